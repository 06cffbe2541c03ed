"""The optimizer, what it leaves alone, and the averages of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

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
    """Clip, Adam, decoupled weight decay on matrices."""
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(learning_rate(optimizer, steps)),
    )


def _is_matrix(params: Params) -> Any:
    """Norms, biases, registers and tables of vectors are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def split_frozen(params: Params, frozen: tuple[str, ...]) -> tuple[Params, Params]:
    """(trained, frozen) parts of the tree, by the start of each path. Raises ConfigError for a name that matches nothing, or all."""
    trained, kept = {}, {}
    unused = set(frozen)

    def visit(node: Params, path: str, trained: Params, kept: Params):
        for key, value in node.items():
            here = f"{path}/{key}" if path else key
            matches = [name for name in frozen if here == name or here.startswith(f"{name}/")]
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


def average(ema: dict[str, Params], params: Params, step: Int32[Array, ""]) -> dict[str, Params]:
    """Exponential moving averages after a step. The decay is ramped up as (1 + step) / (10 + step), so that a short run's average
    does not remember its first weights."""

    def update(decay: str, old: Params) -> Params:
        d: Float32[Array, ""] = jnp.minimum(float(decay), (1 + step) / (10 + step)).astype(jnp.float32)
        return jax.tree.map(lambda o, p: o + (1 - d) * (p - o), old, params)

    return {decay: update(decay, old) for decay, old in ema.items()}
