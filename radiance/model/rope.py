"""Rotary position embeddings (RoFormer, arXiv 2104.09864) over text index, row and column."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int


def make_position_ids(
    num_rows: int, num_columns: int, num_registers: int, num_text_tokens: int, sequential: bool
) -> Int[np.ndarray, "n 3"]:
    """Make the position ids (text index, row, column) of image tokens, registers and text tokens.

    Args:
        num_rows: Rows of image tokens.
        num_columns: Columns of image tokens.
        num_registers: Number of registers; their ids are 0.
        num_text_tokens: Number of text tokens.
        sequential: Whether text tokens have the text indexes 0, 1, 2, … as in models published
            since 2026-05-22; otherwise they are 0, as in all earlier ones.

    Returns:
        Ids of the image tokens in row-major order, then of registers and text tokens.
    """
    image_ids = np.stack(
        np.meshgrid([0], np.arange(num_rows), np.arange(num_columns), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    text_ids = np.zeros((num_registers + num_text_tokens, 3), image_ids.dtype)
    if sequential:
        text_ids[num_registers:, 0] = np.arange(num_text_tokens)
    return np.concatenate([image_ids, text_ids])


def make_rope_table(
    ids: Int[np.ndarray, "n 3"], axis_sizes: tuple[int, ...], theta: float
) -> Float32[np.ndarray, "2 n 1 half"]:
    """Tabulate the cosines and sines of every token's angles.

    The frequencies of an axis of size s are theta^(-2i/s) for i < s/2; the angles of the axes are
    concatenated. They are computed in float64 on the host and rounded once.

    Args:
        ids: Position ids.
        axis_sizes: Channels of a head that each of the three axes rotates.
        theta: Base of the frequencies.

    Returns:
        Cosines and sines, with one axis of size 1 for the heads.
    """
    angles = [
        np.outer(ids[:, axis], theta ** (-np.arange(0, size, 2, dtype=np.float64) / size))
        for axis, size in enumerate(axis_sizes)
    ]
    angles = np.concatenate(angles, axis=-1)[:, None, :]
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def apply_rope(
    x: Float[Array, "b n h k"], table: Float32[Array, "2 n 1 half"]
) -> Float[Array, "b n h k"]:
    """Rotate adjacent channel pairs (x0, x1), (x2, x3), … by the table's angles, in float32."""
    cos, sin = table
    pairs = rearrange(x.astype(jnp.float32), "b n h (half two) -> b n h half two", two=2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rearrange(rotated, "b n h half two -> b n h (half two)").astype(x.dtype)
