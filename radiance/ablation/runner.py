"""Train the seeds of a variant together, by the trainer that trains every run.

A seed has the same images, captions, times and noise in every variant, and the same first weights
of everything that the variant shares with the base. Each seed has its own run directory.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax

from radiance import config
from radiance.ablation.data import ImageSet, PoolBatches, TextSet
from radiance.ablation.metrics import measure_validation_losses
from radiance.base.files import replace_atomically
from radiance.base.json_files import read_json
from radiance.model.transformer import Params, init_params
from radiance.training.inputs import DataFeed, prepare
from radiance.training.loop import fit
from radiance.training.run_directory import RunDirectory
from radiance.training.seeds import InitParams
from radiance.training.step import TrainState


class TrainingOutcome(NamedTuple):
    """The result of training a variant with all seeds.

    Attributes:
        state: State of all seeds, on a leading axis.
        curve: Validation losses of the seeds during training, by step.
        seconds: Time of training with validation, samples and checkpoints, over all starts.
    """

    state: TrainState
    curve: list[tuple[int, list[float]]]
    seconds: float


def train_seeds(
    run: config.Config,
    base: config.Config,
    seeds: Sequence[int],
    train_data: tuple[ImageSet, TextSet],
    validation_data: tuple[ImageSet, TextSet],
    folder: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingOutcome | None:
    """Train several seeds together, or resume them; return None if `should_stop` ended it before.

    Args:
        run: Config of the variant; its name and seed are not used.
        base: Config of the base, whose first weights are shared and whose data and objective
            measure the validation loss.
        seeds: Seed of each run.
        train_data: Images and captions to sample from.
        validation_data: Images and captions of the validation loss.
        folder: Folder of the run directories.
        should_stop: Called after every step; the state is saved when it returns true.
    """
    feed = DataFeed(
        make_batches=lambda seed_run: PoolBatches(seed_run, *train_data),
        validate=lambda params: measure_validation_losses(run, base, params, *validation_data),
        init_params=make_init_params(run.model, base.model),
        num_images=len(train_data[0].image),
        metadata={"pool": {"num_images": len(train_data[0].image)}},
    )
    inputs = prepare(make_runs(run, seeds, folder), feed)
    start_time = time.monotonic()
    step, state = fit(inputs, should_stop)
    seconds = _add_seconds(folder / "seconds.json", time.monotonic() - start_time)
    if step < run.train.steps:
        return None
    return TrainingOutcome(state, read_curve(inputs.directories), seconds)


def make_runs(run: config.Config, seeds: Sequence[int], folder: Path) -> list[config.Config]:
    """Return a run for each seed, with a directory of its own in `folder`."""
    return [
        replace(run, name=f"seed_{seed}", output=str(folder), train=replace(run.train, seed=seed))
        for seed in seeds
    ]


@lru_cache(maxsize=8)  # so that seeds that are resumed in one process share compiled programs
def make_init_params(model: config.Model, base_model: config.Model) -> InitParams:
    """Return a function from a random key to first weights that are shared with the base."""

    def init(key: jax.Array) -> Params:
        return share_params(init_params(model, key), init_params(base_model, key))

    return init


def share_params(params: Params, shared_params: Params) -> Params:
    """Return `params` with the tensors of `shared_params` that have the same path and shape."""
    shared_leaves = dict(jax.tree_util.tree_leaves_with_path(shared_params))

    def select_leaf(path, leaf):
        shared_leaf = shared_leaves.get(path, leaf)
        return shared_leaf if shared_leaf.shape == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(select_leaf, params)


def read_curve(directories: Sequence[RunDirectory]) -> list[tuple[int, list[float]]]:
    """Return the validation losses of the seeds by step, from their run directories."""
    losses_by_seed = [
        {
            row["step"]: row["validation_loss"]
            for row in directory.read_metrics()
            if "validation_loss" in row
        }
        for directory in directories
    ]
    return [
        (step, [losses[step] for losses in losses_by_seed]) for step in sorted(losses_by_seed[0])
    ]


def _add_seconds(file: Path, seconds: float) -> float:
    """Add the time of this start to that of earlier ones, and return the sum."""
    remedy = "remove it; the cost in the result will lack the time before"
    total = seconds + (read_json(file, float, remedy) if file.is_file() else 0.0)
    with replace_atomically(file) as partial_path:
        partial_path.write_text(f"{total}\n", "utf-8")
    return total
