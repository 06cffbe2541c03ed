"""Random numbers that depend on (seed, stream, position) alone.

They are the same on every host, in every process and after a run resumes.
"""

from enum import IntEnum

import numpy as np


class RandomStream(IntEnum):
    """Independent random streams, one for each purpose."""

    CAPTION = 0
    AUGMENTATION = 1
    IMAGE_ORDER = 2  # order of a source's images in one pass over them
    RESOLUTION = 3  # resolution of each image in an epoch
    BATCH_ORDER = 4  # order of the batches of an epoch
    MIXTURE_ORDER = 5  # order in which the images of a mixture are combined in an epoch
    SCENE = 6  # contents of an image of `shapes`; substream 0 is training, 1 is validation
    SCENE_CAPTION = 7  # its caption


def make_rng(
    seed: int, stream: RandomStream, position: int, substream: int = 0
) -> np.random.Generator:
    """Return the random generator of a position in a stream.

    Only `Generator.random` should be called on it. NumPy has never changed its output, and it
    guarantees the output of the Philox bit generator below it.

    Args:
        seed: Seed from 0 to 2³² − 1.
        stream: Purpose of the random numbers.
        position: Nonnegative position in the stream, such as an epoch or a sample.
        substream: Part of the stream, such as a source of a mixture, below 2¹⁶.

    Returns:
        A new generator.
    """
    return np.random.Generator(
        np.random.Philox(key=[seed | stream << 32 | substream << 40, position])
    )


def random_permutation(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return the integers below `count` in random order."""
    return np.argsort(rng.random(count), kind="stable")
