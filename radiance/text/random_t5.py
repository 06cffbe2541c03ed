"""A T5 of random weights that are never trained, for experiments with `shapes` that need what a bag of words lacks.

Its rows know their neighbours, so that a colour is bound to its shape; and its padding depends on the prompt and on its position, as
a trained T5's does. The words are those of the captions of `shapes`; all others are one unknown word.
"""

import hashlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from radiance.data.shape_captions import VOCABULARY
from radiance.text import t5
from radiance.text.encoders import BUCKET, HashEncoder, NetworkEncoder, digest, gaussian
from radiance.text.tokenizers import END
from radiance.weights.files import DTYPES

WORDS = ("<pad>", "</s>", "<unk>", *VOCABULARY)
IDS = {word: i for i, word in enumerate(WORDS)}
LAYERS, HEAD_DIM = 2, 16
DECAY = (3.0, 3.0, 1.5, 1.5)  # of each head: its attention falls off as the distance to the power of minus this
VERSION = 1  # of how the weights are drawn


class RandomT5Encoder(NetworkEncoder):
    """Of any width. All padding that differs is kept, for `masking: off` to see.

    It runs on the host's processor: next to a training step it is nothing, and must not wait for one.
    """

    kind = "random_t5"

    def __init__(self, dim: int, limit: int, dtype: str = "float32"):
        super().__init__()
        self.sizes = t5.T5(len(WORDS), dim, LAYERS, len(DECAY), HEAD_DIM, mlp_hidden=2 * dim)
        # Farther behind the text all its tokens are in the last bucket, and padding cannot tell its own position.
        self.padding = int(distances(self.sizes)[-1])
        self.step = max(BUCKET, limit // 4)  # with so many rows of padding, finer ones save little
        self.dim, self.limit, self.dtype = dim, limit, DTYPES[dtype]
        self.identity = digest("random_t5", VERSION, WORDS, DECAY, self.sizes, dtype)

    def tokenizer(self, text: str) -> list[int]:
        return [*(IDS.get(word, IDS["<unk>"]) for word in HashEncoder.words(text)), END]

    def _load(self) -> t5.Params:
        cast = jax.tree.map(lambda leaf, drawn: drawn.astype(leaf.dtype), t5.abstract(self.sizes, self.dtype.name), weights(self.sizes))
        return jax.device_put(cast, jax.local_devices(backend="cpu")[0])


def weights(sizes: t5.T5) -> t5.Params:
    """The weights, in float32, as T5 draws them before training (arXiv 1910.10683), but for two things.

    A word's vector is the hash encoder's, so that it stays as it is whatever other words there are. And attention is local: the
    bias gives a token and its neighbours the same and falls off with the distance, which T5 has to learn. Every array has a seed of its own, its
    name, for NumPy's frozen legacy generator: the numbers are the same everywhere and always.
    """

    def drawn(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, shape = "/".join(key.key for key in path), leaf.shape
        if name == "embedding":
            return np.stack([gaussian(word, sizes.hidden) for word in WORDS])
        if name == "position_bias":
            return (-np.log(np.maximum(distances(sizes), 1))[:, None] * np.array(DECAY)).astype(np.float32)
        if name.endswith("scale"):
            return np.ones(shape, np.float32)
        inputs = shape[1] * shape[2] if "proj" in name else shape[1]  # axis 0 is the layer
        # Products of queries and keys are not scaled in T5, so its queries are smaller.
        scale = inputs**-0.5 * (sizes.head_dim**-0.5 if "/q/" in name else 1)
        seed = np.frombuffer(hashlib.blake2b(f"random_t5 {name}".encode(), digest_size=16).digest(), "<u4")
        return (np.random.RandomState(seed).standard_normal(shape) * scale).astype(np.float32)

    return jax.tree_util.tree_map_with_path(drawn, t5.abstract(sizes))


def distances(sizes: t5.T5) -> Int[np.ndarray, " buckets"]:
    """The least distance in each bucket of the position bias."""
    buckets = t5.position_buckets(t5.MAX_DISTANCE + 1, sizes.buckets)
    positions = np.arange(len(buckets))
    least = np.full(sizes.buckets, t5.MAX_DISTANCE)
    np.minimum.at(least, buckets, np.abs(positions[None] - positions[:, None]))
    return least
