import errno
import json
import struct
from collections import namedtuple
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toys import toy_model, toy_params

from radiance import config
from radiance.weights import checkpoint, detect, files, native
from radiance.weights.files import CheckpointError

VARIANTS = {
    "velocity": dict(),
    "x0": dict(prediction="x0"),
    "x0_patch32": dict(prediction="x0", patch_embed="conv_half"),
    "sequential": dict(text_ids="sequential", masking="strict"),
    "registers": dict(registers=2),
    "nerf_linear": dict(head="nerf_linear"),
    "linear_patches": dict(head="linear"),
    "latent": dict(head="linear", patch=1, channels=8),
    "flux": dict(head="linear", patch=1, channels=8, modulation="per_block", pooled_dim=5, guidance_embed=True, masking="off"),
    "per_block_nerf": dict(modulation="per_block", rope_theta=100.0),
    "shared": dict(modulation="shared", pooled_dim=5, guidance_embed=True),
    "shared_linear": dict(modulation="shared", head="linear", registers=1),
    "none": dict(modulation="none"),
    "none_linear": dict(modulation="none", head="linear"),
    "no_doubles": dict(double_blocks=0),
    "no_singles": dict(single_blocks=0, mlp_ratio=2.5),
}
MODEL = toy_model()


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.write(path, MODEL, toy_params(MODEL))
    return path


def sentence(error):
    """The message, which must be one line that ends."""
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?"))
    return text


# --- there and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_written_and_read_is_the_same(variant, tmp_path):
    model = toy_model(**VARIANTS[variant])
    params, path = toy_params(model), tmp_path / "new" / "model.safetensors"
    checkpoint.write(path, model, params)
    for asked in (None, model):
        found, again = checkpoint.read(path, asked)
        assert found == model
        assert_same(again, params)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    stored = load_file(path)
    assert {k: v.shape for k, v in stored.items()} == native.layout(model)[0]
    assert sum(v.size for v in stored.values()) == sum(x.size for x in jax.tree.leaves(params))
    markers = [name for name in ("__x0__", "__32x32__", "__sequential__") if name in stored]
    expected = {"x0": ["__x0__"], "x0_patch32": ["__x0__", "__32x32__"], "sequential": ["__sequential__"]}
    assert markers == expected.get(variant, [])
    assert all(stored[m].shape == (0,) and stored[m].dtype == np.float32 for m in markers)


@pytest.mark.parametrize("modulation", ["shared", "none"])
@pytest.mark.parametrize("absent", ["double_blocks", "single_blocks"])
def test_learned_vectors_of_absent_blocks(modulation, absent, tmp_path):
    model = toy_model(modulation=modulation, **{absent: 0})
    checkpoint.write(tmp_path / "x.safetensors", model, toy_params(model))
    assert_same(checkpoint.read(tmp_path / "x.safetensors")[1], toy_params(model))


def test_tensors_lie_as_published(written):
    stored, p = load_file(written), jax.tree.map(np.asarray, toy_params(MODEL))
    d, image, single = MODEL.hidden, p["double"]["image"], p["single"]
    same = np.testing.assert_array_equal
    # [3·h·k, d], (3, h, k) from slow to fast
    qkv = stored["double_blocks.1.img_attn.qkv.weight"].reshape(3, MODEL.heads, MODEL.head_dim, d)
    same(qkv[2, 1, 5], image["attention"]["qkv"]["kernel"][1, :, 2, 1, 5])
    # [d, h·k]
    proj = stored["double_blocks.0.txt_attn.proj.weight"]
    same(proj[7, 3 + MODEL.head_dim], p["double"]["text"]["attention"]["proj"]["kernel"][0, 1, 3, 7])
    same(stored["double_blocks.0.img_mlp.2.weight"], image["mlp"]["linear_out"]["kernel"][0].T)
    # linear1 is qkv, then the MLP; linear2 reads attention, then the MLP
    linear1, linear2 = stored["single_blocks.2.linear1.weight"], stored["single_blocks.2.linear2.weight"]
    same(linear1[: 3 * d], single["attention"]["qkv"]["kernel"][2].reshape(d, -1).T)
    same(linear1[3 * d :], single["mlp"]["linear_in"]["kernel"][2].T)
    same(linear2[:, :d], single["attention"]["proj"]["kernel"][2].reshape(-1, d).T)
    same(linear2[:, d:], single["mlp"]["linear_out"]["kernel"][2].T)
    same(stored["single_blocks.2.linear1.bias"][3 * d :], single["mlp"]["linear_in"]["bias"][2])
    # convolutions: [out, in, row, column]
    patch = p["patch_embed"]["kernel"].reshape(4, 4, 3, d)
    same(stored["img_in_patch.weight"][9, 2, 1, 3], patch[1, 3, 2, 9])
    same(stored["nerf_final_layer_conv.conv.weight"][2, 5, 0, 1], p["head"]["conv"]["kernel"][0, 1, 5, 2])
    same(stored["distilled_guidance_layer.norms.1.scale"], p["modulation"]["layers"]["norm"]["scale"][1])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("variant", ["x0_patch32", "flux"])
def test_a_half_precision_file_comes_back_byte_for_byte(variant, dtype, tmp_path):
    """The first file is made without our writer, from random tensors of the published names and types."""
    model, draw = toy_model(**VARIANTS[variant]), np.random.default_rng(0)
    kept = ("nerf_image_embedder.", "__")  # float32 in the published files
    tensors = {
        name: draw.standard_normal(shape, np.float32).astype(np.float32 if name.startswith(kept) else dtype)
        for name, shape in native.layout(model)[0].items()
    }
    save_file(tensors, tmp_path / "theirs.safetensors")
    _, params = checkpoint.read(tmp_path / "theirs.safetensors", model)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    checkpoint.write(tmp_path / "ours.safetensors", model, params, np.dtype(dtype).name)
    ours = load_file(tmp_path / "ours.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {k: (v.dtype, v.shape) for k, v in tensors.items()}
    assert all(ours[k].tobytes() == tensors[k].tobytes() for k in tensors)


def test_metadata_and_order(tmp_path):
    model, path = toy_model(prediction="x0"), tmp_path / "x.safetensors"
    checkpoint.write(path, model, toy_params(model), metadata={"step": "7"})
    header = header_of(path)
    assert header["__metadata__"]["step"] == "7"
    assert [k for k in header if k != "__metadata__"] == list(native.layout(model)[0])
    assert next(k for k in header if k != "__metadata__") == "__x0__"


def header_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def test_read_to_shardings(written):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = toy_params(MODEL)
    _, again = checkpoint.read(written, shardings=jax.tree.map(lambda _: sharding, params))
    assert_same(again, params)
    assert all(x.sharding == sharding for x in jax.tree.leaves(again))


# --- other tools' files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefixes_and_norm_weights(prefix, written, tmp_path):
    renamed = {}
    for name, tensor in load_file(written).items():
        *_, parent, last = name.split(".")
        norm = last == "scale" and ("norm" in parent or ".norms." in name)
        renamed[prefix + (name.removesuffix("scale") + "weight" if norm else name)] = tensor
    assert sum(k.endswith(".scale") for k in renamed) == 0
    if prefix:
        renamed["vae.decoder.weight"] = np.zeros(3, np.float32)  # a checkpoint of everything holds other networks too
    save_file(renamed, tmp_path / "renamed.safetensors")
    _, params = checkpoint.read(tmp_path / "renamed.safetensors", MODEL)
    assert_same(params, toy_params(MODEL))


def test_one_error_names_every_misfit(written, tmp_path):
    tensors = load_file(written)
    gone = ["txt_in.bias", "single_blocks.2.linear2.weight"]
    for name in gone:
        del tensors[name]
    tensors["double_blocks.9.extra"] = tensors["strange"] = np.zeros(2, np.float32)
    tensors["img_in_patch.bias"] = np.zeros(7, np.float32)
    tensors["nerf_blocks.1.norm.scale"] = np.zeros((8, 1), np.float32)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(tmp_path / "bad.safetensors", MODEL)
    text = sentence(error)
    missing, extra, wrong = (text.index(word) for word in ("missing", "not expected", "of another shape"))
    assert all(missing < text.index(name) < extra for name in gone)
    assert all(extra < text.index(name) < wrong for name in ("double_blocks.9.extra", "strange"))
    assert "img_in_patch.bias is [7], not [48]" in text[wrong:] and "nerf_blocks.1.norm.scale is [8, 1], not [8]" in text[wrong:]
    assert "txt_in.weight" not in text  # what fits is not named


def plain(path):
    """Takes our metadata off: a file as other tools write it."""
    save_file(load_file(path), path)


def test_markers_contradict_what_is_asked_for(tmp_path):
    for changes, marker in ((dict(prediction="x0"), "__x0__"), (dict(text_ids="sequential"), "__sequential__")):
        model, path = toy_model(**changes), tmp_path / "marked.safetensors"
        checkpoint.write(path, model, toy_params(model))
        plain(path)
        with pytest.raises(CheckpointError, match=marker) as error:
            checkpoint.read(path, MODEL)
        sentence(error)
        checkpoint.write(path, MODEL, toy_params(MODEL))
        plain(path)
        assert_same(checkpoint.read(path, model)[1], toy_params(MODEL))  # files without markers are about, so a user may say it


def test_a_patch32_file_is_not_read_as_patch16(tmp_path):
    model = toy_model(patch=8, patch_embed="conv_half")
    checkpoint.write(tmp_path / "x.safetensors", model, toy_params(model))
    plain(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="__32x32__"):
        checkpoint.read(tmp_path / "x.safetensors", MODEL)


# --- files that are none ------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(written, tmp_path):
    whole = written.read_bytes()
    start = struct.unpack("<Q", whole[:8])[0]
    cases = {
        "end cut off": (whole[:-100], "not a whole safetensors"),
        "header cut off": (whole[: start // 2], "not a whole safetensors"),
        "bytes too many": (whole + b"\0" * 8, "not a whole safetensors"),
        "header is no JSON": (whole[:8] + b"}" * start + whole[8 + start :], "not a whole safetensors"),
        "text": (b"<!DOCTYPE html><html>404 not found</html>\n" * 20, "not a whole safetensors"),
        "zip pickle": (b"PK\x03\x04" + bytes(100), "pickle"),
        "old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100), "pickle"),
        "empty gguf": (b"GGUF\x03\0\0\0" + bytes(100), "not a Chroma"),
        "empty": (b"", "not a whole safetensors"),
        "short": (b"\x01\x02", "not a whole safetensors"),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / "broken.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=expected) as error:
            checkpoint.read(path, MODEL)
        assert str(path) in sentence(error), name
    (tmp_path / "empty").mkdir()
    for name, expected in {"absent.safetensors": "There is no file", "empty": "holds no safetensors", ".": "name one of them"}.items():
        path = tmp_path / name
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.read(path, MODEL)


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    path = tmp_path / "x.safetensors"
    for room in range(256):
        save_file({"a": np.zeros(1, np.float32)}, path, metadata={"note": " " * room})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert files.open_tensors(path).shapes == {"a": (1,)}


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "unet.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(CheckpointError, match="Stable Diffusion") as error:
        checkpoint.read(path)
    sentence(error)
    save_file({"txt_in.weight": np.zeros((3, 2), np.float32), "double_blocks.0.x.y": np.zeros(3, np.float32)}, path)
    with pytest.raises(CheckpointError, match="double_blocks|single_blocks") as error:
        checkpoint.read(path)
    sentence(error)


FOREIGN = {
    "a name without dots": lambda tensors: ({"weight": np.zeros(3, np.float32)}, None),  # IndexError in canonical_names
    "flat quantised weights": lambda tensors: ({k: v.reshape(-1) for k, v in tensors.items()}, None),  # ValueError in _detect
    "float8": lambda tensors: (tensors | {"txt_in.bias": tensors["txt_in.bias"].astype(ml_dtypes.float8_e4m3fn)}, OURS),
    "settings of another version": lambda tensors: (tensors, {detect.METADATA_KEY: '{"hiden": 3}'}),
}
OURS = {detect.METADATA_KEY: json.dumps(config.to_dict(MODEL))}


@pytest.mark.parametrize("case", FOREIGN)
def test_more_files_that_deserve_a_sentence(case, written, tmp_path):
    tensors, metadata = FOREIGN[case](load_file(written))
    save_file(tensors, tmp_path / "foreign.safetensors", metadata)
    try:
        checkpoint.read(tmp_path / "foreign.safetensors")
    except CheckpointError:
        return
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")
    assert case == "float8"  # which could be read as well


def test_a_file_that_says_which_model_it_holds_is_believed(tmp_path):
    model = toy_model(masking="strict", rope_theta=5.0)
    checkpoint.write(tmp_path / "x.safetensors", model, toy_params(model))
    with pytest.raises(CheckpointError, match="another model .*rope_theta is 5.0 there, 10000.0 here"):
        checkpoint.read(tmp_path / "x.safetensors", toy_model(masking="strict"))


def test_a_marker_beside_prefixed_names_is_seen(tmp_path):
    model, path = toy_model(prediction="x0"), tmp_path / "x.safetensors"
    checkpoint.write(path, model, toy_params(model))
    save_file({k if k.startswith("__") else f"model.diffusion_model.{k}": v for k, v in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="__x0__"):
        checkpoint.read(path, MODEL)


@pytest.mark.filterwarnings("ignore:overflow")
def test_values_too_large_for_float16_are_not_written(tmp_path):
    params = toy_params(MODEL)
    params = params | dict(text_embed=params["text_embed"] | dict(bias=params["text_embed"]["bias"].at[0].set(1e6)))
    with pytest.raises(CheckpointError):
        checkpoint.write(tmp_path / "x.safetensors", MODEL, params, "float16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value, written, tmp_path):
    tensors = load_file(written)
    tensors["single_blocks.1.linear2.weight"][3, 60] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"single_blocks\.\d\.linear2\.weight.* not finite") as error:
        checkpoint.read(tmp_path / "bad.safetensors", MODEL)
    sentence(error)


# --- failed writes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyError("leaf"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("old", [True, False])
def test_a_failed_write_leaves_nothing(failure, old, tmp_path):
    path = tmp_path / "model.safetensors"
    if old:
        path.write_bytes(b"old")

    def tensor(name):
        if name == "b":
            raise failure
        return np.ones(1000)

    f32 = np.dtype(np.float32)
    with pytest.raises(CheckpointError if isinstance(failure, OSError) else type(failure)) as error:
        files.write_safetensors(path, {"a": (1000,), "b": (1000,)}, {"a": f32, "b": f32}, tensor, {})
    if isinstance(failure, OSError):
        assert "No space left on device" in sentence(error)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"] * old


def disk_with(free):
    return lambda directory: namedtuple("Usage", "total used free")(10**12, 0, free)


def test_a_full_disk_is_seen_before_writing(written, monkeypatch):
    before = written.read_bytes()
    monkeypatch.setattr(files.shutil, "disk_usage", disk_with(len(before) - 1))
    with pytest.raises(CheckpointError, match="free.*needed") as error:
        checkpoint.write(written, MODEL, toy_params(MODEL, 1))
    sentence(error)
    assert written.read_bytes() == before
    monkeypatch.setattr(files.shutil, "disk_usage", disk_with(len(before)))
    checkpoint.write(written, MODEL, toy_params(MODEL, 1))
    assert written.read_bytes() != before
    assert list(written.parent.iterdir()) == [written]


def test_a_replaced_file_that_cannot_take_its_name(written, monkeypatch):
    before = written.read_bytes()

    def fail(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(CheckpointError, match="Permission denied"):
        checkpoint.write(written, MODEL, toy_params(MODEL, 1))
    assert written.read_bytes() == before and list(written.parent.iterdir()) == [written]


def test_a_full_disk_leaves_no_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", disk_with(1))
    with pytest.raises(CheckpointError):
        checkpoint.write(tmp_path / "a" / "b.safetensors", MODEL, toy_params(MODEL))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError):
        checkpoint.write(tmp_path / "file" / "b.safetensors", MODEL, toy_params(MODEL))


def test_parameters_of_another_model_are_not_written(tmp_path):
    with pytest.raises((KeyError, ValueError)):
        checkpoint.write(tmp_path / "x.safetensors", MODEL, toy_params(toy_model(hidden=96, heads=4)))
    assert list(tmp_path.iterdir()) == []


# --- which model a file holds -------------------------------------------------------------------------------------------

WIDE = dict(
    channels=3, hidden=256, heads=2, double_blocks=2, single_blocks=3, text_dim=96, approximator_hidden=40, approximator_depth=2,
    nerf_hidden=8, nerf_mlp_ratio=2, nerf_depth=2, nerf_freqs=3,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(prediction="x0"),
        dict(prediction="x0", patch=32, patch_embed="conv_half"),
        dict(patch=32),
        dict(text_ids="sequential", registers=3),
        dict(head="nerf_linear", nerf_mlp_ratio=3, nerf_freqs=8),
        dict(head="linear", patch=8),
        dict(head="linear", patch=1, channels=64, approximator_depth=5, approximator_dim=32),
        dict(head="linear", patch=1, channels=64, modulation="per_block", masking="off", pooled_dim=768, guidance_embed=True),
        dict(head="linear", patch=1, channels=64, modulation="per_block", masking="off", pooled_dim=768),
        dict(double_blocks=0, mlp_ratio=3.0),
        dict(single_blocks=0, mlp_ratio=8 / 3, hidden=768, heads=6),
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_detection_from_shapes(changes):
    model = config.Model(**(WIDE | changes))
    if model.modulation == "per_block":  # fields that no file of that kind speaks of are the defaults
        model = replace(model, approximator_hidden=5120, approximator_depth=5)
    if model.head == "linear":
        model = replace(model, nerf_hidden=64, nerf_mlp_ratio=4, nerf_depth=4, nerf_freqs=8)
    assert detect.detect(native.layout(model)[0]) == model


def test_detection_needs_what_shapes_cannot_tell():
    shapes = native.layout(MODEL)[0]
    with pytest.raises(CheckpointError, match="Heads of 24 channels") as error:
        detect.detect(shapes)
    sentence(error)
    assert detect.detect(shapes, rope_axes=MODEL.rope_axes) == replace(MODEL, approximator_depth=5)
    metadata = {detect.METADATA_KEY: json.dumps(config.to_dict(MODEL))}
    assert detect.detect(shapes, metadata, rope_theta=5.0) == replace(MODEL, rope_theta=5.0)
