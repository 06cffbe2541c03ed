"""The source of latent_to_pixel.py's toy: an autoencoder of `shapes`, and a model that paints its latents.

    python experiments/latent_source.py [train.seed=SEED name=latent-SEED …]

trains both, in minutes on a CPU, into runs/latent_source: a run directory, of which `radiance sample` and `radiance convert` read the model, and in it
autoencoder.safetensors, and captions.txt to paint for. It says how many real images are still read as told through the autoencoder. The same
command goes on where it was stopped, but an autoencoder that was not finished begins anew.

`radiance train` trains pixel models alone, so the loop is here. The autoencoder is FLUX's architecture made small. It learns with noise of a fixed
variance on its latents and a price for large ones, which is a variational one whose variance is given; they are shifted and scaled to a
mean of 0 and a variance of 1. Most of an image is black, so it learns from quarters with the object first: from whole images alone it paints
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
from radiance.base.images import to_signed
from radiance.data.batches import Batches
from radiance.data.datasets import describe_source, open_source
from radiance.data.source import Source
from radiance.model import autoencoder
from radiance.model.autoencoder import Autoencoder
from radiance.model.transformer import Params
from radiance.shapes import scoring
from radiance.text.factory import make_encoder
from radiance.training.checkpoints import Checkpoints
from radiance.training.progress import Progress
from radiance.training.run_directory import MetricWriter, RunDirectory
from radiance.training.step import init_state, make_train_step
from radiance.training.tracking import Loggers
from radiance.weights import autoencoder as files

SIZES = Autoencoder(
    latent_channels=8, width=8, multipliers=(1, 2, 4), blocks=1, groups=4, shift=0.0, scale=1.0
)
CROPPED, WHOLE, RATE = 2500, 1500, 4e-3  # steps of the autoencoder
NOISE, PRICE = 0.05, 1e-5  # on a latent; of its square, beside the square of an error of a pixel
CAPTIONS = 2048  # to paint for
Images = Float32[np.ndarray, "b height width 3"]
encode, decode = (
    partial(autoencoder.encode_images, dtype="float32"),
    partial(autoencoder.decode_latents, dtype="float32"),
)


def config() -> c.Config:
    return c.override(
        one_shape.config(),
        [
            "name=latent_source", f"model.channels={4 * SIZES.latent_channels}", "model.patch=1", "model.prediction=velocity", "flow.timestep_distribution=logistic",
            "data.batch_size=32", "optimizer.lr_schedule=constant", "train.steps=1500", "train.checkpoint_every=500",
        ],
    )  # fmt: skip


def trained_autoencoder(run: c.Config, source: Source) -> tuple[Autoencoder, Params]:
    """Of squares of errors; the rate rises for a while and falls along a cosine."""
    steps = CROPPED + WHOLE
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, RATE, steps // 36, steps))

    def loss_of(params: Params, images: jax.Array, key: jax.Array) -> jax.Array:
        latents = encode(SIZES, params, images)
        painted = decode(SIZES, params, latents + NOISE * jax.random.normal(key, latents.shape))
        return jnp.square(painted - images).mean() + PRICE * jnp.square(latents).mean()

    @jax.jit
    def step(
        params: Params, held: optax.OptState, images: jax.Array, key: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, images, key)
        updates, held = optimizer.update(gradients, held, params)
        return optax.apply_updates(params, updates), held, loss

    def images(number: int, cropped: bool) -> Images:
        chosen = [
            i % len(source)
            for i in range(number * run.data.batch_size, (number + 1) * run.data.batch_size)
        ]
        whole = np.stack([to_signed(np.asarray(source.load_image(i))) for i in chosen])
        if not cropped:
            return whole
        draw, half = np.random.default_rng((run.train.seed, number)), run.data.resolution // 2
        things = [source.attributes(i)["shown"].objects[0] for i in chosen]
        corners = [
            [min(max(at - draw.integers(2), 0), 2) * half // 2 for at in (thing.row, thing.column)]
            for thing in things
        ]
        return np.stack(
            [
                image[top : top + half, left : left + half]
                for image, (top, left) in zip(whole, corners)
            ]
        )

    key = jax.random.key(run.train.seed)
    params = autoencoder.init_autoencoder_params(SIZES, key)
    held = optimizer.init(params)
    with closing(Progress(0, steps, run.data.batch_size)) as progress:
        for number in range(steps):
            params, held, loss = step(
                params, held, images(number, number < CROPPED), jax.random.fold_in(key, number)
            )
            progress.update(number + 1, {"autoencoder": float(loss)})
    latents = np.concatenate([encode(SIZES, params, images(i, False)) for i in range(8)])
    return replace(SIZES, shift=float(latents.mean()), scale=float(1 / latents.std())), params


def share_read(sizes: Autoencoder, params: Params, source: Source, count: int = 128) -> float:
    """Share of the first images whose objects and background are all read as they are, after the way through the autoencoder."""
    images = np.stack([to_signed(np.asarray(source.load_image(i))) for i in range(count)])
    through = np.asarray(decode(sizes, params, encode(sizes, params, images)))
    return scoring.score_readings(
        scoring.read_pixels(through), [source.attributes(i)["shown"] for i in range(count)]
    ).exact


def main(changes: list[str]) -> int:
    run = c.override(config(), changes)
    directory, source = RunDirectory(run.run_dir), open_source(run.data, "train")
    data = {"train": describe_source(source, run.data, "train")}
    directory.check_resumable(run, data)
    encoder = make_encoder(run.text, run.model.text_dim)
    batches = Batches(source, run.data, encoder, run.train.seed, run.train.steps, run.model.masking)

    checkpoints, like = (
        Checkpoints(directory.checkpoint_dir),
        jax.eval_shape(partial(init_state, run)),
    )
    first = checkpoints.latest_step or 0
    directory.write_metadata(run, data, first)

    file = run.run_dir / "autoencoder.safetensors"
    if not file.is_file():
        (run.run_dir / "captions.txt").write_text(
            "".join(f"{source.captions(i)[0]}\n" for i in range(CAPTIONS))
        )
        files.write_autoencoder(file, *trained_autoencoder(run, source))
    sizes, params = files.read_autoencoder(file)
    print(
        f"{share_read(sizes, params, open_source(run.data, 'validation')):.0%} of held-out images are read as told through {file}.",
        flush=True,
    )

    state = checkpoints.restore(first, like) if first else jax.jit(partial(init_state, run))()
    step = jax.jit(make_train_step(run), donate_argnums=0)
    with (
        closing(batches.start(first)) as feed,
        closing(checkpoints),
        closing(MetricWriter(directory, first, Loggers(run, first))) as journal,
        closing(Progress(first, run.train.steps, run.data.batch_size)) as progress,
    ):
        for number in range(first + 1, run.train.steps + 1):
            batch = {name: x for name, x in next(feed).items() if name not in ("cut", "skipped")}
            state, metrics = step(
                state, batch | {"image": encode(sizes, params, to_signed(batch["image"]))}
            )
            progress.update(number, {"loss": float(metrics["loss"])})
            if number % run.train.log_every == 0:
                journal.write_metrics(number, {"loss": float(metrics["loss"])})
            if number % run.train.checkpoint_every == 0 or number == run.train.steps:
                checkpoints.save(state)
    print(f"{run.run_dir} paints latents, and {file} makes images of them.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
