"""Every experiment and every variant is a valid config, and takes a step at toy size.

Experiments are found by listing the folder, so that a new file is covered.
"""

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
from radiance.training.seeds import make_seeds_step
from radiance.training.step import init_state

FOLDER = Path(__file__).parents[2] / "experiments"
TOYS = ("toy", "rehearsal")  # variants for a CPU
TOY_FIRST = ("few_steps",)  # the toy comes before other variants, which change its settings
CPU_EXPERIMENTS = ("quickstart", "dilation", "one_shape", "latent_source")


def list_variants(path: Path) -> list[str]:
    return list(getattr(load_module(str(path)), "VARIANTS", {}))


def list_toys(path: Path) -> list[str]:
    """Return names of the experiment for a CPU, alone and combined with each variant."""
    if path.stem in CPU_EXPERIMENTS:
        return [str(path), *(f"{path}:{name}" for name in list_variants(path))]
    names = []
    for toy in set(TOYS) & set(list_variants(path)):
        others = [name for name in list_variants(path) if name != toy]
        pairs = [(toy, name) if path.stem in TOY_FIRST else (name, toy) for name in others]
        names += [f"{path}:{':'.join(variants)}" for variants in [(toy,), *pairs]]
    return names


def drop_duplicates(names: list[str]) -> list[str]:
    """Keep configs that differ in more than name and init."""
    return list(
        {replace(load_experiment(name), name="run", init="none"): name for name in names}.values()
    )


PATHS = sorted(FOLDER.glob("*.py"))
NAMES = [
    str(path) + variant
    for path in PATHS
    for variant in ("", *(f":{name}" for name in list_variants(path)))
]
STEPS = drop_duplicates([name for path in PATHS for name in list_toys(path)])
COMPILED = [
    next((name for name in STEPS if name.startswith(str(path))), "") for path in PATHS
]  # the steps of the others are only traced


def file_name(name: str) -> str:
    return Path(name).name


@pytest.mark.parametrize("name", NAMES, ids=file_name)
def test_config_is_valid(name):
    run = load_experiment(name)
    assert run.name.replace("-", ":", 1).partition(":")[0] == Path(name.partition(":")[0]).stem
    assert config.from_json(config.Config, config.to_json(run)) == run
    assert all(
        x.size for x in jax.tree.leaves(make_abstract_params(run.model))
    )  # checkpoints cannot store empty arrays
    make_mesh(run.mesh)  # fits one device


def test_the_model_that_loras_are_rehearsed_on_has_open_gates():
    """A frozen approximator from scratch keeps them at 0, and no LoRA would have an effect."""
    assert load_experiment(f"{FOLDER}/finetune.py").optimizer.frozen == ("modulation",)
    assert load_experiment(f"{FOLDER}/finetune.py:rehearsal").optimizer.frozen == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS, ids=file_name)
def test_train_step(name):
    run = load_experiment(name)
    run = replace(
        run,
        optimizer=replace(run.optimizer, warmup_steps=0),
        data=replace(run.data, batch_size=2 * run.optimizer.gradient_accumulation_steps),
    )
    assert run.text.encoder == "hash"
    rng, count = np.random.default_rng(0), run.data.batch_size
    text, lengths = make_encoder(run.text, run.model.text_dim)(["a red cat"] * count)
    if run.data.dropped_caption == "masked":
        lengths[0] = 0
    segments = (run.distill.segments,) if run.distill.kind == "trajectories" else ()
    image = rng.uniform(
        -1, 1, (count, *segments, run.data.resolution, run.data.resolution, run.model.channels)
    ).astype(np.float32)
    batch = {
        "image": image,
        "text": text,
        "lengths": lengths,
        "weight": np.ones(count, np.float32),
        "seed": np.arange(count),
    }

    def random_params(needed: bool):
        return (
            jax.tree.map(
                lambda x: 0.05 * rng.standard_normal(x.shape, np.float32),
                make_abstract_params(run.model),
            )
            if needed
            else None
        )

    others = (
        random_params(run.lora.rank > 0),
        None,
        Teacher(random_params(run.distill.needs_teacher), TextCondition(text[:1], lengths[:1])),
    )
    if name not in COMPILED:
        jax.eval_shape(
            make_seeds_step(run, 1), jax.eval_shape(lambda: init_state(run)), batch, *others
        )
        return

    @jax.jit
    def first(params, batch, *others):
        state = init_state(run, params)
        after, metrics = make_seeds_step(run, 1)(state, batch, *others)
        return metrics, jnp.stack(
            [
                (x != y).any()
                for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params))
            ]
        )

    metrics, has_changed = first(
        random_params(not run.lora.rank), batch, *others
    )  # fresh params have gates of 0 and would not train
    assert np.isfinite(metrics["loss"])
    assert metrics["loss"] > 0
    assert metrics["skipped_steps"] == 0
    assert has_changed.any(), "no parameter has changed"


def test_every_experiment_has_a_toy():
    assert {Path(name.partition(":")[0]).name for name in STEPS} == {path.name for path in PATHS}
