"""The training step of `distill.kind=distribution_matching`: the fake score, then the student.

Both are LoRAs beside the same base weights. `flow/distribution_matching.py` has the losses.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PRNGKeyArray, UInt32

from radiance import config
from radiance.flow import distribution_matching
from radiance.flow.distillation import Teacher
from radiance.model.transformer import Params, Transformer, bind_model
from radiance.training.ema import update_averages
from radiance.training.gradients import (
    cast_to_float32,
    differentiate_losses,
    split_microbatches,
)
from radiance.training.optimizer import make_fake_optimizer, make_optimizer
from radiance.training.step import (
    DeviceBatch,
    FakeScore,
    Metrics,
    TrainState,
    advance_state,
    assemble_params,
    compute_image_losses,
)
from radiance.training.stochastic_rounding import stochastic_round


class _StudentContext(NamedTuple):
    """Everything that the student's loss depends on, except the student and the batch."""

    base: Params
    fake_adapters: Params
    negative_condition: Any


def make_matching_step(run: config.Config) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the training step: (state, batch, base, seed, teacher) → (state, metrics).

    The arguments are those of `make_train_step`; `teacher` holds the negative condition alone,
    because the teacher is `base`. The student learns from the fake score after its update. A step
    of which any loss or gradient is not finite changes neither.
    """
    optimizer = make_optimizer(run.optimizer, run.train.steps)
    fake_optimizer = make_fake_optimizer(run)

    def step(
        state: TrainState,
        batch: DeviceBatch,
        base: Params,
        seed: UInt32[Array, ""] | None = None,
        teacher: Teacher | None = None,
    ) -> tuple[TrainState, Metrics]:
        assert state.fake_score is not None
        assert teacher is not None
        key = jax.random.fold_in(
            jax.random.key(run.train.seed if seed is None else seed), state.step
        )
        noise_key, fake_key, student_key = jax.random.split(key, 3)
        trajectory = sample_trajectories(run, state.params, base, batch, noise_key)
        batch = batch | {"trajectory": trajectory}
        fake_score, fake_metrics = _update_fake_score(
            run, fake_optimizer, state.fake_score, base, batch, fake_key
        )
        context = _StudentContext(base, fake_score.params, teacher.negative_condition)
        params, ema, optimizer_state, metrics = _update_student(
            run, optimizer, state, context, batch, student_key
        )

        # A step that is not finite keeps the old ones.
        fake_norm = fake_metrics["gradient_norm"]
        numbers = [metrics["loss"], metrics["gradient_norm"], fake_metrics["loss"], fake_norm]
        is_finite = jnp.isfinite(jnp.stack(numbers)).all()
        params, ema, optimizer_state, fake_score = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (params, ema, optimizer_state, fake_score),
            (state.params, state.ema, state.optimizer_state, state.fake_score),
        )
        metrics["gradient_norms"]["fake_score"] = fake_norm
        metrics["fake_loss"] = fake_metrics["loss"]
        new_state, metrics = advance_state(state, params, ema, optimizer_state, is_finite, metrics)
        return replace(new_state, fake_score=fake_score), metrics

    return step


def _update_fake_score(
    run: config.Config,
    optimizer: optax.GradientTransformation,
    fake_score: FakeScore,
    base: Params,
    batch: DeviceBatch,
    key: PRNGKeyArray,
) -> tuple[FakeScore, Metrics]:
    """Return the fake score after an update by the flow's loss for the student's images."""
    renoise_key, weights_key = jax.random.split(key)
    loss, gradients = differentiate_losses(
        run,
        partial(_compute_fake_losses, run),
        fake_score.params,
        base,
        distribution_matching.renoise_trajectories(run, batch, renoise_key),
    )
    params, optimizer_state = _apply_gradients(
        optimizer, gradients, fake_score.optimizer_state, fake_score.params
    )
    params = stochastic_round(weights_key, params, fake_score.params)
    metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
    return FakeScore(params, optimizer_state), metrics


def _update_student(
    run: config.Config,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    context: _StudentContext,
    batch: DeviceBatch,
    key: PRNGKeyArray,
) -> tuple[Params, dict[str, Params], Any, Metrics]:
    """Return the student, its averages and its optimizer's state after an update."""
    renoise_key, weights_key, ema_key = jax.random.split(key, 3)
    loss, gradients = differentiate_losses(
        run,
        partial(_compute_student_losses, run),
        state.params,
        context,
        distribution_matching.renoise_trajectories(run, batch, renoise_key),
    )
    params, optimizer_state = _apply_gradients(
        optimizer, gradients, state.optimizer_state, state.params
    )
    ema = update_averages(state.ema, params, state.step, ema_key)
    params = stochastic_round(weights_key, params, state.params)
    norms = {part: optax.tree.norm(gradient) for part, gradient in gradients.items()}
    metrics = {"loss": loss, "gradient_norm": optax.tree.norm(norms), "gradient_norms": norms}
    return params, ema, optimizer_state, metrics


def _apply_gradients(
    optimizer: optax.GradientTransformation, gradients: Params, optimizer_state: Any, params: Params
) -> tuple[Params, Any]:
    """Return the parameters after an update, in float32, and the optimizer's state."""
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.tree.add(cast_to_float32(params), updates), optimizer_state


def sample_trajectories(
    run: config.Config, adapters: Params, base: Params, batch: DeviceBatch, key: PRNGKeyArray
) -> Float32[Array, "b times height width c"]:
    """Sample a trajectory of the student for each caption, a microbatch at a time.

    Args:
        run: Config of the run.
        adapters: The student's adapters.
        base: The base weights.
        batch: Batch of captions.
        key: Random key of the noise.
    """
    student = _bind(run, adapters, base)
    resolution, channels = run.data.resolution, run.model.channels
    noise_shape = (len(batch["lengths"]), resolution, resolution, channels)
    inputs = {
        "noise": run.flow.noise_scale * jax.random.normal(key, noise_shape),
        "text": batch["text"],
        "lengths": batch["lengths"],
    }

    def sample(microbatch: DeviceBatch) -> Float32[Array, "b times height width c"]:
        return distribution_matching.sample_student_trajectory(
            run, student, microbatch, microbatch["noise"]
        )

    num_microbatches = run.optimizer.gradient_accumulation_steps
    if num_microbatches == 1:
        return sample(inputs)
    trajectories = jax.lax.map(sample, split_microbatches(inputs, num_microbatches))
    return trajectories.swapaxes(0, 1).reshape(-1, *trajectories.shape[2:])


def _compute_fake_losses(
    run: config.Config, adapters: Params, base: Params, microbatch: DeviceBatch
) -> Float32[Array, " b"]:
    """Return the flow's loss for the student's images."""
    return compute_image_losses(run, assemble_params(run, adapters, base), microbatch)


def _compute_student_losses(
    run: config.Config, adapters: Params, context: _StudentContext, microbatch: DeviceBatch
) -> Float32[Array, " b"]:
    """Return the student's losses."""
    return distribution_matching.compute_student_losses(
        run,
        _bind(run, adapters, context.base),
        _bind(run, context.fake_adapters, context.base),
        bind_model(run.model, run.compute, context.base),
        microbatch,
        context.negative_condition,
    )


def _bind(run: config.Config, adapters: Params, base: Params) -> Transformer:
    """Return the network of the base with adapters."""
    return bind_model(run.model, run.compute, assemble_params(run, adapters, base))
