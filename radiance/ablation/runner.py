"""Training one arm: several seeds at once, in pieces.

`jax.vmap` maps the trainer's own step over states and seeds. A seed has the same in every arm: the images and captions of each
step, times and noise, and the first weights of what the arm shares with the base. A piece that is stopped leaves a checkpoint, from which the
next goes on as if nothing had been.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from radiance import config
from radiance.ablation.data import ImageSet, TextSet, sample_indices
from radiance.base.files import replace_atomically
from radiance.model.transformer import Params, init_params
from radiance.training.checkpoints import Checkpoints
from radiance.training.parameter_groups import merge_params, split_frozen
from radiance.training.progress import Progress
from radiance.training.step import (
    TrainState,
    compute_validation_losses,
    init_state,
    make_train_step,
)

# Seeds are on the first axis of all that differs between them; the step is one number, as checkpoints need it.
SEED_AXES = TrainState(
    step=None, params=0, ema=0, optimizer_state=0, skipped_steps=0, consecutive_skipped_steps=0
)


class TrainingOutcome(NamedTuple):
    state: TrainState
    curve: list[
        tuple[int, list[float]]
    ]  # validation loss of each seed as training went, with the first average
    seconds: float  # of training, validation on the way included, over all pieces


def train_seeds(
    run: config.Config,
    base: config.Config,
    seeds: Sequence[int],
    image_set: ImageSet,
    text_set: TextSet,
    validation_data: tuple[ImageSet, TextSet],
    directory: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingOutcome | None:
    """The state after `run.train.steps`; None when `stop`, asked after every step, said so before, and then the state is saved.

    base: whose first weights are shared, and under whose data and method the validation loss is measured.
    """
    checkpoints, notes = Checkpoints(directory / "checkpoints"), directory / "notes.json"
    first = checkpoints.latest_step or 0
    fresh = partial(init_states, run, base.model, seeds)
    state = checkpoints.restore(first, jax.eval_shape(fresh)) if first else jax.jit(fresh)()
    told = json.loads(notes.read_text()) if notes.is_file() else {"seconds": {}, "curve": []}
    curve = [(step, values) for step, values in told["curve"] if step <= first]
    seconds = {
        int(step): spent for step, spent in told["seconds"].items() if int(step) <= first
    }  # of each piece, by its last step
    pool = jax.device_put((image_set.image, text_set.embeddings, text_set.lengths))
    step = jax.jit(partial(step_seeds, run), donate_argnums=0)
    number, saved, began = first, first, time.monotonic()

    def save():
        nonlocal saved, began
        jax.block_until_ready(state)
        seconds[number], began, saved = time.monotonic() - began, time.monotonic(), number
        with replace_atomically(
            notes
        ) as part:  # before the checkpoint, behind which nothing of them is read
            part.write_text(json.dumps({"seconds": seconds, "curve": curve}) + "\n")
        checkpoints.save(state)
        checkpoints.wait()

    try:
        with closing(
            Progress(first, run.train.steps, run.data.batch_size * len(seeds))
        ) as progress:
            while number < run.train.steps:
                chosen = [
                    sample_indices(seed, number, len(image_set.image), run.data) for seed in seeds
                ]
                state, metrics = step(
                    state, tuple(map(np.stack, zip(*chosen))), np.array(seeds, np.uint32), pool
                )
                number += 1
                if number % run.train.validate_every == 0:
                    losses = measure_validation_losses(
                        run,
                        base,
                        select_average(run, state, run.optimizer.ema_names[0]),
                        *validation_data,
                    )
                    curve.append((number, losses.mean(axis=1).tolist()))
                progress.update(
                    number,
                    {"loss": float(metrics["loss"].mean())}
                    if number % run.train.log_every == 0
                    else {},
                )
                if number - saved >= run.train.checkpoint_every or number == run.train.steps:
                    save()
                elif should_stop():
                    save()
                    return None
    finally:
        checkpoints.close()
    return TrainingOutcome(state, curve, sum(seconds.values()))


def init_states(run: config.Config, shared_model: config.Model, seeds: Sequence[int]) -> TrainState:
    """A state for each seed. Tensors that the network has in common with `shared`, by path and shape, begin as that begins."""

    def of(seed: Int32[Array, ""]) -> TrainState:
        key = jax.random.key(seed)
        return init_state(
            run, share_params(init_params(run.model, key), init_params(shared_model, key))
        )

    return jax.vmap(of, out_axes=SEED_AXES)(jnp.array(seeds, jnp.uint32))


def share_params(params: Params, shared_params: Params) -> Params:
    """`own`, with the tensors of `other` that have the same path and shape."""
    theirs = dict(jax.tree_util.tree_leaves_with_path(shared_params))

    def leaf(path, mine):
        found = theirs.get(path, mine)
        return found if found.shape == mine.shape else mine

    return jax.tree_util.tree_map_with_path(leaf, params)


def step_seeds(
    run: config.Config,
    state: TrainState,
    indices: tuple[Array, Array],
    seeds: Array,
    pool: tuple[Array, Array, Array],
):
    """The training step of all seeds. chosen: rows of the pool, [seeds, b], for images and for texts."""
    (index, said), (image, rows, lengths) = indices, pool
    batch = {
        "image": image[index],
        "text": rows[said],
        "lengths": lengths[said],
        "weight": jnp.ones(index.shape),
    }
    return jax.vmap(make_train_step(run), in_axes=(SEED_AXES, 0, None, 0), out_axes=(SEED_AXES, 0))(
        state, batch, None, seeds
    )


def select_average(run: config.Config, state: TrainState, average: str) -> Params:
    """The averaged weights of all seeds."""
    return merge_params(state.ema[average], split_frozen(state.params, run.optimizer.frozen)[1])


def measure_validation_losses(
    run: config.Config, base: config.Config, params: Params, image_set: ImageSet, text_set: TextSet
) -> Float[np.ndarray, "seeds bins"]:
    """Mean validation loss of every seed over images, in equal bins of time, with the same noise for all seeds, arms and views."""
    validate, count, size = (
        _make_validator(replace(base, model=run.model)),
        len(image_set.image),
        base.data.batch_size,
    )
    total = 0.0
    for part, start in enumerate(range(0, count, size)):
        rows = np.minimum(
            np.arange(start, start + size), count - 1
        )  # a last, shorter batch is filled up
        batch = {
            "image": image_set.image[rows],
            "text": text_set.embeddings[rows],
            "lengths": text_set.lengths[rows],
            "weight": np.ones(size, np.float32),
        }
        total += np.asarray(validate(params, batch, jnp.int32(part)), np.float64)[
            :, : count - start
        ].sum(axis=1)
    return total / count


@lru_cache(maxsize=32)
def _make_validator(run: config.Config) -> Callable[..., Any]:
    return jax.jit(jax.vmap(partial(compute_validation_losses, run), in_axes=(0, None, None)))
