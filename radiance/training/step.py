"""One training step and one validation, as pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, UInt32

from radiance import config, flow
from radiance.model.transformer import Params, bind, init
from radiance.pictures import to_signed
from radiance.training import distillation
from radiance.training.adapters import adapted, init_adapters
from radiance.training.averages import average
from radiance.training.distillation import Teacher
from radiance.training.optimizer import join, make_optimizer, restarted, rounded, split_frozen, typed
from radiance.training.rotation import Blocks, blocks_at, put_back, taken

# image [b, height, width, c] uint8, or float32 in [-1, 1]; text [b, l, e], lengths [b], weight [b]; dropped [b], where captions were.
# Of trajectories: image [b, segments, height, width, c], the points behind the noise, and seed [b], which gives the noise.
Batch = dict[str, jax.Array]
Metrics = dict[str, Any]  # numbers, and `gradient_norms`: one of each part of the network that is trained

VALIDATION_BINS = 10


@jax.tree_util.register_dataclass
@dataclass
class State:
    """All that a run knows. Randomness and data follow from (seed, step), so there is nothing else to save."""

    step: Int32[Array, ""]
    params: Params  # of the network, or of what is added to it (LoRA)
    ema: dict[str, Params]  # by decay, or width=WIDTH; only what is trained
    optimizer: Any
    skipped: Int32[Array, ""]  # steps without an update, since the start
    skipped_in_row: Int32[Array, ""]


def init_state(run: config.Config, params: Params | None = None) -> State:
    """The state before the first step, from `params` or from scratch; of a LoRA run always from scratch."""
    key = jax.random.key(run.train.seed)
    if params is None:
        params = init_adapters(run.model, run.lora, key) if run.lora.rank else init(run.model, key)
    params = typed(params, run.optimizer.weights_dtype)
    trained, _ = split_frozen(params, run.optimizer.frozen)
    zero = jnp.zeros((), jnp.int32)
    ema = {name: jax.tree.map(jnp.copy, trained) for name in run.optimizer.averages}
    optimizer = make_optimizer(run.optimizer, run.train.steps).init(taken(trained, blocks_at(run, 0)))
    return State(zero, params, ema, optimizer, zero, zero)


def make_step(run: config.Config) -> Callable[..., tuple[State, Metrics]]:
    """The training step of a run: (state, batch, base, seed, teacher) → (state, metrics), where base is what a LoRA run adds to, else None.

    seed: of times, noise and rounding, in place of the run's, so that `jax.vmap` can train several at once; blocks that are trained in
    rotation stay the run's. A step whose loss or gradient is not finite changes nothing but the count.
    """
    optimizer = make_optimizer(run.optimizer, run.train.steps)

    def loss_of(
        few: Params, fixed: tuple[Params, Blocks, Params, Params | None, Teacher | None], part: Batch
    ) -> tuple[jax.Array, jax.Array]:
        trained, blocks, frozen, base, teacher = fixed
        losses = picture_losses(run, complete(run, join(put_back(trained, few, blocks), frozen), base), part, teacher)
        pulling = distillation.evened(losses) if run.distill.kind == "mean_flow" else losses
        return flow.weighted_mean(pulling, part["weight"]), jnp.where(part["weight"] > 0, losses, 0).mean()

    def step(
        state: State, batch: Batch, base: Params | None = None, seed: UInt32[Array, ""] | None = None, teacher: Teacher | None = None
    ) -> tuple[State, Metrics]:
        trained, frozen = split_frozen(state.params, run.optimizer.frozen)
        blocks = blocks_at(run, state.step)
        few = taken(trained, blocks)
        key = jax.random.fold_in(jax.random.key(run.train.seed if seed is None else seed), state.step)
        batch = with_noise(run, batch, key)
        fixed = (trained, blocks, frozen, base, teacher)
        gradients, loss = accumulated(jax.value_and_grad(loss_of, has_aux=True), few, fixed, batch, run.optimizer.accumulate)
        loss = loss / jnp.maximum((batch["weight"] > 0).mean(), 1e-9)  # of the pictures that are there
        gradients = float32(gradients)
        norms = {part: optax.tree.norm(gradient) for part, gradient in gradients.items()}
        norm = optax.tree.norm(norms)
        held = state.optimizer
        if run.optimizer.rotate != (0, 0):
            held = restarted(held, optimizer.init(few), state.step % run.optimizer.rotate_every == 0)
        updates, optimizer_state = optimizer.update(gradients, held, few)
        moved = optax.tree.add(float32(few), updates)
        weights_key, ema_key = jax.random.split(jax.random.fold_in(key, 2))  # `with_noise` splits the key in 0 and 1
        ema = average(state.ema, put_back(float32(trained), moved, blocks), state.step, ema_key)
        new = (rounded(weights_key, moved, few), ema, optimizer_state)

        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        few, ema, optimizer_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, (few, state.ema, held))
        params = join(put_back(trained, few, blocks), frozen)
        skipped = (~good).astype(jnp.int32)
        state = State(state.step + 1, params, ema, optimizer_state, state.skipped + skipped, (state.skipped_in_row + 1) * skipped)
        metrics = {"loss": loss, "gradient_norm": norm, "gradient_norms": norms}
        return state, metrics | {"skipped": state.skipped, "skipped_in_row": state.skipped_in_row}

    return step


def float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def complete(run: config.Config, params: Params, base: Params | None) -> Params:
    """The weights of the network from those of a state."""
    return params if base is None else adapted(base, params, run.lora)


def with_noise(run: config.Config, batch: Batch, key: jax.Array) -> Batch:
    """The batch with its times and noise, paired over the whole batch as the config's coupling says, and weights that count its times too."""
    noise_key, time_key = jax.random.split(key)
    count, height, width = len(batch["image"]), *batch["image"].shape[-3:-1]
    tokens = (height // run.model.patch) * (width // run.model.patch)
    if run.distill.kind == "trajectories":
        segment = jax.random.randint(noise_key, (count,), 0, run.distill.segments)
        return distillation.on_segments(run, batch, segment, flow.draw_times(time_key, run.flow, count, tokens))
    image = to_signed(batch["image"])
    noise = run.flow.noise_scale * jax.random.normal(noise_key, image.shape)
    if run.flow.coupling != "independent":
        noise = noise[flow.coupled(run.flow, image, noise, batch["text"], batch["lengths"])]
    time = flow.draw_times(time_key, run.flow, count, tokens)
    weight = batch["weight"] * flow.time_weights(run.flow, time, tokens)
    kept = {n: batch[n] for n in ("text", "lengths", "dropped") if n in batch}
    if run.distill.kind == "mean_flow":
        kept["until"] = distillation.until(jax.random.fold_in(time_key, 0), time)
    return kept | {"weight": weight, "image": image, "noise": noise, "time": time}


def picture_losses(run: config.Config, params: Params, batch: Batch, teacher: Teacher | None = None) -> Float32[Array, " b"]:
    """Loss of every picture of a batch that has `noise` and `time`, without the weight that training gives it."""
    image, noise, time = batch["image"], batch["noise"], batch["time"]
    model, noisy = bind(run.model, run.compute, params), flow.mix(image, noise, time)
    if run.distill.kind == "mean_flow":
        return distillation.mean_flow_losses(run, model, batch, noisy, teacher)
    velocity = model(noisy, batch["text"], batch["lengths"], time, divisor=flow.bounded(run.flow, time))
    target = flow.velocity_target(run.flow, run.model.prediction, image, noise, time)
    if run.distill.kind == "guidance":
        target = jax.lax.stop_gradient(distillation.guidance_target(run, model, batch, noisy, target, teacher))
    return flow.squared_error(velocity, target) * flow.loss_weights(run.flow, run.model.prediction, time)


def accumulated(value_and_grad: Callable, trained: Params, fixed: Any, batch: Batch, parts: int) -> tuple[Params, jax.Array]:
    """Gradient and loss of the batch, computed in `parts` equal parts and averaged in float32."""
    if parts == 1:
        (_, loss), gradients = value_and_grad(trained, fixed, batch)
        return gradients, loss
    # Part j takes rows j, j + parts, …: so every device works on every part of a batch in pieces.
    batch = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, part):
        (_, loss), gradients = value_and_grad(trained, fixed, part)
        return jax.tree.map(lambda t, x: t + x / parts, total, (gradients, loss)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    (gradients, loss), _ = jax.lax.scan(add, (zeros, jnp.float32(0)), batch)
    return gradients, loss


def validation_losses(
    run: config.Config, params: Params, batch: Batch, seed: Int32[Array, ""], teacher: Teacher | None = None, bins: int = VALIDATION_BINS
) -> Float32[Array, "b bins"]:
    """Loss of every picture at one time in each of the equal bins. Times and noise depend on `seed`, the bin and the row alone.

    Of trajectories the bins are parts of their segments, which follow one another from row to row; with time_law=noise all are its begin.
    """
    count, segmented = len(batch["image"]), run.distill.kind == "trajectories"
    batch = batch if segmented else batch | {"image": to_signed(batch["image"])}

    def at_bin(i):
        noise_key, time_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(run.train.seed), seed), i))
        time = (i + jax.random.uniform(time_key, (count,))) / bins
        if segmented:
            place = jnp.ones_like(time) if run.flow.time_law == "noise" else time
            return picture_losses(run, params, distillation.on_segments(run, batch, jnp.arange(count) % run.distill.segments, place))
        noise = run.flow.noise_scale * jax.random.normal(noise_key, batch["image"].shape)
        timed = batch | {"noise": noise, "time": time}
        if run.distill.kind == "mean_flow":
            timed["until"] = distillation.until(jax.random.fold_in(time_key, 0), time)
        return picture_losses(run, params, timed, teacher)

    return jax.lax.map(at_bin, jnp.arange(bins)).T
