"""The same numbers on every mesh: 8 fake devices against one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.mesh_process import CASES, MESHES
from tests.helpers.toy_runs import environment_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    out = tmp_path_factory.mktemp("mesh") / "out.npz"
    script = Path(__file__).parents[1] / "helpers" / "mesh_process.py"
    done = subprocess.run(
        [sys.executable, str(script), str(out)],
        env=environment_of(8),
        cwd=script.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return np.load(out)


@pytest.mark.parametrize("mesh", MESHES)
def test_training(mesh, computed):
    np.testing.assert_allclose(computed[f"{mesh}/losses"], computed["one/losses"], rtol=1e-5)
    for key in computed.files:
        if key.startswith("one/params/"):
            np.testing.assert_allclose(
                computed[key.replace("one", mesh)], computed[key], rtol=0, atol=2e-4
            )


@pytest.mark.parametrize(
    ("mesh", "store", "batch"),
    [*((mesh, *CASES[0]) for mesh in MESHES), *(("2x2x2", *case) for case in CASES[1:])],
)
def test_sampling(mesh, store, batch, computed):
    expected = computed[f"one/{store}/{batch}"].astype(int)
    assert expected.std() > 5
    assert np.abs(computed[f"{mesh}/{store}/{batch}"].astype(int) - expected).max() <= 1


def test_a_image_does_not_depend_on_how_many_are_painted_at_once(computed):
    assert np.abs(computed["one/None/8"].astype(int) - computed["one/None/3"]).max() <= 1
