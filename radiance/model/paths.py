"""Classify the leaves of the transformer's parameter tree by their paths, and count vectors."""

import math

BLOCK_STACKS = ("refiner", "double", "single")  # subtrees whose leaves have one row per block

# Modulation vectors; a double block has 6 for each of its two streams.
VECTORS_PER_STREAM = 6
VECTORS_PER_SINGLE_BLOCK = 3
OUTPUT_VECTORS = 2
SHARED_VECTORS = 2 * VECTORS_PER_STREAM + VECTORS_PER_SINGLE_BLOCK + OUTPUT_VECTORS


def is_in_blocks(path: str) -> bool:
    """Return True for the leaves of the transformer blocks."""
    return path.startswith(tuple(f"{stack}/" for stack in BLOCK_STACKS))


def is_block_matrix(path: str) -> bool:
    """Return True for the matrices of the blocks: 90 % of all weights, and quantizable."""
    return is_in_blocks(path) and path.endswith("/kernel")


def count_inputs(path: str, shape: tuple[int, ...]) -> int:
    """Return the number of inputs of one block's matrix.

    Args:
        path: Path of the stacked leaf.
        shape: Shape of the stacked leaf; axis 0 counts the blocks. The output projection of an
            attention layer has two input axes, heads and channels.
    """
    return math.prod(shape[1:3]) if path.endswith("attention/proj/kernel") else shape[1]


def is_always_float32(path: str) -> bool:
    """Return True for leaves that stay float32 at any weight dtype, as in the published files."""
    return path.startswith("head/embedder")
