"""Select parameters by path: frozen parameters and learning-rate multipliers."""

import jax
import optax

from radiance.base.errors import ConfigError
from radiance.base.trees import leaf_path
from radiance.model.transformer import Params


def scale_by_path(multipliers: dict[str, float]) -> optax.GradientTransformation:
    """Make a transformation that multiplies updates by path.

    Args:
        multipliers: Factors by path or prefix of paths; the longest prefix counts, and other
            parameters have the factor 1.

    Returns:
        The transformation; its `init` raises ConfigError for a path that is not in the tree.
    """

    def find_multiplier(path: str) -> float:
        prefixes = [prefix for prefix in multipliers if is_under(path, prefix)]
        return multipliers[max(prefixes, key=len)] if prefixes else 1.0

    def init(params: Params) -> optax.EmptyState:
        paths = [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
        unused = [
            prefix for prefix in multipliers if not any(is_under(path, prefix) for path in paths)
        ]
        if unused:
            raise ConfigError(
                f"optimizer.lr_multipliers names {', '.join(unused)}, which is not among the "
                f"trained parameters: use {', '.join(params)}, or paths below them."
            )
        return optax.EmptyState()

    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Params, optax.EmptyState]:
        scaled_updates = jax.tree_util.tree_map_with_path(
            lambda keys, leaf: find_multiplier(leaf_path(keys)) * leaf, updates
        )
        return scaled_updates, state

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def is_under(path: str, prefix: str) -> bool:
    """Return whether a path equals the prefix or is below it; only complete names match."""
    return f"{path}/".startswith(f"{prefix}/")


def split_frozen(params: Params, frozen_paths: tuple[str, ...]) -> tuple[Params, Params]:
    """Split the parameters into trained and frozen ones.

    Args:
        params: The parameter tree.
        frozen_paths: Paths, or prefixes of paths, of frozen parameters.

    Returns:
        Trees of the trained and of the frozen parameters.

    Raises:
        ConfigError: If a path matches nothing, or if everything is frozen.
    """
    trainable, frozen_params = {}, {}
    unused = set(frozen_paths)

    def visit(node: Params, path: str, trainable: Params, frozen_params: Params):
        for key, value in node.items():
            child_path = f"{path}/{key}" if path else key
            matches = [name for name in frozen_paths if is_under(child_path, name)]
            unused.difference_update(matches)
            if matches:
                frozen_params[key] = value
            elif isinstance(value, dict):
                subtrees = trainable.setdefault(key, {}), frozen_params.setdefault(key, {})
                visit(value, child_path, *subtrees)
                for subtree in (trainable, frozen_params):
                    if not subtree[key]:
                        del subtree[key]
            else:
                trainable[key] = value

    visit(params, "", trainable, frozen_params)
    if unused:
        raise ConfigError(
            f"optimizer.frozen names {', '.join(sorted(unused))}, which is not in the model: use "
            f"{', '.join(params)}, or paths below them."
        )
    if not trainable:
        raise ConfigError("optimizer.frozen leaves nothing to train: name fewer paths.")
    return trainable, frozen_params


def merge_params(a: Params, b: Params) -> Params:
    """Merge the two trees of `split_frozen`."""
    shared_params = {key: merge_params(a[key], b[key]) for key in a.keys() & b.keys()}
    return {**a, **b, **shared_params}
