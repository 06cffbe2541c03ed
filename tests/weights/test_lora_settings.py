"""The strength of a LoRA follows its settings, wherever trainers keep them."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from radiance.base.errors import CheckpointError
from radiance.weights.lora_reading import read_lora
from tests.helpers.toy_loras import LATENT, read_message

MODULES = {
    "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.1.img_attn.proj": "transformer_blocks.1.attn.to_out.0",
    "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
}
RANKS = dict(zip(MODULES, (4, 4, 2)))
ALL = {"double_blocks.0.img_attn.proj": 4, "double_blocks.1.img_attn.proj": 4}


def make_tensors(prefix="transformer.", names=("lora_A", "lora_B"), alpha=None):
    tensors = {}
    for module, name in MODULES.items():
        inputs = 48 if "proj" in module else 48 + LATENT.mlp_hidden
        tensors[f"{prefix}{name}.{names[0]}.weight"] = np.ones((RANKS[module], inputs), np.float32)
        tensors[f"{prefix}{name}.{names[1]}.weight"] = np.ones((48, RANKS[module]), np.float32)
        if alpha is not None:
            tensors[f"{prefix}{name}.alpha"] = np.array(alpha, np.float32)
    return tensors


def read_scales(path):
    return {module: pair.scale for module, pair in read_lora(path, LATENT).pairs.items()}


def diffusers_metadata(**settings):
    values = {f"transformer.{key}": value for key, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(values | {"text_encoder.lora_alpha": 99})}


HEADERS = {
    "diffusers": (diffusers_metadata(r=4, lora_alpha=16), (4, 4, 8)),
    "diffusers, rsLoRA": (
        diffusers_metadata(r=4, lora_alpha=16, use_rslora=True),
        (8, 8, 128**0.5),
    ),
    "alpha_pattern": (
        diffusers_metadata(
            r=4,
            lora_alpha=16,
            rank_pattern={"proj_out": 2},
            alpha_pattern={"proj_out": 6, "transformer_blocks.1.attn.to_out.0": 2},
        ),
        (4, 0.5, 3),
    ),
    "anchored alpha_pattern": (
        diffusers_metadata(
            lora_alpha=4, alpha_pattern={"^transformer_blocks.0.attn.to_out.0": 8, "^attn": 40}
        ),
        (2, 1, 2),
    ),
    "alpha_pattern with expressions": (
        diffusers_metadata(
            lora_alpha=4,
            alpha_pattern={
                r"transformer_blocks\.\d+\.attn\.to_(q|out\.0)": 8,
                ".*proj_out": 1,
            },
        ),
        (2, 2, 0.5),
    ),
    "kohya": ({"ss_network_alpha": "16.0", "ss_network_dim": "4"}, (4, 4, 8)),
    "flat PEFT": ({"r": "4", "lora_alpha": "16"}, (4, 4, 8)),
    "flat PEFT, rsLoRA": ({"r": "4", "lora_alpha": "16", "use_rslora": "True"}, (8, 8, 128**0.5)),
    "flat diffusers": ({"transformer.lora_alpha": "16", "text_encoder.lora_alpha": "3"}, (4, 4, 8)),
    "flat patterns": (
        {"lora_alpha": "4", "alpha_pattern": '{"proj_out": 4}', "use_rslora": "false"},
        (1, 1, 2),
    ),
    "PEFT's config as text": ({"adapter_config": '{"lora_alpha": 8, "r": 4}'}, (2, 2, 4)),
    "nothing": ({"format": "pt", "rank": "4", "ss_network_alpha": "None"}, (1, 1, 1)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_settings_in_the_header(case, tmp_path):
    metadata, expected = HEADERS[case]
    save_file(make_tensors(), tmp_path / "lora.safetensors", metadata)
    assert read_scales(tmp_path / "lora.safetensors") == pytest.approx(dict(zip(MODULES, expected)))


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.transformer."])
@pytest.mark.parametrize("address", ["folder", "file", "folder with others"])
def test_settings_in_the_folder_of_peft(prefix, address, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(make_tensors(prefix), path)
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "alpha_pattern": {"single_transformer_blocks.0.proj_out": 1},
        "init_lora_weights": True,
        "use_rslora": False,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    if address == "folder with others":
        save_file({"x": np.zeros(1)}, tmp_path / "optimizer.safetensors")
    expected = dict(zip(MODULES, (4, 4, 0.5)))
    assert read_scales(path if address == "file" else tmp_path) == expected


def test_settings_of_another_file_are_not_used(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    for name in ("style", "other"):
        save_file(make_tensors(), tmp_path / f"{name}.safetensors")
    assert set(read_scales(tmp_path / "style.safetensors").values()) == {1.0}


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_tensors_take_precedence(names, tmp_path):
    metadata = {"ss_network_alpha": "64", "use_rslora": "true"}
    save_file(make_tensors(names=names, alpha=2), tmp_path / "lora.safetensors", metadata)
    scales = read_scales(tmp_path / "lora.safetensors")
    assert scales == dict(zip(MODULES, (0.5, 0.5, 1)))


def test_alpha_outside_the_tensors_is_reported(tmp_path):
    save_file(make_tensors(), tmp_path / "lora.safetensors", {"lora_alpha": "16"})
    (note,) = read_lora(tmp_path / "lora.safetensors", LATENT).notes
    assert "alpha is 16 by the settings" in note


WRONG_SETTINGS = {
    "no JSON": ({"lora_adapter_metadata": "{r: 4"}, "is not a JSON object"),
    "a list": ({"lora_adapter_metadata": "[1]"}, "is not a JSON object"),
    "deep JSON": ({"lora_adapter_metadata": "[" * 100_000}, "is not a JSON object"),
    "no number": ({"lora_alpha": "strong"}, "lora_alpha='strong', which is not a finite number"),
    "nan": ({"ss_network_alpha": "nan"}, "ss_network_alpha='nan', which is not a finite number"),
    "infinite": (diffusers_metadata(lora_alpha=1e999), "lora_alpha='inf'"),
    "true": (diffusers_metadata(lora_alpha=True), "lora_alpha='True'"),
    "no rank": (diffusers_metadata(lora_alpha=1, r=0), "r='0', which is not a positive number"),
    "no flag": (diffusers_metadata(use_rslora="maybe"), "use_rslora='maybe', which is neither"),
    "no patterns": (diffusers_metadata(alpha_pattern=[3]), "alpha_pattern=.*gives no number"),
    "no number by module": (diffusers_metadata(alpha_pattern={"x": "y"}), "alpha_pattern='y'"),
    "slow expression": (
        diffusers_metadata(alpha_pattern={"(a+)+b": 1}),
        r"\(a\+\)\+b', a regular expression that is not supported",
    ),
    "slow stars": (diffusers_metadata(alpha_pattern={".*.*.*.*x": 1}), "regular expression"),
    "wrong expression": (diffusers_metadata(alpha_pattern={"(a": 1}), "regular expression"),
    "many expressions": (
        diffusers_metadata(alpha_pattern={f".*{i}": 1 for i in range(101)}),
        "one of too many",
    ),
    "another adapter": (diffusers_metadata(peft_type="VERA"), "of the kind VERA"),
    "PiSSA": (
        diffusers_metadata(init_lora_weights="pissa_niter_4"),
        "init_lora_weights=pissa_niter_4, which changes the base",
    ),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_an_error(case, tmp_path):
    metadata, expected = WRONG_SETTINGS[case]
    save_file(make_tensors(), tmp_path / "lora.safetensors", metadata)
    with pytest.raises(CheckpointError, match=expected) as error:
        read_lora(tmp_path / "lora.safetensors", LATENT)
    assert len(read_message(error)) < 400 + len(str(tmp_path))


def test_wrong_config_of_peft_is_an_error(tmp_path):
    save_file(make_tensors(), tmp_path / "adapter_model.safetensors")
    for content, expected in (
        ("\x00\xff", "adapter_config.json is not a JSON object"),
        (" " * (1 << 23), "is larger than the 4 MB"),
    ):
        (tmp_path / "adapter_config.json").write_text(content, encoding="latin1")
        with pytest.raises(CheckpointError, match=expected) as error:
            read_lora(tmp_path, LATENT)
        read_message(error)
