"""Name the leaves of parameter trees by their paths."""

from typing import Any

import jax


def leaf_path(keys: tuple) -> str:
    """Return the path of a leaf as keys joined by slashes.

    Args:
        keys: Keys from the root to the leaf, as `jax.tree_util` gives them.
    """
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in keys)


def flatten_tree(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path, in the order of `jax.tree.leaves`."""
    return {leaf_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def count_bytes(tree: Any) -> int:
    """Return the bytes of all arrays in a tree, or of arrays of these shapes and types."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_params(params: Any) -> int:
    """Return the number of scalars in a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
