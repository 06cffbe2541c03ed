"""Couplings of noise and images within a batch."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int

from radiance.config import Flow

# --- coupling ---------------------------------------------------------------------------------------------------------


def coupling_costs(
    image: Float32[Array, "b height width c"], noise: Float32[Array, "b height width c"]
) -> Float32[Array, "b b"]:
    """Return the cost of every (image, noise) pair: minus the cosine."""
    x, y = image.reshape(len(image), -1), noise.reshape(len(noise), -1)
    x, y = (z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12) for z in (x, y))
    return -jnp.matmul(x, y.T, precision="highest")


def caption_distances(
    text: Float[Array, "b l e"], lengths: Int[Array, " b"]
) -> Float32[Array, "b b"]:
    """Squared distance between the directions of captions' mean embeddings, from 0 for captions that are the same to 4."""
    is_token = jnp.arange(text.shape[1]) < lengths[:, None]
    embedding_sums = jnp.where(is_token[..., None], text.astype(jnp.float32), 0).sum(axis=1)
    directions = embedding_sums / jnp.maximum(
        jnp.linalg.norm(embedding_sums, axis=1, keepdims=True), 1e-12
    )
    return jnp.square(directions[:, None] - directions).sum(
        axis=-1
    )  # not by products, whose rounding tells equal captions apart


def forbid_pairs(
    costs: Float32[Array, "b b"], forbidden_pairs: Bool[Array, "b b"]
) -> Float32[Array, "b b"]:
    """Costs so that no assignment has a forbidden pair unless every one has."""
    max_saving = len(costs) * (
        costs.max() - costs.min()
    )  # that all allowed pairs together can save
    return costs + jnp.where(forbidden_pairs, max_saving + 1e-3, 0)


def assign_noise(costs: Float32[Array, "b b"]) -> Int[Array, " b"]:
    """Which noise each image gets so that the sum of costs is least (minibatch optimal transport, arXiv 2302.00482).

    Exact (Hungarian algorithm), and over the whole batch it is given: under a mesh that is the global batch, alike on every host.
    """
    rows, columns = optax.assignment.hungarian_algorithm(costs)
    return jnp.zeros_like(columns).at[rows].set(columns)


def couple_noise(
    flow: Flow,
    image: Float32[Array, "b height width c"],
    noise: Float32[Array, "b height width c"],
    text: Float[Array, "b l e"],
    lengths: Int[Array, " b"],
) -> Int[Array, " b"]:
    """Which noise each image gets by `flow.coupling`. Noise has the caption of the image that it was drawn with.

    Raises ValueError when the batch does not divide into groups of `flow.coupling_group_size`.
    """

    def couple_group(image, noise, text, lengths):
        costs = coupling_costs(image, noise)
        if flow.coupling == "within_caption":
            costs = forbid_pairs(costs, caption_distances(text, lengths) > 0)
        elif flow.coupling_caption_weight:
            costs = costs + flow.coupling_caption_weight * caption_distances(text, lengths)
        return assign_noise(costs)

    batch_size, group_size = len(image), flow.coupling_group_size
    if flow.coupling == "independent":
        return jnp.arange(batch_size)
    if not group_size:
        return couple_group(image, noise, text, lengths)
    if batch_size % group_size:
        raise ValueError(
            f"A batch of {batch_size} does not divide into groups of {group_size} (flow.coupling_group_size)."
        )
    groups = (x.reshape(-1, group_size, *x.shape[1:]) for x in (image, noise, text, lengths))
    return (
        jax.vmap(couple_group)(*groups) + group_size * jnp.arange(batch_size // group_size)[:, None]
    ).reshape(-1)
