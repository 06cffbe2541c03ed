"""The optimizer, what it leaves alone, the averages of the weights, and rounding that does not lose small changes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from radiance import config
from radiance.model.transformer import Params
from radiance.training.adam import scale_by_adam
from radiance.training.muon import scale_by_muon_and_adam
from radiance.training.parameter_groups import scale_by_path


def make_lr_schedule(optimizer: config.Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or a cosine to 0 at `steps`."""
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.lr_schedule == "cosine":
        main_schedule = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    else:
        main_schedule = optax.constant_schedule(peak)
    # Step 0 is the first of the warm-up, not a step of length 0.
    return optax.join_schedules(
        [lambda step: peak * (step + 1) / (warmup + 1), main_schedule], [warmup]
    )


def make_optimizer(optimizer: config.Optimizer, steps: int) -> optax.GradientTransformation:
    """Clip, Adam or Muon, decoupled weight decay on matrices, and learning rates."""
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        scale_by_muon_and_adam(optimizer) if optimizer.kind == "muon" else scale_by_adam(optimizer),
        optax.add_decayed_weights(optimizer.weight_decay, mask=_is_matrix),
        *([scale_by_path(optimizer.lr_multiplier_by_path)] if optimizer.lr_multipliers else []),
        optax.scale_by_learning_rate(make_lr_schedule(optimizer, steps)),
    )


def reset_moments(
    state: optax.OptState, initial_state: optax.OptState, should_reset: Bool[Array, ""]
) -> optax.OptState:
    """The state of `make_optimizer` with moments from the beginning where `now`; the learning rate goes on."""
    clip_state, moments, *other_states = state
    return (
        clip_state,
        jax.tree.map(lambda old, new: jnp.where(should_reset, new, old), moments, initial_state[1]),
        *other_states,
    )


def _is_matrix(params: Params) -> Any:
    """Norms, biases, registers and tables of vectors are not decayed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "down", "up"), params
    )
