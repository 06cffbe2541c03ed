"""Generate images from prompts with a model, its text encoder and an autoencoder for latents."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from PIL import Image

from radiance import config
from radiance.base.errors import SamplingError
from radiance.base.images import to_image
from radiance.base.text_files import check_text, quote_text, replace_invalid
from radiance.distributed.sharding import gather_array
from radiance.flow.finiteness import find_nonfinite_row, make_nonfinite_error
from radiance.flow.inpainting import InitImage
from radiance.flow.sampler import compute_modulations, generate_images
from radiance.flow.schedules import compute_step_lengths, make_time_schedule
from radiance.model import autoencoder
from radiance.model.modulation import ModulationVectors
from radiance.model.transformer import Params
from radiance.text.encoder import TextEncoder
from radiance.text.factory import make_encoder
from radiance.text.prompts import count_visible_tokens, encode_prompts

DECODE_TILE_SIZE = 1024  # pixels; larger images are decoded from latents in tiles of this size


class GeneratedImage(NamedTuple):
    """An image, and the metadata of its PNG file."""

    image: Image.Image
    metadata: dict[str, Any]  # prompt, seed, size, settings and model


class GeneratedTrajectory(NamedTuple):
    """States from noise to images, about in [-1, 1], or to latents in a latent model."""

    times: Float32[np.ndarray, " times"]  # decreasing from 1 to 0
    # x_t at each time, in complete patches: the inputs of the network, then the images.
    noisy: Float32[np.ndarray, "times b height width c"]

    @property
    def clean(self) -> Float32[np.ndarray, "steps b height width c"]:
        """Prediction x̂ at all times but the last: each step extrapolated linearly to time 0.

        For the Euler solver, this is the guided prediction of the network.
        """
        by_step = (slice(None), *[None] * (self.noisy.ndim - 1))
        velocity = np.diff(self.noisy, axis=0) / np.diff(self.times)[by_step]
        return self.noisy[:-1] - self.times[:-1][by_step] * velocity


class LatentDecoder(NamedTuple):
    """The decoder that turns the latents of a latent model into pixels."""

    architecture: autoencoder.Autoencoder
    params: Params
    dtype: str

    def decode(
        self, latents: Float32[np.ndarray, "b rows columns packed"]
    ) -> Float32[np.ndarray, "b height width 3"]:
        """Decode latents one by one, large ones in tiles, so that memory is bounded."""
        return np.concatenate(
            [
                np.asarray(
                    autoencoder.decode_latents(
                        self.architecture,
                        self.params,
                        x[None],
                        dtype=self.dtype,
                        tile=DECODE_TILE_SIZE,
                    )
                )
                for x in latents
            ]
        )


class Pipeline:
    """A model that generates images: `pipeline(["a handwritten seven"], seeds=[1])`.

    Args:
        run: Settings of the model, and defaults of sampling.
        params: Parameters of the network.
        origin: Name of the model in the metadata of images.
        encoder: The text encoder; made from `run.text` when None.
        decoder: The decoder of a latent model.
        mesh: Mesh of `params`, over which images are sharded. When None, the mesh of
            `jax.set_mesh`, or one device.
    """

    def __init__(
        self,
        run: config.Config,
        params: Params,
        origin: str = "",
        encoder: TextEncoder | None = None,
        decoder: LatentDecoder | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.run, self.origin, self.decoder, self.mesh = run, origin, decoder, mesh
        # The layers that compute the modulation are needed once per schedule; otherwise they are in
        # the memory of the host.
        self._network = {name: value for name, value in params.items() if name != "modulation"}
        self._modulation = jax.tree.map(jnp.asarray, params["modulation"])
        self._modulation_shardings = jax.tree.map(lambda x: x.sharding, self._modulation)
        self._cached_vectors: tuple[bytes, ModulationVectors] | None = None
        self.encoder = encoder or make_encoder(run.text, run.model.text_dim)
        # Side in pixels of the square that a token represents.
        self.pixels_per_token = run.model.patch * (
            decoder.architecture.patch_size if decoder else 1
        )

    @property
    def params(self) -> Params:
        """All parameters of the network."""
        return {
            **self._network,
            "modulation": jax.device_put(self._modulation, self._modulation_shardings),
        }

    def __call__(self, prompts: Sequence[str], *args, **kwargs) -> list[GeneratedImage]:
        """Return the images of `generate` as a list."""
        return list(self.generate(prompts, *args, **kwargs))

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        settings: config.Sample | None = None,
        init_image: InitImage | None = None,
    ) -> Iterator[GeneratedImage]:
        """Yield one image for each prompt and its seed.

        An image depends only on its own prompt, seed, size, settings and initial image. Prompts are
        encoded batch by batch, so memory does not grow with their number.

        Args:
            prompts: Texts.
            seeds: A seed below 2³² for each prompt; 0, 1, 2, … when None.
            width: Pixels, not necessarily complete patches; `run.data.resolution` when None.
            height: Pixels; the width when None.
            settings: Settings of sampling; `run.sample` when None.
            init_image: An image to start from, which also determines the size.

        Raises:
            TextError: For a prompt over the encoder's limit or with invalid Unicode, before any
                image is sampled.
            ConfigError: For an initial image of another size, or with a latent model.
            SamplingError: An image is not finite.
        """
        if init_image:
            self._check_init_image(init_image, width, height)
            width, height = init_image.size
        seeds, width, height, settings = self._fill_defaults(
            prompts, seeds, width, height, settings
        )
        metadata = self.make_metadata(width, height, settings) | (
            init_image.metadata if init_image else {}
        )
        for i, image in enumerate(
            chain.from_iterable(
                self.generate_arrays(prompts, seeds, width, height, settings, init_image)
            )
        ):
            yield GeneratedImage(
                to_image(image), {"prompt": prompts[i], "seed": int(seeds[i]), **metadata}
            )

    def _fill_defaults(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None,
        width: int | None,
        height: int | None,
        settings: config.Sample | None,
    ) -> tuple[list[int], int, int, config.Sample]:
        """Return seeds, width, height and settings with defaults in place of None."""
        resolution = self.run.data.resolution
        return (
            list(range(len(prompts)) if seeds is None else seeds),
            width or resolution,
            height or width or resolution,
            settings or self.run.sample,
        )

    def _check_init_image(self, init_image: InitImage, width: int | None, height: int | None):
        if self.decoder:
            raise config.ConfigError(
                "Latent models cannot start from an image: give a pixel model."
            )
        if (width, height) not in ((None, None), init_image.size):
            raise config.ConfigError(
                f"Samples that start from an image have its size, not {width}×{height}: scale it "
                "first."
            )

    def make_metadata(
        self, width: int, height: int, settings: config.Sample | None = None
    ) -> dict[str, Any]:
        """Return the metadata that all images of a size share.

        Args:
            width: Width in pixels.
            height: Height in pixels.
            settings: Settings of sampling; `run.sample` when None.
        """
        return {
            "size": [width, height],
            "settings": config.to_dict(settings or self.run.sample),
            "model": replace_invalid(self.origin),
        }

    def generate_arrays(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int,
        height: int,
        settings: config.Sample,
        init_image: InitImage | None = None,
    ) -> Iterator[Float32[np.ndarray, "b height width 3"]]:
        """Yield batches of images as arrays, about in [-1, 1], without rounding.

        The arguments and errors are those of `generate`.
        """
        num_images = 0
        for images in self._run_sampler(prompts, seeds, width, height, settings, init_image):
            if self.decoder:
                images = self.decoder.decode(images)
                if (row := find_nonfinite_row(images)) is not None:
                    index = num_images + row
                    raise SamplingError(
                        f"The autoencoder's image of {quote_text(prompts[index])} with seed "
                        f"{seeds[index]} is not finite: use another file of the autoencoder."
                    )
            num_images += len(images)
            yield images[:, :height, :width]

    def generate_trajectory(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        settings: config.Sample | None = None,
    ) -> GeneratedTrajectory:
        """Return the trajectories of the images of `generate`.

        All states are in memory: the number of steps and one more for each image. The arguments
        are those of `generate`.
        """
        seeds, width, height, settings = self._fill_defaults(
            prompts, seeds, width, height, settings
        )
        states = list(self.iter_trajectories(prompts, seeds, width, height, settings))
        return GeneratedTrajectory(
            self._make_times(width, height, settings), np.concatenate(states, axis=1)
        )

    def iter_trajectories(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int,
        height: int,
        settings: config.Sample,
    ) -> Iterator[Float32[np.ndarray, "times b rows columns c"]]:
        """Yield the states of trajectories batch by batch.

        The arguments are those of `generate`.
        """
        return self._run_sampler(prompts, seeds, width, height, settings, return_trajectory=True)

    def _make_times(
        self, width: int, height: int, settings: config.Sample, strength: float = 1.0
    ) -> Float32[np.ndarray, " times"]:
        return make_time_schedule(
            settings,
            -(-height // self.pixels_per_token) * -(-width // self.pixels_per_token),
            strength,
        )

    def _run_sampler(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int,
        height: int,
        settings: config.Sample,
        init_image: InitImage | None = None,
        return_trajectory: bool = False,
    ) -> Iterator[Float32[np.ndarray, "*steps b rows columns c"]]:
        """Yield batches of samples or trajectories in complete patches."""
        run = self.run
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}.")
        if not prompts:
            return
        for prompt in (*prompts, settings.negative_prompt):
            check_text(prompt, "The prompt")
        num_tokens = count_visible_tokens(
            self.encoder, [*prompts, settings.negative_prompt], run.model.masking
        )
        strength = init_image.strength if init_image else 1.0
        sample = partial(
            self._sample_batch,
            num_tokens=num_tokens,
            height=-(-height // self.pixels_per_token) * run.model.patch,
            width=-(-width // self.pixels_per_token) * run.model.patch,
            times=self._make_times(width, height, settings, strength),
            settings=settings,
            init_image=init_image,
        )
        batch_size = min(settings.batch_size, len(prompts))
        for first in range(0, len(prompts), batch_size):
            last = len(prompts) - 1  # pads the last batch
            indices = [min(index, last) for index in range(first, first + batch_size)]
            batch_prompts = [prompts[index] for index in indices]
            batch_seeds = [seeds[index] for index in indices]
            samples = sample(batch_prompts, batch_seeds, return_trajectory=return_trajectory)
            samples = samples[..., : len(prompts) - first, :, :, :]
            if (row := find_nonfinite_row(samples)) is not None:
                prompt, seed = batch_prompts[row], batch_seeds[row]
                trajectory = sample([prompt], [seed], return_trajectory=True)
                raise make_nonfinite_error(prompt, seed, trajectory)
            yield samples

    def _sample_batch(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_tokens: int,
        height: int,
        width: int,
        times: Float32[np.ndarray, " times"],
        settings: config.Sample,
        init_image: InitImage | None,
        return_trajectory: bool,
    ) -> Float32[np.ndarray, "*steps b height width c"]:
        """Return samples or trajectories of one batch, complete on every host."""
        positive, negative = encode_prompts(
            self.encoder, prompts, settings, self.run.model.masking, num_tokens
        )
        size: dict[str, int] = dict(height=height, width=width)
        init_images = None
        if init_image:
            init_images = init_image.to_batch(**size, batch_size=len(prompts))
        with jax.set_mesh(self.mesh) if self.mesh else nullcontext():
            samples = generate_images(
                self._network,
                np.array(seeds, np.uint32),
                positive,
                jax.tree.map(lambda x: np.repeat(x, len(prompts), axis=0), negative),
                model=self.run.model,
                compute=self.run.compute,
                # The negative prompt is encoded already: another one needs no other program.
                settings=replace(settings, negative_prompt=""),
                noise_scale=self.run.flow.noise_scale,
                vectors=self.modulation_vectors(times, settings),
                init_images=init_images,
                strength=init_image.strength if init_image else 1.0,
                return_trajectory=return_trajectory,
                **size,
            )
        return gather_array(samples)

    def modulation_vectors(
        self, times: Float32[np.ndarray, " t"], settings: config.Sample | None = None
    ) -> ModulationVectors:
        """Return the modulation vectors at the given times; those of the last schedule are cached.

        Args:
            times: Times in [0, 1].
            settings: Settings of sampling; `run.sample` when None.
        """
        lengths = compute_step_lengths(settings or self.run.sample, times)
        cache_key = times.tobytes() + (b"" if lengths is None else lengths.tobytes())
        if self._cached_vectors is None or self._cached_vectors[0] != cache_key:
            modulation = jax.device_put(self._modulation, self._modulation_shardings)
            self._cached_vectors = (
                cache_key,
                compute_modulations(
                    modulation, times, lengths, model=self.run.model, compute=self.run.compute
                ),
            )
            if all(
                sharding.is_fully_addressable
                for sharding in jax.tree.leaves(self._modulation_shardings)
            ):
                self._modulation = jax.device_get(modulation)
        return self._cached_vectors[1]
