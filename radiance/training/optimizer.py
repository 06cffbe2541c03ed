"""The optimizer, what it leaves alone, the averages of the weights, and rounding that does not lose small changes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, BFloat16, Bool, Float32, Int32, PRNGKeyArray
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from radiance import config
from radiance.model.transformer import Params


def learning_rate(optimizer: config.Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or a cosine to 0 at `steps`."""
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    else:
        after = optax.constant_schedule(peak)
    # Step 0 is the first of the warm-up, not a step of length 0.
    return optax.join_schedules([lambda step: peak * (step + 1) / (warmup + 1), after], [warmup])


def make_optimizer(optimizer: config.Optimizer, steps: int) -> optax.GradientTransformation:
    """Clip, Adam or Muon, decoupled weight decay on matrices, and learning rates."""
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        scale_by_muon_and_adam(optimizer) if optimizer.kind == "muon" else scale_by_adam(optimizer),
        optax.add_decayed_weights(optimizer.weight_decay, mask=_is_matrix),
        *([scale_by_path(optimizer.factors)] if optimizer.rates else []),
        optax.scale_by_learning_rate(learning_rate(optimizer, steps)),
    )


def muon_axes(path: str) -> MuonDimensionNumbers | None:
    """Which axes of a stacked leaf are a matrix's inputs and outputs, if it is one of the blocks' matrices. The others, the block among them,
    count matrices, each orthogonalised by itself: so are queries, keys and values, which share a leaf."""
    if not path.startswith(("preamble/", "double/", "single/")):
        return None
    if path.endswith("attention/qkv/kernel"):
        return MuonDimensionNumbers(1, (3, 4))
    if path.endswith("attention/proj/kernel"):
        return MuonDimensionNumbers((1, 2), 3)
    return MuonDimensionNumbers(1, 2) if path.endswith(("/kernel", "/down", "/up")) else None


def scale_by_muon_and_adam(optimizer: config.Optimizer) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the blocks' matrices, scaled to the mean size of Adam's steps: 0.2 √max(in, out) (arXiv 2502.16982, eq. 4);
    Adam for the rest."""

    def labels(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, _: "muon" if muon_axes(_path(keys)) else "adam", params)

    def axes(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, _: muon_axes(_path(keys)), params)

    def sized(keys: tuple, update: jax.Array) -> jax.Array:
        numbers = muon_axes(_path(keys))
        sides = (np.prod([update.shape[axis] for axis in np.atleast_1d(side)]) for side in numbers)
        return 0.2 * np.sqrt(max(sides)) * update

    scaled = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(sized, updates))
    orthogonal = scale_by_muon(beta=optimizer.muon_beta, mu_dtype="float32", weight_dimension_numbers=axes)
    return optax.partition(
        {"muon": optax.chain(_kept_as(optimizer.mu_dtype, orthogonal), scaled), "adam": scale_by_adam(optimizer)}, labels
    )


def _kept_as(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same with a momentum that is kept in another type, rounded at random as Adam's."""

    def cast(state: MuonState, kind: str) -> MuonState:
        return state._replace(mu=jax.tree.map(lambda m: m.astype(kind), state.mu))

    def update(gradients: Params, state: MuonState, params: Params | None = None) -> tuple[Params, MuonState]:
        updates, new = inner.update(gradients, cast(state, "float32"), params)
        key = jax.random.fold_in(jax.random.key(1), new.count)
        return updates, new._replace(mu=rounded(key, new.mu, state.mu))

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def restarted(state: optax.OptState, fresh: optax.OptState, now: Bool[Array, ""]) -> optax.OptState:
    """The state of `make_optimizer` with moments from the beginning where `now`; the learning rate goes on."""
    clip, moments, *rest = state
    return clip, jax.tree.map(lambda old, new: jnp.where(now, new, old), moments, fresh[1]), *rest


def scale_by_path(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies what lies under each path, the longest that fits. `init` raises ConfigError for a path that is not in the tree."""

    def found(path: str) -> str | None:
        return max((start for start in factors if starts(path, start)), key=len, default=None)

    def init(params: Params) -> optax.EmptyState:
        paths = [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
        if unused := [start for start in factors if not any(starts(path, start) for path in paths)]:
            raise config.ConfigError(
                f"optimizer.rates names {', '.join(unused)}, which is not among what is trained: that has {', '.join(params)}."
            )
        return optax.EmptyState()

    def update(updates: Params, state: optax.EmptyState, params: Params | None = None) -> tuple[Params, optax.EmptyState]:
        return jax.tree_util.tree_map_with_path(lambda keys, u: factors.get(found(_path(keys)), 1.0) * u, updates), state

    return optax.GradientTransformation(init, update)


def _path(keys: tuple) -> str:
    return "/".join(key.key for key in keys)


def starts(path: str, start: str) -> bool:
    """Whether `start` is a path's first part or parts; whole names count."""
    return f"{path}/".startswith(f"{start}/")


class AdamState(NamedTuple):
    count: Int32[Array, ""]
    mu: Params
    nu: Params


def scale_by_adam(optimizer: config.Optimizer) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) with moments of given types. Optax's has none that is rounded at random, and in bfloat16 a second
    moment rounded to the nearest stands still: at β₂ = 0.95 a twentieth of a change is often less than half of its last digit."""
    kinds = jnp.dtype(optimizer.mu_dtype), jnp.dtype(optimizer.nu_dtype)
    betas = optimizer.beta1, optimizer.beta2

    def init(params: Params) -> AdamState:
        mu, nu = (jax.tree.map(lambda p, kind=kind: jnp.zeros(p.shape, kind), params) for kind in kinds)
        return AdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(gradients: Params, state: AdamState, params: Params | None = None) -> tuple[Params, AdamState]:
        count = state.count + 1
        moments = [
            jax.tree.map(lambda m, g, b=beta, p=power: b * m.astype(jnp.float32) + (1 - b) * g**p, old, gradients)
            for old, beta, power in zip(state[1:], betas, (1, 2))
        ]
        mean, square = (jax.tree.map(lambda m, b=beta: m / (1 - b**count), moment) for moment, beta in zip(moments, betas))
        updates = jax.tree.map(lambda m, s: m / (jnp.sqrt(s) + optimizer.eps), mean, square)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count))
        return updates, AdamState(count, *map(rounded, keys, moments, state[1:]))

    return optax.GradientTransformation(init, update)


def rounded(key: PRNGKeyArray, tree: Params, like: Params) -> Params:
    """A float32 tree in the types of `like`; bfloat16 is rounded at random to one of its two neighbours, so that its mean is the value."""
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(jax.random.split(key, len(leaves)), leaves, jax.tree.leaves(like))
    return jax.tree.unflatten(structure, [_stochastic(k, x) if old.dtype == jnp.bfloat16 else x for k, x, old in pairs])


def _stochastic(key: PRNGKeyArray, x: Float32[Array, "..."]) -> BFloat16[Array, "..."]:
    """bfloat16 is the upper half of float32: what is added to the lower half carries over as often as it should."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    carried = (bits + jax.random.bits(key, x.shape, jnp.uint16)) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(carried, jnp.float32), x).astype(jnp.bfloat16)


def _is_matrix(params: Params) -> Any:
    """Norms, biases, registers and tables of vectors are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "down", "up"), params)


def typed(params: Params, dtype: str) -> Params:
    """Parameters as they are kept: matrices in `dtype`, but for the pixel embedder's, which the published files have in float32 too."""

    def leaf(path, p):
        precise = path[-1].key != "kernel" or [k.key for k in path[:2]] == ["head", "embedder"]
        return p.astype(jnp.float32 if precise else dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


def split_frozen(params: Params, frozen: tuple[str, ...]) -> tuple[Params, Params]:
    """(trained, frozen) parts of the tree, by the start of each path. Raises ConfigError for a name that matches nothing, or all."""
    trained, kept = {}, {}
    unused = set(frozen)

    def visit(node: Params, path: str, trained: Params, kept: Params):
        for key, value in node.items():
            here = f"{path}/{key}" if path else key
            matches = [name for name in frozen if starts(here, name)]
            unused.difference_update(matches)
            if matches:
                kept[key] = value
            elif isinstance(value, dict):
                visit(value, here, trained.setdefault(key, {}), kept.setdefault(key, {}))
                for side in (trained, kept):
                    if not side[key]:
                        del side[key]
            else:
                trained[key] = value

    visit(params, "", trained, kept)
    if unused:
        raise config.ConfigError(
            f"optimizer.frozen names {', '.join(sorted(unused))}, which is not in the model: it has {', '.join(params)}."
        )
    if not trained:
        raise config.ConfigError("optimizer.frozen leaves nothing to train: name fewer parts.")
    return trained, kept


def join(a: Params, b: Params) -> Params:
    """The tree of which `split_frozen` made two parts."""
    both = {key: join(a[key], b[key]) for key in a.keys() & b.keys()}
    return {**a, **b, **both}
