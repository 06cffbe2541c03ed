"""Every experiment is what it says: it builds with all its arms, and its smallest takes a step."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import same

from radiance import config
from radiance.cli import experiment
from radiance.text.encoders import HashEncoder
from radiance.training.step import init_state, make_step

FILES = sorted(Path(__file__).parents[1].glob("experiments/*.py"))
SMALL = ("toy", "rehearsal")  # arms for a CPU


def arms(path: Path) -> list[str]:
    return list(runpy.run_path(str(path)).get("ARMS", {}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_builds(path):
    assert experiment(str(path)).name
    for arm in arms(path):
        assert experiment(f"{path}:{arm}").name.endswith(f"-{arm}")
    assert f"radiance train experiments/{path.name}" in path.read_text()  # its docstring says how to run it
    assert path.stem == "quickstart" or {*SMALL} & {*arms(path)}


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem != "lora"], ids=lambda path: path.stem
)  # which needs weights to add to
def test_its_smallest_takes_a_step(path):
    run = experiment(":".join([str(path), *(arm for arm in arms(path) if arm in SMALL)]))
    run = config.override(run, ["data.batch=2", "optimizer.accumulate=1"])
    draw, side = np.random.default_rng(0), run.data.side
    text, lengths = HashEncoder(run.model.text_dim, run.text.length)(["a cat", ""])
    if run.data.dropout_to == "masked":
        lengths[1] = 0
    image = draw.uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    state = init_state(run)
    after, metrics = jax.jit(make_step(run))(state, {"image": image, "text": text, "lengths": lengths, "weight": np.ones(2, np.float32)})
    assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0 and not same(state.params, after.params)
