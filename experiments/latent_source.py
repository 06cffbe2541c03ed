"""The source of latent_to_pixel.py's toy: an autoencoder of `shapes`, and a model that paints its latents.

    python experiments/latent_source.py [train.seed=SEED name=latent-SEED …]

trains both, in minutes on a CPU, into runs/latent_source: a run directory, of which `radiance sample` and `radiance convert` read the model, and in it
autoencoder.safetensors, and captions.txt to paint for. It says how many real pictures are still read as told through the autoencoder. The same
command goes on where it was stopped, but an autoencoder that was not finished begins anew.

`radiance train` trains pixel models alone, so the loop is here. The autoencoder is FLUX's architecture made small. It learns with noise of a fixed
variance on its latents and a price for large ones, which is a variational one whose variance is given; they are shifted and scaled to a
mean of 0 and a variance of 1. Most of a picture is black, so it learns from quarters with the object first: from whole pictures alone it paints
blobs for longer than all of this takes.
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
from jaxtyping import Float32

from radiance import config as c
from radiance.data.datasets import Source, describe, open_source
from radiance.data.pipeline import Batches
from radiance.evaluation import reader
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
CROPPED, WHOLE, RATE = 2500, 1500, 4e-3  # steps of the autoencoder
NOISE, PRICE = 0.05, 1e-5  # on a latent; of its square, beside the square of an error of a pixel
CAPTIONS = 2048  # to paint for
Pictures = Float32[np.ndarray, "b height width 3"]
encode, decode = partial(autoencoder.encode, dtype="float32"), partial(autoencoder.decode, dtype="float32")


def config() -> c.Config:
    return c.override(
        one_shape.config(),
        [
            "name=latent_source", f"model.channels={4 * SIZES.latent_channels}", "model.patch=1", "model.prediction=velocity", "flow.time_law=logistic",
            "data.batch=32", "optimizer.decay=constant", "train.steps=1500", "train.checkpoint_every=500",
        ],
    )  # fmt: skip


def trained_autoencoder(run: c.Config, source: Source) -> tuple[Autoencoder, Params]:
    """Of squares of errors; the rate rises for a while and falls along a cosine."""
    steps = CROPPED + WHOLE
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, RATE, steps // 36, steps))

    def loss_of(params: Params, pictures: jax.Array, key: jax.Array) -> jax.Array:
        latents = encode(SIZES, params, pictures)
        painted = decode(SIZES, params, latents + NOISE * jax.random.normal(key, latents.shape))
        return jnp.square(painted - pictures).mean() + PRICE * jnp.square(latents).mean()

    @jax.jit
    def step(params: Params, held: optax.OptState, pictures: jax.Array, key: jax.Array) -> tuple[Params, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, pictures, key)
        updates, held = optimizer.update(gradients, held, params)
        return optax.apply_updates(params, updates), held, loss

    def pictures(number: int, cropped: bool) -> Pictures:
        chosen = [i % len(source) for i in range(number * run.data.batch, (number + 1) * run.data.batch)]
        whole = np.stack([to_signed(np.asarray(source.picture(i))) for i in chosen])
        if not cropped:
            return whole
        draw, half = np.random.default_rng((run.train.seed, number)), run.data.side // 2
        things = [source.attributes(i)["shown"].objects[0] for i in chosen]
        corners = [[min(max(at - draw.integers(2), 0), 2) * half // 2 for at in (thing.row, thing.column)] for thing in things]
        return np.stack([picture[top : top + half, left : left + half] for picture, (top, left) in zip(whole, corners)])

    key = jax.random.key(run.train.seed)
    params = autoencoder.init(SIZES, key)
    held = optimizer.init(params)
    with closing(Progress(0, steps, run.data.batch)) as progress:
        for number in range(steps):
            params, held, loss = step(params, held, pictures(number, number < CROPPED), jax.random.fold_in(key, number))
            progress.update(number + 1, {"autoencoder": float(loss)})
    latents = np.concatenate([encode(SIZES, params, pictures(i, False)) for i in range(8)])
    return replace(SIZES, shift=float(latents.mean()), scale=float(1 / latents.std())), params


def share_read(sizes: Autoencoder, params: Params, source: Source, count: int = 128) -> float:
    """Share of the first pictures whose objects and background are all read as they are, after the way through the autoencoder."""
    pictures = np.stack([to_signed(np.asarray(source.picture(i))) for i in range(count)])
    through = np.asarray(decode(sizes, params, encode(sizes, params, pictures)))
    return reader.score(reader.read(through), [source.attributes(i)["shown"] for i in range(count)]).exact


def main(changes: list[str]) -> int:
    run = c.override(config(), changes)
    directory, source = RunDirectory(run.directory), open_source(run.data, "train")
    data = {"train": describe(source, run.data, "train")}
    directory.check(run, data)
    encoder = make_encoder(run.text, run.model.text_dim)
    batches = Batches(source, run.data, encoder, run.train.seed, run.train.steps, run.model.masking)

    checkpoints, like = Checkpoints(directory.checkpoints), jax.eval_shape(partial(init_state, run))
    first = checkpoints.latest or 0
    directory.record(run, data, first)

    file = run.directory / "autoencoder.safetensors"
    if not file.is_file():
        (run.directory / "captions.txt").write_text("".join(f"{source.captions(i)[0]}\n" for i in range(CAPTIONS)))
        files.write(file, *trained_autoencoder(run, source))
    sizes, params = files.read(file)
    print(
        f"{share_read(sizes, params, open_source(run.data, 'validation')):.0%} of held-out pictures are read as told through {file}.",
        flush=True,
    )

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
