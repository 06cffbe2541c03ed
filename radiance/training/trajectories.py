"""The ways along which a teacher paints: made once, kept in a folder, and read as batches.

A trajectory is what a prompt and a seed give: the noise, which follows from the seed and is not kept, and the points at the ends of its
segments, of which the last is the image. Files hold SHARD of them, and one that is there is whole: painting goes on where it was stopped.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Float16

from radiance import config
from radiance.base.files import replace_atomically, require_space
from radiance.base.random import RandomStream, make_rng, random_permutation
from radiance.data.batches import PREFETCH_BATCHES, Batch, encode_captions, padded_text_length
from radiance.data.captions import augment_caption
from radiance.data.source import Source
from radiance.pipeline import Pipeline
from radiance.text.encoder import TextEncoder
from radiance.training.progress import Progress
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors
from radiance.weights.tensors import Tensors

SHARD_SIZE = 64  # trajectories of a file
POINTS_DTYPE = np.dtype(
    np.float16
)  # of the points: what is lost of an image is a sixteenth of one of its 256 levels
SPLITS = ("train", "validation")  # their seeds are the even and the odd numbers


class Trajectories:
    """Those of one split of a folder: the first `count`. They may be missing yet.

    segments: of each; they may be of several that the folder's were painted in.
    """

    def __init__(self, folder: Path, split: str, num_trajectories: int, segments: int):
        self.folder, self.split, self.num_trajectories, self.segments = (
            folder,
            split,
            num_trajectories,
            segments,
        )
        self._open_cached = lru_cache(maxsize=None)(self._open_shard)

    def seed(self, index: int) -> int:
        return 2 * index + SPLITS.index(self.split)

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"{self.split}-{shard:06d}.safetensors"

    @property
    def num_shards(self) -> int:
        return -(-self.num_trajectories // SHARD_SIZE)

    @property
    def missing_shards(self) -> list[int]:
        """Numbers of the files that are not there."""
        return [shard for shard in range(self.num_shards) if not self.shard_path(shard).is_file()]

    def points(self, index: int) -> Float16[np.ndarray, "segments height width c"]:
        """At the ends of its segments: the last is the image."""
        tensors, _ = self._open_cached(index // SHARD_SIZE)
        location = tensors.locations["points"]
        size = location.nbytes // SHARD_SIZE
        row_location = location._replace(
            offset=location.offset + index % SHARD_SIZE * size, size=size, shape=location.shape[1:]
        )
        points = tensors.read_values(row_location)
        stride = len(points) // self.segments
        return points[stride - 1 :: stride]

    def caption(self, index: int) -> str:
        return self._open_cached(index // SHARD_SIZE)[1][index % SHARD_SIZE]

    def _open_shard(self, shard: int) -> tuple[Tensors, list[str]]:
        tensors = open_tensors(self.shard_path(shard))
        return tensors, json.loads(tensors.metadata["captions"])


class TrajectoryMetadata(NamedTuple):
    """What trajectories are made from; all of it is written beside them, and others are refused there."""

    teacher: str  # its identity
    sample: dict[str, Any]
    segments: int
    resolution: int
    noise_scale: float
    captions: dict[str, str]  # of each split, the fingerprint of what they are taken from
    rules: dict[str, Any]  # of the captions
    text: str  # identity of the encoder
    max_tokens: int  # of its tokens
    model: dict[str, Any]  # with what the teacher's file may not say, such as its masking


def describe_trajectories(
    run: config.Config, sources: dict[str, Source], encoder: TextEncoder, teacher: str
) -> TrajectoryMetadata:
    """What the trajectories of a run are made from. teacher: its identity."""
    sample = {
        setting: value
        for setting, value in config.to_dict(run.distill.sample).items()
        if setting not in ("weights", "batch")
    }
    rules = {
        setting: getattr(run.data, setting)
        for setting in (
            "shuffle_tags",
            "tag_dropout",
            "lowercase_probability",
            "caption_prefix",
            "caption_suffix",
        )
    }
    captions = {split: source.fingerprint() for split, source in sources.items()}
    model, flow, segments = config.to_dict(run.model), run.flow, run.distill.segments
    metadata = TrajectoryMetadata(
        teacher,
        sample,
        segments,
        run.data.resolution,
        flow.noise_scale,
        captions,
        rules,
        encoder.identity,
        encoder.max_length,
        model,
    )
    return TrajectoryMetadata(
        **json.loads(json.dumps(metadata._asdict()))
    )  # as a file gives it back


def trajectory_folder(run: config.Config) -> Path:
    return (
        Path(run.distill.trajectory_dir).expanduser()
        if run.distill.trajectory_dir
        else run.run_dir / "trajectories"
    )


def resolve_segments(folder: Path, metadata: TrajectoryMetadata) -> TrajectoryMetadata:
    """The same with the segments that the folder's were painted in, which may be parts of those that are wanted.

    Raises ConfigError when it holds trajectories that were made otherwise.
    """
    file = folder / "trajectories.json"
    if not file.is_file():
        return metadata
    stored_metadata = json.loads(file.read_text())
    mismatches = [
        name
        for name, value in metadata._asdict().items()
        if name != "segments" and stored_metadata.get(name) != value
    ]
    if stored_metadata["segments"] % metadata.segments:
        mismatches.append(f"in {stored_metadata['segments']} segments")
    if mismatches:
        raise config.ConfigError(
            f"{folder} holds trajectories that were made otherwise ({', '.join(mismatches)}): give another distill.trajectory_dir."
        )
    return metadata._replace(segments=stored_metadata["segments"])


def open_trajectories(run: config.Config) -> dict[str, Trajectories]:
    counts = (run.distill.num_trajectories, run.train.validation_images)
    return {
        split: Trajectories(trajectory_folder(run), split, count, run.distill.segments)
        for split, count in zip(SPLITS, counts)
    }


def generate_missing_trajectories(
    run: config.Config,
    metadata: TrajectoryMetadata,
    sources: dict[str, Source],
    load_teacher: Callable[[], Pipeline],
) -> TrajectoryMetadata:
    """Paints what is missing of the trajectories of a run, file by file, and gives what they are made from, in the segments that are there now.

    teacher: gives its pipeline, with the encoder of the run. Raises OutputError when there is no room for them, and ConfigError when no caption fits the
    encoder and when several hosts would have to paint them.
    """
    trajectories_by_split = open_trajectories(run)
    missing_shards = [
        (split, shard)
        for split, trajectories in trajectories_by_split.items()
        for shard in trajectories.missing_shards
    ]
    if not missing_shards:
        return metadata
    if jax.process_count() > 1:
        raise config.ConfigError(
            f"{len(missing_shards) * SHARD_SIZE} trajectories are not painted yet, which one host does: run the same command on one first, with "
            "distill.trajectory_dir=FOLDER where all hosts see it."
        )
    folder, resolution = trajectory_folder(run), run.data.resolution
    require_space(
        folder,
        len(missing_shards)
        * SHARD_SIZE
        * metadata.segments
        * resolution**2
        * run.model.channels
        * POINTS_DTYPE.itemsize,
    )
    pipeline = load_teacher()
    metadata = resolve_segments(
        folder, metadata
    )  # another run may have begun to paint here while the teacher was read
    captions = {
        split: choose_captions(
            sources[split],
            pipeline.encoder,
            run.data,
            trajectories_by_split[split].num_shards * SHARD_SIZE,
        )
        for split in {split for split, _ in missing_shards}
    }
    if not (folder / "trajectories.json").is_file():
        with replace_atomically(folder / "trajectories.json") as partial_path:
            partial_path.write_text(json.dumps(metadata._asdict(), indent=2) + "\n")
    stride = run.distill.sample.steps // metadata.segments
    print(
        f"{folder}: {len(missing_shards) * SHARD_SIZE} trajectories are painted first.", flush=True
    )
    with closing(Progress(0, len(missing_shards), SHARD_SIZE, "file")) as progress:
        for num_done, (split, shard) in enumerate(missing_shards, 1):
            trajectories, indices = (
                trajectories_by_split[split],
                range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE),
            )
            if trajectories.shard_path(shard).is_file():  # by another run
                continue
            prompts = captions[split][indices.start : indices.stop]
            states = pipeline.iter_trajectories(
                prompts,
                [trajectories.seed(index) for index in indices],
                resolution,
                resolution,
                run.distill.sample,
            )
            points = {
                "points": np.concatenate([batch[stride::stride].swapaxes(0, 1) for batch in states])
            }
            shapes = {name: x.shape for name, x in points.items()}
            tensor_metadata = {"captions": json.dumps(prompts)}
            write_safetensors(
                trajectories.shard_path(shard),
                shapes,
                dict.fromkeys(points, POINTS_DTYPE),
                points.__getitem__,
                tensor_metadata,
            )
            if num_done == 1:
                progress.reset_rate(num_done)
            progress.update(num_done, {"trajectories": num_done * SHARD_SIZE})
    return metadata


def choose_captions(
    source: Source, encoder: TextEncoder, rules: config.Data, count: int
) -> list[str]:
    """One of each image, in a random order that no seed of a run changes, and others of them when all are used; those that the encoder would
    cut are passed over. Raises ConfigError when none is left.
    """
    rules = replace(rules, caption_dropout=0.0)
    captions: list[str] = []
    for position, index in enumerate(_iterate_shuffled(len(source))):
        if len(captions) == count:
            break
        if position == len(source) and not captions:
            raise config.ConfigError(
                f"No caption fits text.max_length={encoder.max_length}: raise it."
            )
        rng = make_rng(0, RandomStream.CAPTION, position)
        caption = augment_caption(source.captions(index), source.has_tags(index), rules, rng)
        if encoder.count_tokens(caption) <= encoder.max_length:
            captions.append(caption)
    return captions


def _iterate_shuffled(count: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from random_permutation(make_rng(0, RandomStream.IMAGE_ORDER, epoch), count).tolist()
        epoch += 1


class TrajectoryBatches:
    """`batches[step]` is this host's `rows` of the batch of that step, as `data.pipeline.Batches` gives it of images: every epoch has each trajectory
    once. Captions are dropped as `data.caption_dropout` says, and otherwise stay as they were painted.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        data: config.Data,
        encoder: TextEncoder,
        seed: int,
        steps: int,
        masking: str,
        rows: Sequence[int] | None = None,
    ):
        self.trajectories, self.data, self.encoder, self.seed, self.steps, self.masking = (
            trajectories,
            data,
            encoder,
            seed,
            steps,
            masking,
        )
        self.rows = range(data.batch_size) if rows is None else rows
        self._caption_rules = config.Data(
            caption_dropout=data.caption_dropout
        )  # all others have been followed
        self._epoch_order = lru_cache(maxsize=2)(
            lambda epoch: random_permutation(
                make_rng(seed, RandomStream.IMAGE_ORDER, epoch), trajectories.num_trajectories
            )
        )

    def __getitem__(self, step: int) -> Batch:
        positions = [
            divmod(step * self.data.batch_size + row, self.trajectories.num_trajectories)
            for row in range(self.data.batch_size)
        ]
        indices = [int(self._epoch_order(epoch)[position]) for epoch, position in positions]
        captions = [
            self._caption(step * self.data.batch_size + row, index)
            for row, index in enumerate(indices)
        ]
        num_tokens = max(
            self.encoder.count_tokens(caption or "") for caption in captions
        )  # of all hosts, for their arrays must have one shape
        examples = [(indices[row], captions[row]) for row in self.rows]
        batch = make_trajectory_batch(
            self.trajectories,
            examples,
            self.encoder,
            padded_text_length(num_tokens, self.encoder.max_length, self.masking),
            self.data.dropped_caption,
        )
        return batch | {"cut": np.int32(0), "skipped": np.int32(0)}

    def _caption(self, position: int, index: int) -> str | None:
        return augment_caption(
            [self.trajectories.caption(index)],
            False,
            self._caption_rules,
            make_rng(self.seed, RandomStream.CAPTION, position),
        )

    def start(self, step: int) -> grain.DatasetIterator[Batch]:
        """Batches from `step` on, read ahead. To be closed."""
        steps = grain.MapDataset.range(step, self.steps)
        return grain.experimental.ThreadPrefetchIterDataset(
            steps.map(self.__getitem__).to_iter_dataset(), prefetch_buffer_size=PREFETCH_BATCHES
        ).__iter__()


def make_trajectory_batch(
    trajectories: Trajectories,
    examples: Sequence[tuple[int, str | None]],
    encoder: TextEncoder,
    text_length: int,
    dropped_caption: Literal["empty", "masked"] = "empty",
) -> Batch:
    """Return trajectories by index with captions, in arrays; a caption is None if dropped."""
    captions = [caption for _, caption in examples]
    return {
        "image": np.stack([trajectories.points(index) for index, _ in examples]),
        "seed": np.array([trajectories.seed(index) for index, _ in examples], np.uint32),
        **encode_captions(encoder, captions, text_length, dropped_caption),
        "weight": np.ones(len(examples), np.float32),
    }


def make_fixed_trajectory_batches(
    trajectories: Trajectories, encoder: TextEncoder, masking: str, batch_size: int
) -> list[Batch]:
    """All of them in batches of one shape; the last one is filled up with rows of weight 0."""
    captions = [trajectories.caption(index) for index in range(trajectories.num_trajectories)]
    text_length = padded_text_length(
        max(map(encoder.count_tokens, captions)), encoder.max_length, masking
    )
    batch_size, batches = min(batch_size, trajectories.num_trajectories), []
    for start in range(0, trajectories.num_trajectories, batch_size):
        examples = [
            (
                min(index, trajectories.num_trajectories - 1),
                captions[min(index, trajectories.num_trajectories - 1)],
            )
            for index in range(start, start + batch_size)
        ]
        batch = make_trajectory_batch(trajectories, examples, encoder, text_length)
        batch["weight"][trajectories.num_trajectories - start :] = 0
        batches.append(batch)
    return batches
