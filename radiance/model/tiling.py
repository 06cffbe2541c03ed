"""Apply a network to a large image in overlapping tiles, to bound the memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32


def apply_in_tiles(
    network: Callable,
    x: Float[Array, "b height width c"],
    input_patch: int,
    output_patch: int,
    channels: int,
    tile_size: int,
) -> Float32[Array, "b height_out width_out {channels}"]:
    """Apply a network to tiles, and blend their outputs linearly.

    All tiles have one shape, so that the network is compiled once.

    Args:
        network: Function from `x` to the output.
        x: Input.
        input_patch: Height and width of a token in the input.
        output_patch: Height and width of a token in the output.
        channels: Channels of the output.
        tile_size: Rows and columns of tokens of a tile at most; 0 for the whole input at once.

    Returns:
        The output.
    """
    b, height, width, c = x.shape
    rows, columns = height // input_patch, width // input_patch
    if not tile_size or max(rows, columns) <= tile_size:
        return network(x)
    tile_rows, tile_columns = min(tile_size, rows), min(tile_size, columns)
    row_starts, row_weights = place_tiles(rows, tile_rows, output_patch)
    column_starts, column_weights = place_tiles(columns, tile_columns, output_patch)
    i, j = np.indices((len(row_starts), len(column_starts))).reshape(2, -1)

    def add_tile(output, tile_placement):
        row_start, column_start, row_weights, column_weights = tile_placement
        output_tile = network(
            jax.lax.dynamic_slice(
                x,
                (0, row_start * input_patch, column_start * input_patch, 0),
                (b, tile_rows * input_patch, tile_columns * input_patch, c),
            )
        )
        output_tile *= (row_weights[:, None] * column_weights)[..., None]
        corner = (0, row_start * output_patch, column_start * output_patch, 0)
        output_tile += jax.lax.dynamic_slice(output, corner, output_tile.shape)
        return jax.lax.dynamic_update_slice(output, output_tile, corner), None

    output = jnp.zeros((b, rows * output_patch, columns * output_patch, channels))
    return jax.lax.scan(
        add_tile, output, (row_starts[i], column_starts[j], row_weights[i], column_weights[j])
    )[0]


def place_tiles(
    num_tokens: int, tile_size: int, output_patch: int
) -> tuple[Int32[np.ndarray, " tiles"], Float32[np.ndarray, "tiles size"]]:
    """Place tiles along one axis, with an overlap of at least a quarter.

    Args:
        num_tokens: Number of tokens along the axis.
        tile_size: Tokens of a tile.
        output_patch: Size of a token in the output.

    Returns:
        First token of each tile, and the weights of its outputs: linear ramps, which add up to 1
        everywhere.
    """
    output_size = tile_size * output_patch
    num_tiles = 1 - (tile_size - num_tokens) // (tile_size - tile_size // 4)
    starts = np.linspace(0, num_tokens - tile_size, num_tiles).round().astype(np.int32)
    positions = starts[:, None] * output_patch + np.arange(output_size)
    indices = np.arange(output_size)
    edge_distances = np.minimum(indices, indices[::-1]) + 0.5
    ramp = np.broadcast_to(np.minimum(edge_distances / (output_size / 4), 1), positions.shape)
    weight_sums = np.bincount(positions.ravel(), ramp.ravel())
    return starts, (ramp / weight_sums[positions]).astype(np.float32)
