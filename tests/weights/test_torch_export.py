"""The exported PyTorch module agrees with the JAX model and the golden files; its script works."""

import ast
import importlib
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from radiance import config
from radiance.base.images import to_image
from radiance.evaluation import verify
from radiance.flow.sampler import TextCondition, sample_from_noise
from radiance.flow.schedules import make_time_schedule
from radiance.model.modulation import index_embeddings, sinusoid_frequencies
from radiance.model.transformer import bind_model
from radiance.weights import checkpoint, lora
from radiance.weights.detect import canonical_names, detect_model
from radiance.weights.opening import open_tensors
from tests.helpers.toy_loras import MODEL, toy_lora
from tests.helpers.toy_models import (
    FLOAT32,
    VARIANTS,
    apply,
    gradients,
    rows_of,
    toy_inputs,
    toy_model,
    toy_params,
)

pytest.importorskip("torch", reason="PyTorch is not installed.")

import torch
from safetensors.torch import save_file as save_torch

from radiance.weights.torch_export import model as torch_model

sys.modules["model"] = torch_model  # sample.py imports it under this name
torch_sample = importlib.import_module("radiance.weights.torch_export.sample")

pytestmark = pytest.mark.reference

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
FILES = {
    "model.py": Path(torch_model.__file__),
    "sample.py": Path(torch_model.__file__).with_name("sample.py"),
}
MORE = VARIANTS | {"latent": dict(head="linear", patch=1, channels=8, rope_theta=100.0)}
FULL = dict(registers=2, text_ids="sequential")
SMALL = dict(masking="strict", head="linear", modulation="none")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Leave the other core to JAX."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def export(folder, model, params):
    """Write config.json and model.safetensors as `convert` does."""
    (folder / "config.json").write_text(config.to_json(model))
    checkpoint.write_checkpoint(
        folder / "model.safetensors", model, jax.tree.map(np.asarray, params)
    )
    return folder


@pytest.fixture
def loaded(tmp_path):
    return lambda model, **arguments: torch_model.load(
        export(tmp_path, model, toy_params(model)), **arguments
    )


def to_torch(inputs):
    """Return tensors with channels first."""
    inputs = {name: None if x is None else torch.from_numpy(x.copy()) for name, x in inputs.items()}
    return inputs | dict(image=inputs["image"].permute(0, 3, 1, 2).contiguous())


def run(module, inputs):
    with torch.no_grad():
        return module(**to_torch(inputs)).permute(0, 2, 3, 1).numpy()


def assert_near(ours, expected, tolerance=2e-5):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MORE)
def test_agrees_with_our_model(variant, loaded):
    model = toy_model(**MORE[variant])
    inputs = toy_inputs(model)
    assert_near(
        run(loaded(model, head_chunk_size=4), inputs), apply(model, toy_params(model), inputs)
    )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_agrees_with_the_published_code(path):
    file = open_tensors(path)
    shapes = {
        name.removeprefix(verify.PARAMS_PREFIX): shape
        for name, shape in file.shapes.items()
        if name.startswith(verify.PARAMS_PREFIX)
    }
    names = canonical_names(shapes)
    sizes = json.loads(file.metadata["config"])
    model = detect_model(
        {name: shapes[key] for name, key in names.items()},
        None,
        path,
        **verify._reference_settings(sizes),
    )
    module = torch_model.Transformer(config.to_dict(model))
    module.load_state_dict(
        {name: torch.from_numpy(file[verify.PARAMS_PREFIX + key]) for name, key in names.items()}
    )

    positive, negative = (
        verify._read_condition(file),
        verify._read_condition(file, "neg_") if "neg_text" in file.shapes else None,
    )
    inputs = dict(zip(("text", "lengths", "pooled"), positive)) | dict(
        image=verify._read_image(file, sizes), time=file["timestep"]
    )
    inputs = to_torch({name: x if x is None else np.asarray(x) for name, x in inputs.items()})
    with torch.no_grad():
        velocity = module(
            **inputs,
            guidance=torch.from_numpy(file["guidance"]) if "guidance" in file.shapes else None,
        )
    stored = (
        velocity.permute(0, 2, 3, 1).reshape(file["velocity"].shape)
        if "tokens" in file.shapes
        else velocity
    )
    assert_near(stored, file["velocity"])
    if negative is None:
        return
    condition = [torch.from_numpy(np.array(x)) for x in (*positive[:2], *negative[:2])]
    sampled = torch_sample.sample(
        module,
        inputs["image"],
        *condition,
        times=torch.from_numpy(np.array(file["schedule"])),
        guidance_scale=3.5,
        unguided_steps=2,
    )
    assert_near(
        sampled, file["sampled"], verify.MAX_TOLERANCE
    )  # rounding alone changes some of these by 2e-4: see verify.py


@pytest.mark.parametrize(
    "changes",
    [
        FULL,
        SMALL,
        dict(VARIANTS["conv_half"], guidance_embed=True),
        VARIANTS["learned"],
        VARIANTS["refiner"],
    ],
)
def test_gradients_agree(changes, loaded, tmp_path):
    model = toy_model(**changes)
    params, inputs = toy_params(model), toy_inputs(model)
    weights = np.random.default_rng(5).standard_normal(inputs["image"].shape, np.float32)
    _, (to_params, to_image, to_text) = gradients(model, params, inputs, weights)
    checkpoint.write_checkpoint(
        tmp_path / "gradient.safetensors", model, jax.tree.map(np.asarray, to_params)
    )
    expected = load_file(tmp_path / "gradient.safetensors")
    for recompute in (False, True):
        module, tensors = loaded(model, head_chunk_size=4), to_torch(inputs)
        module.recompute = recompute
        image, text = tensors["image"].requires_grad_(), tensors["text"].requires_grad_()
        (module(**tensors) * to_torch(dict(image=weights))["image"]).sum().backward()
        assert_near(image.grad.permute(0, 2, 3, 1), to_image)
        assert_near(text.grad, to_text)
        for name, parameter in module.named_parameters():
            unused = parameter.grad is None
            assert_near(torch.zeros_like(parameter) if unused else parameter.grad, expected[name])
            assert not unused or name == "final_layer.modulation_offset", name


def test_tables():
    for count in (1, 7, 8, 16, 128):
        np.testing.assert_array_equal(torch_model.frequencies(count), sinusoid_frequencies(count))
    for count, width in ((344, 32), (11, 8), (50, 12)):
        np.testing.assert_allclose(
            torch_model.sinusoid(torch.arange(count), width),
            index_embeddings(count, width),
            atol=2e-7,
        )


# --- batches of ragged text -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["one_pad", "no_singles", "latent", "refiner"])
def test_padded_text_and_other_samples_have_no_influence(variant, loaded):
    model = toy_model(**MORE[variant])
    module, inputs = loaded(model), toy_inputs(model, lengths=(0, 3, 4))
    hidden = np.arange(6) >= inputs["lengths"][:, None] + (model.masking == "one_pad")
    before = run(module, inputs)
    for i in range(3):
        assert_near(run(module, rows_of(inputs, slice(i, i + 1)))[0], before[i])
    for garbage in (1e30, np.nan):
        dirty = to_torch(
            inputs | dict(text=np.where(hidden[..., None], np.float32(garbage), inputs["text"]))
        )
        text = dirty["text"].requires_grad_()
        velocity = module(**dirty)
        np.testing.assert_array_equal(velocity.detach().permute(0, 2, 3, 1), before)
        module.zero_grad()
        velocity.square().sum().backward()
        assert (text.grad[hidden] == 0).all()
        assert (text.grad[~hidden] != 0).any(dim=-1).all()
        assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_padding_is_a_learned_vector(loaded):
    model = toy_model(**VARIANTS["learned"])
    module, inputs = loaded(model), toy_inputs(model, lengths=(0, 3, 6))
    dirty = np.where(
        (np.arange(6) >= inputs["lengths"][:, None])[..., None], np.float32(np.nan), inputs["text"]
    )
    assert_near(run(module, inputs | dict(text=dirty)), apply(model, toy_params(model), inputs))


def test_sizes_and_the_divisor(loaded):
    model = toy_model(prediction="x0", head="linear", modulation="none")
    module, inputs = loaded(model), toy_inputs(model)
    tensors = to_torch(inputs)
    with torch.no_grad():
        once, twice = module(**tensors), module(**tensors, divisor=2 * tensors["time"])
    assert_near(2 * twice, once, 1e-6)
    with pytest.raises(ValueError, match="12×7 does not divide into patches of 4"):
        module(**tensors | dict(image=tensors["image"][:, :, :7]))
    pooled = toy_model(modulation="shared", pooled_dim=5)
    with pytest.raises(ValueError, match="pooled"):
        torch_model.Transformer(config.to_dict(pooled))(
            **to_torch(toy_inputs(pooled) | dict(pooled=None))
        )


# --- bfloat16 -------------------------------------------------------------------------------------

HALF = {
    "autocast": lambda module: (module, torch.autocast("cpu", torch.bfloat16)),
    "weights": lambda module: (module.to(torch.bfloat16), nullcontext()),
}


@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize("variant", ["one_pad", "strict", "flux", "conv_half", "no_singles"])
def test_bfloat16(mode, variant, loaded, monkeypatch):
    model = toy_model(**MORE[variant])
    inputs, module = toy_inputs(model), loaded(model)
    exact, seen = run(module, inputs), []

    def spy(f):
        def spied(x, weight, *arguments, **named):
            out = f(x, weight, *arguments, **named)
            seen.append((tuple(weight.shape), out.dtype))
            return out

        return spied

    module, context = HALF[mode](module)
    monkeypatch.setattr(torch_model.F, "linear", spy(torch_model.F.linear))
    monkeypatch.setattr(torch_model.F, "conv2d", spy(torch_model.F.conv2d))
    with context:
        ours = module(**to_torch(inputs))
    assert ours.dtype == torch.float32
    error = np.abs(ours.detach().permute(0, 2, 3, 1).numpy() - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.1  # the module computes in bfloat16
    f, h = model.nerf_hidden, model.channels
    float32_shapes = {
        "linear": [(model.patch**2 * h, model.hidden)],
        "nerf_linear": [(f, h + 9), (h, f)],
        "nerf_conv": [(f, h + 9), (h, f, 3, 3)],
    }
    assert [shape for shape, dtype in seen if dtype == torch.float32] == float32_shapes[model.head]
    assert torch.bfloat16 in {dtype for _, dtype in seen}
    ours.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("mode", HALF)
def test_image_is_not_rounded(mode, loaded):
    """If the head predicts zeros, the velocity of an x0 model is image / time, bit for bit."""
    model = toy_model(prediction="x0", head="linear")
    module, inputs = loaded(model), to_torch(toy_inputs(model))
    torch.nn.init.zeros_(module.final_layer.linear.weight)
    torch.nn.init.zeros_(module.final_layer.linear.bias)
    module, context = HALF[mode](module)
    with context, torch.no_grad():
        assert torch.equal(module(**inputs), inputs["image"] / inputs["time"][:, None, None, None])


def test_bfloat16_model_keeps_float32_tensors(loaded):
    module = loaded(toy_model(prediction="x0"), dtype=torch.bfloat16)
    float32_names = {name for name, x in module.state_dict().items() if x.dtype == torch.float32}
    assert float32_names == {"__x0__", "nerf_final_layer_conv.norm.scale"} | {
        f"{layer}.{part}"
        for layer in ("nerf_image_embedder.embedder.0", "nerf_final_layer_conv.conv")
        for part in ("weight", "bias")
    }
    assert all(p.requires_grad for p in module.parameters())


# --- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch_embed", "padding"), [("conv_half", "encoder"), ("bottleneck", "learned")]
)
def test_trained_model_is_read_back(patch_embed, padding, tmp_path):
    model = toy_model(
        prediction="x0",
        patch_embed=patch_embed,
        text_ids="sequential",
        registers=2,
        padding=padding,
        text_refiner_blocks=1,
    )
    module = torch_model.load(export(tmp_path, model, toy_params(model)))
    with torch.no_grad():
        module.txt_in.bias.add_(1)
    # overwrite the file it came from, which must not be in use
    save_torch(
        module.state_dict(),
        tmp_path / "model.safetensors",
        {"radiance.model": json.dumps(module.config)},
    )
    model_read, params = checkpoint.read_checkpoint(tmp_path / "model.safetensors")
    assert model_read == model
    expected = toy_params(model) | dict(
        text_embed={k: x + (k == "bias") for k, x in toy_params(model)["text_embed"].items()}
    )
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_settings_match_the_config():
    hints = get_type_hints(config.Model)
    assert {f.name for f in fields(config.Model)} == {
        *torch_model.NUMERIC_SETTINGS,
        *torch_model.CHOICE_SETTINGS,
    }
    assert {
        name: get_args(hints[name]) for name in torch_model.CHOICE_SETTINGS
    } == torch_model.CHOICE_SETTINGS
    assert not any(
        isinstance(getattr(config.Model(), name), str) for name in torch_model.NUMERIC_SETTINGS
    )
    assert config.Compute().head_chunk_size == torch_model.HEAD_CHUNK_SIZE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(depth=3, width=4), "unknown depth, width"),
        (dict(hidden=None), "missing hidden"),
        (dict(head="unet"), "head='unet'.*nerf_conv, nerf_linear, linear"),
    ],
)
def test_config_that_does_not_fit_is_an_error(changes, message):
    values = {
        name: value
        for name, value in (config.to_dict(toy_model()) | changes).items()
        if value is not None
    }
    with pytest.raises(ValueError, match=message) as error:
        torch_model.Transformer(values)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_an_error(tmp_path):
    export(tmp_path, toy_model(), toy_params(toy_model()))
    (tmp_path / "config.json").write_text(config.to_json(toy_model(registers=1)))
    with pytest.raises(RuntimeError, match=r"Missing.*registers"):
        torch_model.load(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json(toy_model(head="linear")))
    with pytest.raises(RuntimeError, match=r"Unexpected.*nerf_blocks\.0"):
        torch_model.load(tmp_path)


# --- LoRAs ----------------------------------------------------------------------------------------


def test_added_lora_equals_merged_lora(loaded, tmp_path):
    """The LoRA has pairs for all modules, convolutions too; −strength removes it."""
    module, model, lora_weights = loaded(MODEL), MODEL, toy_lora()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    file = tmp_path / "lora.safetensors"
    lora.write_lora(file, lora_weights, dtype="float32")
    torch_model.add_lora(module, file, 0.5)
    merged = lora.merge_lora(
        checkpoint.checkpoint_from_params(model, toy_params(model), "toy"), lora_weights, 0.5
    )
    for name, x in module.state_dict().items():
        if not name.startswith("__"):
            assert_near(x, merged.get_tensor(name), 1e-6)
    assert sum(not torch.equal(x, before[name]) for name, x in module.state_dict().items()) == len(
        lora_weights.pairs
    )
    torch_model.add_lora(module, file, -0.5)
    for name, x in module.state_dict().items():
        if not name.startswith("__"):
            assert_near(x, before[name], 1e-6)


@pytest.mark.parametrize("fault", ["other model", "kohya", "incomplete", "empty", "no alpha"])
def test_lora_that_does_not_fit_changes_nothing(fault, loaded, tmp_path):
    module, file = loaded(MODEL), tmp_path / "lora.safetensors"
    before = {name: x.clone() for name, x in module.state_dict().items()}
    modules = ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"]
    lora.write_lora(
        file,
        toy_lora(toy_model(mlp_ratio=3) if fault == "other model" else MODEL, modules),
        "kohya" if fault == "kohya" else "peft",
    )
    tensors = load_file(file) if fault != "empty" else {}
    save_file(
        {
            key: x
            for key, x in tensors.items()
            if not (fault == "incomplete" and "single_blocks.0.linear1.lora_B" in key)
            and not (fault == "no alpha" and key.endswith("linear1.alpha"))
        },
        file,
    )
    with pytest.raises(
        ValueError, match=r"do not fit this model|not a LoRA with PEFT's|has no alpha"
    ):
        torch_model.add_lora(module, file)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance_scale", "unguided_steps", "min_divisor"), [(1.0, 0, 0.0), (2.0, 1, 0.5)]
)
def test_sampling_agrees_with_our_sampler(guidance_scale, unguided_steps, min_divisor, loaded):
    model = toy_model(
        double_blocks=0,
        single_blocks=1,
        head="linear",
        prediction="x0",
        modulation="shared",
        pooled_dim=5,
    )
    settings = config.Sample(
        steps=3,
        guidance_scale=guidance_scale,
        unguided_steps=unguided_steps,
        min_divisor=min_divisor,
    )
    positive, negative = toy_inputs(model), rows_of(toy_inputs(model, seed=2), slice(0, 1))
    times, noise = make_time_schedule(settings, 6), jnp.asarray(positive["image"])

    def condition(inputs):
        return TextCondition(
            *(
                jnp.broadcast_to(inputs[k], (3, *inputs[k].shape[1:]))
                for k in ("text", "lengths", "pooled")
            )
        )

    program = jax.jit(
        lambda p: sample_from_noise(
            bind_model(model, FLOAT32, p),
            noise,
            times,
            settings,
            condition(positive),
            condition(negative),
        )
    )
    expected = program.lower(toy_params(model)).compile()(toy_params(model))
    p, n = to_torch(positive), to_torch(negative)
    ours = torch_sample.sample(
        loaded(model),
        p["image"],
        p["text"],
        p["lengths"],
        n["text"],
        n["lengths"],
        times=torch.linspace(1, 0, 4),
        guidance_scale=guidance_scale,
        unguided_steps=unguided_steps,
        min_divisor=min_divisor,
        pooled=p["pooled"],
        negative_pooled=n["pooled"],
    )
    assert_near(ours.permute(0, 2, 3, 1), expected)


def test_invalid_sampling_arguments_are_errors():
    module, p = (
        torch_model.Transformer(config.to_dict(toy_model())),
        to_torch(toy_inputs(toy_model())),
    )
    inputs = p["image"], p["text"], p["lengths"]
    with pytest.raises(ValueError, match="must fall"):
        torch_sample.sample(module, *inputs, times=[1.0, 0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match="negative_text"):
        torch_sample.sample(module, *inputs, times=[1.0, 0.0], guidance_scale=2.0)


# --- exported files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("model.py", {"torch", "safetensors"}), ("sample.py", {"torch", "safetensors", "model"})],
)
def test_exported_files_import_nothing_of_radiance(name, allowed):
    imported = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == allowed


ISOLATED = """
import runpy, sys
absent = {
    "numpy", "jax", "jaxlib", "flax", "ml_dtypes", "scipy", "PIL", "radiance", "transformers",
    "diffusers",
}
class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent)
script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, script.removesuffix("sample.py"))
runpy.run_path(script, run_name="__main__")
assert not absent & set(sys.modules)
"""


def run_script(folder, *arguments):
    """Run `python sample.py` with torch and safetensors as the only packages."""
    command = [
        sys.executable,
        "-I",
        "-W",
        "ignore",
        "-c",
        ISOLATED,
        str(folder / "sample.py"),
        *arguments,
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )


PROMPTS = ["a red square", "ein grüner Kreis"]


def user_folder(folder, model, settings):
    """Write the folder that `convert` gives to users; return its inputs."""
    export(folder, model, toy_params(model))
    for name, source in FILES.items():
        (folder / name).write_text(source.read_text())
    positive, negative = toy_inputs(model, lengths=(2, 5)), toy_inputs(model, lengths=(1,), seed=2)
    tensors = {"text": positive["text"], "lengths": positive["lengths"]}
    tensors |= {
        "negative_text": negative["text"],
        "negative_lengths": negative["lengths"].astype(np.int64),
    }
    save_file(
        tensors,
        folder / "prompts.safetensors",
        {"prompts": json.dumps(PROMPTS), "sample": json.dumps(settings)},
    )
    return {name: torch.from_numpy(x) for name, x in tensors.items()}


def test_sample_script_writes_images(tmp_path):
    model = toy_model(prediction="x0")
    run = config.to_dict(
        config.Sample(steps=3, guidance_scale=2.0, solver="heun", schedule="shifted")
    )
    settings = run | {"resolution": 16, "noise_scale": 2.0, "times": [1.0, 0.9, 0.6, 0.0]}
    tensors = user_folder(tmp_path, model, settings)
    lora.write_lora(tmp_path / "lora.safetensors", toy_lora(model, ["single_blocks.0.linear1"]))
    ours = ["--lora", "lora.safetensors:0.5", "--lora", "lora.safetensors:-0.25"]
    done = run_script(
        tmp_path, "--seed", "7", "--size", "18x10", "--dtype", "float32", "--device", "cpu", *ours
    )
    assert done.returncode == 0, done.stderr
    assert all(prompt in done.stdout for prompt in PROMPTS)
    assert "solver=heun" in done.stdout
    assert "schedule" not in done.stdout
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [
        "000-seed7.png",
        "001-seed8.png",
    ]

    noise = torch.cat(
        [
            2 * torch.randn((1, 3, 12, 20), generator=torch.Generator().manual_seed(seed))
            for seed in (7, 8)
        ]
    )
    module = torch_model.load(tmp_path)
    torch_model.add_lora(module, tmp_path / "lora.safetensors", 0.25)
    expected = torch_sample.sample(
        module, noise, *tensors.values(), times=settings["times"], guidance_scale=2.0
    )
    for i, pixels in enumerate(expected.permute(0, 2, 3, 1).numpy()):
        with Image.open(tmp_path / "images" / f"00{i}-seed{7 + i}.png") as image:
            assert image.size == (18, 10)
            assert image.mode == "RGB"
            ours = np.asarray(image, int)
        assert np.abs(ours - np.asarray(to_image(pixels[:10, :18]), int)).max() <= 1
        assert ours.std() > 10


def test_sample_script_writes_latents(tmp_path):
    model = toy_model(head="linear", patch=1, channels=8)
    user_folder(
        tmp_path,
        model,
        {
            "steps": 4,
            "guidance_scale": 1.0,
            "resolution": 3,
            "noise_scale": 1.0,
            "schedule": "beta",
            "times": [1.0, 0.0],
        },
    )
    done = run_script(tmp_path, "--out", "latents", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "schedule=beta" in done.stdout
    latents = load_file(tmp_path / "latents" / "001-seed1.safetensors")["latents"]
    assert latents.shape == (8, 3, 3)
    assert latents.std() > 0.1
    (tmp_path / "prompts.safetensors").unlink()
    done = run_script(tmp_path)
    assert done.returncode == 1
    assert "prompts.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
