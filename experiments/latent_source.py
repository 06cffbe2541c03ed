"""The source of latent_to_pixel.py's toy: an autoencoder of `shapes`, and a model that paints its latents.

    python experiments/latent_source.py [train.seed=SEED name=latent-SEED …]

trains both, in minutes on a CPU, into runs/latent_source: a run directory, of which `radiance sample` and `radiance convert` read the model, and in it
autoencoder.safetensors, and captions.txt to paint for. The same command goes on where it was stopped; the autoencoder begins anew.

`radiance train` trains pixel models alone, so the loop is here. The autoencoder is FLUX's architecture made small. It learns with noise of a fixed
variance on its latents and a price for large ones, which is a variational one whose variance is given; they are shifted and scaled to a
mean of 0 and a variance of 1.
"""

import sys
from contextlib import closing
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import one_shape
import optax

from radiance import config as c
from radiance.data.datasets import describe, open_source
from radiance.data.pipeline import Batches
from radiance.model import autoencoder
from radiance.model.autoencoder import Autoencoder
from radiance.model.transformer import Params
from radiance.pictures import to_signed
from radiance.text.encoders import make_encoder
from radiance.training.checkpoints import Checkpoints
from radiance.training.directory import Journal, RunDirectory
from radiance.training.progress import Progress
from radiance.training.step import init_state, make_step
from radiance.training.tracking import Trackers
from radiance.weights import autoencoder as files

SIZES = Autoencoder(latent_channels=8, width=8, multipliers=(1, 2, 4), blocks=1, groups=4, shift=0.0, scale=1.0)
STEPS, RATE = 600, 4e-3  # of the autoencoder
NOISE, PRICE = 0.1, 1e-3  # on a latent; of its square, beside the square of an error of a pixel
CAPTIONS = 2048  # to paint for
encode, decode = partial(autoencoder.encode, dtype="float32"), partial(autoencoder.decode, dtype="float32")


def config() -> c.Config:
    return c.override(
        one_shape.config(),
        [
            "name=latent_source", f"model.channels={4 * SIZES.latent_channels}", "model.patch=1", "model.prediction=velocity", "flow.time_law=logistic",
            "data.batch=32", "optimizer.decay=constant", "train.steps=1500", "train.checkpoint_every=500",
        ],
    )  # fmt: skip


def trained_autoencoder(run: c.Config, batches: Batches) -> tuple[Autoencoder, Params]:
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def loss_of(params: Params, pictures: jax.Array, key: jax.Array) -> jax.Array:
        latents = encode(SIZES, params, pictures)
        painted = decode(SIZES, params, latents + NOISE * jax.random.normal(key, latents.shape))
        return jnp.square(painted - pictures).mean() + PRICE * jnp.square(latents).mean()

    @jax.jit
    def step(params: Params, held: optax.OptState, pictures: jax.Array, key: jax.Array) -> tuple[Params, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, to_signed(pictures), key)
        updates, held = optimizer.update(gradients, held, params)
        return optax.apply_updates(params, updates), held, loss

    key = jax.random.key(run.train.seed)
    params = autoencoder.init(SIZES, key)
    held = optimizer.init(params)
    with closing(batches.start(0)) as feed, closing(Progress(0, STEPS, run.data.batch)) as progress:
        for number in range(STEPS):
            params, held, loss = step(params, held, next(feed)["image"], jax.random.fold_in(key, number))
            progress.update(number + 1, {"autoencoder": float(loss)})
    latents = np.concatenate([encode(SIZES, params, to_signed(batches[i]["image"])) for i in range(8)])
    return replace(SIZES, shift=float(latents.mean()), scale=float(1 / latents.std())), params


def main(changes: list[str]) -> int:
    run = c.override(config(), changes)
    directory, source = RunDirectory(run.directory), open_source(run.data, "train")
    data = {"train": describe(source, run.data, "train")}
    directory.check(run, data)
    encoder = make_encoder(run.text, run.model.text_dim)
    batches = Batches(source, run.data, encoder, run.train.seed, max(run.train.steps, STEPS), run.model.masking)

    file = run.directory / "autoencoder.safetensors"
    if not file.is_file():
        directory.record(run, data, 0)
        files.write(file, *trained_autoencoder(run, batches))
        (run.directory / "captions.txt").write_text("".join(f"{source.captions(i)[0]}\n" for i in range(CAPTIONS)))
    sizes, params = files.read(file)

    checkpoints, like = Checkpoints(directory.checkpoints), jax.eval_shape(partial(init_state, run))
    first = checkpoints.latest or 0
    state = checkpoints.restore(first, like) if first else jax.jit(partial(init_state, run))()
    step = jax.jit(make_step(run), donate_argnums=0)
    with (
        closing(batches.start(first)) as feed,
        closing(checkpoints),
        closing(Journal(directory, first, Trackers(run, first))) as journal,
        closing(Progress(first, run.train.steps, run.data.batch)) as progress,
    ):
        for number in range(first + 1, run.train.steps + 1):
            batch = {name: x for name, x in next(feed).items() if name not in ("cut", "skipped")}
            state, metrics = step(state, batch | {"image": encode(sizes, params, to_signed(batch["image"]))})
            progress.update(number, {"loss": float(metrics["loss"])})
            if number % run.train.log_every == 0:
                journal.write(number, {"loss": float(metrics["loss"])})
            if number % run.train.checkpoint_every == 0 or number == run.train.steps:
                checkpoints.save(state)
    print(f"{run.directory} paints latents, and {file} makes pictures of them.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
