import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.evaluation.verify import verify_golden_file
from radiance.weights import native
from radiance.weights.detect import detect_model

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL_NAMES = {
    "chroma1_base": "chroma1-base",
    "chroma1_radiance": "chroma1-radiance",
    "chroma1_radiance_x0": "chroma1-radiance-x0",
    "chroma1_radiance_x0_patch32": "chroma1-radiance-x0-patch32",
    "flux1_schnell": "flux1-schnell",
}
PARAMETERS = {"chroma1_base": 8.900e9, "flux1_schnell": 11.891e9}  # the pixel models: 9.506e9


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def test_outputs_agree_with_the_published_code(path):
    results = verify_golden_file(path)
    assert {r.output for r in results} == {"velocity", "sampled"} & set(load_file(path))
    for r in results:
        assert r.is_within_tolerance, r
        if r.output == "velocity":
            assert r.error < 2e-5, r


def test_coarse_rounding_is_not_tolerated():
    """Rounding to bfloat16 moves sampled images far, but the tolerance has a limit."""
    results = verify_golden_file(
        GOLDEN / "radiance_x0.safetensors", config.Compute(dtype="bfloat16")
    )
    assert not any(r.is_within_tolerance for r in results)
    assert all(r.tolerance <= 1e-3 for r in results)


def test_all_golden_files_exist():
    assert len(list(GOLDEN.glob("*.safetensors"))) == 7
    assert {path.name.removesuffix(".keys.json") for path in GOLDEN.glob("*.json")} == set(
        MODEL_NAMES
    )


@pytest.mark.parametrize(
    "changed_tensor", ["velocity", "params.double_blocks.1.txt_mlp.0.bias", "nan"]
)
def test_a_small_difference_is_detected(changed_tensor, tmp_path):
    """One value of the reference, or of the weights, is off by a thousandth."""
    path = GOLDEN / "flux_modulation.safetensors"
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    if changed_tensor == "nan":
        tensors["velocity"].flat[5] = np.nan
    else:
        tensors[changed_tensor].flat[5] += (
            1e-3 * np.abs(tensors["velocity"]).max() if changed_tensor == "velocity" else 0.1
        )
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    (result,) = verify_golden_file(tmp_path / "x.safetensors")
    assert not result.is_within_tolerance, result


def test_other_files_are_errors(tmp_path):
    save_file({"velocity": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a golden file"):
        verify_golden_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("file", MODEL_NAMES)
def test_full_size_models_have_the_published_keys(file):
    published = {
        name: tuple(shape)
        for name, shape in json.loads((GOLDEN / f"{file}.keys.json").read_text()).items()
    }
    model = config.MODELS[MODEL_NAMES[file]]
    shapes, sources = native.native_layout(model)
    assert shapes == published
    assert set(sources) == {name for name in shapes if not name.startswith("__")}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert round(count / 1e6) == round(PARAMETERS.get(file, 9.506e9) / 1e6)
    assert detect_model(published) == model
