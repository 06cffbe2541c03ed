"""The trainer: read it from top to bottom.

A run directory is a run: the same command goes on where it stopped, bit for bit as if it had not.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from radiance import config
from radiance.data.datasets import describe, open_source
from radiance.data.pipeline import Batches, fixed_batches
from radiance.model.transformer import Params
from radiance.pictures import contact_sheet, save_png, to_picture
from radiance.sampling import Condition, paint
from radiance.sharding import make_mesh, put_batch, shardings
from radiance.text.encoders import Encoder, make_encoder
from radiance.training.checkpoints import Checkpoints
from radiance.training.directory import Journal, RunDirectory
from radiance.training.optimizer import join, learning_rate, split_frozen
from radiance.training.progress import Progress
from radiance.training.step import State, init_state, make_step, validation_losses
from radiance.weights import native
from radiance.weights.files import require_space


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


def train(run: config.Config) -> int:
    """Trains `run` in its directory and returns the step it reached: fewer than `train.steps` when SIGTERM came.

    Raises ConfigError, DataError, TextError or CheckpointError before any work when something does not fit, and TrainingError
    when the loss stays non-finite.
    """
    # 1. What is asked, and with what. Everything that can be wrong is found here.
    mesh = make_mesh(run.mesh)
    _check(run, mesh)
    encoder = make_encoder(run.text, run.model.text_dim)
    sources = {split: open_source(run.data, split) for split in ("train", "validation")}
    batches = Batches(sources["train"], run.data, encoder, run.train.seed, run.train.steps, jax.process_index(), jax.process_count())
    validation = fixed_batches(sources["validation"], run.data, encoder, run.train.validate_pictures)
    prompts = run.train.sample_prompts or tuple(sources["validation"][i].captions[0] for i in range(min(16, len(sources["validation"]))))
    gallery = Gallery(run, encoder, prompts)
    directory = RunDirectory(run.directory)
    directory.open(run, {split: describe(source, run.data, split) for split, source in sources.items()})

    # 2. The state: this run's newest checkpoint, else the weights of `train.init`, else fresh ones; born on its devices.
    like = jax.eval_shape(partial(init_state, run))
    places = shardings(like, mesh)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, places)
    require_space(directory.checkpoints, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like)))
    checkpoints = Checkpoints(directory.checkpoints, run.train.keep, run.train.keep_every)
    start, state, origin = _start(run, checkpoints, like, places)
    count = sum(x.size for x in jax.tree.leaves(like.params))
    print(
        f"{directory.path}: {count / 1e6:.1f} M parameters, {len(sources['train'])} pictures, {mesh.size} device(s), {origin}.", flush=True
    )
    if start >= run.train.steps:
        checkpoints.close()
        return start

    # 3. The steps.
    step = jax.jit(make_step(run), in_shardings=(places, None), out_shardings=(places, None), donate_argnums=0)
    validate = jax.jit(partial(validation_losses, run))
    rate = learning_rate(run.optimizer, run.train.steps)
    journal, progress = Journal(directory, start), Progress(start, run.train.steps, run.data.batch)
    feed = batches.start(start)
    facts: dict[str, float] = {}
    before, waited, number = None, 0.0, start
    with _sigterm() as stopping:
        while number < run.train.steps and not stopping.is_set():
            began = time.monotonic()
            batch = next(feed)
            waited += time.monotonic() - began
            cut = int(batch.pop("cut"))
            state, metrics = step(state, put_batch(batch, mesh))
            number += 1
            # Read one step late, so that the device always has the next step to do.
            if before is not None:
                _check_finite(run, before, number - 1, checkpoints)
            before = metrics
            if number == start + 1:
                jax.block_until_ready(metrics)
                progress.first_step_done()

            last = number == run.train.steps
            if number % run.train.log_every == 0 or last:
                facts = {"loss": float(metrics["loss"]), "gradient_norm": float(metrics["gradient_norm"])}
                row = facts | {"learning_rate": float(rate(number - 1)), "skipped": int(metrics["skipped"]), "captions_cut": cut}
                journal.write(number, row | {"pictures_per_second": progress.rate, "input_wait_seconds": waited})
                waited = 0.0
            progress.update(number, facts)
            if number % run.train.validate_every == 0 or last:
                bins = _validate(validate, weights_of(run, state), validation, mesh)
                journal.write(number, {"validation_loss": float(bins.mean()), "validation_bins": [float(x) for x in bins]})
                progress.say(f"step {number}: validation loss {bins.mean():.4f}")
            if number % run.train.sample_every == 0 or last:
                gallery.paint(weights_of(run, state), directory.samples / f"{number:08d}.png")
            if number % run.train.checkpoint_every == 0 or last or stopping.is_set():
                _check_finite(run, metrics, number, checkpoints)
                checkpoints.save(state)
    progress.close()
    journal.close()
    checkpoints.close()
    return number


def _check(run: config.Config, mesh: jax.sharding.Mesh):
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * run.optimizer.accumulate
    if run.data.batch % parts:
        raise config.ConfigError(
            f"data.batch={run.data.batch} does not divide into {parts} parts (mesh data × fsdp × optimizer.accumulate): change one of them."
        )
    if run.model.channels != 3:
        raise config.ConfigError(
            f"model.channels={run.model.channels}, but {run.data.source} has pictures of 3 channels: train a pixel model."
        )
    if run.model.pooled_dim:
        raise config.ConfigError(
            f"model.pooled_dim={run.model.pooled_dim}, but the {run.text.encoder} encoder gives no pooled vector: set it to 0."
        )


def _start(run: config.Config, checkpoints: Checkpoints, like: State, places: State) -> tuple[int, State, str]:
    latest = checkpoints.latest
    if latest is not None:
        return latest, checkpoints.restore(latest, like), f"going on from step {latest}"
    fresh = jax.jit(partial(init_state, run), out_shardings=places)
    if not run.train.init:
        return 0, fresh(), "from scratch"
    params = load_weights(run.train.init, run, places.params)
    return 0, fresh(params), f"from the weights of {run.train.init}"


def load_weights(path: str, run: config.Config, places: Params | None = None) -> Params:
    """Weights to start from: of a native checkpoint file, or the averaged ones of a run directory. They must be of `run.model`."""
    if Path(path).is_file():
        return native.read(path, run.model, places)[1]
    other = RunDirectory(Path(path))
    their = other.read_config()
    if changed := config.differences(their.model, run.model, "model."):
        told = ", ".join(f"{key} is {old!r} there, {new!r} here" for key, (old, new) in changed.items())
        raise config.ConfigError(f"train.init={path} is a run of another model ({told}): make the models equal.")
    checkpoints = Checkpoints(other.checkpoints)
    if checkpoints.latest is None:
        raise config.ConfigError(f"train.init={path} has no checkpoint yet.")
    return checkpoints.restore_weights(checkpoints.latest, their, their.sample.weights, places)


def weights_of(run: config.Config, state: State) -> Params:
    """The weights that the run samples and is validated with."""
    if run.sample.weights == "params" or not state.ema:
        return state.params
    decay = run.sample.weights.partition("=")[2] or max(state.ema, key=float)
    if decay not in state.ema:
        raise config.ConfigError(f"sample.weights={run.sample.weights}, but the run keeps the averages {', '.join(state.ema)}.")
    return join(state.ema[decay], split_frozen(state.params, run.optimizer.frozen)[1])


def _check_finite(run: config.Config, metrics: dict[str, jax.Array], step: int, checkpoints: Checkpoints):
    if int(metrics["skipped_in_row"]) < run.train.skip_limit:
        return
    latest = checkpoints.latest
    checkpoints.close()
    raise TrainingError(
        f"The loss or its gradient was not finite in the {run.train.skip_limit} steps up to {step}: lower optimizer.learning_rate or look at the "
        f"data. {'No checkpoint was written.' if latest is None else f'The checkpoint of step {latest} is good.'}"
    )


def _validate(validate, params: Params, batches: list[dict[str, np.ndarray]], mesh: jax.sharding.Mesh) -> np.ndarray:
    """Mean loss in every time bin."""
    total, weight = 0.0, 0.0
    for seed, batch in enumerate(batches):
        losses = np.asarray(validate(params, put_batch(batch, mesh) if len(batch["image"]) % mesh.size == 0 else batch, jnp.int32(seed)))
        total, weight = total + batch["weight"] @ losses, weight + batch["weight"].sum()
    return total / weight


class Gallery:
    """The same prompts and seeds, painted as the model learns."""

    def __init__(self, run: config.Config, encoder: Encoder, prompts: tuple[str, ...]):
        self.run, self.prompts = run, prompts
        self.positive = Condition(*encoder(prompts))
        self.negative = Condition(*encoder([run.sample.negative] * len(prompts)))

    def paint(self, params: Params, path: Path):
        run = self.run
        images = paint(
            params, jnp.arange(len(self.prompts)), self.positive, self.negative, model=run.model, compute=run.compute, settings=run.sample,
            noise_scale=run.flow.noise_scale, height=run.data.side, width=run.data.side,
        )  # fmt: skip
        sheet = contact_sheet([to_picture(x) for x in np.asarray(images)], columns=min(len(self.prompts), 10))
        save_png(
            path, sheet, {"prompts": list(self.prompts), "seeds": list(range(len(self.prompts))), "settings": config.to_dict(run.sample)}
        )


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """Inside, SIGTERM asks for a clean stop after the step at hand."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
