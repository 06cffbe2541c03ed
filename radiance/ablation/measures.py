"""What is measured of a trained arm, seed by seed.

validation_loss: mean over held-out pictures and equal bins of time, with the averaged weights and the same noise for all arms.
exact, f1, background, exact_chance: of pictures painted from held-out captions and read; see evaluation/reader.py. Chance is against another
picture's caption.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from radiance import config
from radiance.ablation.shown import Shown, Texts
from radiance.evaluation.reader import chance, read, score
from radiance.model.transformer import Params
from radiance.sampling import Condition, paint

GUIDANCE = (1.0, 3.0)


def adherence(run: config.Config, params: Params, seeds: Sequence[int], shown: Shown, texts: Texts) -> dict[str, dict[int, float]]:
    """By name@guidance and seed, of pictures of the captions of `shown`, each from the noise of its number."""
    found: dict[str, dict[int, float]] = {}
    for guidance in GUIDANCE:
        for i, seed in enumerate(seeds):
            readings = read(_painted(run, jax.tree.map(lambda x, i=i: x[i], params), guidance, texts))
            real, null = score(readings, shown.facts), chance(readings, shown.facts)
            for name in ("exact", "f1", "background"):
                found.setdefault(f"{name}@{guidance:g}", {})[seed] = getattr(real, name)
                found.setdefault(f"{name}_chance@{guidance:g}", {})[seed] = getattr(null, name)
    return found


def _painted(run: config.Config, params: Params, guidance: float, texts: Texts) -> np.ndarray:
    count, size = len(texts.lengths) - 1, run.sample.batch
    settings, parts = replace(run.sample, guidance=guidance), []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)  # a last, shorter batch is filled up
        empty = np.full(size, count)
        images = paint(
            params, rows.astype(np.uint32), *(Condition(texts.rows[which], texts.lengths[which]) for which in (rows, empty)),
            model=run.model, compute=run.compute, settings=settings, noise_scale=run.flow.noise_scale, height=run.data.side, width=run.data.side,
        )  # fmt: skip
        parts.append(np.asarray(images)[: count - start])
    return np.concatenate(parts)
