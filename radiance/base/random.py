"""Numbers that follow from (seed, what is drawn, position) alone: the same on every host, in every process, and after a resumption."""

from enum import IntEnum

import numpy as np


class RandomStream(IntEnum):
    """What is drawn: each has numbers of its own."""

    CAPTION = 0
    AUGMENTATION = 1
    IMAGE_ORDER = 2  # their order in an epoch
    RESOLUTION = 3  # base resolutions
    BATCH_ORDER = 4  # their order in an epoch
    MIXTURE_ORDER = 5  # of a mixture: how an epoch's images are mixed
    SCENE = 6  # what an image of `shapes` shows; part 0 training, 1 validation
    SCENE_CAPTION = 7  # and what its caption says


def make_rng(
    seed: int, stream: RandomStream, position: int, substream: int = 0
) -> np.random.Generator:
    """To be used with `Generator.random` alone, whose stream no version of NumPy has changed, over Philox, whose own is promised.

    seed: 0 to 2³² - 1. part: of a mixture, less than 2¹⁶.
    """
    return np.random.Generator(
        np.random.Philox(key=[seed | stream << 32 | substream << 40, position])
    )


def random_permutation(rng: np.random.Generator, count: int) -> np.ndarray:
    """The numbers below `count` in a random order."""
    return np.argsort(rng.random(count), kind="stable")
