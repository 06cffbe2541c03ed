"""Train the latent model and the autoencoder that the toy of latent_to_pixel.py starts from.

    python experiments/latent_source.py [train.seed=SEED name=latent-SEED …]

This trains both into runs/latent_source, the model in seven minutes of a CPU core and the
autoencoder in six. `radiance sample` and `convert` open this run directory, which has
autoencoder.safetensors and captions.txt in it. It prints how many real images an exact reader
still reads correctly after the autoencoder. The same command resumes, but an unfinished
autoencoder starts anew.

`radiance train` trains pixel models only, so the loop is here. The autoencoder is a small version
of FLUX's. It is trained with noise of fixed variance on its latents and a penalty on their
squares, which is a variational one of given variance; latents are shifted and scaled to mean 0
and variance 1. Most of an image is black, so training starts with quarters that hold the object;
from full images alone it reconstructs blobs for longer than all of this.
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
from radiance.training.coordination import lock_run_directory
from radiance.training.metric_writer import MetricWriter
from radiance.training.progress import Progress
from radiance.training.resumption import check_resumable
from radiance.training.run_directory import RunDirectory
from radiance.training.step import init_state, make_train_step
from radiance.training.tracking import Loggers
from radiance.weights import autoencoder as files

SIZES = Autoencoder(
    latent_channels=8, width=8, multipliers=(1, 2, 4), blocks=1, groups=4, shift=0.0, scale=1.0
)
CROP_STEPS, FULL_STEPS, LEARNING_RATE = 2500, 1500, 4e-3  # of the autoencoder
LATENT_NOISE, LATENT_PENALTY = 0.05, 1e-5  # standard deviation; weight of the mean square
NUM_CAPTIONS = 2048  # of images to sample for latent_to_pixel.py
Images = Float32[np.ndarray, "b height width 3"]
encode, decode = (
    partial(autoencoder.encode_images, dtype="float32"),
    partial(autoencoder.decode_latents, dtype="float32"),
)


def config() -> c.Config:
    return c.override(
        one_shape.config(),
        [
            "name=latent_source", f"model.channels={4 * SIZES.latent_channels}", "model.patch=1",
            "model.prediction=velocity", "flow.timestep_distribution=logistic",
            "data.batch_size=32", "optimizer.lr_schedule=constant", "train.steps=1500",
            "train.checkpoint_every=500",
        ],
    )  # fmt: skip


def load_batch(run: c.Config, source: Source, index: int, crop: bool) -> Images:
    """Load the images of a step, or their quarters that hold the object."""
    size = run.data.batch_size
    indices = [i % len(source) for i in range(index * size, (index + 1) * size)]
    images = np.stack([to_signed(np.asarray(source.load_image(i))) for i in indices])
    if not crop:
        return images
    rng, half = np.random.default_rng((run.train.seed, index)), run.data.resolution // 2
    corners = []
    for scene_object in (source.attributes(i)["scene"].objects[0] for i in indices):
        cells = (scene_object.row, scene_object.column)
        corners.append([min(max(cell - rng.integers(2), 0), 2) * half // 2 for cell in cells])
    return np.stack([image[y : y + half, x : x + half] for image, (y, x) in zip(images, corners)])


def train_autoencoder(run: c.Config, source: Source) -> tuple[Autoencoder, Params]:
    """Train the autoencoder on squared errors, with warm-up and cosine decay."""
    steps = CROP_STEPS + FULL_STEPS
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, steps // 36, steps)
    optimizer = optax.adam(schedule)

    def compute_loss(params: Params, images: jax.Array, key: jax.Array) -> jax.Array:
        latents = encode(SIZES, params, images)
        noise = LATENT_NOISE * jax.random.normal(key, latents.shape)
        error = jnp.square(decode(SIZES, params, latents + noise) - images).mean()
        return error + LATENT_PENALTY * jnp.square(latents).mean()

    @jax.jit
    def train_step(
        params: Params, state: optax.OptState, images: jax.Array, key: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(compute_loss)(params, images, key)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    key = jax.random.key(run.train.seed)
    params = autoencoder.init_autoencoder_params(SIZES, key)
    state = optimizer.init(params)
    with closing(Progress(0, steps, run.data.batch_size)) as progress:
        for index in range(steps):
            images = load_batch(run, source, index, crop=index < CROP_STEPS)
            params, state, loss = train_step(params, state, images, jax.random.fold_in(key, index))
            progress.update(index + 1, {"autoencoder": float(loss)})
    latents = np.concatenate(
        [encode(SIZES, params, load_batch(run, source, i, crop=False)) for i in range(8)]
    )
    return replace(SIZES, shift=float(latents.mean()), scale=float(1 / latents.std())), params


def fraction_read(
    sizes: Autoencoder, params: Params, source: Source, num_images: int = 128
) -> float:
    """Return the fraction of images that are read correctly after encoding and decoding."""
    images = np.stack([to_signed(np.asarray(source.load_image(i))) for i in range(num_images)])
    decoded = np.asarray(decode(sizes, params, encode(sizes, params, images)))
    scenes = [source.attributes(i)["scene"] for i in range(num_images)]
    return scoring.score_readings(scoring.read_pixels(decoded), scenes).exact


def train_latent_model(run: c.Config, sizes: Autoencoder, params: Params, batches: Batches) -> None:
    """Train the latent model in its run directory, or resume its training."""
    run_dir = RunDirectory(run.run_dir)
    checkpoints = Checkpoints(run_dir.checkpoint_dir)
    first_step = checkpoints.latest_step or 0
    make_state = partial(init_state, run)
    if first_step:
        state = checkpoints.restore(first_step, jax.eval_shape(make_state))
    else:
        state = jax.jit(make_state)()
    train_step = jax.jit(make_train_step(run), donate_argnums=0)
    with (
        closing(batches.start(first_step)) as feed,
        closing(checkpoints),
        closing(MetricWriter(run_dir, first_step, Loggers(run, first_step))) as writer,
        closing(Progress(first_step, run.train.steps, run.data.batch_size)) as progress,
    ):
        for step in range(first_step + 1, run.train.steps + 1):
            batch = {name: x for name, x in next(feed).items() if name not in ("cut", "skipped")}
            latents = encode(sizes, params, to_signed(batch["image"]))
            state, metrics = train_step(state, batch | {"image": latents})
            loss = {"loss": float(metrics["loss"])}
            progress.update(step, loss)
            if step % run.train.log_every == 0:
                writer.write_metrics(step, loss)
            if step % run.train.checkpoint_every == 0 or step == run.train.steps:
                checkpoints.save(state)


def main(changes: list[str]) -> int:
    """Train the autoencoder and the latent model; return the exit code."""
    run = c.override(config(), changes)
    with lock_run_directory(run.run_dir):
        train(run)
    return 0


def train(run: c.Config) -> None:
    """Train the autoencoder and the latent model in the run directory, or resume their training."""
    run_dir, source = RunDirectory(run.run_dir), open_source(run.data, "train")
    data = {"train": describe_source(source, run.data, "train")}
    check_resumable(run_dir, run, data)
    encoder = make_encoder(run.text, run.model.text_dim)
    batches = Batches(source, run.data, encoder, run.train.seed, run.train.steps, run.model.masking)
    run_dir.write_metadata(run, data, Checkpoints(run_dir.checkpoint_dir).latest_step or 0)

    path = run.run_dir / "autoencoder.safetensors"
    if not path.is_file():
        captions = "".join(f"{source.captions(i)[0]}\n" for i in range(NUM_CAPTIONS))
        (run.run_dir / "captions.txt").write_text(captions, "utf-8")
        files.write_autoencoder(path, *train_autoencoder(run, source))
    sizes, params = files.read_autoencoder(path)
    fraction = fraction_read(sizes, params, open_source(run.data, "validation"))
    print(f"{fraction:.0%} of held-out images are read correctly after {path}.", flush=True)

    train_latent_model(run, sizes, params, batches)
    print(f"{run.run_dir} generates latents, and {path} decodes them.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
