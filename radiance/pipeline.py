"""From prompts to images with a model, its text encoder and, for latent models, an autoencoder."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from radiance import config
from radiance.base.images import to_image, to_signed
from radiance.base.settings import require
from radiance.distributed.sharding import gather_array
from radiance.flow.sampler import StartImage, TextCondition, compute_modulations, generate_images
from radiance.flow.schedules import compute_step_lengths, make_time_schedule
from radiance.model import autoencoder
from radiance.model.modulation import ModulationVectors
from radiance.model.transformer import Params, visible_lengths
from radiance.text.encoder import TextEncoder, round_up_length
from radiance.text.factory import make_encoder

DECODE_TILE_SIZE = 1024  # pixels; larger images are decoded from latents in tiles of this side


class GeneratedImage(NamedTuple):
    image: Image.Image
    metadata: dict[str, Any]  # prompt, seed, size, settings, model: what its PNG carries


@dataclass(frozen=True, eq=False)
class InitImage:
    """An image that painting starts from. Raises ConfigError for a mask of another size and a strength that cannot be."""

    image: UInt8[np.ndarray, "height width 3"]
    # 1 where it is painted anew, 0 where it stays to the last bit, and between where the two are blended; everything anew when None.
    mask: Float32[np.ndarray, "height width"] | None = None
    strength: float = 1.0  # the time that painting starts at: near 0 little changes, and at 1 what is painted anew forgets the image

    def __post_init__(self):
        require(
            0 < self.strength <= 1,
            f"strength={self.strength} must be more than 0 and at most 1: it is the time that painting starts at.",
        )
        if self.mask is not None:
            mask_size, image_size = (
                "×".join(map(str, x.shape[1::-1])) for x in (self.mask, self.image)
            )
            require(
                mask_size == image_size,
                f"The mask is of {mask_size} pixels, and the image of {image_size}: make them alike.",
            )

    @property
    def metadata(self) -> dict[str, Any]:
        """For a PNG: which image and mask it was, by the hash of their pixels."""
        arrays = {"image": self.image, "mask": self.mask}
        hashes = {
            name: hashlib.blake2b(x.tobytes(), digest_size=8).hexdigest()
            for name, x in arrays.items()
            if x is not None
        }
        return {"start": {"strength": self.strength, **hashes}}

    def to_start_image(self, height: int, width: int, batch_size: int) -> StartImage:
        """As the network needs it: so many times, and grown to whole patches by its last rows and columns."""
        mask = np.ones(self.image.shape[:2], np.float32) if self.mask is None else self.mask
        padding = [(0, height - mask.shape[0]), (0, width - mask.shape[1]), (0, 0)]
        return StartImage(
            *(
                np.repeat(np.pad(x, padding, "edge")[None], batch_size, axis=0)
                for x in (to_signed(self.image), mask[..., None])
            )
        )


class Trajectory(NamedTuple):
    """The way from noise to images, about in [-1, 1]; of latent models, to latents."""

    times: Float32[np.ndarray, " steps+1"]  # falling from 1 to 0
    noisy: Float32[
        np.ndarray, "steps+1 b height width c"
    ]  # x_t at each of them, in whole patches: what the network sees, and the image

    @property
    def clean(self) -> Float32[np.ndarray, "steps b height width c"]:
        """x̂ at all times but the last: where each step, gone on with straight, ends at time 0.

        With Euler that is the image which the network expects at that time, led by guidance.
        """
        by_step = (slice(None), *[None] * (self.noisy.ndim - 1))
        velocity = np.diff(self.noisy, axis=0) / np.diff(self.times)[by_step]
        return self.noisy[:-1] - self.times[:-1][by_step] * velocity


class LatentDecoder(NamedTuple):
    """What turns a latent model's images into pixels."""

    architecture: autoencoder.Autoencoder
    params: Params
    dtype: str

    def decode(
        self, latents: Float32[np.ndarray, "b rows columns packed"]
    ) -> Float32[np.ndarray, "b height width 3"]:
        """One image at a time, in tiles where it is large, so that memory is bounded."""
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
    """`pipeline(["a handwritten seven"], seeds=[1])` gives images."""

    def __init__(
        self,
        run: config.Config,
        params: Params,
        origin: str = "",
        encoder: TextEncoder | None = None,
        decoder: LatentDecoder | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """mesh: over which `params` lie, and images are spread; the one of `jax.set_mesh`, or one device, when None."""
        self.run, self.origin, self.decoder, self.mesh = run, origin, decoder, mesh
        # What makes the modulation is wanted once a schedule, and otherwise waits in the host's memory.
        self._network = {name: value for name, value in params.items() if name != "modulation"}
        self._modulation = jax.tree.map(jnp.asarray, params["modulation"])
        self._modulation_shardings = jax.tree.map(lambda x: x.sharding, self._modulation)
        self._cached_vectors: tuple[bytes, ModulationVectors] | None = None
        self.encoder = encoder or make_encoder(run.text, run.model.text_dim)
        # Pixels along the side of what one token stands for.
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
        """The list of what `paint` yields."""
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
        """One image per prompt and seed (0, 1, 2, … when None), of any size: whole patches are painted and cropped.

        An image depends on its prompt, seed, size, settings and start, not on the others. Prompts are encoded batch by batch: any number of
        them takes the memory of a few. start: an image to start from, whose size they have. Raises TextError for one over the encoder's
        limit, before anything is painted, and ConfigError for a start of another size or with a latent model.
        """
        if init_image:
            self._check_init_image(init_image, width, height)
            height, width = init_image.image.shape[:2]
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
        """With what was left open."""
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
                "Latent models cannot start from an image here: give a pixel model."
            )
        if (width, height) not in ((None, None), init_image.image.shape[1::-1]):
            raise config.ConfigError(
                f"Painting from an image gives one of its size, not of {width}×{height}: scale it first."
            )

    def make_metadata(
        self, width: int, height: int, settings: config.Sample | None = None
    ) -> dict[str, Any]:
        """What images of that size have in common and say of themselves."""
        return {
            "size": [width, height],
            "settings": config.to_dict(settings or self.run.sample),
            "model": self.origin,
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
        """The images of `paint` as the network gives them, batch by batch: about in [-1, 1], and not rounded."""
        for images in self._run_sampler(prompts, seeds, width, height, settings, init_image):
            yield (self.decoder.decode(images) if self.decoder else images)[:, :height, :width]

    def generate_trajectory(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        settings: config.Sample | None = None,
    ) -> Trajectory:
        """How the images of `paint` come about. All of it is in memory: as many images as there are steps, and one, of each."""
        seeds, width, height, settings = self._fill_defaults(
            prompts, seeds, width, height, settings
        )
        states = list(self.iter_trajectories(prompts, seeds, width, height, settings))
        return Trajectory(self._make_times(width, height, settings), np.concatenate(states, axis=1))

    def iter_trajectories(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int,
        height: int,
        settings: config.Sample,
    ) -> Iterator[Float32[np.ndarray, "steps+1 b rows columns c"]]:
        """What `trajectory` calls noisy, batch by batch."""
        return self._run_sampler(prompts, seeds, width, height, settings, return_trajectory=True)

    def _make_times(
        self, width: int, height: int, settings: config.Sample, strength: float = 1.0
    ) -> Float32[np.ndarray, " steps+1"]:
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
        """What the sampler gives, batch by batch, in whole patches."""
        run = self.run
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}.")
        if not prompts:
            return
        num_tokens = count_visible_tokens(
            self.encoder, [*prompts, settings.negative_prompt], run.model.masking
        )
        size = dict(
            height=-(-height // self.pixels_per_token) * run.model.patch,
            width=-(-width // self.pixels_per_token) * run.model.patch,
        )
        strength = init_image.strength if init_image else 1.0
        times = self._make_times(width, height, settings, strength)

        batch_size = min(settings.batch_size, len(prompts))
        for first in range(0, len(prompts), batch_size):
            indices = np.minimum(
                np.arange(first, first + batch_size), len(prompts) - 1
            )  # a last, shorter batch is filled up
            positive, negative = encode_prompts(
                self.encoder,
                [prompts[index] for index in indices],
                settings,
                run.model.masking,
                num_tokens,
            )
            with jax.set_mesh(self.mesh) if self.mesh else nullcontext():
                samples = generate_images(
                    self._network,
                    np.array(seeds, np.uint32)[indices],
                    positive,
                    TextCondition(
                        np.repeat(negative.text, batch_size, axis=0),
                        np.repeat(negative.lengths, batch_size),
                    ),
                    model=run.model,
                    compute=run.compute,
                    settings=replace(
                        settings, negative_prompt=""
                    ),  # already encoded: another text needs no other program
                    noise_scale=run.flow.noise_scale,
                    vectors=self.modulation_vectors(times, settings),
                    start_image=init_image.to_start_image(**size, batch_size=batch_size)
                    if init_image
                    else None,
                    strength=strength,
                    return_trajectory=return_trajectory,
                    **size,
                )
            yield gather_array(samples)[..., : len(prompts) - first, :, :, :]

    def modulation_vectors(
        self, times: Float32[np.ndarray, " t"], settings: config.Sample | None = None
    ) -> ModulationVectors:
        """The modulation of the network at these times; that of the last schedule is kept."""
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


def encode_prompts(
    encoder: TextEncoder,
    prompts: Sequence[str],
    settings: config.Sample,
    masking: str,
    num_tokens: int | None = None,
) -> tuple[TextCondition, TextCondition]:
    """Conditions of the prompts, and of what guidance leads away from: the negative prompt, or a text of length 0.

    They are cut to `tokens`, or where no token is visible in any of them. What is cut off is masked anyway: the image is the same for less
    work.
    """
    encoded = encoder.encode([*prompts, settings.negative_prompt])
    text, lengths = encoder.pad_embeddings(
        encoded,
        num_tokens or count_visible_tokens(encoder, [*prompts, settings.negative_prompt], masking),
    )
    if settings.unconditional == "masked":
        lengths[-1] = 0
    return TextCondition(text[:-1], lengths[:-1]), TextCondition(text[-1:], lengths[-1:])


def count_visible_tokens(encoder: TextEncoder, texts: Sequence[str], masking: str) -> int:
    """Tokens that hold what is visible of every text, in steps, so that few programs are compiled. Raises TextError for a text over the
    limit.
    """
    counts = np.array([encoder.count_tokens(text) for text in texts])
    for text, count in zip(texts, counts.tolist()):
        encoder.check_length(text, count, truncate=False)
    return round_up_length(
        int(visible_lengths(counts, encoder.max_length, masking).max()), encoder.max_length
    )
