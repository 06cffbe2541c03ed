import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.detect import MODEL_KEY
from radiance.weights.inspect import inspect_file, inspect_model
from tests.helpers.toy_files import LATENT, published, save, sentence
from tests.helpers.toy_t5 import torch_tensors


def test_a_published_model_is_described():
    description = inspect_model(config.MODELS["chroma1-radiance-x0"])
    assert description.splitlines()[0] == "The model is chroma1-radiance-x0."
    total = description.splitlines()[-1].split()
    assert total[0] == "total"
    assert total[-2] == "659"
    assert total[-1].startswith("9,50")
    assert "NeRF head" in description
    assert "modulation" in description


def test_differences_from_the_most_similar_model_are_listed():
    description = inspect_model(replace(config.MODELS["chroma1-base"], single_blocks=7))
    assert description.startswith("The model is chroma1-base with single_blocks=7.")


@pytest.mark.parametrize(
    ("to", "dtype", "expected"),
    [("native", None, "BF16"), ("gguf", "q8_0", "Q8_0"), ("diffusers", None, "BF16")],
)
def test_files_of_all_formats_are_described(to, dtype, expected, tmp_path):
    source = save(tmp_path / "in.safetensors", published(LATENT), LATENT)
    out = tmp_path / {"native": "out.safetensors", "gguf": "out.gguf", "diffusers": "out"}[to]
    convert_checkpoint(open_checkpoint(source), out, to, dtype)
    description = inspect_file(out)
    count = sum(x.size for x in published(LATENT).values())
    assert f": {to if to != 'gguf' else 'GGUF'}, " in description.splitlines()[0]
    assert "channels=8" in description.splitlines()[1]
    assert any(
        line.startswith("double blocks") and expected in line.split()
        for line in description.splitlines()
    )
    assert any(
        line.startswith("total") and line.endswith(f"{count:,}")
        for line in description.splitlines()
    )
    assert f"radiance.origin: {source}" in description


def test_long_metadata_values_are_cut(tmp_path):
    metadata = {
        MODEL_KEY: json.dumps(config.to_dict(LATENT)),
        "license": "Apache-2.0",
        "story": "y" * 1000,
    }
    save_file(published(LATENT), tmp_path / "x.safetensors", metadata)
    description = inspect_file(tmp_path / "x.safetensors").splitlines()
    assert "license: Apache-2.0" in description
    assert f"story: {'y' * 200}…" in description


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (torch_tensors(), "a T5 text encoder."),
        ({"dec_net.cond_embed.weight": np.ones((2, 2), np.float32)}, "Zeta-Chroma"),
        ({"conv.weight": np.ones((2, 2), np.float32)}, "not a known model."),
        ({"x.lora_A.weight": np.ones((2, 2), np.float32)}, "a LoRA."),
        ({"x.lora.down.weight": np.ones((2, 2), np.float32)}, "a LoRA."),
        ({"lora_te1_SelfAttention.q.hada_w1_a": np.ones((2, 2), np.float32)}, "a LoRA."),
        ({"x.lokr_w1": np.ones((2, 2), np.float32)}, "a LoRA."),
    ],
)
def test_files_of_other_kinds_are_described(tensors, kind, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    text = inspect_file(tmp_path / "x.safetensors")
    assert kind in text
    assert "total" in text
    assert f"{sum(x.size for x in tensors.values()):,}" in text


def test_lora_is_described(tmp_path):
    a, b = np.ones((4, 8), np.float32), np.ones((8, 4), np.float32)
    tensors = {
        "transformer.x.lora_A.weight": a,
        "transformer.x.lora_B.weight": b,
        "transformer.y.lora_A.weight": a[:2],
        "transformer.y.lora_B.weight": b[:, :2],
        "transformer.y.dora_scale": b[:, :1],
        "lycoris_z.lokr_w1": a,
        "lycoris_z.lokr_w2": a,
        "lora_te1_q.lora_down.weight": a,
        "strange": a,
    }
    path, metadata = tmp_path / "x.safetensors", {"ss_network_alpha": "16"}
    save_file({key: x.copy() for key, x in tensors.items()}, path, metadata)
    lines = inspect_file(path).splitlines()
    assert lines[:4] == [
        f"{path} is a LoRA.",
        "modules: 1 LoKr, 1 LoRA, 1 DoRA; ranks: 2, 4",
        "for other networks: 1 text encoders, 1 unknown tensors",
        "alpha of modules without a tensor of it: 16",
    ]
    save_file({"x.lora_A.weight": a}, path, {"lora_alpha": "?"})
    assert "lora_alpha='?', which is not a finite number" in inspect_file(path)


def test_a_damaged_file_is_rejected(tmp_path):
    path = save(tmp_path / "x.safetensors", published(LATENT), LATENT)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a complete safetensors file") as error:
        inspect_file(path)
    sentence(error)
