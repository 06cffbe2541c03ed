"""A model in numbers: the loss of its velocity in bins of time, and what it paints for the captions of pictures it has not seen, beside them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from radiance import config
from radiance.data.captions import first_caption
from radiance.data.datasets import DataError, Source
from radiance.data.pipeline import first_pictures, fixed_batches
from radiance.data.pixels import View, draw
from radiance.data.shapes import GRID, Facts
from radiance.evaluation import reader
from radiance.evaluation.clip import Clip
from radiance.evaluation.compare import LEAST, compare_features
from radiance.evaluation.features import Extractor, Features, Pictures, digest, kept_features
from radiance.evaluation.signals import Signals, clipping_fraction, power_error, root_mean_square
from radiance.pictures import to_picture, to_signed
from radiance.pipeline import Pipeline
from radiance.text.encoders import Encoder
from radiance.training.loop import mean_losses
from radiance.training.step import validation_losses

BINS = 16  # of time
BATCH = 64  # real pictures at a time

Progress = Callable[[int], object]  # told how many pictures, or batches, are done


def validation(
    pipeline: Pipeline, source: Source, pictures: int, mesh: jax.sharding.Mesh, progress: Progress = lambda batches: None
) -> dict[str, Any]:
    """The velocity loss of the first pictures of the validation split, over uniform time and in bins of it.

    Each picture is seen at one time in each bin; times and noise follow from train.seed and the picture's place in its batch. It is the plain loss,
    also of a model that was taught by another.
    """
    run = replace(pipeline.run, distill=config.Distill(), flow=replace(pipeline.run.flow, time_law="uniform", time_mean=None))
    batches = fixed_batches(source, run.data, pipeline.encoder, pictures, run.model.masking)
    validate = jax.jit(partial(validation_losses, run, bins=BINS))

    def counted():
        for batch in batches:
            yield batch
            progress(1)

    with jax.set_mesh(mesh):
        bins = mean_losses(validate, pipeline.params, counted(), mesh)
    count = sum(int(batch["weight"].sum()) for batch in batches)
    return {"loss": float(bins.mean()), "bins": bins.tolist(), "pictures": count}


def captioned(source: Source, data: config.Data, encoder: Encoder, count: int) -> list[int]:
    """The first `count` pictures of a split, without those whose first caption is over the encoder's limit: it cannot be painted."""
    return [i for i in first_pictures(source, min(count, len(source))) if encoder.count(first_caption(source, i, data)) <= encoder.limit]


def check_pictures(source: Source, chosen: Sequence[int], side: int):
    """Raises DataError when there are too few, and when scenes cannot be read at that side."""
    if len(chosen) < LEAST:
        raise DataError(f"{len(chosen)} pictures of the validation split can be painted, and comparing takes {LEAST}: ask for more.")
    if told_facts(source, chosen) and side % GRID:
        raise DataError(
            f"Pictures of data.side={side} do not divide into {GRID}×{GRID} cells, and cannot be read: make it a multiple of {GRID}."
        )


def told_facts(source: Source, chosen: Sequence[int]) -> list[Facts] | None:
    """What the captions of `shapes` say; None for other pictures."""
    facts = [source.attributes(i).get("told") for i in chosen]
    return facts if all(isinstance(said, Facts) for said in facts) else None


def sampling(
    pipeline: Pipeline,
    source: Source,
    chosen: Sequence[int],
    extractors: Sequence[Extractor],
    clip: Clip | None = None,
    progress: Progress = lambda pictures: None,
) -> dict[str, Any]:
    """Pictures painted at the run's settings for the first captions of those chosen, picture i with seed i, measured beside them."""
    run, side = pipeline.run, pipeline.run.data.side
    folder = Path(run.data.directory).expanduser() / "features"
    fingerprint = digest(source.fingerprint(), np.array(chosen), side, run.data.background)
    real = Signals(pipeline.side)
    for pictures in real_pictures(source, chosen, side):
        real.add(pictures)
    references = [kept_features(folder, x, fingerprint, len(chosen), real_pictures(source, chosen, side)) for x in extractors]

    captions, facts = [first_caption(source, i, run.data) for i in chosen], told_facts(source, chosen)
    painted = Painted(captions, extractors, clip, facts is not None, pipeline.side)
    for values in pipeline.values(captions, range(len(captions)), side, side, run.sample):
        painted.add(values)
        progress(len(values))

    error = power_error(painted.signals.spectrum, real.spectrum)
    numbers = {}
    for extractor, features, reference in zip(extractors, painted.features, references):
        numbers |= compare_features(np.concatenate(features), reference, extractor.name)
    if clip:
        numbers["CLIP score"] = float(np.concatenate(painted.scores).mean())
    numbers |= {
        "log spectral distance (dB)": root_mean_square(error),
        "clipping fraction": painted.clipped / len(captions),
        "seam score": painted.signals.seam,
        "seam score of real pictures": real.seam,
    }
    found = {"numbers": numbers, "spectrum error (dB)": error.tolist()}
    if facts:
        found["scenes"] = reader.score(painted.readings, facts)._asdict()
        found["scenes by chance"] = reader.chance(painted.readings, facts)._asdict()
    return found


class Painted:
    """What is measured of pictures as they are painted, batch by batch; none is kept.

    All but the share of values that are clipped is measured of pictures in 8 bits, as real ones are.
    """

    def __init__(self, captions: Sequence[str], extractors: Sequence[Extractor], clip: Clip | None, scenes: bool, patch: int):
        self.captions, self.extractors, self.clip, self.scenes = captions, extractors, clip, scenes
        self.count, self.clipped, self.signals = 0, 0.0, Signals(patch)
        self.features: list[list[Features]] = [[] for _ in extractors]
        self.scores: list[np.ndarray] = []
        self.readings: list[reader.Reading] = []

    def add(self, values: Pictures):
        """Raises DataError for a picture that is not finite."""
        if bad := np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3))).tolist():
            raise DataError(f"Picture {self.count + bad[0]} has values that are not finite: look at the run's losses, or at its weights.")
        pictures = np.stack([to_signed(np.asarray(to_picture(picture))) for picture in values])
        self.clipped += len(values) * clipping_fraction(values)
        self.signals.add(pictures)
        for found, extractor in zip(self.features, self.extractors):
            found.append(extractor(pictures))
        if self.clip:
            self.scores.append(self.clip(pictures, self.captions[self.count : self.count + len(pictures)]))
        if self.scenes:
            self.readings += reader.read(pictures)
        self.count += len(pictures)


def real_pictures(source: Source, chosen: Sequence[int], side: int) -> Iterator[Pictures]:
    """Squares from their centres, in batches. Raises DataError for one that cannot be decoded."""
    for start in range(0, len(chosen), BATCH):
        rows = chosen[start : start + BATCH]
        drawn = draw(source, rows, (side, side), [View()] * len(rows))
        for index, reason in drawn.broken.items():
            raise DataError(f"{source.name(index)!r} of the validation split cannot be decoded ({reason}): put a whole one there.")
        yield to_signed(drawn.image)
