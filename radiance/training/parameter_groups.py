"""Select parameters by path: frozen parameters and learning-rate multipliers."""

import jax
import optax

from radiance import config
from radiance.base.trees import leaf_path
from radiance.model.transformer import Params


def scale_by_path(multipliers: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies what lies under each path, the longest that fits. `init` raises ConfigError for a path that is not in the tree."""

    def matching_prefix(path: str) -> str | None:
        return max(
            (prefix for prefix in multipliers if is_under(path, prefix)), key=len, default=None
        )

    def init(params: Params) -> optax.EmptyState:
        paths = [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
        if unused := [
            prefix for prefix in multipliers if not any(is_under(path, prefix) for path in paths)
        ]:
            raise config.ConfigError(
                f"optimizer.lr_multipliers names {', '.join(unused)}, which is not among what is trained: that has {', '.join(params)}."
            )
        return optax.EmptyState()

    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Params, optax.EmptyState]:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: multipliers.get(matching_prefix(leaf_path(keys)), 1.0) * leaf,
            updates,
        ), state

    return optax.GradientTransformation(init, update)


def is_under(path: str, prefix: str) -> bool:
    """Whether `start` is a path's first part or parts; whole names count."""
    return f"{path}/".startswith(f"{prefix}/")


def split_frozen(params: Params, frozen_paths: tuple[str, ...]) -> tuple[Params, Params]:
    """(trained, frozen) parts of the tree, by the start of each path. Raises ConfigError for a name that matches nothing, or all."""
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
                visit(
                    value,
                    child_path,
                    trainable.setdefault(key, {}),
                    frozen_params.setdefault(key, {}),
                )
                for subtree in (trainable, frozen_params):
                    if not subtree[key]:
                        del subtree[key]
            else:
                trainable[key] = value

    visit(params, "", trainable, frozen_params)
    if unused:
        raise config.ConfigError(
            f"optimizer.frozen names {', '.join(sorted(unused))}, which is not in the model: it has {', '.join(params)}."
        )
    if not trainable:
        raise config.ConfigError("optimizer.frozen leaves nothing to train: name fewer parts.")
    return trainable, frozen_params


def merge_params(a: Params, b: Params) -> Params:
    """The tree of which `split_frozen` made two parts."""
    shared_params = {key: merge_params(a[key], b[key]) for key in a.keys() & b.keys()}
    return {**a, **b, **shared_params}
