"""Couplings of noise and images within a batch."""

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int

from radiance.config import Flow
from radiance.flow.objective import Images


def coupling_costs(image: Images, noise: Images) -> Float32[Array, "b b"]:
    """Compute minus the cosine between every image (row) and every noise (column)."""
    x, y = (_normalize_rows(rearrange(z, "b ... -> b (...)")) for z in (image, noise))
    return -jnp.matmul(x, y.T, precision="highest")


def caption_distances(
    text: Float[Array, "b l e"], lengths: Int[Array, " b"]
) -> Float32[Array, "b b"]:
    """Compute squared distances between the directions of captions' mean embeddings.

    Args:
        text: Embeddings of the captions' tokens.
        lengths: Number of real tokens of each caption.

    Returns:
        Distances from 0, for equal captions, to 4.
    """
    is_token = jnp.arange(text.shape[1]) < lengths[:, None]
    embedding_sums = jnp.where(is_token[..., None], text.astype(jnp.float32), 0).sum(axis=1)
    directions = _normalize_rows(embedding_sums)
    # Differences are 0 for equal captions; products would be so up to rounding only.
    return jnp.square(directions[:, None] - directions).sum(axis=-1)


def _normalize_rows(x: Float32[Array, "b d"]) -> Float32[Array, "b d"]:
    """Divide rows by their norms, at least 1e-12."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def forbid_pairs(
    costs: Float32[Array, "b b"], forbidden_pairs: Bool[Array, "b b"]
) -> Float32[Array, "b b"]:
    """Raise the costs of forbidden pairs above all that the allowed pairs together can save.

    Args:
        costs: Costs of (image, noise) pairs.
        forbidden_pairs: Mask of the pairs to avoid.

    Returns:
        Costs; the cheapest assignment has a forbidden pair only if every assignment has one.
    """
    max_saving = len(costs) * (costs.max() - costs.min())
    return costs + jnp.where(forbidden_pairs, max_saving + 1e-3, 0)


def assign_noise(costs: Float32[Array, "b b"]) -> Int[Array, " b"]:
    """Find the assignment with the least sum of costs (minibatch OT, arXiv 2302.00482).

    The Hungarian algorithm is exact. Under a mesh the costs are those of the global batch, and the
    result is the same on every host.

    Args:
        costs: Costs of (image, noise) pairs.

    Returns:
        Index of the noise for each image.
    """
    rows, columns = optax.assignment.hungarian_algorithm(costs)
    return jnp.zeros_like(columns).at[rows].set(columns)


def couple_noise(
    flow: Flow,
    image: Images,
    noise: Images,
    text: Float[Array, "b l e"],
    lengths: Int[Array, " b"],
) -> Int[Array, " b"]:
    """Assign the noise of a batch to its images by `flow.coupling`.

    Args:
        flow: Settings.
        image: Images.
        noise: Noise; row i has the caption of image i.
        text: Embeddings of the captions' tokens.
        lengths: Number of real tokens of each caption.

    Returns:
        Index of the noise for each image.

    Raises:
        ValueError: If the batch does not divide into groups of `flow.coupling_group_size`.
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
            f"A batch of {batch_size} does not divide into groups of {group_size} "
            "(flow.coupling_group_size): change one of them."
        )
    groups = (
        rearrange(x, "(groups n) ... -> groups n ...", n=group_size)
        for x in (image, noise, text, lengths)
    )
    first_indices = group_size * jnp.arange(batch_size // group_size)
    indices = jax.vmap(couple_group)(*groups) + first_indices[:, None]
    return rearrange(indices, "groups n -> (groups n)")
