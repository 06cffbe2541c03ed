"""Numbers that follow from (seed, what is drawn, position) alone: the same on every host, in every process, and after a resumption."""

from enum import IntEnum

import numpy as np


class Of(IntEnum):
    """What is drawn: each has numbers of its own."""

    CAPTION = 0
    VIEW = 1
    PICTURES = 2  # their order in an epoch
    SIDES = 3  # base resolutions
    BATCHES = 4  # their order in an epoch
    PARTS = 5  # of a mixture: how an epoch's pictures are mixed
    SCENE = 6  # what a picture of `shapes` shows; part 0 training, 1 validation
    SAID = 7  # and what its caption says


def draws(seed: int, of: Of, position: int, part: int = 0) -> np.random.Generator:
    """To be used with `Generator.random` alone, whose stream no version of NumPy has changed, over Philox, whose own is promised.

    seed: 0 to 2³² - 1. part: of a mixture, less than 2¹⁶.
    """
    return np.random.Generator(np.random.Philox(key=[seed | of << 32 | part << 40, position]))


def shuffled(draw: np.random.Generator, count: int) -> np.ndarray:
    """The numbers below `count` in a random order."""
    return np.argsort(draw.random(count), kind="stable")
