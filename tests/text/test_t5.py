"""The T5 encoder against NumPy and transformers, and its weights from all kinds of files."""

import io
import json
import math
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from radiance.base.errors import CheckpointError, ConfigError
from radiance.text import t5
from radiance.text.t5 import T5, position_buckets
from radiance.text.t5_weights import T5_RULES, T5Weights
from tests.helpers.toy_runs import output_of
from tests.helpers.toy_t5 import TOY, torch_tensors

LENGTHS = np.array([1, 4, 17, 40], np.int32)
GGUF = {row.torch_name: row.gguf_name for row in T5_RULES}


def token_ids(lengths=LENGTHS, width=40, vocabulary=TOY.vocabulary):
    ids = np.random.default_rng(5).integers(3, vocabulary, (len(lengths), width), np.int32)
    for row, length in zip(ids, lengths):
        row[length - 1], row[length:] = 1, 0
    return ids


def apply(params, ids, lengths, sizes=TOY, dtype="float32"):
    run = jax.jit(lambda p, i, n: t5.bind_t5(sizes, dtype, p)(i, n))
    return np.asarray(run(params, ids, lengths))


def saved(folder, tensors, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("t5"), torch_tensors())


@pytest.fixture(scope="module")
def params(file):
    return T5Weights(file).load_params("float32")


def relative(result, expected):
    return np.abs(result - expected).max() / np.abs(expected).max()


def sentence(error):
    """Return the message, which must be one line that ends with a period."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- the network -----------------------------------------------------------------------------


def bucket_by_definition(distance):
    """Apply Raffel et al.'s rule: 32 buckets, the upper 16 for later keys."""
    first, n = (16 if distance > 0 else 0), abs(distance)
    if n < 8:
        return first + n
    return first + min(
        8 + math.floor(round(math.log2(n / 8) * 2, 9)), 15
    )  # 8 more buckets up to 128 = 8 · 2⁴


def test_position_buckets_follow_their_definition():
    table = position_buckets(300, 32)
    expected = [
        [bucket_by_definition(key - query) for key in range(300)] for query in (0, 150, 299)
    ]
    np.testing.assert_array_equal(table[[0, 150, 299]], expected)
    assert table[0, [0, 1, 7, 8, 11, 12, 15, 16, 63, 64, 90, 91, 299]].tolist() == [
        0,
        17,
        23,
        24,
        24,
        25,
        25,
        26,
        29,
        30,
        30,
        31,
        31,
    ]
    assert table[16, 0] == 10
    assert (table < 32).all()


def reference(tensors, ids, sizes=TOY):
    """Encode one text without padding, in float64, from PyTorch's tensors."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * tensors[name]

    def heads(x, name):
        return (x @ tensors[name].T.astype(np.float64)).reshape(len(x), sizes.heads, sizes.head_dim)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    table = [[bucket_by_definition(k - q) for k in range(len(ids))] for q in range(len(ids))]
    bias = tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][
        np.array(table)
    ]
    x = tensors["shared.weight"][ids].astype(np.float64)
    for i in range(sizes.layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        y = norm(x, f"{attention}.layer_norm.weight")
        q, k, v = (heads(y, f"{attention}.SelfAttention.{name}.weight") for name in "qkv")
        logits = np.einsum("qhc,khc->qkh", q, k) + bias
        weights = np.exp(logits - logits.max(1, keepdims=True))
        attended = np.einsum("qkh,khc->qhc", weights / weights.sum(1, keepdims=True), v).reshape(
            len(ids), -1
        )
        x = x + attended @ tensors[f"{attention}.SelfAttention.o.weight"].T
        y = norm(x, f"{mlp}.layer_norm.weight")
        gate, value = (
            y @ tensors[f"{mlp}.DenseReluDense.{name}.weight"].T for name in ("wi_0", "wi_1")
        )
        x = x + (gelu(gate) * value) @ tensors[f"{mlp}.DenseReluDense.wo.weight"].T
    return norm(x, "encoder.final_layer_norm.weight")


def test_a_batch_equals_the_reference(params):
    """The texts have different lengths."""
    ids = token_ids()
    result = apply(params, ids, LENGTHS)
    for row, text, length in zip(result, ids, LENGTHS):
        assert relative(row[:length], reference(torch_tensors(), text[:length])) < 1e-5


def test_padding_depends_on_real_tokens_and_position(params):
    """It does not depend on the number or the ids of other padding tokens."""
    ids = token_ids()
    result = apply(params, ids, LENGTHS)
    assert np.isfinite(result).all()
    longer = np.pad(ids, [(0, 0), (0, 24)])
    np.testing.assert_allclose(apply(params, longer, LENGTHS)[:, :40], result, atol=2e-5)
    other = np.where(
        np.arange(40) > LENGTHS[:, None], 7, ids
    )  # the first padding token does not change
    changed = apply(params, other, LENGTHS)
    first = np.arange(40) <= LENGTHS[:, None]
    np.testing.assert_array_equal(changed[first], result[first])
    assert np.abs(changed - result)[~first].max() > 0.1
    # It depends on the real tokens.
    assert np.abs(result[0, 1] - result[1, 4]).max() > 0.1


def test_bfloat16_is_close(file):
    weights, ids = T5Weights(file), token_ids()
    exact = apply(weights.load_params("float32"), ids, LENGTHS)
    result = apply(weights.load_params("bfloat16"), ids, LENGTHS, dtype="bfloat16")
    assert result.dtype == np.float32  # at the output
    error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
    print(f"relative error of bfloat16: {error:.1e}")
    assert 1e-4 < error < 0.012


def test_the_residual_stream_is_not_rounded(file):
    """With embeddings 30 times as large as the updates, updates are still exact to a percent."""
    weights, ids = T5Weights(file), token_ids()
    table = 30 * np.asarray(weights.load_params("bfloat16")["embedding"]).astype(np.float32)
    params = {
        dtype: weights.load_params(dtype) | {"embedding": table}
        for dtype in ("float32", "bfloat16")
    }
    exact, result = (apply(params[dtype], ids, LENGTHS, dtype=dtype) for dtype in params)
    x = table[ids]
    without = (
        x / np.sqrt((x**2).mean(-1, keepdims=True)) * np.asarray(params["float32"]["norm"]["scale"])
    )
    assert np.linalg.norm(result - exact) / np.linalg.norm(exact - without) < 0.02


def test_outputs_are_rounded_at_the_end(file):
    weights, ids = T5Weights(file), token_ids()
    params = weights.load_params("bfloat16")
    result = np.asarray(t5.encode_ids(TOY, "bfloat16", params, ids, LENGTHS))
    assert result.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(
        result.astype(np.float32),
        apply(params, ids, LENGTHS, dtype="bfloat16"),
        rtol=0.02,
        atol=0.02,
    )


@pytest.mark.reference
@pytest.mark.parametrize("seed", [0, 1])
def test_the_network_equals_transformers(tmp_path, seed):
    """Compare rows of tokens and of padding, with weights from the file of T5EncoderModel."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=TOY.vocabulary, d_model=TOY.hidden, d_kv=TOY.head_dim,
            d_ff=TOY.mlp_hidden, num_layers=TOY.layers,
            num_heads=TOY.heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    ).eval()  # fmt: skip
    state = {name: torch.from_numpy(x) for name, x in torch_tensors(seed=seed, spread=1.5).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"}
    assert not unexpected
    theirs.save_pretrained(tmp_path)
    lengths = np.array([1, 7, 130, 150], np.int32)
    ids = token_ids(lengths, 150)
    with torch.no_grad():
        mask = torch.from_numpy(np.arange(150) < lengths[:, None]).long()
        expected = theirs(
            input_ids=torch.from_numpy(ids).long(), attention_mask=mask
        ).last_hidden_state.numpy()
    weights = T5Weights(tmp_path)
    assert weights.sizes == TOY
    error = relative(apply(weights.load_params("float32"), ids, lengths), expected)
    print(f"largest relative difference from transformers: {error:.1e}")
    assert error < 2e-5


# --- files --------------------------------------------------------------------------


def test_shapes_of_the_parameters(file, params):
    """Kernels are [in, *out] with blocks on axis 0, and attention has an axis of heads."""
    tensors, q = torch_tensors(), params["blocks"]["attention"]["q"]["kernel"]
    assert T5Weights(file).sizes == TOY
    assert q.shape == (3, 32, 4, 6)
    stored = tensors["encoder.block.2.layer.0.SelfAttention.q.weight"]
    assert q[2, 30, 3, 5] == stored[3 * 6 + 5, 30]
    proj = params["blocks"]["attention"]["proj"]["kernel"]
    assert proj.shape == (3, 4, 6, 32)
    assert (
        proj[1, 2, 4, 9] == tensors["encoder.block.1.layer.0.SelfAttention.o.weight"][9, 2 * 6 + 4]
    )
    np.testing.assert_array_equal(
        params["blocks"]["mlp"]["gate"]["kernel"][0],
        tensors["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].T,
    )
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in tensors.values())
    half = T5Weights(file).load_params("bfloat16")
    kinds = {
        x.dtype.name for x in (half["embedding"], *jax.tree.leaves(half["blocks"]["mlp"]["gate"]))
    }
    assert kinds == {"bfloat16"}
    assert half["position_bias"].dtype == half["blocks"]["mlp"]["norm"]["scale"].dtype == np.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), half) == jax.tree.map(
        lambda x: (x.shape, x.dtype), t5.make_abstract_t5(TOY, "bfloat16")
    )


def write_gguf(path, tensors):
    """Write llama.cpp's names, with large tensors as float16."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_string("general.name", "toy")
    for name, x in tensors.items():
        digits = [part for part in name.split(".") if part.isdigit()]
        pattern = name if name in GGUF else name.replace(f"block.{digits[0]}.", "block.{i}.")
        writer.add_tensor(
            GGUF[pattern].format(i=digits[0] if digits else ""),
            x.astype(np.float16) if x.size > 1000 else x,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_files_give_the_same_parameters(tmp_path):
    tensors = {name: x.astype(np.float16).astype(np.float32) for name, x in torch_tensors().items()}
    ours = T5Weights(saved(tmp_path, tensors))
    theirs = T5Weights(write_gguf(tmp_path / "t5.gguf", tensors))
    assert theirs.sizes == ours.sizes == TOY
    assert_same(theirs.load_params("float32"), ours.load_params("float32"))


def test_fp8_files_with_scales(tmp_path):
    """ComfyUI's files of T5 have a scale for each weight, and a marker."""
    tensors, expected = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, {}
    for name, x in torch_tensors().items():
        expected[name] = tensors[name] = x
        if "SelfAttention." in name and "bias" not in name:
            scale = np.float32(np.abs(x).max() / 448)
            tensors |= {
                name: (x / scale).astype(ml_dtypes.float8_e4m3fn),
                name.replace(".weight", ".scale_weight"): scale.reshape(1),
            }
            expected[name] = tensors[name].astype(np.float32) * scale
    result = T5Weights(saved(tmp_path, tensors)).load_params("float32")
    assert_same(
        result, T5Weights(saved(tmp_path, expected, "plain.safetensors")).load_params("float32")
    )


@pytest.mark.parametrize(
    "prefix", ["text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "text_encoder."]
)
def test_prefixes_of_names(tmp_path, params, prefix):
    """In files of a complete pipeline other tensors are ignored."""
    tensors = {prefix + name: x for name, x in torch_tensors().items()}
    tensors |= {
        "model.diffusion_model.img_in.weight": np.ones(3, np.float32),
        "text_encoders.t5xxl.logit_scale": np.ones(1, np.float32),
    }
    assert_same(T5Weights(saved(tmp_path, tensors)).load_params("float32"), params)


@pytest.mark.parametrize(
    "names",
    [
        ["encoder.embed_tokens.weight"],
        ["shared.weight", "encoder.embed_tokens.weight"],
        ["decoder.embed_tokens.weight"],
    ],
)
def test_names_of_the_embedding(tmp_path, params, names):
    tensors = torch_tensors()
    embedding = tensors.pop("shared.weight")
    tensors |= {name: embedding.copy() for name in names}
    assert_same(T5Weights(saved(tmp_path, tensors)).load_params("float32"), params)


def test_the_decoder_is_ignored(tmp_path, params):
    extra = (
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.final_layer_norm.weight",
        "lm_head.weight",
    )
    tensors = torch_tensors() | {name: np.ones((2, 2), np.float32) for name in extra}
    assert_same(T5Weights(saved(tmp_path, tensors)).load_params("float32"), params)


@pytest.mark.parametrize("prefix", ["", "t5xxl.transformer.", "_orig_mod.module."])
def test_extras_that_are_no_weights_are_ignored(tmp_path, params, prefix):
    """Files of ComfyUI contain the tokenizer, and those of CLIP's tools a scale."""
    extras = {
        "spiece_model": np.arange(40, dtype=np.uint8),
        "logit_scale": np.ones((), np.float32),
        "text_projection.weight": np.ones((4, 4), np.float32),
        "position_ids": np.arange(8)[None],
    }
    tensors = {prefix + name: x for name, x in (torch_tensors() | extras).items()}
    weights = T5Weights(saved(tmp_path, tensors))
    assert_same(weights.load_params("float32"), params)
    assert weights.read_sentencepiece() == bytes(range(40))


def test_wrapped_modules_are_unwrapped(tmp_path, params):
    tensors = {
        name.replace(".layer.", "._orig_mod.layer.", 1): x for name, x in torch_tensors().items()
    }
    assert_same(T5Weights(saved(tmp_path, tensors)).load_params("float32"), params)


def test_weights_in_several_files(tmp_path, params, file):
    tensors = torch_tensors()
    parts = {"model-1.safetensors": list(tensors)[::2], "model-2.safetensors": list(tensors)[1::2]}
    for name, keys in parts.items():
        saved(tmp_path, {key: tensors[key] for key in keys}, name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    result = T5Weights(tmp_path)
    assert_same(result.load_params("float32"), params)
    assert result.fingerprint() == T5Weights(file).fingerprint()


def test_parameters_have_the_given_shardings(file, params):
    requested = []

    def shardings(tree):
        requested.append(tree)
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), tree)

    assert_same(T5Weights(file).load_params("float32", shardings), params)
    assert jax.tree.structure(requested[0]) == jax.tree.structure(params)


@pytest.mark.slow
def test_sharded_weights_give_the_same_rows(file, params):
    """Four devices hold parts of the matrices."""
    script = f"""
import sys, jax, numpy as np
from functools import partial
from radiance import config
from radiance.distributed.sharding import make_mesh, make_shardings
from radiance.text import t5
from radiance.text.t5_weights import T5Weights

mesh = make_mesh(config.Mesh(data=1, fsdp=2, tensor=2))
params = T5Weights({str(file)!r}).load_params("float32", partial(make_shardings, mesh=mesh))
for path in ("attention/q", "attention/proj", "mlp/gate", "mlp/linear_out"):
    leaf = params["blocks"]
    for part in (*path.split("/"), "kernel"):
        leaf = leaf[part]
    assert 4 * leaf.addressable_shards[0].data.size == leaf.size, path
ids, lengths = (np.array(x, np.int32) for x in {(token_ids().tolist(), LENGTHS.tolist())!r})
sizes = t5.T5(**{vars(TOY)!r})
np.save(sys.stdout.buffer, np.asarray(t5.encode_ids(sizes, "float32", params, ids, lengths)))
"""
    result = np.load(io.BytesIO(output_of(script, devices=4)))
    np.testing.assert_allclose(result, apply(params, token_ids(), LENGTHS), rtol=0, atol=2e-5)


def test_the_fingerprint_depends_on_every_weight(tmp_path, file):
    expected, tensors = T5Weights(file).fingerprint(), torch_tensors()
    seen = {expected}
    for name in (
        "shared.weight",
        "encoder.block.2.layer.1.DenseReluDense.wo.weight",
        "encoder.final_layer_norm.weight",
    ):
        changed = tensors | {name: tensors[name].copy()}
        changed[name].reshape(-1)[17] += 1e-3
        seen.add(T5Weights(saved(tmp_path, changed)).fingerprint())
    seen.add(
        T5Weights(
            saved(tmp_path, {name: x.astype(np.float16) for name, x in tensors.items()})
        ).fingerprint()
    )
    assert len(seen) == 5
    prefixed = saved(
        tmp_path, {f"t5xxl.transformer.{name}": x for name, x in reversed(tensors.items())}
    )
    assert T5Weights(prefixed).fingerprint() == expected


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the peak of memory is read from Linux' /proc"
)
def test_loading_needs_no_second_copy(tmp_path):
    """In bfloat16 memory is that of half the float32 file, and of the largest leaf."""
    sizes = T5(vocabulary=1000, hidden=512, layers=12, heads=8, head_dim=64, mlp_hidden=1024)
    path = saved(tmp_path, torch_tensors(sizes))
    script = f"""
import jax
from radiance.text.t5_weights import T5Weights

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

jax.block_until_ready(jax.numpy.ones(3) + 1)
weights = T5Weights({str(path)!r})
before = peak()
params = jax.block_until_ready(weights.load_params("bfloat16"))
print(peak() - before)
"""
    held = int(output_of(script)) * 1024 / path.stat().st_size
    assert held < 0.85  # 0.5 for the parameters, 0.1 for the largest leaf


# --- errors ------------------------------------------------------------------------------


def renamed(tensors, old, new):
    return {name.replace(old, new): x for name, x in tensors.items()}


def without(tensors, *names):
    return {name: x for name, x in tensors.items() if name not in names}


ATTENTION_0, ATTENTION_1 = (f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2))
BIAS_0, BIAS_1 = (f"{name}.relative_attention_bias.weight" for name in (ATTENTION_0, ATTENTION_1))
NORM_1 = "encoder.block.1.layer.1.layer_norm.weight"


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: without(renamed(t, "wi_0", "wi"), *(n for n in t if "wi_1" in n)),
            ["T5 v1.0", "T5 v1.1"],
        ),
        (lambda t: {"img_in.weight": ones(2, 2)}, ["no T5 encoder", "T5 v1.1"]),
        (lambda t: t | {f"a.{n}": x for n, x in t.items()}, ["more than one model"]),
        (
            lambda t: without(t, NORM_1, "encoder.final_layer_norm.weight"),
            ["missing", "block.1.layer.1.layer_norm", "final_layer_norm"],
        ),
        (lambda t: without(t, "shared.weight"), ["shared.weight", "download it again"]),
        (lambda t: without(t, BIAS_0), ["relative_attention_bias", "download it again"]),
        (lambda t: t | {BIAS_1: ones(32, 4)}, ["not expected", BIAS_1.removesuffix(".weight")]),
        (
            lambda t: t | {f"{ATTENTION_1}.k.weight": ones(24, 31)},
            ["k.weight is [24, 31], not [24, 32]"],
        ),
        (lambda t: t | {"shared.weight": ones(5)}, ["other shapes"]),
        (lambda t: t | {BIAS_0: ones(7, 4)}, ["other shapes"]),
        (lambda t: t | {BIAS_0: ones(32, 0)}, ["other shapes"]),
    ],
)
def test_wrong_files_are_an_error_when_opened(tmp_path, change, message):
    path = saved(tmp_path, change(torch_tensors()))
    with pytest.raises(CheckpointError) as error:
        T5Weights(path)
    assert all(part in sentence(error) for part in [str(path), *message])


def test_gguf_of_t5_1_0_is_an_error(tmp_path):
    tensors = {name: x for name, x in torch_tensors().items() if "wi_0" not in name}
    with pytest.raises(CheckpointError) as error:
        T5Weights(write_gguf(tmp_path / "t5.gguf", tensors))
    assert "T5 v1.0" in sentence(error)


def test_values_that_are_not_finite_are_an_error(tmp_path):
    tensors = torch_tensors()
    tensors["encoder.block.1.layer.0.SelfAttention.v.weight"][3, 4] = np.nan
    weights = T5Weights(saved(tmp_path, tensors))
    with pytest.raises(CheckpointError) as error:
        weights.load_params("bfloat16")
    assert "encoder.block.1.layer.0.SelfAttention.v.weight" in sentence(error)
    assert "damaged" in str(error.value)


def test_wrong_sizes_are_an_error():
    assert T5() == T5(32128, 4096, 24, 64, 64, 10240, 32)
    for change in ({"layers": 0}, {"buckets": 30}, {"buckets": 0}):
        with pytest.raises(ConfigError):
            T5(**change)
