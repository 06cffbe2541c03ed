"""Results are the same on every mesh: 8 fake devices against one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.mesh_process import MESHES, SAMPLING_CASES
from tests.helpers.toy_runs import environment_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The arrays that tests/helpers/mesh_process.py writes."""
    out = tmp_path_factory.mktemp("mesh") / "out.npz"
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-m", "tests.helpers.mesh_process", str(out)],
        env=environment_of(8),
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return np.load(out)


@pytest.mark.parametrize("mesh", MESHES)
def test_training_does_not_depend_on_the_mesh(mesh, results):
    np.testing.assert_allclose(results[f"{mesh}/losses"], results["one/losses"], rtol=1e-5)
    for key in results.files:
        if key.startswith("one/params/"):
            params = results[key.replace("one", mesh)]
            np.testing.assert_allclose(params, results[key], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("mesh", "weight_format", "batch_size"),
    [
        *((mesh, *SAMPLING_CASES[0]) for mesh in MESHES),
        *(("2x2x2", *case) for case in SAMPLING_CASES[1:]),
    ],
)
def test_sampling_does_not_depend_on_the_mesh(mesh, weight_format, batch_size, results):
    expected = results[f"one/{weight_format}/{batch_size}"].astype(int)
    assert expected.std() > 5
    images = results[f"{mesh}/{weight_format}/{batch_size}"].astype(int)
    assert np.abs(images - expected).max() <= 1


def test_an_image_does_not_depend_on_the_batch_size(results):
    assert np.abs(results["one/None/8"].astype(int) - results["one/None/3"]).max() <= 1
