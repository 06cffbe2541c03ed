"""Metrics of a trained variant, for each seed.

Losses are means over held-out images and equal bins of time, with averaged weights and the same
noise for all variants. Images are generated from held-out captions, with each guidance scale. They
are compared with the held-out images, and those of data.source=shapes are read by an exact reader.
A metric NAME@SCALE is of a guidance scale. To add a metric, describe it in METRICS and compute it
in `summarize_losses` or `measure_samples`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from radiance import config
from radiance.ablation.data import ImageSet, TextSet
from radiance.base.images import to_signed
from radiance.flow.sampler import TextCondition, generate_images
from radiance.model.transformer import Params
from radiance.shapes.scoring import read_pixels, score_chance, score_readings
from radiance.training.step import compute_validation_losses

GUIDANCE_SCALES = (1.0, 3.0)
MIN_HIGH_NOISE_BIN = 3  # of ten
SCORES = {
    "exact": "images that show all of the caption and nothing else, as a fraction",
    "f1": "F1 of objects that are right in all attributes",
    "position": "described objects that are in the right place, as a fraction",
    "background": "images with the background of the caption, as a fraction",
}


class Metric(NamedTuple):
    """What a suite can be decided by.

    Attributes:
        description: What is measured.
        higher_is_better: Whether a higher value is better.
        needs: What it is computed from: validation losses, generated samples, or samples whose
            captions have exact descriptions (data.source=shapes).
    """

    description: str
    higher_is_better: bool
    needs: Literal["losses", "samples", "descriptions"]


METRICS = {
    "validation_loss": Metric("mean validation loss over all times", False, "losses"),
    "high_noise_loss": Metric(
        "mean validation loss over times above 0.3, where the caption decides", False, "losses"
    ),
}
for _scale in GUIDANCE_SCALES:
    METRICS[f"retrieval@{_scale:g}"] = Metric(
        f"samples whose closest held-out image is that of their caption, guidance {_scale:g}",
        True,
        "samples",
    )
    for _name, _description in SCORES.items():
        METRICS[f"{_name}@{_scale:g}"] = Metric(
            f"{_description}, guidance {_scale:g}", True, "descriptions"
        )


def measure_validation_losses(
    run: config.Config, base: config.Config, params: Params, image_set: ImageSet, text_set: TextSet
) -> Float[np.ndarray, "seeds bins"]:
    """Return the mean validation loss of every seed in equal bins of time.

    The noise is the same for all seeds, variants and evaluation conditions.

    Args:
        run: Config of the variant, of which only the model is used.
        base: Config of the base, whose data and objective measure the loss.
        params: Weights of all seeds, on a leading axis.
        image_set: Held-out images.
        text_set: Their encoded captions.
    """
    compute_losses = _compile_validation(replace(base, model=run.model))
    num_images, batch_size = len(image_set.image), base.data.batch_size
    total: Any = 0.0
    for index, start in enumerate(range(0, num_images, batch_size)):
        # A last, shorter batch is padded with copies of the last image, which do not count.
        rows = np.minimum(np.arange(start, start + batch_size), num_images - 1)
        batch = {
            "image": image_set.image[rows],
            "text": text_set.embeddings[rows],
            "lengths": text_set.lengths[rows],
            "weight": np.ones(batch_size, np.float32),
        }
        losses = np.asarray(compute_losses(params, batch, jnp.int32(index)), np.float64)
        total += losses[:, : num_images - start].sum(axis=1)
    return total / num_images


@lru_cache(maxsize=32)
def _compile_validation(run: config.Config) -> Callable[..., Any]:
    """Return the compiled validation losses of several seeds."""
    return jax.jit(jax.vmap(partial(compute_validation_losses, run), in_axes=(0, None, None)))


def summarize_losses(
    bin_losses: Float[np.ndarray, "seeds bins"],
) -> dict[str, Float[np.ndarray, " seeds"]]:
    """Return the metrics that are computed from validation losses, by name.

    Args:
        bin_losses: Losses in ten equal bins of time.
    """
    return {
        "validation_loss": bin_losses.mean(axis=1),
        "high_noise_loss": bin_losses[:, MIN_HIGH_NOISE_BIN:].mean(axis=1),
    }


def measure_samples(
    run: config.Config, params: Params, seeds: Sequence[int], image_set: ImageSet, text_set: TextSet
) -> dict[str, dict[int, float]]:
    """Return the metrics of generated images by name and seed.

    Those with _chance compare with the next image and its caption.

    Args:
        run: Config of the variant.
        params: Weights of all seeds, on a leading axis.
        seeds: Seed of each run.
        image_set: Held-out images with their captions; caption i starts from noise of seed i.
        text_set: The encoded captions.
    """
    metrics: dict[str, dict[int, float]] = {}
    has_descriptions = None not in image_set.descriptions
    true_images = to_signed(image_set.image)
    for guidance_scale in GUIDANCE_SCALES:
        for index, seed in enumerate(seeds):
            seed_params = jax.tree.map(lambda x, index=index: x[index], params)
            images = _generate_images(run, seed_params, guidance_scale, text_set)
            values = {
                "retrieval": measure_retrieval(images, true_images),
                "retrieval_chance": measure_retrieval(np.roll(images, 1, axis=0), true_images),
            }
            if has_descriptions:
                readings = read_pixels(images)
                scores = score_readings(readings, image_set.descriptions)
                chance_scores = score_chance(readings, image_set.descriptions)
                values |= {name: getattr(scores, name) for name in SCORES}
                values |= {f"{name}_chance": getattr(chance_scores, name) for name in SCORES}
            for name, value in values.items():
                metrics.setdefault(f"{name}@{guidance_scale:g}", {})[seed] = value
    return metrics


def measure_retrieval(
    images: Float[np.ndarray, "n height width 3"],
    true_images: Float[np.ndarray, "n height width 3"],
) -> float:
    """Return the fraction of images to which no true image is closer than their own, by pixels.

    Args:
        images: Generated images in [-1, 1]. Those that are not finite count as wrong.
        true_images: The true image of each.
    """
    queries, references = (x.reshape(len(x), -1).astype(np.float64) for x in (images, true_images))
    squared_norms = np.square(references).sum(axis=1)
    distances = squared_norms - 2 * queries @ references.T  # up to the norm of the query
    own_distances = np.diagonal(distances)
    is_right = (distances >= own_distances[:, None]).all(axis=1) & np.isfinite(own_distances)
    return float(is_right.mean())


def _generate_images(
    run: config.Config, params: Params, guidance_scale: float, text_set: TextSet
) -> np.ndarray:
    """Generate an image of every caption."""
    num_captions, batch_size = len(text_set.lengths) - 1, run.sample.batch_size
    settings = replace(run.sample, guidance_scale=guidance_scale)
    empty_rows = np.full(batch_size, num_captions)
    batches = []
    for start in range(0, num_captions, batch_size):
        # A last, shorter batch is padded with copies of the last caption.
        rows = np.minimum(np.arange(start, start + batch_size), num_captions - 1)
        conditions = [
            TextCondition(text_set.embeddings[indices], text_set.lengths[indices])
            for indices in (rows, empty_rows)
        ]
        images = generate_images(
            params,
            rows.astype(np.uint32),
            *conditions,
            model=run.model,
            compute=run.compute,
            settings=settings,
            noise_scale=run.flow.noise_scale,
            height=run.data.resolution,
            width=run.data.resolution,
        )
        batches.append(np.asarray(images)[: num_captions - start])
    return np.concatenate(batches)
