"""One training step and one validation, as pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, UInt32

from radiance import config
from radiance.base.images import to_signed
from radiance.flow import distillation, objective, timesteps
from radiance.flow.distillation import Teacher
from radiance.model.transformer import Params, bind_model, init_params
from radiance.training.block_rotation import (
    BlockIndices,
    active_blocks,
    scatter_blocks,
    select_blocks,
)
from radiance.training.ema import update_averages
from radiance.training.lora import attach_adapters, init_adapters
from radiance.training.optimizer import make_optimizer, reset_moments
from radiance.training.parameter_groups import merge_params, split_frozen
from radiance.training.stochastic_rounding import cast_params, stochastic_round

# image [b, height, width, c] uint8, or float32 in [-1, 1]; text [b, l, e], lengths [b], weight [b]; dropped [b], where captions were.
# Of trajectories: image [b, segments, height, width, c], the points behind the noise, and seed [b], which gives the noise.
DeviceBatch = dict[str, jax.Array]
Metrics = dict[
    str, Any
]  # numbers, and `gradient_norms`: one of each part of the network that is trained

VALIDATION_BINS = 10


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """All that a run knows. Randomness and data follow from (seed, step), so there is nothing else to save."""

    step: Int32[Array, ""]
    params: Params  # of the network, or of what is added to it (LoRA)
    ema: dict[str, Params]  # by decay, or width=WIDTH; only what is trained
    optimizer_state: Any
    skipped_steps: Int32[Array, ""]  # steps without an update, since the start
    consecutive_skipped_steps: Int32[Array, ""]


def init_state(run: config.Config, params: Params | None = None) -> TrainState:
    """The state before the first step, from `params` or from scratch; of a LoRA run always from scratch."""
    key = jax.random.key(run.train.seed)
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
    return TrainState(zero, params, ema, optimizer_state, zero, zero)


def make_train_step(run: config.Config) -> Callable[..., tuple[TrainState, Metrics]]:
    """The training step of a run: (state, batch, base, seed, teacher) → (state, metrics), where base is what a LoRA run adds to, else None.

    seed: of times, noise and rounding, in place of the run's, so that `jax.vmap` can train several at once; blocks that are trained in
    rotation stay the run's. A step whose loss or gradient is not finite changes nothing but the count.
    """
    optimizer = make_optimizer(run.optimizer, run.train.steps)

    def compute_loss(
        active: Params,
        context: tuple[Params, BlockIndices, Params, Params | None, Teacher | None],
        part: DeviceBatch,
    ) -> tuple[jax.Array, jax.Array]:
        trainable, blocks, frozen, base, teacher = context
        losses = compute_image_losses(
            run,
            assemble_params(
                run, merge_params(scatter_blocks(trainable, active, blocks), frozen), base
            ),
            part,
            teacher,
        )
        normalized_losses = (
            distillation.normalize_losses(losses) if run.distill.kind == "mean_flow" else losses
        )
        return objective.weighted_mean(normalized_losses, part["weight"]), jnp.where(
            part["weight"] > 0, losses, 0
        ).mean()

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
        batch = add_noise_and_times(run, batch, key)
        context = (trainable, blocks, frozen, base, teacher)
        gradients, loss = accumulate_gradients(
            jax.value_and_grad(compute_loss, has_aux=True),
            active,
            context,
            batch,
            run.optimizer.gradient_accumulation_steps,
        )
        loss = loss / jnp.maximum(
            (batch["weight"] > 0).mean(), 1e-9
        )  # of the images that are there
        gradients = cast_to_float32(gradients)
        gradient_norms = {part: optax.tree.norm(gradient) for part, gradient in gradients.items()}
        gradient_norm = optax.tree.norm(gradient_norms)
        old_optimizer_state = state.optimizer_state
        if run.optimizer.block_rotation != (0, 0):
            old_optimizer_state = reset_moments(
                old_optimizer_state,
                optimizer.init(active),
                state.step % run.optimizer.block_rotation_every == 0,
            )
        updates, optimizer_state = optimizer.update(gradients, old_optimizer_state, active)
        new_active = optax.tree.add(cast_to_float32(active), updates)
        weights_key, ema_key = jax.random.split(
            jax.random.fold_in(key, 2)
        )  # `with_noise` splits the key in 0 and 1
        ema = update_averages(
            state.ema,
            scatter_blocks(cast_to_float32(trainable), new_active, blocks),
            state.step,
            ema_key,
        )
        new_trees = (stochastic_round(weights_key, new_active, active), ema, optimizer_state)

        is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        active, ema, optimizer_state = jax.tree.map(
            lambda n, o: jnp.where(is_finite, n, o),
            new_trees,
            (active, state.ema, old_optimizer_state),
        )
        params = merge_params(scatter_blocks(trainable, active, blocks), frozen)
        is_skipped = (~is_finite).astype(jnp.int32)
        state = TrainState(
            state.step + 1,
            params,
            ema,
            optimizer_state,
            state.skipped_steps + is_skipped,
            (state.consecutive_skipped_steps + 1) * is_skipped,
        )
        metrics = {"loss": loss, "gradient_norm": gradient_norm, "gradient_norms": gradient_norms}
        return state, metrics | {
            "skipped_steps": state.skipped_steps,
            "consecutive_skipped_steps": state.consecutive_skipped_steps,
        }

    return step


def cast_to_float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def assemble_params(run: config.Config, params: Params, base: Params | None) -> Params:
    """The weights of the network from those of a state."""
    return params if base is None else attach_adapters(base, params, run.lora)


def add_noise_and_times(run: config.Config, batch: DeviceBatch, key: jax.Array) -> DeviceBatch:
    """The batch with its times and noise, paired over the whole batch as the config's coupling says, and weights that count its times too."""
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
            objective.couple_noise(run.flow, image, noise, batch["text"], batch["lengths"])
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
    """Loss of every image of a batch that has `noise` and `time`, without the weight that training gives it."""
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


def accumulate_gradients(
    value_and_grad: Callable,
    active: Params,
    context: Any,
    batch: DeviceBatch,
    num_microbatches: int,
) -> tuple[Params, jax.Array]:
    """Gradient and loss of the batch, computed in `parts` equal parts and averaged in float32."""
    if num_microbatches == 1:
        (_, loss), gradients = value_and_grad(active, context, batch)
        return gradients, loss
    # Part j takes rows j, j + parts, …: so every device works on every part of a batch in pieces.
    batch = jax.tree.map(
        lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def accumulate(total, microbatch):
        (_, loss), gradients = value_and_grad(active, context, microbatch)
        return jax.tree.map(
            lambda total_leaf, x: total_leaf + x / num_microbatches, total, (gradients, loss)
        ), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), active)
    (gradients, loss), _ = jax.lax.scan(accumulate, (zeros, jnp.float32(0)), batch)
    return gradients, loss


def compute_validation_losses(
    run: config.Config,
    params: Params,
    batch: DeviceBatch,
    seed: Int32[Array, ""],
    teacher: Teacher | None = None,
    num_bins: int = VALIDATION_BINS,
) -> Float32[Array, "b bins"]:
    """Loss of every image at one time in each of the equal bins. Times and noise depend on `seed`, the bin and the row alone.

    Of trajectories the bins are parts of their segments, which follow one another from row to row; with time_law=noise all are its begin.
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
