"""What is measured of a trained arm, seed by seed.

validation_loss: mean over held-out images and equal bins of time, with the averaged weights and the same noise for all arms.
exact, f1, background, exact_chance: of images painted from held-out captions and read; see evaluation/reader.py. Chance is against another
image's caption.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from radiance import config
from radiance.ablation.data import ImageSet, TextSet
from radiance.flow.sampler import TextCondition, generate_images
from radiance.model.transformer import Params
from radiance.shapes.scoring import read_pixels, score_chance, score_readings

GUIDANCE_SCALES = (1.0, 3.0)


def measure_adherence(
    run: config.Config, params: Params, seeds: Sequence[int], image_set: ImageSet, text_set: TextSet
) -> dict[str, dict[int, float]]:
    """By name@guidance and seed, of images of the captions of `shown`, each from the noise of its number."""
    metrics: dict[str, dict[int, float]] = {}
    for guidance in GUIDANCE_SCALES:
        for i, seed in enumerate(seeds):
            readings = read_pixels(
                _generate_images(run, jax.tree.map(lambda x, i=i: x[i], params), guidance, text_set)
            )
            image_score, chance_score = (
                score_readings(readings, image_set.facts),
                score_chance(readings, image_set.facts),
            )
            for name in ("exact", "f1", "background"):
                metrics.setdefault(f"{name}@{guidance:g}", {})[seed] = getattr(image_score, name)
                metrics.setdefault(f"{name}_chance@{guidance:g}", {})[seed] = getattr(
                    chance_score, name
                )
    return metrics


def _generate_images(
    run: config.Config, params: Params, guidance: float, text_set: TextSet
) -> np.ndarray:
    num_captions, batch_size = len(text_set.lengths) - 1, run.sample.batch_size
    settings, image_batches = replace(run.sample, guidance_scale=guidance), []
    for start in range(0, num_captions, batch_size):
        rows = np.minimum(
            np.arange(start, start + batch_size), num_captions - 1
        )  # a last, shorter batch is filled up
        empty_rows = np.full(batch_size, num_captions)
        images = generate_images(
            params, rows.astype(np.uint32), *(TextCondition(text_set.embeddings[indices], text_set.lengths[indices]) for indices in (rows, empty_rows)),
            model=run.model, compute=run.compute, settings=settings, noise_scale=run.flow.noise_scale, height=run.data.resolution, width=run.data.resolution,
        )  # fmt: skip
        image_batches.append(np.asarray(images)[: num_captions - start])
    return np.concatenate(image_batches)
