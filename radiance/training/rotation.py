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

Blocks = dict[str, Int32[Array, " slots"]]  # of each kind, those at hand; no kinds where all are trained

_SHUFFLES = 1 << 31  # keys from here on are no step's


def blocks_at(run: config.Config, step: Int32[Array, ""] | int) -> Blocks:
    """The blocks that are trained in a step, from (seed, step) alone. A list that does not divide ends with some from its beginning."""
    counts = {"double": run.model.double_blocks, "single": run.model.single_blocks}
    if run.optimizer.edges != (0, 0):
        first, last = run.optimizer.edges
        edges = {"double": jnp.arange(first), "single": jnp.arange(counts["single"] - last, counts["single"])}
        return {name: blocks for name, blocks in edges.items() if len(blocks)}
    turn = jnp.asarray(step, jnp.int32) // run.optimizer.rotate_every

    def next_of(kind: int, count: int, slots: int) -> Int32[Array, " slots"]:
        turns = -(-count // slots)
        key = jax.random.fold_in(jax.random.key(run.train.seed), jnp.uint32(_SHUFFLES) + (turn // turns).astype(jnp.uint32))
        order = jax.random.permutation(jax.random.fold_in(key, kind), count)
        return order[(turn % turns * slots + jnp.arange(slots)) % count]

    slots = zip(counts.items(), run.optimizer.rotate)
    return {name: next_of(i, count, few) for i, ((name, count), few) in enumerate(slots) if few}


def taken(params: Params, blocks: Blocks) -> Params:
    """What is trained: of the stacks `blocks` alone, and all of the rest."""
    return {
        name: jax.tree.map(lambda x, at=blocks[name]: jnp.take(x, at, axis=0), part) if name in blocks else part
        for name, part in params.items()
    }


def put_back(params: Params, few: Params, blocks: Blocks) -> Params:
    """`params` with what `taken` took, after it has changed."""
    return {
        name: jax.tree.map(lambda x, y, at=blocks[name]: x.at[at].set(y), part, few[name]) if name in blocks else few[name]
        for name, part in params.items()
    }
