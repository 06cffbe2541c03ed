"""What the arms of a suite are shown: pictures of `shapes`, rendered once and drawn from with replacement, and their captions.

All arms and all seeds share the pictures. Which of them a step shows, and which captions it leaves out, follows from (seed, step) alone, so it
is the same in every arm; two seeds see the same pictures in two orders.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8

from radiance import config
from radiance.data.draws import Of, draws
from radiance.data.shape_captions import Law, caption
from radiance.data.shapes import Facts, Split, render, scene
from radiance.text.encoders import make_encoder

SCENES = 0  # the seed of all scenes


class Shown(NamedTuple):
    image: UInt8[np.ndarray, "n side side 3"]
    captions: tuple[str, ...]
    facts: tuple[Facts, ...]  # that the captions say


class Texts(NamedTuple):
    rows: Float[np.ndarray, "n+1 l e"]  # the last is the empty prompt's
    lengths: Int32[np.ndarray, " n+1"]
    identity: str


@lru_cache(maxsize=4)
def pictures(split: Split, count: int, side: int, law: Law) -> Shown:
    """The first so many of `shapes`."""
    scenes = [scene(SCENES, i, split) for i in range(count)]
    said = [caption(drawn, law) for drawn in scenes]
    image = np.stack([np.asarray(render(drawn, side)) for drawn in scenes])
    return Shown(image, tuple(text for text, _ in said), tuple(facts for _, facts in said))


@lru_cache(maxsize=4)
def encoded(captions: tuple[str, ...], text: config.Text, dim: int) -> Texts:
    """The captions, and behind them the empty prompt, padded to the limit. Raises TextError for one over it."""
    encoder = make_encoder(text, dim)
    return Texts(*encoder([*captions, ""]), f"{encoder.kind} {encoder.identity} {encoder.limit}")


def drawn(seed: int, step: int, count: int, data: config.Data) -> tuple[Int32[np.ndarray, " b"], Int32[np.ndarray, " b"]]:
    """The pictures of a seed's step, and the rows of `Texts` beside them."""
    index = (draws(seed, Of.PICTURES, step).random(data.batch) * count).astype(np.int32)
    dropped = draws(seed, Of.CAPTION, step).random(data.batch) < data.caption_dropout
    return index, np.where(dropped, np.int32(count), index)


def digest(parts: Sequence[Shown], texts: Sequence[Texts]) -> str:
    """What tells this data from any other."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(repr(part.image.shape).encode() + part.image.tobytes() + "\n".join(part.captions).encode())
    found.update("\n".join(text.identity for text in texts).encode())
    return found.hexdigest()
