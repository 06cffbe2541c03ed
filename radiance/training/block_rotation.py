"""Training a few blocks: those at the edges of the trunk, or, in rotation, some at a time and then the next of a shuffled list, until each
had its turn and the list is shuffled anew. What is not in a block is always trained.

The optimizer holds moments of the blocks at hand alone. The weights' gradient is computed for all blocks, inside the step, and kept for
these.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from radiance import config
from radiance.model.transformer import Params

BlockIndices = dict[
    str, Int32[Array, " slots"]
]  # of each kind, those at hand; no kinds where all are trained

_SHUFFLE_KEY_OFFSET = 1 << 31  # keys from here on are no step's


def active_blocks(run: config.Config, step: Int32[Array, ""] | int) -> BlockIndices:
    """The blocks that are trained in a step, from (seed, step) alone. A list that does not divide ends with some from its beginning."""
    counts = {"double": run.model.double_blocks, "single": run.model.single_blocks}
    if run.optimizer.edge_blocks != (0, 0):
        first, last = run.optimizer.edge_blocks
        edge_blocks = {
            "double": jnp.arange(first),
            "single": jnp.arange(counts["single"] - last, counts["single"]),
        }
        return {name: blocks for name, blocks in edge_blocks.items() if len(blocks)}
    rotation_index = jnp.asarray(step, jnp.int32) // run.optimizer.block_rotation_every

    def select_indices(kind: int, count: int, slots: int) -> Int32[Array, " slots"]:
        turns_per_cycle = -(-count // slots)
        key = jax.random.fold_in(
            jax.random.key(run.train.seed),
            jnp.uint32(_SHUFFLE_KEY_OFFSET)
            + (rotation_index // turns_per_cycle).astype(jnp.uint32),
        )
        order = jax.random.permutation(jax.random.fold_in(key, kind), count)
        return order[(rotation_index % turns_per_cycle * slots + jnp.arange(slots)) % count]

    slots = zip(counts.items(), run.optimizer.block_rotation)
    return {
        name: select_indices(i, count, num_slots)
        for i, ((name, count), num_slots) in enumerate(slots)
        if num_slots
    }


def select_blocks(params: Params, blocks: BlockIndices) -> Params:
    """What is trained: of the stacks `blocks` alone, and all of the rest."""
    return {
        name: jax.tree.map(lambda x, indices=blocks[name]: jnp.take(x, indices, axis=0), stack)
        if name in blocks
        else stack
        for name, stack in params.items()
    }


def scatter_blocks(params: Params, active: Params, blocks: BlockIndices) -> Params:
    """`params` with what `taken` took, after it has changed."""
    return {
        name: jax.tree.map(
            lambda x, y, indices=blocks[name]: x.at[indices].set(y), stack, active[name]
        )
        if name in blocks
        else active[name]
        for name, stack in params.items()
    }
