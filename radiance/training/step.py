"""One training step and one validation, as pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray, UInt32

from radiance import config
from radiance.base.images import to_signed
from radiance.flow import coupling, distillation, objective, timesteps
from radiance.flow.distillation import Teacher
from radiance.model.transformer import Params, bind_model, init_params
from radiance.training.block_rotation import (
    BlockIndices,
    active_blocks,
    scatter_blocks,
    select_blocks,
)
from radiance.training.ema import update_averages
from radiance.training.gradients import cast_to_float32, differentiate_losses
from radiance.training.lora import attach_adapters, init_adapters
from radiance.training.optimizer import make_fake_optimizer, make_optimizer, reset_moments
from radiance.training.parameter_groups import merge_params, split_frozen
from radiance.training.stochastic_rounding import cast_params, stochastic_round

# image [b, height, width, c] uint8, or float32 in [-1, 1]; text [b, l, e]; lengths [b]; weight [b];
# dropped [b], true where the caption was dropped. Batches of trajectories have
# image [b, segments, height, width, c], the points after the noise, and seed [b] of the noise.
DeviceBatch = dict[str, jax.Array]
# Numbers, and `gradient_norms`: one for each trained part of the network.
Metrics = dict[str, Any]

VALIDATION_BINS = 10


@jax.tree_util.register_dataclass
@dataclass
class FakeScore:
    """The network that learns the student's images in distribution matching."""

    params: Params  # adapters beside the same base as the student's
    optimizer_state: Any


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a checkpoint stores; randomness and data follow from (seed, step)."""

    step: Int32[Array, ""]
    params: Params  # of the network, or the adapters of a LoRA run
    ema: dict[str, Params]  # by decay or width=WIDTH; trainable parameters only
    optimizer_state: Any
    skipped_steps: Int32[Array, ""]  # steps without an update, since the start of the run
    consecutive_skipped_steps: Int32[Array, ""]
    fake_score: FakeScore | None = None  # of distill.kind=distribution_matching


@dataclass(frozen=True)
class StepContext:
    """Everything that the loss of a step depends on, except the active parameters and the batch."""

    trainable: Params
    blocks: BlockIndices  # of the stacks in `trainable` that are trained in this step
    frozen: Params
    base: Params | None  # weights that a LoRA is added to
    teacher: Teacher | None


def init_state(
    run: config.Config, params: Params | None = None, key: PRNGKeyArray | None = None
) -> TrainState:
    """Return the state before the first step.

    Args:
        run: Config of the run.
        params: Initial weights; random ones if None. A LoRA run always starts from random adapters.
        key: Random key of the initial weights; that of `train.seed` if None.
    """
    key = jax.random.key(run.train.seed) if key is None else key
    if params is None:
        params = (
            init_adapters(run.model, run.lora, key)
            if run.lora.rank
            else init_params(run.model, key)
        )
    params = cast_params(params, run.optimizer.weights_dtype)
    trainable, _ = split_frozen(params, run.optimizer.frozen)
    zero = jnp.zeros((), jnp.int32)
    ema = {name: jax.tree.map(jnp.copy, trainable) for name in run.optimizer.ema_names}
    optimizer_state = make_optimizer(run.optimizer, run.train.steps).init(
        select_blocks(trainable, active_blocks(run, 0))
    )
    fake_score = _init_fake_score(run, key) if run.distill.has_fake_score else None
    return TrainState(zero, params, ema, optimizer_state, zero, zero, fake_score)


def _init_fake_score(run: config.Config, key: PRNGKeyArray) -> FakeScore:
    """Return a fake score that equals the base."""
    adapters = init_adapters(run.model, run.lora, jax.random.fold_in(key, 1))
    params = cast_params(adapters, run.optimizer.weights_dtype)
    return FakeScore(params, make_fake_optimizer(run).init(params))


def make_train_step(run: config.Config) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the training step: (state, batch, base, seed, teacher) → (state, metrics).

    `base` holds the weights that a LoRA run adds to, else None. `seed` replaces `train.seed` for
    times, noise and rounding, so that `jax.vmap` can train several seeds together; block rotation
    always follows `train.seed`. A step whose loss or gradient is not finite only increases the
    counts.
    """
    optimizer = make_optimizer(run.optimizer, run.train.steps)

    def step(
        state: TrainState,
        batch: DeviceBatch,
        base: Params | None = None,
        seed: UInt32[Array, ""] | None = None,
        teacher: Teacher | None = None,
    ) -> tuple[TrainState, Metrics]:
        trainable, frozen = split_frozen(state.params, run.optimizer.frozen)
        blocks = active_blocks(run, state.step)
        active = select_blocks(trainable, blocks)
        key = jax.random.fold_in(
            jax.random.key(run.train.seed if seed is None else seed), state.step
        )

        # Gradients of the active parameters.
        context = StepContext(trainable, blocks, frozen, base, teacher)
        loss, gradients = _compute_gradients(run, active, context, batch, key)
        gradient_norms = {part: optax.tree.norm(gradient) for part, gradient in gradients.items()}
        gradient_norm = optax.tree.norm(gradient_norms)

        # Updated parameters, averages and optimizer state.
        optimizer_state = state.optimizer_state
        if run.optimizer.block_rotation != (0, 0):
            optimizer_state = reset_moments(
                optimizer_state,
                optimizer.init(active),
                state.step % run.optimizer.block_rotation_every == 0,
            )
        updates, new_optimizer_state = optimizer.update(gradients, optimizer_state, active)
        new_active = optax.tree.add(cast_to_float32(active), updates)
        # `add_noise_and_times` splits the key into children 0 and 1.
        weights_key, ema_key = jax.random.split(jax.random.fold_in(key, 2))
        new_trainable = scatter_blocks(cast_to_float32(trainable), new_active, blocks)
        new_ema = update_averages(state.ema, new_trainable, state.step, ema_key)
        new_active = stochastic_round(weights_key, new_active, active)

        # A step that is not finite keeps the old ones.
        is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        active, ema, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (new_active, new_ema, new_optimizer_state),
            (active, state.ema, optimizer_state),
        )
        params = merge_params(scatter_blocks(trainable, active, blocks), frozen)
        return advance_state(
            state,
            params,
            ema,
            optimizer_state,
            is_finite,
            {"loss": loss, "gradient_norm": gradient_norm, "gradient_norms": gradient_norms},
        )

    return step


def _compute_gradients(
    run: config.Config,
    active: Params,
    context: StepContext,
    batch: DeviceBatch,
    key: PRNGKeyArray,
) -> tuple[jax.Array, Params]:
    """Return the mean loss of the images that are present, and the gradients in float32."""

    def compute_losses(
        active: Params, context: StepContext, microbatch: DeviceBatch
    ) -> Float32[Array, " b"]:
        trainable = scatter_blocks(context.trainable, active, context.blocks)
        params = assemble_params(run, merge_params(trainable, context.frozen), context.base)
        return compute_image_losses(run, params, microbatch, context.teacher)

    return differentiate_losses(
        run, compute_losses, active, context, add_noise_and_times(run, batch, key)
    )


def advance_state(
    state: TrainState,
    params: Params,
    ema: dict[str, Params],
    optimizer_state: Any,
    is_finite: Bool[Array, ""],
    metrics: Metrics,
) -> tuple[TrainState, Metrics]:
    """Return the state after a step, and its metrics with the counts of skipped steps."""
    is_skipped = (~is_finite).astype(jnp.int32)
    skipped_steps = state.skipped_steps + is_skipped
    consecutive_skipped_steps = (state.consecutive_skipped_steps + 1) * is_skipped
    new_state = TrainState(
        state.step + 1, params, ema, optimizer_state, skipped_steps, consecutive_skipped_steps
    )
    counts = {
        "skipped_steps": skipped_steps,
        "consecutive_skipped_steps": consecutive_skipped_steps,
    }
    return new_state, metrics | counts


def assemble_params(run: config.Config, params: Params, base: Params | None) -> Params:
    """Return the weights of the network from those of a state.

    Args:
        run: Config of the run.
        params: Parameters of the state: those of the network, or the adapters of a LoRA run.
        base: Weights that the adapters are added to; None if the run has none.
    """
    return params if base is None else attach_adapters(base, params, run.lora)


def add_noise_and_times(run: config.Config, batch: DeviceBatch, key: jax.Array) -> DeviceBatch:
    """Return the batch with noise and times, and with weights that include the timestep weighting.

    Noise is paired with images over the whole batch, as `flow.coupling` says.
    """
    noise_key, time_key = jax.random.split(key)
    batch_size, height, width = len(batch["image"]), *batch["image"].shape[-3:-1]
    tokens = (height // run.model.patch) * (width // run.model.patch)
    if run.distill.kind == "trajectories":
        segment_index = jax.random.randint(noise_key, (batch_size,), 0, run.distill.segments)
        return distillation.make_segment_batch(
            run,
            batch,
            segment_index,
            timesteps.sample_timesteps(time_key, run.flow, batch_size, tokens),
        )
    image = to_signed(batch["image"])
    noise = run.flow.noise_scale * jax.random.normal(noise_key, image.shape)
    if run.flow.coupling != "independent":
        noise = noise[
            coupling.couple_noise(run.flow, image, noise, batch["text"], batch["lengths"])
        ]
    time = timesteps.sample_timesteps(time_key, run.flow, batch_size, tokens)
    weight = batch["weight"] * timesteps.timestep_weights(run.flow, time, tokens)
    conditioning = {name: batch[name] for name in ("text", "lengths", "dropped") if name in batch}
    if run.distill.kind == "mean_flow":
        conditioning["until"] = distillation.sample_end_times(jax.random.fold_in(time_key, 0), time)
    return conditioning | {"weight": weight, "image": image, "noise": noise, "time": time}


def compute_image_losses(
    run: config.Config, params: Params, batch: DeviceBatch, teacher: Teacher | None = None
) -> Float32[Array, " b"]:
    """Return the unweighted loss of every image of a batch that has `noise` and `time`."""
    image, noise, time = batch["image"], batch["noise"], batch["time"]
    model, noisy = bind_model(run.model, run.compute, params), objective.mix(image, noise, time)
    if run.distill.kind == "mean_flow":
        return distillation.compute_mean_flow_losses(run, model, batch, noisy, teacher)
    velocity = model(
        noisy,
        batch["text"],
        batch["lengths"],
        time,
        divisor=objective.velocity_divisor(run.flow, time),
    )
    target = objective.velocity_target(run.flow, run.model.prediction, image, noise, time)
    if run.distill.kind == "guidance":
        target = jax.lax.stop_gradient(
            distillation.compute_guidance_target(run, model, batch, noisy, target, teacher)
        )
    return objective.mean_squared_errors(velocity, target) * objective.loss_weights(
        run.flow, run.model.prediction, time
    )


def compute_validation_losses(
    run: config.Config,
    params: Params,
    batch: DeviceBatch,
    seed: Int32[Array, ""],
    teacher: Teacher | None = None,
    num_bins: int = VALIDATION_BINS,
) -> Float32[Array, "b bins"]:
    """Return the loss of every image at one time in each of the equal bins of time.

    Times and noise depend only on `train.seed`, `seed`, the bin and the row. For trajectories the
    bins divide the segments, which alternate from row to row; with
    `timestep_distribution=pure_noise` all losses are measured at the start of the segment.

    Args:
        run: Config whose objective is measured.
        params: Weights of the network.
        batch: Batch with uint8 images, or a batch of trajectories.
        seed: Index of the validation batch.
        teacher: Teacher of a distilled run.
        num_bins: Number of bins of time in [0, 1].
    """
    batch_size, on_trajectories = len(batch["image"]), run.distill.kind == "trajectories"
    batch = batch if on_trajectories else batch | {"image": to_signed(batch["image"])}

    def losses_at_bin(i):
        noise_key, time_key = jax.random.split(
            jax.random.fold_in(jax.random.fold_in(jax.random.key(run.train.seed), seed), i)
        )
        time = (i + jax.random.uniform(time_key, (batch_size,))) / num_bins
        if on_trajectories:
            position = (
                jnp.ones_like(time) if run.flow.timestep_distribution == "pure_noise" else time
            )
            return compute_image_losses(
                run,
                params,
                distillation.make_segment_batch(
                    run, batch, jnp.arange(batch_size) % run.distill.segments, position
                ),
            )
        noise = run.flow.noise_scale * jax.random.normal(noise_key, batch["image"].shape)
        noisy_batch = batch | {"noise": noise, "time": time}
        if run.distill.kind == "mean_flow":
            noisy_batch["until"] = distillation.sample_end_times(
                jax.random.fold_in(time_key, 0), time
            )
        return compute_image_losses(run, params, noisy_batch, teacher)

    return jax.lax.map(losses_at_bin, jnp.arange(num_bins)).T
