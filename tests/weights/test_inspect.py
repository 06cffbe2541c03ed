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


def test_a_published_size():
    told = inspect_model(config.MODELS["chroma1-radiance-x0"])
    assert told.splitlines()[0] == "The model is chroma1-radiance-x0."
    together = told.splitlines()[-1].split()
    assert together[0] == "total"
    assert together[-2] == "659"
    assert together[-1].startswith("9,50")
    assert "NeRF head" in told
    assert "modulation" in told


def test_what_differs_from_the_nearest_size_is_told():
    told = inspect_model(replace(config.MODELS["chroma1-base"], single_blocks=7))
    assert told.startswith("The model is chroma1-base with single_blocks=7.")


@pytest.mark.parametrize(
    ("to", "dtype", "expected"),
    [("native", None, "BF16"), ("gguf", "q8_0", "Q8_0"), ("diffusers", None, "BF16")],
)
def test_a_file(to, dtype, expected, tmp_path):
    source = save(tmp_path / "in.safetensors", published(LATENT), LATENT)
    out = tmp_path / {"native": "out.safetensors", "gguf": "out.gguf", "diffusers": "out"}[to]
    convert_checkpoint(open_checkpoint(source), out, to, dtype)
    told = inspect_file(out)
    count = sum(x.size for x in published(LATENT).values())
    assert f": {to if to != 'gguf' else 'GGUF'}, " in told.splitlines()[0]
    assert "channels=8" in told.splitlines()[1]
    assert any(
        line.startswith("double blocks") and expected in line.split() for line in told.splitlines()
    )
    assert any(
        line.startswith("total") and line.endswith(f"{count:,}") for line in told.splitlines()
    )
    assert f"radiance.origin: {source}" in told


def test_long_metadata_is_cut(tmp_path):
    notes = {
        MODEL_KEY: json.dumps(config.to_dict(LATENT)),
        "license": "Apache-2.0",
        "story": "y" * 1000,
    }
    save_file(published(LATENT), tmp_path / "x.safetensors", notes)
    told = inspect_file(tmp_path / "x.safetensors").splitlines()
    assert "license: Apache-2.0" in told
    assert f"story: {'y' * 200}…" in told


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (torch_tensors(), "a T5 text encoder."),
        ({"dec_net.cond_embed.weight": np.ones((2, 2), np.float32)}, "Zeta-Chroma"),
        ({"conv.weight": np.ones((2, 2), np.float32)}, "not a known model."),
        ({"x.lora_A.weight": np.ones((2, 2), np.float32)}, "a LoRA."),
    ],
)
def test_other_files(tensors, told, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    text = inspect_file(tmp_path / "x.safetensors")
    assert told in text
    assert "total" in text
    assert f"{sum(x.size for x in tensors.values()):,}" in text


def test_a_damaged_file(tmp_path):
    path = save(tmp_path / "x.safetensors", published(LATENT), LATENT)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a complete safetensors file") as error:
        inspect_file(path)
    sentence(error)
