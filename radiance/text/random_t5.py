"""A T5 with random, untrained weights, for experiments with `shapes` that need contextual rows.

Its rows depend on their neighbors, so that a color is bound to its shape, and its padding depends
on the prompt and on the position, as that of a trained T5. The vocabulary is that of the captions
of `shapes`; all other words are one unknown word.
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
# Exponent of each head: attention is in proportion to distance^(−exponent).
ATTENTION_DECAY = (3.0, 3.0, 1.5, 1.5)
WEIGHTS_VERSION = 1  # changes when the weights are sampled differently


class RandomT5Encoder(BaseT5Encoder):
    """A random T5 of any width, which keeps all rows of padding that differ.

    It runs on the CPU: its time is negligible beside a training step, and it must not wait for one.
    """

    kind = "random_t5"

    def __init__(self, dim: int, max_length: int, dtype: str = "float32"):
        super().__init__()
        self.sizes = t5.T5(
            len(TOKEN_WORDS), dim, NUM_LAYERS, len(ATTENTION_DECAY), HEAD_DIM, mlp_hidden=2 * dim
        )
        # Padding that is farther behind the text sees all tokens in the last bucket of distances,
        # so that it no longer depends on its position.
        self.num_padding_rows = int(bucket_distances(self.sizes)[-1])
        # With so many rows of padding, finer steps save little.
        self.length_step = max(LENGTH_STEP, max_length // 4)
        self.dim, self.max_length, self.dtype = dim, max_length, DTYPES[dtype]
        self.tokenizer = tokenize_words
        self.identity = hash_parts(
            "random_t5", WEIGHTS_VERSION, TOKEN_WORDS, ATTENTION_DECAY, self.sizes, dtype
        )

    def _load_params(self) -> t5.Params:
        params = jax.tree.map(
            lambda leaf, values: values.astype(leaf.dtype),
            t5.make_abstract_t5(self.sizes, self.dtype.name),
            make_random_params(self.sizes),
        )
        return jax.device_put(params, jax.local_devices(backend="cpu")[0])


def tokenize_words(text: str) -> list[int]:
    """Convert a text to the ids of its words, end-of-sequence last."""
    unknown_id = TOKEN_IDS["<unk>"]
    return [*(TOKEN_IDS.get(word, unknown_id) for word in HashEncoder.split_words(text)), END_ID]


def make_random_params(sizes: t5.T5) -> t5.Params:
    """Make float32 weights with the distribution of T5's initialization (arXiv 1910.10683).

    There are two differences. The vector of a word is the hash encoder's, so that it does not
    depend on the other words of the vocabulary. Attention is local: the bias is the same for a
    token and its neighbors and falls with the distance, which a T5 has to learn. Every array has a
    seed of its own, its name, for NumPy's frozen legacy generator, so that the numbers are the same
    on every machine and version.

    Args:
        sizes: Sizes of the network.

    Returns:
        The parameter tree, as NumPy arrays.
    """

    def make_leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, shape = leaf_path(path), leaf.shape
        if name == "embedding":
            return np.stack([gaussian_vector(word, sizes.hidden) for word in TOKEN_WORDS])
        if name == "position_bias":
            log_distances = np.log(np.maximum(bucket_distances(sizes), 1))
            return (-log_distances[:, None] * np.array(ATTENTION_DECAY)).astype(np.float32)
        if name.endswith("scale"):
            return np.ones(shape, np.float32)
        fan_in = shape[1] * shape[2] if "proj" in name else shape[1]  # axis 0 is the layer
        # T5 does not scale products of queries and keys, so its queries are smaller.
        std = fan_in**-0.5 * (sizes.head_dim**-0.5 if "/q/" in name else 1)
        seed = np.frombuffer(
            hashlib.blake2b(f"random_t5 {name}".encode(), digest_size=16).digest(), "<u4"
        )
        return (np.random.RandomState(seed).standard_normal(shape) * std).astype(np.float32)

    return jax.tree_util.tree_map_with_path(make_leaf, t5.make_abstract_t5(sizes))


def bucket_distances(sizes: t5.T5) -> Int[np.ndarray, " buckets"]:
    """Compute the least distance in each bucket of the position bias."""
    buckets = t5.position_buckets(t5.MAX_DISTANCE + 1, sizes.buckets)
    positions = np.arange(len(buckets))
    min_distances = np.full(sizes.buckets, t5.MAX_DISTANCE)
    np.minimum.at(min_distances, buckets, np.abs(positions[None] - positions[:, None]))
    return min_distances
