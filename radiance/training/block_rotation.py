"""Training a few blocks at a time, to save the optimizer's memory.

Either the first double and the last single blocks are trained (edge blocks), or some blocks at a
time, then the next of a shuffled list, which is shuffled again after all blocks (block rotation).
Parameters outside the blocks are always trained. The optimizer holds moments of the active blocks
alone. Gradients are computed for all blocks, inside the step, and kept for the active ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from radiance import config
from radiance.model.transformer import Params

# Indexes of the active blocks by kind; kinds whose blocks are all trained are absent.
BlockIndices = dict[str, Int32[Array, " _"]]

_SHUFFLE_KEY_OFFSET = 1 << 31  # above all steps, whose keys are used for noise


def active_blocks(run: config.Config, step: Int32[Array, ""] | int) -> BlockIndices:
    """Return the blocks that are trained in a step; they depend on (seed, step) alone.

    Args:
        run: The run's settings.
        step: Index of the step.

    Returns:
        Indexes of the active blocks. If their number does not divide the number of blocks, the end
        of a shuffled list is filled from its beginning.
    """
    counts = {"double": run.model.double_blocks, "single": run.model.single_blocks}
    if run.optimizer.edge_blocks != (0, 0):
        first, last = run.optimizer.edge_blocks
        edge_blocks = {
            "double": jnp.arange(first),
            "single": jnp.arange(counts["single"] - last, counts["single"]),
        }
        return {name: blocks for name, blocks in edge_blocks.items() if len(blocks)}

    rotation_index = jnp.asarray(step, jnp.int32) // run.optimizer.block_rotation_every

    def select_indices(kind: int, num_blocks: int, num_active: int) -> Int32[Array, " _"]:
        rotations_per_cycle = -(-num_blocks // num_active)
        cycle = (rotation_index // rotations_per_cycle).astype(jnp.uint32)
        seed_key = jax.random.key(run.train.seed)
        key = jax.random.fold_in(seed_key, jnp.uint32(_SHUFFLE_KEY_OFFSET) + cycle)
        order = jax.random.permutation(jax.random.fold_in(key, kind), num_blocks)
        first = rotation_index % rotations_per_cycle * num_active
        return order[(first + jnp.arange(num_active)) % num_blocks]

    return {
        name: select_indices(kind, num_blocks, num_active)
        for kind, ((name, num_blocks), num_active) in enumerate(
            zip(counts.items(), run.optimizer.block_rotation)
        )
        if num_active
    }


def select_blocks(params: Params, blocks: BlockIndices) -> Params:
    """Select the trained parameters: the rows of active blocks, and everything outside the blocks.

    Args:
        params: The parameter tree.
        blocks: Output of `active_blocks`.

    Returns:
        The tree with shorter stacks.
    """
    return {
        name: jax.tree.map(lambda x, indices=blocks[name]: jnp.take(x, indices, axis=0), stack)
        if name in blocks
        else stack
        for name, stack in params.items()
    }


def scatter_blocks(params: Params, active: Params, blocks: BlockIndices) -> Params:
    """Write the parameters of `select_blocks` back into the complete tree.

    Args:
        params: The complete tree.
        active: The tree of `select_blocks` with new values.
        blocks: Output of `active_blocks`.

    Returns:
        The complete tree with the new values.
    """
    return {
        name: jax.tree.map(
            lambda x, y, indices=blocks[name]: x.at[indices].set(y), stack, active[name]
        )
        if name in blocks
        else active[name]
        for name, stack in params.items()
    }
