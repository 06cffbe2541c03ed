"""LoRA files are read in all naming schemes and written in two; wrong files are errors."""

from collections import Counter

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.weights import checkpoint, lora, lora_reading
from radiance.weights.formats import LORA_NAMINGS
from radiance.weights.lora import LoraPair, LoraWeights
from radiance.weights.lora_adapters import apply_loras
from tests.helpers.toy_loras import (
    BF16,
    LATENT,
    MODEL,
    assert_equal_loras,
    make_checkpoint,
    module_shapes,
    read_message,
    toy_lora,
)
from tests.helpers.toy_models import toy_model, toy_params

# --- naming schemes -------------------------------------------------------------------------------

# keys of the down matrix and the up matrix of a module
NAMINGS = {
    "ai-toolkit, diffusion-pipe": (
        "diffusion_model.{}.lora_A.weight",
        "diffusion_model.{}.lora_B.weight",
    ),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "peft": (
        "base_model.model.{}.lora_A.default.weight",
        "base_model.model.{}.lora_B.default.weight",
    ),
    "peft, with prefix": (
        "base_model.model.diffusion_model.{}.lora_A.weight",
        "base_model.model.diffusion_model.{}.lora_B.weight",
    ),
    "kohya": ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
    "lycoris": ("lycoris_{_}.lora_down.weight", "lycoris_{_}.lora_up.weight"),
    "lodestone flow": ("{}.lora.lora_A", "{}.lora.lora_B"),
    "lodestone RamTorchRun": ("{}.lora_A", "{}.lora_B"),
}


def format_key(key, module):
    return key.replace("{_}", module.replace(".", "_")).replace("{}", module)


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("naming", NAMINGS)
def test_naming_scheme_does_not_matter(naming, alpha, tmp_path):
    modules = [m for m, shape in module_shapes(MODEL).items() if len(shape) == 2]
    expected = toy_lora(modules=modules, scale=None if alpha else 1.0)
    tensors = {}
    for module, (down, up, scale) in expected.pairs.items():
        tensors |= {
            format_key(key, module): matrix for key, matrix in zip(NAMINGS[naming], (down, up))
        }
        if alpha:
            key = NAMINGS[naming][0].partition(".lora")[0] + ".alpha"
            tensors[format_key(key, module)] = np.array(scale * len(down), np.float32).reshape(
                [(), (1,)][len(tensors) % 2]
            )
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_equal_loras(lora_reading.read_lora(tmp_path / "lora.safetensors", MODEL), expected)


D, MLP = LATENT.hidden, LATENT.mlp_hidden
# Module of diffusers → native module and its rows.
DIFFUSERS_MODULES = {
    "transformer_blocks.1.attn.to_q": ("double_blocks.1.img_attn.qkv", 0, D),
    "transformer_blocks.1.attn.to_k": ("double_blocks.1.img_attn.qkv", D, 2 * D),
    "transformer_blocks.1.attn.to_v": ("double_blocks.1.img_attn.qkv", 2 * D, 3 * D),
    "transformer_blocks.0.attn.add_q_proj": ("double_blocks.0.txt_attn.qkv", 0, D),
    "transformer_blocks.0.attn.add_v_proj": ("double_blocks.0.txt_attn.qkv", 2 * D, 3 * D),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", 0, D),
    "transformer_blocks.1.ff_context.net.0.proj": ("double_blocks.1.txt_mlp.0", 0, MLP),
    "single_transformer_blocks.2.attn.to_q": ("single_blocks.2.linear1", 0, D),
    "single_transformer_blocks.2.attn.to_k": ("single_blocks.2.linear1", D, 2 * D),
    "single_transformer_blocks.2.attn.to_v": ("single_blocks.2.linear1", 2 * D, 3 * D),
    "single_transformer_blocks.2.proj_mlp": ("single_blocks.2.linear1", 3 * D, 3 * D + MLP),
    "single_transformer_blocks.0.attn.to_v": ("single_blocks.0.linear1", 2 * D, 3 * D),
    "single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", 0, D),
    "x_embedder": ("img_in", 0, D),
    "proj_out": ("final_layer.linear", 0, 8),
}


@pytest.mark.parametrize(
    ("down_key", "up_key"),
    [
        ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
        ("lora_transformer_{_}.lora_down.weight", "lora_transformer_{_}.lora_up.weight"),
    ],
)
def test_diffusers_parts_become_one_module(down_key, up_key, tmp_path):
    rng, tensors, ranks = np.random.default_rng(0), {}, Counter()
    deltas = {m: np.zeros(shape) for m, shape in module_shapes(LATENT).items()}
    for i, (diffusers_module, (module, a, b)) in enumerate(DIFFUSERS_MODULES.items()):
        rank = 1 + i % 3
        ranks[module] += rank
        down, up = (
            rng.standard_normal((rank, deltas[module].shape[1]), np.float32),
            rng.standard_normal((b - a, rank), np.float32),
        )
        tensors |= {
            format_key(down_key, diffusers_module): down,
            format_key(up_key, diffusers_module): up,
        }
        if i % 2:
            tensors[format_key(down_key.partition(".lora_")[0] + ".alpha", diffusers_module)] = (
                np.float32(0.75 * rank)
            )
        deltas[module][a:b] = (0.75 if i % 2 else 1) * up.astype(float) @ down
    save_file({k: np.asarray(v) for k, v in tensors.items()}, tmp_path / "lora.safetensors")
    merged = lora_reading.read_lora(tmp_path / "lora.safetensors", LATENT)
    assert {m: len(pair.down) for m, pair in merged.pairs.items()} == ranks
    for module, pair in merged.pairs.items():
        np.testing.assert_allclose(pair.compute_delta(), deltas[module], rtol=1e-5, atol=1e-6)


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MODEL, LATENT], ids=["pixels", "latent"])
@pytest.mark.parametrize("naming", ["peft", "kohya"])
def test_written_lora_is_read_back(naming, model, tmp_path):
    path, expected = tmp_path / "new" / "lora.safetensors", toy_lora(model)
    lora.write_lora(path, expected, naming, "float32")
    assert_equal_loras(lora_reading.read_lora(path, model), expected)
    lora.write_lora(path, expected, naming)
    rounded = lora_reading.read_lora(path, model)
    for module, pair in expected.pairs.items():
        np.testing.assert_array_equal(
            rounded.pairs[module].up, pair.up.astype(BF16).astype(np.float32)
        )
        assert rounded.pairs[module].scale == pytest.approx(pair.scale, rel=1e-6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_names_of_diffusers(tmp_path):
    """Fused matrices are split into diffusers' modules, and come back as the same change."""
    modules = [x for x in module_shapes(LATENT) if not x.startswith("distilled")]
    path, expected = tmp_path / "lora.safetensors", toy_lora(LATENT, modules)
    lora.write_lora(path, expected, "diffusers", "float32")
    keys = load_file(path).keys()
    assert all(key.startswith("transformer.") for key in keys)
    for module in ("transformer_blocks.1.attn.add_k_proj", "single_transformer_blocks.2.proj_mlp"):
        assert {f"transformer.{module}.{x}" for x in ("lora_A.weight", "alpha")} <= keys
    read = lora_reading.read_lora(path, LATENT)
    assert read.pairs.keys() == expected.pairs.keys()
    for module, pair in expected.pairs.items():
        np.testing.assert_allclose(
            read.pairs[module].compute_delta(), pair.compute_delta(), rtol=1e-4, atol=1e-6
        )
    # A LoRA with separate ranks for the parts keeps them.
    lora.write_lora(tmp_path / "again.safetensors", read, "diffusers", "float32")
    again = load_file(tmp_path / "again.safetensors")
    assert {k: x.shape for k, x in again.items()} == {
        k: x.shape for k, x in load_file(path).items()
    }
    with pytest.raises(CheckpointError, match="no class for pixel models") as error:
        lora.write_lora(path, toy_lora(), "diffusers")
    read_message(error)


def test_every_naming_scheme_can_be_requested():
    assert tuple(lora.NAMING_SCHEMES) == LORA_NAMINGS


def test_written_names(tmp_path):
    path, model = (
        tmp_path / "lora.safetensors",
        toy_lora(modules=["double_blocks.1.img_mlp.0", "img_in_patch"]).model,
    )
    written = toy_lora(modules=["double_blocks.1.img_mlp.0", "img_in_patch"])
    lora.write_lora(path, written)
    stored = load_file(path)
    assert {k: (v.shape, v.dtype) for k, v in stored.items()} == {
        "diffusion_model.double_blocks.1.img_mlp.0.lora_A.weight": ((1, 48), BF16),
        "diffusion_model.double_blocks.1.img_mlp.0.lora_B.weight": ((192, 1), BF16),
        "diffusion_model.double_blocks.1.img_mlp.0.alpha": ((), np.float32),
        "diffusion_model.img_in_patch.lora_A.weight": ((2, 3, 4, 4), BF16),
        "diffusion_model.img_in_patch.lora_B.weight": ((48, 2, 1, 1), BF16),
        "diffusion_model.img_in_patch.alpha": ((), np.float32),
    }
    assert stored["diffusion_model.img_in_patch.alpha"] == 1.5 * 2
    with safe_open(path, "numpy") as file:
        assert file.metadata()["rank"] == "1, 2"
        assert config.from_json(config.Model, file.metadata()[lora.BASE_MODEL_KEY]) == model
    lora.write_lora(path, written, "kohya", "float16")
    assert {k.partition(".")[0] for k in load_file(path)} == {
        "lora_unet_double_blocks_1_img_mlp_0",
        "lora_unet_img_in_patch",
    }
    assert {k.partition(".")[2] for k in load_file(path)} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    with pytest.raises(CheckpointError, match="choose one of peft, kohya, diffusers") as error:
        lora.write_lora(path, written, "onnx")
    read_message(error)
    with pytest.raises(CheckpointError, match="is a LoRA: give it as --lora"):
        checkpoint.open_checkpoint(path)


# --- wrong files ----------------------------------------------------------------------------------

X = "double_blocks.0.img_attn.proj"
A, B = f"{X}.lora_A.weight", f"{X}.lora_B.weight"
GOOD = {A: np.ones((2, 48), np.float32), B: np.ones((48, 2), np.float32)}
WRONG_FILES = {
    "another kind": (
        GOOD | {f"{X}.oft_blocks": np.ones((2, 2, 2))},
        rf"{X}.oft_blocks belongs to another kind of adapter \(OFT\).*extract the difference",
    ),
    "text encoder alone": (
        {"lora_te1_encoder_q.lora_down.weight": np.ones((2, 4))},
        "holds nothing for this model .1 for text encoders.: choose the model",
    ),
    "another model": (
        {"diffusion_model.double_blocks.7.img_attn.proj.lora_A.weight": np.ones((2, 48))},
        "holds nothing for this model .1 for modules that this model does not have",
    ),
    "a quantized model": (
        GOOD | {"transformer_blocks.0.attn.to_qkv.qweight": np.ones((4, 2))},
        "is quantized",
    ),
    "no up matrix": ({A: GOOD[A]}, rf"{A} without the up matrix"),
    "no down matrix": (
        {B: GOOD[B], f"{X}.alpha": np.ones(())},
        rf"{X}\.\w+.* and {X}\.\w+.* without the down matrix",
    ),
    "alpha alone": (GOOD | {"txt_in.alpha": np.ones(())}, "txt_in.alpha without"),
    "two ranks": (
        GOOD | {B: np.ones((48, 3))},
        r"lora_B.weight has shape \[48, 3\].*rank 2.*\[48, 2\]",
    ),
    "another width": (
        GOOD | {A: np.ones((2, 64))},
        r"lora_A.weight has shape \[2, 64\].*\[2, 48\]",
    ),
    "a convolution": (
        GOOD | {A: np.ones((2, 48, 3, 3))},
        r"lora_A.weight has shape \[2, 48, 3, 3\]",
    ),
    "a convolution up": (
        GOOD | {B: np.ones((48, 2, 3, 3))},
        r"lora_B.weight has shape \[48, 2, 3, 3\]",
    ),
    "no rank": ({A: np.ones((0, 48)), B: np.ones((48, 0))}, "rank 0"),
    "a number": (GOOD | {A: np.ones(())}, r"lora_A.weight has shape \[\]"),
    "a vector": (GOOD | {A: np.ones(2)}, r"lora_A.weight has shape \[2\]"),
    "alpha of many": (GOOD | {f"{X}.alpha": np.ones(2)}, r"alpha has shape \[2\]"),
    "not a number": (GOOD | {A: np.full((2, 48), np.nan)}, f"{A} holds values that are not finite"),
    "infinite": (GOOD | {f"{X}.alpha": np.array(np.inf)}, "alpha holds values that are not finite"),
    "two adapters": (
        GOOD | {f"diffusion_model.{X}.lora_A.weight": GOOD[A]},
        "same part of one change",
    ),
    "module and its parts": (
        {
            "double_blocks.0.img_attn.qkv.lora_A": np.ones((1, 48)),
            "double_blocks.0.img_attn.qkv.lora_B": np.ones((144, 1)),
            "transformer_blocks.0.attn.to_q.lora_A": np.ones((1, 48)),
            "transformer_blocks.0.attn.to_q.lora_B": np.ones((48, 1)),
        },
        "both as a whole and in parts",
    ),
    "a checkpoint": ({"txt_in.weight": np.ones((48, 32))}, "is no LoRA: txt_in.weight is not part"),
    "nothing": ({}, "no tensors"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file_is_an_error(case, tmp_path):
    tensors, expected = WRONG_FILES[case]
    save_file(
        {k: np.asarray(v, np.float32) for k, v in tensors.items()}, tmp_path / "lora.safetensors"
    )
    with pytest.raises(CheckpointError, match=expected) as error:
        lora_reading.read_lora(tmp_path / "lora.safetensors", MODEL)
    assert str(tmp_path / "lora.safetensors") in read_message(error)


def test_one_by_one_convolutions_are_linear(tmp_path):
    tensors = {A: GOOD[A].reshape(2, 48, 1, 1), B: GOOD[B].reshape(48, 2, 1, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_equal_loras(
        lora_reading.read_lora(tmp_path / "lora.safetensors", MODEL),
        LoraWeights(MODEL, {X: LoraPair(GOOD[A], GOOD[B])}),
    )


def test_lora_of_another_model_is_an_error():
    wide = toy_lora(toy_model(hidden=96, heads=4), ["double_blocks.0.img_attn.proj"])
    more = toy_lora(toy_model(double_blocks=5), ["double_blocks.4.img_attn.proj"])
    for other in (wide, more):
        with pytest.raises(
            CheckpointError, match=r"img_attn\.proj of .* which this model does not have"
        ) as error:
            lora.merge_lora(make_checkpoint()[0], other)
        read_message(error)
        with pytest.raises(
            CheckpointError, match=r"img_attn\.proj of .* which this model does not have"
        ):
            apply_loras(toy_params(MODEL), MODEL, [(other, 1.0)])
    # A LoRA of another model with the same modules fits.
    lora.merge_lora(make_checkpoint(toy_model(prediction="x0"))[0], toy_lora())


# --- with PyTorch ---------------------------------------------------------------------------------


@pytest.mark.reference
def test_peft_reads_written_file(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with PEFT, which needs PyTorch")
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    module = "single_blocks.2.linear1"
    written = toy_lora(modules=[module])
    lora.write_lora(tmp_path / "lora.safetensors", written, dtype="float32")
    tensors = {
        k.removeprefix("diffusion_model."): torch.from_numpy(v)
        for k, v in load_file(tmp_path / "lora.safetensors").items()
    }
    alpha = tensors.pop(f"{module}.alpha")
    net = torch.nn.Module()
    net.single_blocks = torch.nn.ModuleList([torch.nn.Module() for _ in range(3)])
    layer = net.single_blocks[2].linear1 = torch.nn.Linear(48, 3 * 48 + 192)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 48), np.float32))
    plain = layer(x).detach().numpy()
    rank = len(written.pairs[module].down)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=alpha.item(), target_modules=[module]), net
    )
    assert not peft.set_peft_model_state_dict(net, tensors).unexpected_keys
    adapted = net.single_blocks[2].linear1(x).detach().numpy()
    np.testing.assert_allclose(
        adapted, plain + x.numpy() @ written.pairs[module].compute_delta().T, rtol=1e-4, atol=1e-5
    )
