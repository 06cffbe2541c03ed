"""The optimizer: clipping, Adam or Muon, weight decay and the learning-rate schedule."""

from dataclasses import replace
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
    """Make the learning-rate schedule: linear warm-up from 0, then constant or a cosine to 0.

    Args:
        optimizer: Settings.
        steps: Step at which the cosine reaches 0.

    Returns:
        A function from the step to the learning rate.
    """
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.lr_schedule == "cosine":
        main_schedule = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    else:
        main_schedule = optax.constant_schedule(peak)
    # Step 0 is the first of the warm-up, and its learning rate is not 0.
    return optax.join_schedules(
        [lambda step: peak * (step + 1) / (warmup + 1), main_schedule], [warmup]
    )


def make_optimizer(optimizer: config.Optimizer, steps: int) -> optax.GradientTransformation:
    """Make the optimizer: clipping, Adam or Muon, decoupled weight decay, learning rates.

    Args:
        optimizer: Settings.
        steps: Number of steps of the run, for the learning-rate schedule.

    Returns:
        The transformation from gradients to updates.
    """
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        scale_by_muon_and_adam(optimizer) if optimizer.kind == "muon" else scale_by_adam(optimizer),
        optax.add_decayed_weights(optimizer.weight_decay, mask=_is_matrix),
        *([scale_by_path(optimizer.lr_multiplier_by_path)] if optimizer.lr_multipliers else []),
        optax.scale_by_learning_rate(make_lr_schedule(optimizer, steps)),
    )


def make_fake_optimizer(run: config.Config) -> optax.GradientTransformation:
    """Make the optimizer of the fake score: that of the run, at its own learning rate."""
    learning_rate = run.optimizer.learning_rate * run.distill.fake_lr_multiplier
    settings = replace(run.optimizer, learning_rate=learning_rate)
    return make_optimizer(settings, run.train.steps)


def reset_moments(state: Any, initial_state: Any, should_reset: Bool[Array, ""]) -> Any:
    """Reset the moments of `make_optimizer`; the learning-rate schedule continues.

    Args:
        state: The optimizer's state.
        initial_state: Its initial state.
        should_reset: Whether to reset.

    Returns:
        The new state.
    """
    clip_state, moments, *other_states = state
    return (
        clip_state,
        jax.tree.map(lambda old, new: jnp.where(should_reset, new, old), moments, initial_state[1]),
        *other_states,
    )


def _is_matrix(params: Params) -> Any:
    """Mark the matrices: norms, biases, registers and tables of vectors do not decay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "down", "up"), params
    )
