"""Metrics of a trained variant, for each seed.

validation_loss: mean over held-out images and equal bins of time, with averaged weights and the
same noise for all variants.
exact, f1, background and exact_chance: scores of images that are generated from held-out captions
and read by `shapes/scoring.py`; chance compares with another image's caption.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from radiance import config
from radiance.ablation.data import ImageSet, TextSet
from radiance.flow.sampler import TextCondition, generate_images
from radiance.model.transformer import Params
from radiance.shapes.scoring import read_pixels, score_chance, score_readings
from radiance.training.step import compute_validation_losses

GUIDANCE_SCALES = (1.0, 3.0)
SCORES = ("exact", "f1", "background")


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


def measure_adherence(
    run: config.Config, params: Params, seeds: Sequence[int], image_set: ImageSet, text_set: TextSet
) -> dict[str, dict[int, float]]:
    """Return scores of generated images by SCORE@GUIDANCE and seed.

    Args:
        run: Config of the variant.
        params: Weights of all seeds, on a leading axis.
        seeds: Seed of each run.
        image_set: Held-out captions with their descriptions; caption i starts from noise of seed i.
        text_set: The encoded captions.
    """
    metrics: dict[str, dict[int, float]] = {}
    for guidance_scale in GUIDANCE_SCALES:
        for index, seed in enumerate(seeds):
            seed_params = jax.tree.map(lambda x, index=index: x[index], params)
            readings = read_pixels(_generate_images(run, seed_params, guidance_scale, text_set))
            scores = score_readings(readings, image_set.descriptions)
            chance_scores = score_chance(readings, image_set.descriptions)
            for name in SCORES:
                for suffix, score in (("", scores), ("_chance", chance_scores)):
                    values = metrics.setdefault(f"{name}{suffix}@{guidance_scale:g}", {})
                    values[seed] = getattr(score, name)
    return metrics


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
