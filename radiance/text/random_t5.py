"""A T5 of random weights that are never trained, for experiments with `shapes` that need what a bag of words lacks.

Its rows know their neighbors, so that a color is bound to its shape; and its padding depends on the prompt and on its position, as
a trained T5's does. The words are those of the captions of `shapes`; all others are one unknown word.
"""

import hashlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from radiance.base.hashing import hash_parts
from radiance.base.trees import leaf_path
from radiance.shapes.captions import VOCABULARY
from radiance.text import t5
from radiance.text.encoder import LENGTH_STEP
from radiance.text.hash_encoder import HashEncoder, gaussian_vector
from radiance.text.t5_encoder import BaseT5Encoder
from radiance.text.tokenizers import END_ID
from radiance.weights.tensors import DTYPES

TOKEN_WORDS = ("<pad>", "</s>", "<unk>", *VOCABULARY)
TOKEN_IDS = {word: i for i, word in enumerate(TOKEN_WORDS)}
NUM_LAYERS, HEAD_DIM = 2, 16
ATTENTION_DECAY = (
    3.0,
    3.0,
    1.5,
    1.5,
)  # of each head: its attention falls off as the distance to the power of minus this
WEIGHTS_VERSION = 1  # of how the weights are drawn


class RandomT5Encoder(BaseT5Encoder):
    """Of any width. All padding that differs is kept, for `masking: off` to see.

    It runs on the host's processor: next to a training step it is nothing, and must not wait for one.
    """

    kind = "random_t5"

    def __init__(self, dim: int, max_length: int, dtype: str = "float32"):
        super().__init__()
        self.sizes = t5.T5(
            len(TOKEN_WORDS), dim, NUM_LAYERS, len(ATTENTION_DECAY), HEAD_DIM, mlp_hidden=2 * dim
        )
        # Farther behind the text all its tokens are in the last bucket, and padding cannot tell its own position.
        self.num_padding_rows = int(bucket_distances(self.sizes)[-1])
        self.length_step = max(
            LENGTH_STEP, max_length // 4
        )  # with so many rows of padding, finer ones save little
        self.dim, self.max_length, self.dtype = dim, max_length, DTYPES[dtype]
        self.identity = hash_parts(
            "random_t5", WEIGHTS_VERSION, TOKEN_WORDS, ATTENTION_DECAY, self.sizes, dtype
        )

    def tokenizer(self, text: str) -> list[int]:
        return [
            *(TOKEN_IDS.get(word, TOKEN_IDS["<unk>"]) for word in HashEncoder.split_words(text)),
            END_ID,
        ]

    def _load_params(self) -> t5.Params:
        params = jax.tree.map(
            lambda leaf, values: values.astype(leaf.dtype),
            t5.make_abstract_t5(self.sizes, self.dtype.name),
            make_random_params(self.sizes),
        )
        return jax.device_put(params, jax.local_devices(backend="cpu")[0])


def make_random_params(sizes: t5.T5) -> t5.Params:
    """The weights, in float32, as T5 draws them before training (arXiv 1910.10683), but for two things.

    A word's vector is the hash encoder's, so that it stays as it is whatever other words there are. And attention is local: the
    bias gives a token and its neighbors the same and falls off with the distance, which T5 has to learn. Every array has a seed of its own, its
    name, for NumPy's frozen legacy generator: the numbers are the same everywhere and always.
    """

    def make_leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, shape = leaf_path(path), leaf.shape
        if name == "embedding":
            return np.stack([gaussian_vector(word, sizes.hidden) for word in TOKEN_WORDS])
        if name == "position_bias":
            return (
                -np.log(np.maximum(bucket_distances(sizes), 1))[:, None] * np.array(ATTENTION_DECAY)
            ).astype(np.float32)
        if name.endswith("scale"):
            return np.ones(shape, np.float32)
        fan_in = shape[1] * shape[2] if "proj" in name else shape[1]  # axis 0 is the layer
        # Products of queries and keys are not scaled in T5, so its queries are smaller.
        std = fan_in**-0.5 * (sizes.head_dim**-0.5 if "/q/" in name else 1)
        seed = np.frombuffer(
            hashlib.blake2b(f"random_t5 {name}".encode(), digest_size=16).digest(), "<u4"
        )
        return (np.random.RandomState(seed).standard_normal(shape) * std).astype(np.float32)

    return jax.tree_util.tree_map_with_path(make_leaf, t5.make_abstract_t5(sizes))


def bucket_distances(sizes: t5.T5) -> Int[np.ndarray, " buckets"]:
    """The least distance in each bucket of the position bias."""
    buckets = t5.position_buckets(t5.MAX_DISTANCE + 1, sizes.buckets)
    positions = np.arange(len(buckets))
    min_distances = np.full(sizes.buckets, t5.MAX_DISTANCE)
    np.minimum.at(min_distances, buckets, np.abs(positions[None] - positions[:, None]))
    return min_distances
