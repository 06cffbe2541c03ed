"""Gradients of a batch: of the mean loss, in float32, in microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from radiance import config
from radiance.flow import distillation, objective
from radiance.model.transformer import Params

Batch = dict[str, jax.Array]


def differentiate_losses(
    run: config.Config,
    compute_losses: Callable[..., Float32[Array, " b"]],
    active: Params,
    context: Any,
    batch: Batch,
) -> tuple[Float32[Array, ""], Params]:
    """Return the mean loss of the images that are present, and the gradients in float32.

    Args:
        run: Config of the run.
        compute_losses: (active, context, microbatch) → the loss of every image.
        active: Parameters to differentiate.
        context: Second argument of `compute_losses`.
        batch: Batch with the arrays that `compute_losses` needs, and "weight".
    """

    def compute_loss(
        active: Params, context: Any, microbatch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        losses = compute_losses(active, context, microbatch)
        normalized_losses = (
            distillation.normalize_losses(losses) if run.distill.kind == "mean_flow" else losses
        )
        is_present = microbatch["weight"] > 0
        return (
            objective.weighted_mean(normalized_losses, microbatch["weight"]),
            jnp.where(is_present, losses, 0).mean(),
        )

    gradients, loss = accumulate_gradients(
        jax.value_and_grad(compute_loss, has_aux=True),
        active,
        context,
        batch,
        run.optimizer.gradient_accumulation_steps,
    )
    loss = loss / jnp.maximum((batch["weight"] > 0).mean(), 1e-9)
    return loss, cast_to_float32(gradients)


def accumulate_gradients(
    value_and_grad: Callable,
    active: Params,
    context: Any,
    batch: Batch,
    num_microbatches: int,
) -> tuple[Params, jax.Array]:
    """Return gradients and loss of a batch, computed in equal microbatches and averaged in float32.

    Args:
        value_and_grad: (active, context, microbatch) → ((_, loss), gradients).
        active: Parameters to differentiate.
        context: Second argument of `value_and_grad`.
        batch: Batch whose size is a multiple of `num_microbatches`.
        num_microbatches: Number of microbatches.
    """
    if num_microbatches == 1:
        (_, loss), gradients = value_and_grad(active, context, batch)
        return gradients, loss
    batch = split_microbatches(batch, num_microbatches)

    def accumulate(total, microbatch):
        (_, loss), gradients = value_and_grad(active, context, microbatch)
        return jax.tree.map(
            lambda total_leaf, x: total_leaf + x / num_microbatches, total, (gradients, loss)
        ), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), active)
    (gradients, loss), _ = jax.lax.scan(accumulate, (zeros, jnp.float32(0)), batch)
    return gradients, loss


def split_microbatches(batch: Batch, num_microbatches: int) -> Batch:
    """Return the batch with a leading axis of equal microbatches.

    Microbatch j has rows j, j + n, …, so that every device has rows of every microbatch.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )


def cast_to_float32(tree: Params) -> Params:
    """Return the tree with float32 leaves."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
