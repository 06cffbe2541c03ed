"""Train several seeds together: states of runs that differ only in the seed, on a leading axis."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from radiance import config
from radiance.base.errors import ConfigError
from radiance.data.batches import Batch
from radiance.distributed.sharding import BATCH_AXES, put_batch
from radiance.model.transformer import Params
from radiance.training.matching import make_matching_step
from radiance.training.step import DeviceBatch, TrainState, init_state, make_train_step

# Seeds are on the first axis of everything that differs between them. All share one step.
STACKED_FIELDS = tuple(field.name for field in fields(TrainState) if field.name != "step")
SEED_AXES = TrainState(**{"step": None, **dict.fromkeys(STACKED_FIELDS, 0)})

InitParams = Callable[[jax.Array], Params]  # initial weights from a random key


def check_seeds(runs: Sequence[config.Config]):
    """Raise ConfigError if several runs cannot be trained together."""
    if len(runs) == 1:
        return
    first = runs[0]
    for run in runs[1:]:
        shared = replace(run, name=first.name, train=replace(run.train, seed=first.train.seed))
        if shared != first or run.name == first.name or run.train.seed == first.train.seed:
            raise ConfigError(
                f"{run.name} and {first.name} cannot be trained together: runs of a group must "
                "differ in name and train.seed, and in nothing else."
            )
    if first.data.bucket_step or first.data.extra_resolutions:
        raise ConfigError(
            "Seeds that are trained together need images of one shape: leave data.bucket_step and "
            "data.extra_resolutions out."
        )
    if first.optimizer.block_rotation != (0, 0):
        raise ConfigError(
            "optimizer.block_rotation follows train.seed, which differs between seeds that are "
            "trained together: leave it out."
        )


def init_states(
    run: config.Config,
    seeds: Sequence[int],
    params: Params | None = None,
    init_params: InitParams | None = None,
) -> TrainState:
    """Initialize the state before the first step; states of several seeds are stacked.

    Args:
        run: Config of the runs.
        seeds: Seed of each run.
        params: Initial weights of all seeds; random ones if None.
        init_params: Initial weights from a random key, in place of those of the model.
    """

    def init_seed(seed: jax.Array | int) -> TrainState:
        key = jax.random.key(seed)
        return init_state(run, init_params(key) if init_params else params, key)

    if len(seeds) == 1:
        return init_seed(seeds[0])
    return jax.vmap(init_seed, out_axes=SEED_AXES)(jnp.array(seeds, jnp.uint32))


def make_seeds_step(run: config.Config, num_seeds: int) -> Callable[..., Any]:
    """Return the training step of one seed, or of several that are mapped over the leading axis.

    Its arguments are those of `make_train_step`; `seed` is None for one, else an array of seeds.
    """
    step = make_matching_step(run) if run.distill.has_fake_score else make_train_step(run)
    if num_seeds == 1:
        return step
    map_seeds = jax.vmap(step, in_axes=(SEED_AXES, 0, None, 0, None), out_axes=(SEED_AXES, 0))

    def step_seeds(state, batch, base=None, seeds=None, teacher=None):
        # Images without weights count equally. Constant weights let the compiler simplify the step.
        weights = {"weight": jnp.ones(batch["lengths"].shape)}
        return map_seeds(state, weights | batch, base, seeds, teacher)

    return step_seeds


def select_seed(state: TrainState, index: int) -> TrainState:
    """Return the state of one seed from a stacked state."""
    return replace(
        state,
        **{name: jax.tree.map(lambda x: x[index], getattr(state, name)) for name in STACKED_FIELDS},
    )


def stack_states(states: Sequence[TrainState], shardings: TrainState | None = None) -> TrainState:
    """Return a stacked state of several seeds, which have done the same steps.

    Args:
        states: State of each seed.
        shardings: Shardings of the result; those of the arguments if None.
    """

    def stack(*states: TrainState) -> TrainState:
        return replace(
            states[0],
            **{
                name: jax.tree.map(
                    lambda *leaves: jnp.stack(leaves), *(getattr(s, name) for s in states)
                )
                for name in STACKED_FIELDS
            },
        )

    return jax.jit(stack, out_shardings=shardings)(*states)


def select_abstract_seed(state: TrainState) -> TrainState:
    """Return shapes and shardings of one seed from those of a stacked state."""

    def drop_axis(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = x.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

    return replace(
        state,
        **{name: jax.tree.map(drop_axis, getattr(state, name)) for name in STACKED_FIELDS},
    )


def put_batches(batches: Sequence[Batch], mesh: jax.sharding.Mesh, batch_size: int) -> DeviceBatch:
    """Return the global batch of one seed, or of several on a leading axis, on the devices.

    Args:
        batches: This host's rows of the batch of each seed.
        mesh: Mesh whose `data` and `fsdp` axes shard the rows.
        batch_size: Number of rows of a global batch.
    """
    if len(batches) == 1:
        return put_batch(batches[0], mesh, batch_size)
    text_length = max(batch["text"].shape[1] for batch in batches)
    batches = [batch | {"text": _pad_text(batch["text"], text_length)} for batch in batches]
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    put = partial(jax.make_array_from_process_local_data, sharding)
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    return {name: put(x, (len(batches), batch_size, *x.shape[2:])) for name, x in stacked.items()}


def _pad_text(text: np.ndarray, length: int) -> np.ndarray:
    """Pad embeddings [b, l, e] with zeros; batches are cut only where no token is visible."""
    return np.pad(text, ((0, 0), (0, length - text.shape[1]), (0, 0)))
