"""A model in numbers: the loss of its velocity in bins of time, and what it paints for the captions of images it has not seen, beside them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from radiance import config
from radiance.base.hashing import hash_parts
from radiance.base.images import to_image, to_signed
from radiance.data.batches import first_image_indices, make_validation_batches
from radiance.data.captions import first_caption
from radiance.data.datasets import DataError
from radiance.data.images import Augmentation, load_images
from radiance.data.source import Source
from radiance.evaluation.clip import ClipScorer
from radiance.evaluation.features import (
    Extractor,
    Features,
    Images,
    load_or_extract_features,
)
from radiance.evaluation.image_statistics import (
    ImageStatistics,
    clipping_fraction,
    root_mean_square,
    spectrum_error,
)
from radiance.evaluation.metrics import MIN_IMAGES, compare_features
from radiance.pipeline import Pipeline
from radiance.shapes import scoring
from radiance.shapes.scenes import GRID_SIZE, SceneDescription
from radiance.text.encoder import TextEncoder
from radiance.training.step import compute_validation_losses
from radiance.training.validation import compute_mean_losses

NUM_TIME_BINS = 16  # of time
REAL_BATCH_SIZE = 64  # real images at a time

ProgressCallback = Callable[[int], object]  # told how many images, or batches, are done


def evaluate_loss(
    pipeline: Pipeline,
    source: Source,
    num_images: int,
    mesh: jax.sharding.Mesh,
    on_progress: ProgressCallback = lambda batches: None,
) -> dict[str, Any]:
    """The velocity loss of the first images of the validation split, over uniform time and in bins of it.

    Each image is seen at one time in each bin; times and noise follow from train.seed and the
    image's place in its batch. It is the plain loss, also of a model that was taught by another.
    """
    run = replace(
        pipeline.run,
        distill=config.Distill(),
        flow=replace(pipeline.run.flow, timestep_distribution="uniform", logit_mean=None),
    )
    batches = make_validation_batches(
        source, run.data, pipeline.encoder, num_images, run.model.masking
    )
    validate = jax.jit(partial(compute_validation_losses, run, num_bins=NUM_TIME_BINS))

    def iterate_batches():
        for batch in batches:
            yield batch
            on_progress(1)

    with jax.set_mesh(mesh):
        bin_losses = compute_mean_losses(validate, pipeline.params, iterate_batches(), mesh)
    count = sum(int(batch["weight"].sum()) for batch in batches)
    return {"loss": float(bin_losses.mean()), "bins": bin_losses.tolist(), "images": count}


def select_images(
    source: Source, data: config.Data, encoder: TextEncoder, num_images: int
) -> list[int]:
    """The first `count` images of a split, without those whose first caption is over the encoder's limit: it cannot be painted."""
    return [
        i
        for i in first_image_indices(source, min(num_images, len(source)))
        if encoder.count_tokens(first_caption(source, i, data)) <= encoder.max_length
    ]


def check_images(source: Source, indices: Sequence[int], resolution: int):
    """Raises DataError when there are too few, and when scenes cannot be read at that side."""
    if len(indices) < MIN_IMAGES:
        raise DataError(
            f"{len(indices)} images of the validation split can be painted, and comparing takes "
            f"{MIN_IMAGES}: ask for more."
        )
    if load_scene_descriptions(source, indices) and resolution % GRID_SIZE:
        raise DataError(
            f"Images of data.resolution={resolution} do not divide into {GRID_SIZE}×{GRID_SIZE} "
            f"cells, and cannot be read: make it a multiple of {GRID_SIZE}."
        )


def load_scene_descriptions(
    source: Source, indices: Sequence[int]
) -> list[SceneDescription] | None:
    """What the captions of `shapes` say; None for other images."""
    descriptions = [source.attributes(i).get("described") for i in indices]
    return (
        descriptions
        if all(isinstance(description, SceneDescription) for description in descriptions)
        else None
    )


def evaluate_samples(
    pipeline: Pipeline,
    source: Source,
    indices: Sequence[int],
    extractors: Sequence[Extractor],
    clip: ClipScorer | None = None,
    on_progress: ProgressCallback = lambda real_images: None,
) -> dict[str, Any]:
    """Images painted at the run's settings for the first captions of those chosen, image i with seed i, measured beside them."""
    run, resolution = pipeline.run, pipeline.run.data.resolution
    cache_dir = Path(run.data.cache_dir).expanduser() / "features"
    fingerprint = hash_parts(
        source.fingerprint(), np.array(indices), resolution, run.data.background
    )
    real_statistics = ImageStatistics(pipeline.pixels_per_token)
    for real_images in load_real_images(source, indices, resolution):
        real_statistics.add(real_images)
    reference_features = [
        load_or_extract_features(
            cache_dir, x, fingerprint, len(indices), load_real_images(source, indices, resolution)
        )
        for x in extractors
    ]

    captions, descriptions = (
        [first_caption(source, i, run.data) for i in indices],
        load_scene_descriptions(source, indices),
    )
    sample_metrics = SampleMetrics(
        captions, extractors, clip, descriptions is not None, pipeline.pixels_per_token
    )
    for samples in pipeline.generate_arrays(
        captions, range(len(captions)), resolution, resolution, run.sample
    ):
        sample_metrics.add(samples)
        on_progress(len(samples))

    error_db = spectrum_error(sample_metrics.statistics.spectrum, real_statistics.spectrum)
    metrics = {}
    for extractor, features, reference in zip(
        extractors, sample_metrics.features, reference_features
    ):
        metrics |= compare_features(np.concatenate(features), reference, extractor.name)
    if clip:
        metrics["CLIP score"] = float(np.concatenate(sample_metrics.clip_scores).mean())
    metrics |= {
        "log spectral distance (dB)": root_mean_square(error_db),
        "clipping fraction": sample_metrics.clipping_sum / len(captions),
        "seam score": sample_metrics.statistics.seam_score,
        "seam score of real images": real_statistics.seam_score,
    }
    results = {"numbers": metrics, "spectrum error (dB)": error_db.tolist()}
    if descriptions:
        results["scenes"] = scoring.score_readings(sample_metrics.readings, descriptions)._asdict()
        results["scenes by chance"] = scoring.score_chance(
            sample_metrics.readings, descriptions
        )._asdict()
    return results


class SampleMetrics:
    """What is measured of images as they are painted, batch by batch; none is kept.

    All but the share of values that are clipped is measured of images in 8 bits, as real ones are.
    """

    def __init__(
        self,
        captions: Sequence[str],
        extractors: Sequence[Extractor],
        clip: ClipScorer | None,
        has_scenes: bool,
        patch_size: int,
    ):
        self.captions, self.extractors, self.clip, self.has_scenes = (
            captions,
            extractors,
            clip,
            has_scenes,
        )
        self.num_images, self.clipping_sum, self.statistics = 0, 0.0, ImageStatistics(patch_size)
        self.features: list[list[Features]] = [[] for _ in extractors]
        self.clip_scores: list[np.ndarray] = []
        self.readings: list[scoring.Reading] = []

    def add(self, samples: Images):
        """Raises DataError for an image that is not finite."""
        if nonfinite_rows := np.flatnonzero(~np.isfinite(samples).all(axis=(1, 2, 3))).tolist():
            raise DataError(
                f"Image {self.num_images + nonfinite_rows[0]} has values that are not finite: look "
                "at the run's losses, or at its weights."
            )
        images = np.stack([to_signed(np.asarray(to_image(sample))) for sample in samples])
        self.clipping_sum += len(samples) * clipping_fraction(samples)
        self.statistics.add(images)
        for feature_batches, extractor in zip(self.features, self.extractors):
            feature_batches.append(extractor(images))
        if self.clip:
            self.clip_scores.append(
                self.clip(images, self.captions[self.num_images : self.num_images + len(images)])
            )
        if self.has_scenes:
            self.readings += scoring.read_pixels(images)
        self.num_images += len(images)


def load_real_images(source: Source, indices: Sequence[int], resolution: int) -> Iterator[Images]:
    """Squares from their centers, in batches. Raises DataError for one that cannot be decoded."""
    for start in range(0, len(indices), REAL_BATCH_SIZE):
        batch_indices = indices[start : start + REAL_BATCH_SIZE]
        batch = load_images(
            source, batch_indices, (resolution, resolution), [Augmentation()] * len(batch_indices)
        )
        for index, reason in batch.broken.items():
            raise DataError(
                f"{source.name(index)!r} of the validation split cannot be decoded ({reason}): put "
                "a whole one there."
            )
        yield to_signed(batch.image)
