"""From prompts to pictures with a model, its text encoder and, for latent models, an autoencoder."""

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
from radiance.model import autoencoder
from radiance.model.modulation import Vectors
from radiance.model.transformer import Params, visible_tokens
from radiance.pictures import to_picture, to_signed
from radiance.sampling import Condition, Known, lengths_of, modulations, paint, times_of
from radiance.sections import require
from radiance.sharding import gathered
from radiance.text.encoders import Encoder, bucket, make_encoder

TILE = 1024  # pixels; larger pictures are decoded from latents in tiles of this side


class Picture(NamedTuple):
    image: Image.Image
    facts: dict[str, Any]  # prompt, seed, size, settings, model: what its PNG carries


@dataclass(frozen=True, eq=False)
class Start:
    """A picture that painting starts from. Raises ConfigError for a mask of another size and a strength that cannot be."""

    image: UInt8[np.ndarray, "height width 3"]
    # 1 where it is painted anew, 0 where it stays to the last bit, and between where the two are blended; everything anew when None.
    mask: Float32[np.ndarray, "height width"] | None = None
    strength: float = 1.0  # the time that painting starts at: near 0 little changes, and at 1 what is painted anew forgets the picture

    def __post_init__(self):
        require(
            0 < self.strength <= 1, f"strength={self.strength} must be more than 0 and at most 1: it is the time that painting starts at."
        )
        if self.mask is not None:
            ours, theirs = ("×".join(map(str, x.shape[1::-1])) for x in (self.mask, self.image))
            require(ours == theirs, f"The mask is of {ours} pixels, and the picture of {theirs}: make them alike.")

    @property
    def facts(self) -> dict[str, Any]:
        """For a PNG: which picture and mask it was, by the hash of their pixels."""
        parts = {"image": self.image, "mask": self.mask}
        hashes = {name: hashlib.blake2b(x.tobytes(), digest_size=8).hexdigest() for name, x in parts.items() if x is not None}
        return {"start": {"strength": self.strength, **hashes}}

    def known(self, height: int, width: int, count: int) -> Known:
        """As the network needs it: so many times, and grown to whole patches by its last rows and columns."""
        mask = np.ones(self.image.shape[:2], np.float32) if self.mask is None else self.mask
        grown = [(0, height - mask.shape[0]), (0, width - mask.shape[1]), (0, 0)]
        return Known(*(np.repeat(np.pad(x, grown, "edge")[None], count, axis=0) for x in (to_signed(self.image), mask[..., None])))


class Trajectory(NamedTuple):
    """The way from noise to pictures, about in [-1, 1]; of latent models, to latents."""

    times: Float32[np.ndarray, " steps+1"]  # falling from 1 to 0
    noisy: Float32[np.ndarray, "steps+1 b height width c"]  # x_t at each of them, in whole patches: what the network sees, and the picture

    @property
    def clean(self) -> Float32[np.ndarray, "steps b height width c"]:
        """x̂ at all times but the last: where each step, gone on with straight, ends at time 0.

        With Euler that is the picture which the network expects at that time, led by guidance.
        """
        by_step = (slice(None), *[None] * (self.noisy.ndim - 1))
        velocity = np.diff(self.noisy, axis=0) / np.diff(self.times)[by_step]
        return self.noisy[:-1] - self.times[:-1][by_step] * velocity


class Autoencoder(NamedTuple):
    """What turns a latent model's pictures into pixels."""

    sizes: autoencoder.Autoencoder
    params: Params
    dtype: str

    def decode(self, latents: Float32[np.ndarray, "b rows columns packed"]) -> Float32[np.ndarray, "b height width 3"]:
        """One picture at a time, in tiles where it is large, so that memory is bounded."""
        return np.concatenate(
            [np.asarray(autoencoder.decode(self.sizes, self.params, x[None], dtype=self.dtype, tile=TILE)) for x in latents]
        )


class Pipeline:
    """`pipeline(["a handwritten seven"], seeds=[1])` gives pictures."""

    def __init__(
        self,
        run: config.Config,
        params: Params,
        origin: str = "",
        encoder: Encoder | None = None,
        decoder: Autoencoder | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """mesh: over which `params` lie, and pictures are spread; the one of `jax.set_mesh`, or one device, when None."""
        self.run, self.origin, self.decoder, self.mesh = run, origin, decoder, mesh
        # What makes the modulation is wanted once a schedule, and otherwise waits in the host's memory.
        self._network = {name: value for name, value in params.items() if name != "modulation"}
        self._modulation = jax.tree.map(jnp.asarray, params["modulation"])
        self._places = jax.tree.map(lambda x: x.sharding, self._modulation)
        self._vectors: tuple[bytes, Vectors] | None = None
        self.encoder = encoder or make_encoder(run.text, run.model.text_dim)
        # Pixels along the side of what one token stands for.
        self.side = run.model.patch * (decoder.sizes.side if decoder else 1)

    @property
    def params(self) -> Params:
        """All parameters of the network."""
        return {**self._network, "modulation": jax.device_put(self._modulation, self._places)}

    def __call__(self, prompts: Sequence[str], *arguments, **named) -> list[Picture]:
        """The list of what `paint` yields."""
        return list(self.paint(prompts, *arguments, **named))

    def paint(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        settings: config.Sample | None = None,
        start: Start | None = None,
    ) -> Iterator[Picture]:
        """One picture per prompt and seed (0, 1, 2, … when None), of any size: whole patches are painted and cropped.

        A picture depends on its prompt, seed, size, settings and start, not on the others. Prompts are encoded batch by batch: any number of
        them takes the memory of a few. start: a picture to start from, whose size they have. Raises TextError for one over the encoder's
        limit, before anything is painted, and ConfigError for a start of another size or with a latent model.
        """
        if start:
            self._check(start, width, height)
            height, width = start.image.shape[:2]
        seeds, width, height, settings = self._asked(prompts, seeds, width, height, settings)
        facts = self.facts(width, height, settings) | (start.facts if start else {})
        for i, image in enumerate(chain.from_iterable(self.values(prompts, seeds, width, height, settings, start))):
            yield Picture(to_picture(image), {"prompt": prompts[i], "seed": int(seeds[i]), **facts})

    def _asked(
        self, prompts: Sequence[str], seeds: Sequence[int] | None, width: int | None, height: int | None, settings: config.Sample | None
    ) -> tuple[list[int], int, int, config.Sample]:
        """With what was left open."""
        side = self.run.data.side
        return list(range(len(prompts)) if seeds is None else seeds), width or side, height or width or side, settings or self.run.sample

    def _check(self, start: Start, width: int | None, height: int | None):
        if self.decoder:
            raise config.ConfigError("Latent models cannot start from a picture here: give a pixel model.")
        if (width, height) not in ((None, None), start.image.shape[1::-1]):
            raise config.ConfigError(f"Painting from a picture gives one of its size, not of {width}×{height}: scale it first.")

    def facts(self, width: int, height: int, settings: config.Sample | None = None) -> dict[str, Any]:
        """What pictures of that size have in common and say of themselves."""
        return {"size": [width, height], "settings": config.to_dict(settings or self.run.sample), "model": self.origin}

    def values(
        self, prompts: Sequence[str], seeds: Sequence[int], width: int, height: int, settings: config.Sample, start: Start | None = None
    ) -> Iterator[Float32[np.ndarray, "b height width 3"]]:
        """The pictures of `paint` as the network gives them, batch by batch: about in [-1, 1], and not rounded."""
        for images in self._painted(prompts, seeds, width, height, settings, start):
            yield (self.decoder.decode(images) if self.decoder else images)[:, :height, :width]

    def trajectory(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        settings: config.Sample | None = None,
    ) -> Trajectory:
        """How the pictures of `paint` come about. All of it is in memory: as many pictures as there are steps, and one, of each."""
        seeds, width, height, settings = self._asked(prompts, seeds, width, height, settings)
        states = list(self.ways(prompts, seeds, width, height, settings))
        return Trajectory(self._times(width, height, settings), np.concatenate(states, axis=1))

    def ways(
        self, prompts: Sequence[str], seeds: Sequence[int], width: int, height: int, settings: config.Sample
    ) -> Iterator[Float32[np.ndarray, "steps+1 b rows columns c"]]:
        """What `trajectory` calls noisy, batch by batch."""
        return self._painted(prompts, seeds, width, height, settings, way=True)

    def _times(self, width: int, height: int, settings: config.Sample, strength: float = 1.0) -> Float32[np.ndarray, " steps+1"]:
        return times_of(settings, -(-height // self.side) * -(-width // self.side), strength)

    def _painted(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        width: int,
        height: int,
        settings: config.Sample,
        start: Start | None = None,
        way: bool = False,
    ) -> Iterator[Float32[np.ndarray, "*steps b rows columns c"]]:
        """What the sampler gives, batch by batch, in whole patches."""
        run = self.run
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}.")
        if not prompts:
            return
        tokens = visible(self.encoder, [*prompts, settings.negative], run.model.masking)
        size = dict(height=-(-height // self.side) * run.model.patch, width=-(-width // self.side) * run.model.patch)
        strength = start.strength if start else 1.0
        times = self._times(width, height, settings, strength)

        count = min(settings.batch, len(prompts))
        for first in range(0, len(prompts), count):
            rows = np.minimum(np.arange(first, first + count), len(prompts) - 1)  # a last, shorter batch is filled up
            positive, negative = encode(self.encoder, [prompts[row] for row in rows], settings, run.model.masking, tokens)
            with jax.set_mesh(self.mesh) if self.mesh else nullcontext():
                painted = paint(
                    self._network,
                    np.array(seeds, np.uint32)[rows],
                    positive,
                    Condition(np.repeat(negative.text, count, axis=0), np.repeat(negative.lengths, count)),
                    model=run.model,
                    compute=run.compute,
                    settings=replace(settings, negative=""),  # already encoded: another text needs no other program
                    noise_scale=run.flow.noise_scale,
                    vectors=self.vectors(times, settings),
                    known=start.known(**size, count=count) if start else None,
                    strength=strength,
                    way=way,
                    **size,
                )
            yield gathered(painted)[..., : len(prompts) - first, :, :, :]

    def vectors(self, times: Float32[np.ndarray, " t"], settings: config.Sample | None = None) -> Vectors:
        """The modulation of the network at these times; that of the last schedule is kept."""
        lengths = lengths_of(settings or self.run.sample, times)
        schedule = times.tobytes() + (b"" if lengths is None else lengths.tobytes())
        if self._vectors is None or self._vectors[0] != schedule:
            modulation = jax.device_put(self._modulation, self._places)
            self._vectors = schedule, modulations(modulation, times, lengths, model=self.run.model, compute=self.run.compute)
            if all(place.is_fully_addressable for place in jax.tree.leaves(self._places)):
                self._modulation = jax.device_get(modulation)
        return self._vectors[1]


def encode(
    encoder: Encoder, prompts: Sequence[str], settings: config.Sample, masking: str, tokens: int | None = None
) -> tuple[Condition, Condition]:
    """Conditions of the prompts, and of what guidance leads away from: the negative prompt, or a text of length 0.

    They are cut to `tokens`, or where no token is visible in any of them. What is cut off is masked anyway: the picture is the same for less
    work.
    """
    encoded = encoder.encode([*prompts, settings.negative])
    text, lengths = encoder.pad(encoded, tokens or visible(encoder, [*prompts, settings.negative], masking))
    if settings.unconditional == "masked":
        lengths[-1] = 0
    return Condition(text[:-1], lengths[:-1]), Condition(text[-1:], lengths[-1:])


def visible(encoder: Encoder, texts: Sequence[str], masking: str) -> int:
    """Tokens that hold what is visible of every text, in steps, so that few programs are compiled. Raises TextError for a text over the
    limit."""
    counts = np.array([encoder.count(text) for text in texts])
    for text, count in zip(texts, counts.tolist()):
        encoder.check(text, count, cut=False)
    return bucket(int(visible_tokens(counts, encoder.limit, masking).max()), encoder.limit)
