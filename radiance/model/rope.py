"""Rotary positions of tokens (RoFormer, arXiv 2104.09864) over three axes: text index, row and column."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


def position_ids(
    num_rows: int, num_columns: int, num_registers: int, num_text_tokens: int, sequential: bool
) -> Int[np.ndarray, "n 3"]:
    """Rotary ids (text index, row, column): image tokens row-major from the corner, then registers and text.

    Text ids are 0 in all published models before 2026-05-22, and 0, 1, 2, … on the first axis (`sequential`) since.
    """
    image_ids = np.stack(
        np.meshgrid([0], np.arange(num_rows), np.arange(num_columns), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    text_ids = np.zeros((num_registers + num_text_tokens, 3), image_ids.dtype)
    if sequential:
        text_ids[num_registers:, 0] = np.arange(num_text_tokens)
    return np.concatenate([image_ids, text_ids])


def rope_table(
    ids: Int[np.ndarray, "n 3"], axis_sizes: tuple[int, ...], theta: float
) -> Float32[np.ndarray, "2 n 1 half"]:
    """Cosines and sines of every token's angles; one broadcast axis for the heads.

    Per axis of size s the frequencies are theta^(-2i/s), i < s/2, the axes' angles side by side.
    Made in float64 on the host and rounded once.
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
    """Turns the adjacent pairs (x0, x1), (x2, x3), … by the table's angles, in float32."""
    cos, sin = table
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return (
        jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        .reshape(x.shape)
        .astype(x.dtype)
    )
