"""LoKr, LoHa, DoRA, LoCon, biases and complete values are merged as their trainers compute them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from radiance.base.errors import CheckpointError
from radiance.weights import lora
from radiance.weights.lora_adapters import apply_loras, can_stay_unmerged
from radiance.weights.lora_reading import read_lora
from tests.helpers.toy_loras import LATENT, MODEL, make_checkpoint, read_message, toy_lora
from tests.helpers.toy_models import toy_params

LINEAR, SQUARE, CONV = "single_blocks.1.linear2", "double_blocks.0.img_attn.proj", "img_in_patch"
SHAPES = {LINEAR: (48, 240), SQUARE: (48, 48), CONV: (48, 3, 4, 4)}
NORM = "double_blocks.0.img_attn.norm.query_norm"


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def merge(tmp_path, tensors, strength=1.0, model=MODEL, metadata=None):
    """Return the base and the merged checkpoint of a LoRA file with these tensors."""
    path = tmp_path / "lora.safetensors"
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, path, metadata)
    base = make_checkpoint(model)[0]
    return base, lora.merge_lora(base, read_lora(path, model), strength)


def norms(x, axis):
    axes = tuple(i for i in range(x.ndim) if i != axis)
    return np.sqrt(np.square(x.astype(np.float64)).sum(axis=axes, keepdims=True))


def make_kinds(module):
    """Return the tensors of each kind of change of a module, and the change in float64."""
    out, *inputs = SHAPES[module]
    size, channels, kernel = int(np.prod(inputs)), inputs[0], inputs[1:]
    down, up = random(2, size), random(out, 2)
    alpha = np.array(3, np.float32)
    pair = {"lora_down.weight": down.reshape(2, *inputs), "lora_up.weight": up, "alpha": alpha}
    a, b, c, d = random(out, 2), random(2, size), random(out, 2, seed=1), random(2, size, seed=1)
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": alpha}
    k, left, right = random(6, channels // 3), random(8, 2), random(2, 3 * int(np.prod(kernel)))
    k_left, k_right = random(6, 2, seed=2), random(2, channels // 3, seed=2)
    lokr = {"lokr_w1": k, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": alpha}
    delta = up.astype(np.float64) @ down
    return {
        "LoRA": (pair, 1.5 * delta),
        "LoHa": (loha, 1.5 * ((a.astype(np.float64) @ b) * (c @ d))),
        "LoKr": (lokr, 1.5 * np.kron(k, left.astype(np.float64) @ right)),
        "LoKr of products": (
            {"lokr_w1_a": k_left, "lokr_w1_b": k_right}
            | {name: x for name, x in lokr.items() if name != "lokr_w1"},
            1.5 * np.kron(k_left @ k_right, left.astype(np.float64) @ right),
        ),
        "complete LoKr": (
            {"lokr_w1": k, "lokr_w2": (left @ right).reshape(8, 3, *kernel)}
            | {"alpha": np.array(9_999_999_999, np.float32)},
            np.kron(k, left.astype(np.float64) @ right),
        ),
        "difference": ({"diff": random(out, *inputs)}, random(out, *inputs)),
    }


KINDS = list(make_kinds(LINEAR))


@pytest.mark.parametrize("prefix", ["lycoris_", "diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("module", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_merged(kind, module, prefix, tmp_path):
    tensors, delta = make_kinds(module)[kind]
    name = prefix + (module if prefix.endswith(".") else module.replace(".", "_"))
    base, merged = merge(tmp_path, {f"{name}.{k}": x for k, x in tensors.items()}, -0.5)
    before, after = (x.get_tensor(f"{module}.weight") for x in (base, merged))
    delta = delta.reshape(before.shape)
    np.testing.assert_allclose(after - before, -0.5 * delta, atol=2e-5 * np.abs(delta).max())
    for other in SHAPES.keys() - {module}:
        x, y = (c.get_tensor(f"{other}.weight") for c in (base, merged))
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("module", SHAPES)
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_dora_sets_the_norms(kind, module, axis, tmp_path):
    tensors, delta = make_kinds(module)[kind]
    shape = [1] * len(SHAPES[module])
    shape[axis] = SHAPES[module][axis]
    magnitude = 1 + np.abs(random(*shape))
    names = {f"{module}.{k}": x for k, x in tensors.items()} | {f"{module}.dora_scale": magnitude}
    base, merged = merge(tmp_path, names)
    before, after = (x.get_tensor(f"{module}.weight") for x in (base, merged))
    np.testing.assert_allclose(norms(after, axis), magnitude, rtol=1e-5)
    changed = before + delta.reshape(before.shape)
    expected = changed / norms(changed, axis) * magnitude
    np.testing.assert_allclose(after, expected, rtol=2e-3, atol=1e-5)
    # Strengths other than 1 interpolate.
    half = merge(tmp_path, names, 0.25)[1].get_tensor(f"{module}.weight")
    np.testing.assert_allclose(half, 0.75 * before + 0.25 * after, rtol=1e-4, atol=1e-5)


def test_tucker_decompositions_of_convolutions(tmp_path):
    core, core2 = random(2, 2, 4, 4), random(2, 2, 4, 4, seed=1)
    up, down, up2, down2 = random(48, 2), random(2, 3), random(48, 2, seed=1), random(2, 3, seed=1)

    def expand(core, up, down):
        return np.einsum("mnhw,om,nc->ochw", core.astype(np.float64), up, down)

    one = np.array(1, np.float32)
    locon = {
        "lora_mid.weight": core,
        "lora_up.weight": up.reshape(48, 2, 1, 1),
        "lora_down.weight": down.reshape(2, 3, 1, 1),
        "alpha": one,
    }
    loha = {"hada_t1": core, "hada_w1_a": up.T, "hada_w1_b": down, "alpha": one}
    loha |= {"hada_t2": core2, "hada_w2_a": up2.T, "hada_w2_b": down2}
    first = random(6, 3)
    lokr = {"lokr_w1": first, "lokr_t2": core, "alpha": one}
    lokr |= {"lokr_w2_a": up.T[:, :8], "lokr_w2_b": down[:, :1]}
    kron = np.kron(first, expand(core, up[:8], down[:, :1]).reshape(8, -1))
    for tensors, expected in (
        (locon, expand(core, up, down)),
        (loha, expand(core, up, down) * expand(core2, up2, down2)),
        (lokr, kron.reshape(48, 3, 4, 4)),
    ):
        base, merged = merge(tmp_path, {f"{CONV}.{k}": x for k, x in tensors.items()})
        before, after = (x.get_tensor(f"{CONV}.weight") for x in (base, merged))
        np.testing.assert_allclose(after - before, expected / 2, rtol=1e-4, atol=1e-4)


# --- biases, norms and complete values ------------------------------------------------------------

PAIR = {f"{SQUARE}.lora_A.weight": random(2, 48), f"{SQUARE}.lora_B.weight": random(48, 2)}
VALUES = random(48)
# name of a tensor, values, the native tensor, its values at strength 0.5 as a function of before
OTHER_CHANGES = {
    "bias of the up matrix": (
        {f"{SQUARE}.lora_B.bias": VALUES, f"{SQUARE}.alpha": np.array(8, np.float32)},
        f"{SQUARE}.bias",
        lambda x: x + 0.5 * 4 * VALUES,
    ),
    "difference of a bias": (
        {f"diffusion_model.{SQUARE}.diff_b": VALUES},
        f"{SQUARE}.bias",
        lambda x: x + 0.5 * VALUES,
    ),
    "difference of a bias by its name": (
        {f"diffusion_model.{SQUARE}.bias.diff": VALUES},
        f"{SQUARE}.bias",
        lambda x: x + 0.5 * VALUES,
    ),
    "replaced weight": (
        {f"diffusion_model.{LINEAR}.set_weight": random(48, 240)},
        f"{LINEAR}.weight",
        lambda x: 0.5 * x + 0.5 * random(48, 240),
    ),
    "weight saved by PEFT": (
        {f"base_model.model.{LINEAR}.weight": random(48, 240)},
        f"{LINEAR}.weight",
        lambda x: 0.5 * x + 0.5 * random(48, 240),
    ),
    "weight to save in PEFT": (
        {f"base_model.model.{LINEAR}.modules_to_save.default.weight": random(48, 240)},
        f"{LINEAR}.weight",
        lambda x: 0.5 * x + 0.5 * random(48, 240),
    ),
    "bias saved by PEFT": (
        {f"base_model.model.{LINEAR}.base_layer.bias": VALUES},
        f"{LINEAR}.bias",
        lambda x: 0.5 * x + 0.5 * VALUES,
    ),
    "norm of a control LoRA": (
        {f"{NORM}.scale": VALUES[:24]},
        f"{NORM}.scale",
        lambda x: 0.5 * x + 0.5 * VALUES[:24],
    ),
    "replaced norm": (
        {f"diffusion_model.{NORM}.scale.set_weight": VALUES[:24]},
        f"{NORM}.scale",
        lambda x: 0.5 * x + 0.5 * VALUES[:24],
    ),
    "difference of a norm": (
        {f"lora_unet_{NORM}.w_norm".replace("double.", "double_"): VALUES[:24]},
        f"{NORM}.scale",
        lambda x: x + 0.5 * VALUES[:24],
    ),
    "norm of diffusers": (
        {"transformer.transformer_blocks.0.attn.norm_q.diff": VALUES[:24]},
        f"{NORM}.scale",
        lambda x: x + 0.5 * VALUES[:24],
    ),
}


@pytest.mark.parametrize("case", OTHER_CHANGES)
def test_biases_norms_and_complete_values(case, tmp_path):
    tensors, name, make_expected = OTHER_CHANGES[case]
    base, merged = merge(tmp_path, PAIR | tensors, 0.5, LATENT)
    expected = make_expected(base.get_tensor(name))
    np.testing.assert_allclose(merged.get_tensor(name), expected, rtol=1e-6, atol=1e-6)
    pair = f"{SQUARE}.weight"
    assert np.abs(merged.get_tensor(pair) - base.get_tensor(pair)).max() > 0.1


def test_replaced_values_are_exact_at_full_strength(tmp_path):
    tensors = PAIR | {f"{LINEAR}.set_weight": random(48, 240)}
    merged = merge(tmp_path, tensors)[1]
    np.testing.assert_array_equal(merged.get_tensor(f"{LINEAR}.weight"), random(48, 240))


def test_parts_of_one_matrix_may_be_of_different_kinds(tmp_path):
    """Queries have a LoKr and a bias, values a LoRA: the rows of the native matrix."""
    prefix, name = "transformer.transformer_blocks.0.attn.", "double_blocks.0.img_attn.qkv"
    first, second, down, up = random(6, 6), random(8, 8), random(2, 48), random(48, 2)
    tensors = {
        f"{prefix}to_q.lokr_w1": first,
        f"{prefix}to_q.lokr_w2": second,
        f"{prefix}to_q.diff_b": VALUES,
        f"{prefix}to_v.lora_A.weight": down,
        f"{prefix}to_v.lora_B.weight": up,
    }
    base, merged = merge(tmp_path, tensors, 1.0, LATENT)
    delta, bias = (
        merged.get_tensor(f"{name}.{kind}") - base.get_tensor(f"{name}.{kind}")
        for kind in ("weight", "bias")
    )
    np.testing.assert_allclose(delta[:48], np.kron(first, second), atol=1e-5)
    np.testing.assert_array_equal(delta[48:96], 0)
    np.testing.assert_allclose(delta[96:], up @ down, atol=1e-5)
    np.testing.assert_allclose(bias, np.concatenate([VALUES, np.zeros(96)]), atol=1e-6)


# --- wrong files ----------------------------------------------------------------------------------

LOKR = {f"{SQUARE}.lokr_w1": random(6, 6), f"{SQUARE}.lokr_w2": random(8, 8)}
WRONG_FILES = {
    "no second factor": ({f"{SQUARE}.lokr_w1": random(6, 6)}, "without lokr_w2_a of the change"),
    "half a factor": (
        {f"{SQUARE}.lokr_w1": random(6, 6), f"{SQUARE}.lokr_w2_a": random(8, 2)},
        "without lokr_w2_b",
    ),
    "no LoHa": ({f"{SQUARE}.hada_w1_a": random(48, 2)}, "without hada_w1_b"),
    "two kinds": (LOKR | PAIR, "in several ways"),
    "norms alone": ({f"{SQUARE}.dora_scale": random(48, 1)}, "without matrices"),
    "norms of a bias": (
        {f"{SQUARE}.dora_scale": random(48, 1), f"{SQUARE}.diff_b": VALUES},
        "without matrices",
    ),
    "other norms": (PAIR | {f"{SQUARE}.dora_scale": random(7, 1)}, "one norm for each output"),
    "other ranks": (
        {f"{SQUARE}.lokr_w1": random(6, 6)}
        | {f"{SQUARE}.lokr_w2_a": random(8, 2), f"{SQUARE}.lokr_w2_b": random(3, 8)},
        r"lokr_w2_b has shape \[3, 8\], which does not fit the other tensors",
    ),
    "other sizes": (
        {f"{SQUARE}.lokr_w1": random(6, 6), f"{SQUARE}.lokr_w2": random(8, 9)},
        "of 48 × 54 weights, and this model has",
    ),
    "huge product": (
        {f"{SQUARE}.lokr_w1": random(3000, 1), f"{SQUARE}.lokr_w2": random(3000, 1)},
        "of 9000000 × 1 weights",
    ),
    "a vector": ({f"{SQUARE}.lokr_w1": VALUES, f"{SQUARE}.lokr_w2": VALUES}, "does not fit"),
    "empty": (
        {f"{SQUARE}.hada_w{i}_a": random(48, 0) for i in (1, 2)}
        | {f"{SQUARE}.hada_w{i}_b": random(0, 48) for i in (1, 2)},
        "does not fit the other tensors",
    ),
    "two biases": (
        PAIR | {f"{SQUARE}.lora_B.bias": VALUES, f"{SQUARE}.diff_b": VALUES},
        "changes the bias of double_blocks.0.img_attn.proj in several ways",
    ),
    "no bias here": ({f"{NORM}.diff_b": VALUES}, "and this model has nothing there"),
    "other core": (
        {f"{CONV}.lora_mid.weight": random(2, 3, 4, 4), f"{CONV}.lora_up.weight": random(48, 2)}
        | {f"{CONV}.lora_down.weight": random(2, 3)},
        "lora_mid.weight has shape",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file_is_an_error(case, tmp_path):
    tensors, expected = WRONG_FILES[case]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=expected) as error:
        read_lora(tmp_path / "lora.safetensors", MODEL)
    assert str(tmp_path / "lora.safetensors") in read_message(error)


# --- sampling and writing -------------------------------------------------------------------------


def test_only_pairs_of_low_rank_stay_unmerged(tmp_path):
    """One pair of a high rank would pad those of all blocks to its rank."""
    assert can_stay_unmerged(toy_lora())
    assert not can_stay_unmerged(
        lora.LoraWeights(MODEL, {SQUARE: lora.LoraPair(random(1000, 48), random(48, 1000))})
    )
    save_file(LOKR, tmp_path / "lora.safetensors")
    lokr = read_lora(tmp_path / "lora.safetensors", MODEL)
    assert not can_stay_unmerged(lokr)
    with pytest.raises(CheckpointError, match=f"changes {SQUARE}.weight by more than a pair"):
        apply_loras(toy_params(MODEL), MODEL, [(lokr, 1.0)])
    with pytest.raises(CheckpointError, match="which can only be merged") as error:
        lora.write_lora(tmp_path / "renamed.safetensors", lokr)
    read_message(error)


# --- with PyTorch ---------------------------------------------------------------------------------

LYCORIS = {
    "LoCon": dict(algo="lora"),
    "LoCon, Tucker": dict(algo="lora", use_tucker=True),
    "rsLoRA": dict(algo="lora", rs_lora=True),
    "DoRA": dict(algo="lora", dora_wd=True),
    "DoRA of inputs": dict(algo="lora", dora_wd=True, wd_on_output=False),
    "LoHa": dict(algo="loha"),
    "LoHa, Tucker": dict(algo="loha", use_tucker=True),
    "LoHa, DoRA": dict(algo="loha", dora_wd=True, wd_on_output=False),
    "LoKr": dict(algo="lokr", factor=4),
    "LoKr of products": dict(algo="lokr", factor=8, decompose_both=True),
    "LoKr of matrices": dict(algo="lokr", factor=4, full_matrix=True),
    "LoKr, Tucker": dict(algo="lokr", factor=4, use_tucker=True),
    "LoKr, DoRA": dict(algo="lokr", factor=4, dora_wd=True),
    "full": dict(algo="full"),
}


def make_torch_modules(torch, base, modules=SHAPES):
    """Return a module of PyTorch with some of the base's layers, under their names."""
    net = torch.nn.Module()
    for module in modules:
        *parents, last = module.split(".")
        parent = net
        for name in parents:
            if not hasattr(parent, name):
                parent.add_module(name, torch.nn.Module())
            parent = getattr(parent, name)
        out, *inputs = SHAPES[module]
        make_layer = torch.nn.Conv2d if len(inputs) > 1 else torch.nn.Linear
        layer = make_layer(inputs[0], out, *inputs[1:])
        parent.add_module(last, layer)
        for kind in ("weight", "bias"):
            getattr(layer, kind).data = torch.from_numpy(base.get_tensor(f"{module}.{kind}"))
    return net


def read_torch_weight(torch, net, module):
    """Return weight and bias of a layer by its outputs for each input."""
    layer, shape = net.get_submodule(module), SHAPES[module]
    size = int(np.prod(shape[1:]))
    inputs = torch.cat([torch.eye(size), torch.zeros(1, size)]).reshape(-1, *shape[1:])
    with torch.no_grad():
        outputs = layer(inputs).reshape(size + 1, -1).numpy()
    return (outputs[:-1] - outputs[-1]).T.reshape(shape), outputs[-1]


def assert_equal_layers(torch, net, merged, modules=SHAPES):
    for module in modules:
        weight, bias = read_torch_weight(torch, net, module)
        np.testing.assert_allclose(
            merged.get_tensor(f"{module}.weight"), weight, rtol=0, atol=5e-5 * np.abs(weight).max()
        )
        np.testing.assert_allclose(merged.get_tensor(f"{module}.bias"), bias, atol=1e-5)


def add_noise(torch, module, names):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in module.named_parameters():
            if any(part in name for part in names):
                param += 0.3 * torch.randn(param.shape, generator=generator)


@pytest.mark.reference
@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris(case, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with LyCORIS, which needs PyTorch")
    lycoris = pytest.importorskip("lycoris", reason="compares with LyCORIS")
    base = make_checkpoint()[0]
    net = make_torch_modules(torch, base)
    lycoris.LycorisNetwork.apply_preset(
        {"enable_conv": True, "target_module": ["Linear", "Conv2d"], "target_name": []}
    )
    adapters = lycoris.create_lycoris(
        net, 1.0, linear_dim=4, linear_alpha=2.0, conv_dim=2, conv_alpha=1.0, **LYCORIS[case]
    )
    adapters.apply_to()
    add_noise(torch, adapters, ("",))
    adapters.eval()
    file = tmp_path / "lora.safetensors"
    save_file({k: x.detach().numpy().copy() for k, x in adapters.state_dict().items()}, file)
    read = read_lora(file, MODEL)
    assert not read.notes
    assert_equal_layers(torch, net, lora.merge_lora(base, read))


PEFT = {
    "LoRA": ("LoraConfig", dict(r=4, lora_alpha=16)),
    "rsLoRA": ("LoraConfig", dict(r=4, lora_alpha=16, use_rslora=True)),
    "patterns": (
        "LoraConfig",
        dict(
            r=4,
            lora_alpha=16,
            rank_pattern={"linear2": 2, "^img_in_patch": 3},
            alpha_pattern={r".*\.linear2": 6, "img_attn.proj": 1},
        ),
    ),
    "DoRA": ("LoraConfig", dict(r=4, lora_alpha=16, use_dora=True)),
    "biases": ("LoraConfig", dict(r=4, lora_alpha=16, lora_bias=True)),
    "base biases": ("LoraConfig", dict(r=4, lora_alpha=16, bias="lora_only")),
    "saved modules": (
        "LoraConfig",
        dict(r=4, lora_alpha=16, target_modules=["linear2"], modules_to_save=["proj"]),
    ),
    "LoHa": ("LoHaConfig", dict(r=4, alpha=8)),
    "LoHa, Tucker": ("LoHaConfig", dict(r=2, alpha=8, use_effective_conv2d=True)),
    "LoKr": ("LoKrConfig", dict(r=4, alpha=8, decompose_factor=4)),
    "LoKr of products": ("LoKrConfig", dict(r=2, alpha=8, decompose_both=True)),
    "LoKr of matrices": ("LoKrConfig", dict(r=100, alpha=50)),
}


@pytest.mark.reference
@pytest.mark.parametrize("case", PEFT)
def test_folder_of_peft(case, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with PEFT, which needs PyTorch")
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    class_name, settings = PEFT[case]
    base = make_checkpoint()[0]
    settings = {"target_modules": ["linear2", "proj", "img_in_patch"]} | settings
    settings |= {"init_weights": True} if class_name != "LoraConfig" else {}
    model = peft.get_peft_model(
        make_torch_modules(torch, base), getattr(peft, class_name)(**settings)
    )
    is_bias_saved = case == "base biases"
    names = ("lora_", "hada_", "lokr_", "modules_to_save", *["bias"][:is_bias_saved])
    add_noise(torch, model, names)
    model.eval().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    if is_bias_saved:  # their values are saved, not their changes
        assert f"base_model.model.{SQUARE}.base_layer.bias" in load_file(
            tmp_path / "adapter_model.safetensors"
        )
    read = read_lora(tmp_path, MODEL)
    assert not any("skipped" in note for note in read.notes)
    modules = [LINEAR, SQUARE] if case == "saved modules" else SHAPES
    assert_equal_layers(torch, model.base_model.model, lora.merge_lora(base, read), modules)
