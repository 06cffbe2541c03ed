"""Evaluate a model on the validation split: its loss by time, and its samples against images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from radiance import config
from radiance.base.errors import DataError
from radiance.base.hashing import hash_parts
from radiance.base.images import Images, to_image, to_signed
from radiance.data.batches import first_image_indices, make_validation_batches
from radiance.data.captions import first_caption
from radiance.data.images import Augmentation, load_images
from radiance.data.source import Source
from radiance.evaluation.clip import ClipScorer
from radiance.evaluation.features import Extractor, Features, load_or_extract_features
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

NUM_TIME_BINS = 16
REAL_BATCH_SIZE = 64  # real images that are decoded at a time

ProgressCallback = Callable[[int], object]  # called with the number of new images or batches


def evaluate_loss(
    pipeline: Pipeline,
    source: Source,
    num_images: int,
    mesh: jax.sharding.Mesh,
    on_progress: ProgressCallback = lambda batches: None,
) -> dict[str, Any]:
    """Return the velocity loss of the first images of a split, over uniform times.

    Every image is seen at one time in each bin. Times and noise follow from train.seed and the
    image's position in its batch. The loss is that of the plain flow objective, also for distilled
    models.

    Args:
        pipeline: The model.
        source: Validation split.
        num_images: Number of images.
        mesh: Mesh of the weights.
        on_progress: Called after every batch.

    Returns:
        The mean `loss`, the losses in `bins` of time from 0 (image) to 1 (noise), and the number of
        `images`.
    """
    run = replace(
        pipeline.run,
        distill=config.Distill(),
        flow=replace(pipeline.run.flow, timestep_distribution="uniform", logit_mean=None),
    )
    batches = make_validation_batches(
        source, run.data, pipeline.encoder, num_images, run.model.masking
    )
    compute_losses = jax.jit(partial(compute_validation_losses, run, num_bins=NUM_TIME_BINS))

    def iterate_batches() -> Iterator[dict[str, Any]]:
        for batch in batches:
            yield batch
            on_progress(1)

    with jax.set_mesh(mesh):
        bin_losses = compute_mean_losses(compute_losses, pipeline.params, iterate_batches(), mesh)
    count = sum(int(batch["weight"].sum()) for batch in batches)
    return {"loss": float(bin_losses.mean()), "bins": bin_losses.tolist(), "images": count}


def select_images(
    source: Source, data: config.Data, encoder: TextEncoder, num_images: int
) -> list[int]:
    """Return the indices of the first images of a split whose captions can be sampled from.

    Args:
        source: Images with captions.
        data: Settings of the captions.
        encoder: Encoder, whose limit the first caption of an image must not exceed.
        num_images: Number of images to look at.
    """
    return [
        i
        for i in first_image_indices(source, min(num_images, len(source)))
        if encoder.count_tokens(first_caption(source, i, data)) <= encoder.max_length
    ]


def check_images(source: Source, indices: Sequence[int], resolution: int):
    """Check that samples can be compared with these images at a resolution.

    Raises:
        DataError: There are too few images, or scenes of `shapes` cannot be read at the resolution.
    """
    if len(indices) < MIN_IMAGES:
        raise DataError(
            f"{len(indices)} images of the validation split have captions within the encoder's "
            f"limit, and a comparison needs {MIN_IMAGES}: give a larger number of images."
        )
    if load_scene_descriptions(source, indices) and resolution % GRID_SIZE:
        raise DataError(
            f"Images of data.resolution={resolution} do not divide into {GRID_SIZE}×{GRID_SIZE} "
            f"cells and cannot be read: set it to a multiple of {GRID_SIZE}."
        )


def load_scene_descriptions(
    source: Source, indices: Sequence[int]
) -> list[SceneDescription] | None:
    """Return what the captions of `shapes` describe, or None for other data."""
    descriptions = [source.attributes(i).get("described") for i in indices]
    scenes = [x for x in descriptions if isinstance(x, SceneDescription)]
    return scenes if len(scenes) == len(descriptions) else None


# --- samples beside real images ------------------------------------------------------------------


def evaluate_samples(
    pipeline: Pipeline,
    source: Source,
    indices: Sequence[int],
    extractors: Sequence[Extractor],
    clip: ClipScorer | None = None,
    on_progress: ProgressCallback = lambda images: None,
) -> dict[str, Any]:
    """Sample an image for the first caption of each real image, and compare both sets.

    Images are sampled with the run's settings; sample i has seed i.

    Args:
        pipeline: The model.
        source: Validation split.
        indices: Indices of the real images.
        extractors: Feature extractors of the distances.
        clip: Model of the CLIP score; None leaves the score out.
        on_progress: Called after every batch of samples.

    Returns:
        `metrics` by name, the `spectrum error (dB)` by frequency, and for `shapes` how well
        captions agree with what `scenes` show, and would agree `scenes by chance`.

    Raises:
        DataError: A real image cannot be decoded.
        SamplingError: A sample is not finite.
    """
    run, resolution = pipeline.run, pipeline.run.data.resolution
    reference = _measure_real_images(pipeline, source, indices, extractors)
    captions = [first_caption(source, i, run.data) for i in indices]
    descriptions = load_scene_descriptions(source, indices)
    sample_metrics = SampleMetrics(
        captions, extractors, clip, descriptions is not None, pipeline.pixels_per_token
    )
    for samples in pipeline.generate_arrays(
        captions, range(len(captions)), resolution, resolution, run.sample
    ):
        sample_metrics.add(samples)
        on_progress(len(samples))
    results = sample_metrics.compare(reference)
    if descriptions:
        readings = sample_metrics.readings
        scores = scoring.score_readings(readings, descriptions)
        chance_scores = scoring.score_chance(readings, descriptions)
        results |= {"scenes": scores._asdict(), "scenes by chance": chance_scores._asdict()}
    return results


class RealImageReference(NamedTuple):
    """Statistics and features of the real images that samples are compared with."""

    statistics: ImageStatistics
    features: list[Features]  # by extractor


def _measure_real_images(
    pipeline: Pipeline, source: Source, indices: Sequence[int], extractors: Sequence[Extractor]
) -> RealImageReference:
    """Return the reference; features are cached in the data's cache directory."""
    data = pipeline.run.data
    statistics = ImageStatistics(pipeline.pixels_per_token)
    for real_images in load_real_images(source, indices, data.resolution):
        statistics.add(real_images)
    cache_dir = Path(data.cache_dir).expanduser() / "features"
    fingerprint = hash_parts(
        source.fingerprint(), np.array(indices), data.resolution, data.background
    )
    features = [
        load_or_extract_features(
            cache_dir,
            extractor,
            fingerprint,
            len(indices),
            load_real_images(source, indices, data.resolution),
        )
        for extractor in extractors
    ]
    return RealImageReference(statistics, features)


def load_real_images(source: Source, indices: Sequence[int], resolution: int) -> Iterator[Images]:
    """Yield batches of center crops.

    Raises:
        DataError: An image cannot be decoded.
    """
    for start in range(0, len(indices), REAL_BATCH_SIZE):
        batch_indices = indices[start : start + REAL_BATCH_SIZE]
        batch = load_images(
            source, batch_indices, (resolution, resolution), [Augmentation()] * len(batch_indices)
        )
        for index, reason in batch.broken.items():
            raise DataError(
                f"{source.name(index)!r} of the validation split cannot be decoded ({reason}): "
                "replace it by an intact file."
            )
        yield to_signed(batch.image)


class SampleMetrics:
    """Metrics of samples, added batch by batch; no image is kept.

    All metrics but the clipping fraction are measured after rounding to 8 bits, as in real images.
    """

    def __init__(
        self,
        captions: Sequence[str],
        extractors: Sequence[Extractor],
        clip: ClipScorer | None,
        has_scenes: bool,
        patch_size: int,
    ):
        self.captions, self.extractors, self.clip = captions, extractors, clip
        self.has_scenes = has_scenes
        self.num_images, self.clipping_sum = 0, 0.0
        self.statistics = ImageStatistics(patch_size)
        self.features: list[list[Features]] = [[] for _ in extractors]
        self.clip_scores: list[np.ndarray] = []
        self.readings: list[scoring.Reading] = []

    def add(self, samples: Images):
        """Add a batch from the sampler."""
        images = np.stack([to_signed(np.asarray(to_image(sample))) for sample in samples])
        self.clipping_sum += len(samples) * clipping_fraction(samples)
        self.statistics.add(images)
        for feature_batches, extractor in zip(self.features, self.extractors):
            feature_batches.append(extractor(images))
        if self.clip:
            captions = self.captions[self.num_images : self.num_images + len(images)]
            self.clip_scores.append(self.clip(images, captions))
        if self.has_scenes:
            self.readings += scoring.read_pixels(images)
        self.num_images += len(images)

    def compare(self, reference: RealImageReference) -> dict[str, Any]:
        """Return the metrics of all samples, and the error of their spectrum."""
        metrics = {}
        for extractor, features, real_features in zip(
            self.extractors, self.features, reference.features
        ):
            metrics |= compare_features(np.concatenate(features), real_features, extractor.name)
        if self.clip:
            metrics["CLIP score"] = float(np.concatenate(self.clip_scores).mean())
        error_db = spectrum_error(self.statistics.spectrum, reference.statistics.spectrum)
        metrics |= {
            "log spectral distance (dB)": root_mean_square(error_db),
            "clipping fraction": self.clipping_sum / len(self.captions),
            "seam score": self.statistics.seam_score,
            "seam score of real images": reference.statistics.seam_score,
        }
        return {"metrics": metrics, "spectrum error (dB)": error_db.tolist()}
