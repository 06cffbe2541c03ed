"""Every experiment and every arm is a config that can be, and takes a step at the size of its arm for a CPU. Found by looking, so that a new
file is covered."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.config.experiments import load_experiment, load_module
from radiance.distributed.sharding import make_mesh
from radiance.flow.distillation import Teacher
from radiance.flow.sampler import TextCondition
from radiance.model.transformer import make_abstract_params
from radiance.text.factory import make_encoder
from radiance.training.step import init_state, make_train_step

FOLDER = Path(__file__).parents[2] / "experiments"
SMALL = ("toy", "rehearsal")  # arms for a CPU
SMALL_FIRST = ("few_steps",)  # before other arms, which change what it says
FOR_A_CPU = ("quickstart", "dilation", "one_shape", "latent_source")  # as they are


def arms(path: Path) -> list[str]:
    return list(getattr(load_module(str(path)), "VARIANTS", {}))


def small(path: Path) -> list[str]:
    """The experiment for a CPU, as it is and behind each of its arms."""
    if path.stem in FOR_A_CPU:
        return [str(path), *(f"{path}:{arm}" for arm in arms(path))]
    found = []
    for small in set(SMALL) & set(arms(path)):
        others = [name for name in arms(path) if name != small]
        pairs = [(small, name) if path.stem in SMALL_FIRST else (name, small) for name in others]
        found += [f"{path}:{':'.join(names)}" for names in [(small,), *pairs]]
    return found


def distinct(names: list[str]) -> list[str]:
    """Those that differ in more than their name and what they start from."""
    return list(
        {replace(load_experiment(name), name="run", init="none"): name for name in names}.values()
    )


PATHS = sorted(FOLDER.glob("*.py"))
NAMES = [str(path) + arm for path in PATHS for arm in ("", *(f":{name}" for name in arms(path)))]
STEPS = distinct([name for path in PATHS for name in small(path)])
COMPILED = [
    next((name for name in STEPS if name.startswith(str(path))), "") for path in PATHS
]  # of the others the step is traced alone


def short(name: str) -> str:
    return Path(name).name


@pytest.mark.parametrize("name", NAMES, ids=short)
def test_it_builds(name):
    run = load_experiment(name)
    assert run.name.replace("-", ":", 1).partition(":")[0] == Path(name.partition(":")[0]).stem
    assert config.from_json(config.Config, config.to_json(run)) == run
    assert all(
        x.size for x in jax.tree.leaves(make_abstract_params(run.model))
    )  # checkpoints cannot hold an empty array
    make_mesh(run.mesh)  # fits one device


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS, ids=short)
def test_it_takes_a_step(name):
    run = load_experiment(name)
    run = replace(
        run,
        optimizer=replace(run.optimizer, warmup_steps=0),
        data=replace(run.data, batch_size=2 * run.optimizer.gradient_accumulation_steps),
    )
    assert run.text.encoder == "hash"
    draw, count = np.random.default_rng(0), run.data.batch_size
    text, lengths = make_encoder(run.text, run.model.text_dim)(["a red cat"] * count)
    if run.data.dropped_caption == "masked":
        lengths[0] = 0
    ways = (run.distill.segments,) if run.distill.kind == "trajectories" else ()
    image = draw.uniform(
        -1, 1, (count, *ways, run.data.resolution, run.data.resolution, run.model.channels)
    ).astype(np.float32)
    batch = {
        "image": image,
        "text": text,
        "lengths": lengths,
        "weight": np.ones(count, np.float32),
        "seed": np.arange(count),
    }

    def weights(wanted: bool):
        return (
            jax.tree.map(
                lambda x: 0.05 * draw.standard_normal(x.shape, np.float32),
                make_abstract_params(run.model),
            )
            if wanted
            else None
        )

    others = (
        weights(run.lora.rank > 0),
        None,
        Teacher(weights(run.distill.needs_teacher), TextCondition(text[:1], lengths[:1])),
    )
    if name not in COMPILED:
        jax.eval_shape(
            make_train_step(run), jax.eval_shape(lambda: init_state(run)), batch, *others
        )
        return

    @jax.jit
    def first(params, batch, *others):
        state = init_state(run, params)
        after, metrics = make_train_step(run)(state, batch, *others)
        return metrics, jnp.stack(
            [
                (x != y).any()
                for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params))
            ]
        )

    metrics, moved = first(
        weights(not run.lora.rank), batch, *others
    )  # fresh ones have gates of 0, behind which nothing learns
    assert np.isfinite(metrics["loss"])
    assert metrics["loss"] > 0
    assert metrics["skipped"] == 0
    assert moved.any(), "no parameter has moved"


def test_every_experiment_but_the_quickstart_has_an_arm_for_a_cpu():
    assert {Path(name.partition(":")[0]).name for name in STEPS} == {path.name for path in PATHS}
