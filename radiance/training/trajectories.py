"""The ways along which a teacher paints: made once, kept in a folder, and read as batches.

A trajectory is what a prompt and a seed give: the noise, which follows from the seed and is not kept, and the points at the ends of its
segments, of which the last is the picture. Files hold SHARD of them, and one that is there is whole: painting goes on where it was stopped.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Float16

from radiance import config
from radiance.data.captions import caption_of
from radiance.data.datasets import Source
from radiance.data.draws import Of, draws, shuffled
from radiance.data.pipeline import AHEAD, Batch, width_for
from radiance.pipeline import Pipeline
from radiance.text.encoders import Encoder
from radiance.training.progress import Progress
from radiance.weights.files import Tensors, open_tensors, replacing, require_space, write_safetensors

SHARD = 64  # trajectories of a file
STORED = np.dtype(np.float16)  # of the points: what is lost of a picture is a sixteenth of one of its 256 levels
SPLITS = ("train", "validation")  # their seeds are the even and the odd numbers


class Trajectories:
    """Those of one split of a folder: the first `count`. They may be missing yet.

    segments: of each; they may be of several that the folder's were painted in.
    """

    def __init__(self, folder: Path, split: str, count: int, segments: int):
        self.folder, self.split, self.count, self.segments = folder, split, count, segments
        self._opened = lru_cache(maxsize=None)(self._open)

    def seed(self, index: int) -> int:
        return 2 * index + SPLITS.index(self.split)

    def file(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:06d}.safetensors"

    @property
    def files(self) -> int:
        return -(-self.count // SHARD)

    @property
    def missing(self) -> list[int]:
        """Numbers of the files that are not there."""
        return [number for number in range(self.files) if not self.file(number).is_file()]

    def points(self, index: int) -> Float16[np.ndarray, "segments height width c"]:
        """At the ends of its segments: the last is the picture."""
        tensors, _ = self._opened(index // SHARD)
        place = tensors.places["points"]
        size = place.size // SHARD
        one = place._replace(offset=place.offset + index % SHARD * size, size=size, shape=place.shape[1:])
        points = tensors.values(one)
        each = len(points) // self.segments
        return points[each - 1 :: each]

    def caption(self, index: int) -> str:
        return self._opened(index // SHARD)[1][index % SHARD]

    def _open(self, number: int) -> tuple[Tensors, list[str]]:
        tensors = open_tensors(self.file(number))
        return tensors, json.loads(tensors.metadata["captions"])


class Painted(NamedTuple):
    """What trajectories are made from; all of it is written beside them, and others are refused there."""

    teacher: str  # its identity
    sample: dict[str, Any]
    segments: int
    side: int
    noise_scale: float
    captions: dict[str, str]  # of each split, the fingerprint of what they are taken from
    rules: dict[str, Any]  # of the captions
    text: str  # identity of the encoder
    limit: int  # of its tokens
    model: dict[str, Any]  # with what the teacher's file may not say, such as its masking


def painted(run: config.Config, sources: dict[str, Source], encoder: Encoder, teacher: str) -> Painted:
    """What the trajectories of a run are made from. teacher: its identity."""
    sample = {name: value for name, value in config.to_dict(run.distill.sample).items() if name not in ("weights", "batch")}
    rules = {name: getattr(run.data, name) for name in ("tag_shuffle", "tag_drop", "lower", "prefix", "suffix")}
    captions = {split: source.fingerprint() for split, source in sources.items()}
    model, flow, segments = config.to_dict(run.model), run.flow, run.distill.segments
    made = Painted(teacher, sample, segments, run.data.side, flow.noise_scale, captions, rules, encoder.identity, encoder.limit, model)
    return Painted(**json.loads(json.dumps(made._asdict())))  # as a file gives it back


def folder_of(run: config.Config) -> Path:
    return Path(run.distill.path).expanduser() if run.distill.path else run.directory / "trajectories"


def as_there(folder: Path, made: Painted) -> Painted:
    """The same with the segments that the folder's were painted in, which may be parts of those that are wanted.

    Raises ConfigError when it holds trajectories that were made otherwise.
    """
    file = folder / "trajectories.json"
    if not file.is_file():
        return made
    there = json.loads(file.read_text())
    other = [name for name, value in made._asdict().items() if name != "segments" and there.get(name) != value]
    if there["segments"] % made.segments:
        other.append(f"in {there['segments']} segments")
    if other:
        raise config.ConfigError(f"{folder} holds trajectories that were made otherwise ({', '.join(other)}): give another distill.path.")
    return made._replace(segments=there["segments"])


def of_run(run: config.Config) -> dict[str, Trajectories]:
    counts = (run.distill.trajectories, run.train.validate_pictures)
    return {split: Trajectories(folder_of(run), split, count, run.distill.segments) for split, count in zip(SPLITS, counts)}


def paint_missing(run: config.Config, made: Painted, sources: dict[str, Source], teacher: Callable[[], Pipeline]) -> Painted:
    """Paints what is missing of the trajectories of a run, file by file, and gives what they are made from, in the segments that are there now.

    teacher: gives its pipeline, with the encoder of the run. Raises CheckpointError when there is no room for them, and ConfigError when no caption fits the
    encoder and when several hosts would have to paint them.
    """
    wanted = of_run(run)
    missing = [(split, number) for split, ways in wanted.items() for number in ways.missing]
    if not missing:
        return made
    if jax.process_count() > 1:
        raise config.ConfigError(
            f"{len(missing) * SHARD} trajectories are not painted yet, which one host does: run the same command on one first, with "
            "distill.path=FOLDER where all hosts see it."
        )
    folder, side = folder_of(run), run.data.side
    require_space(folder, len(missing) * SHARD * made.segments * side**2 * run.model.channels * STORED.itemsize)
    pipeline = teacher()
    made = as_there(folder, made)  # another run may have begun to paint here while the teacher was read
    captions = {
        split: chosen_captions(sources[split], pipeline.encoder, run.data, wanted[split].files * SHARD)
        for split in {split for split, _ in missing}
    }
    if not (folder / "trajectories.json").is_file():
        with replacing(folder / "trajectories.json") as part:
            part.write_text(json.dumps(made._asdict(), indent=2) + "\n")
    every = run.distill.sample.steps // made.segments
    print(f"{folder}: {len(missing) * SHARD} trajectories are painted first.", flush=True)
    with closing(Progress(0, len(missing), SHARD, "file")) as progress:
        for done, (split, number) in enumerate(missing, 1):
            ways, rows = wanted[split], range(number * SHARD, (number + 1) * SHARD)
            if ways.file(number).is_file():  # by another run
                continue
            prompts = captions[split][rows.start : rows.stop]
            found = pipeline.ways(prompts, [ways.seed(row) for row in rows], side, side, run.distill.sample)
            points = {"points": np.concatenate([batch[every::every].swapaxes(0, 1) for batch in found])}
            shapes = {name: x.shape for name, x in points.items()}
            told = {"captions": json.dumps(prompts)}
            write_safetensors(ways.file(number), shapes, dict.fromkeys(points, STORED), points.__getitem__, told)
            if done == 1:
                progress.first_step_done(done)
            progress.update(done, {"trajectories": done * SHARD})
    return made


def chosen_captions(source: Source, encoder: Encoder, rules: config.Data, count: int) -> list[str]:
    """One of each picture, in a random order that no seed of a run changes, and others of them when all are used; those that the encoder would
    cut are passed over. Raises ConfigError when none is left."""
    rules = replace(rules, caption_dropout=0.0)
    found: list[str] = []
    for position, index in enumerate(_in_order(len(source))):
        if len(found) == count:
            break
        if position == len(source) and not found:
            raise config.ConfigError(f"No caption fits text.length={encoder.limit}: raise it.")
        drawn = draws(0, Of.CAPTION, position)
        caption = caption_of(source.captions(index), source.tags(index), rules, drawn)
        if encoder.count(caption) <= encoder.limit:
            found.append(caption)
    return found


def _in_order(count: int) -> Iterator[int]:
    turn = 0
    while True:
        yield from shuffled(draws(0, Of.PICTURES, turn), count).tolist()
        turn += 1


class TrajectoryBatches:
    """`batches[step]` is this host's `rows` of the batch of that step, as `data.pipeline.Batches` gives it of pictures: every epoch has each trajectory
    once. Captions are dropped as `data.caption_dropout` says, and otherwise stay as they were painted."""

    def __init__(
        self,
        ways: Trajectories,
        data: config.Data,
        encoder: Encoder,
        seed: int,
        steps: int,
        masking: str,
        rows: Sequence[int] | None = None,
    ):
        self.ways, self.data, self.encoder, self.seed, self.steps, self.masking = ways, data, encoder, seed, steps, masking
        self.rows = range(data.batch) if rows is None else rows
        self._rules = config.Data(caption_dropout=data.caption_dropout)  # all others have been followed
        self._order = lru_cache(maxsize=2)(lambda epoch: shuffled(draws(seed, Of.PICTURES, epoch), ways.count))

    def __getitem__(self, step: int) -> Batch:
        places = [divmod(step * self.data.batch + row, self.ways.count) for row in range(self.data.batch)]
        chosen = [int(self._order(epoch)[place]) for epoch, place in places]
        captions = [self._caption(step * self.data.batch + row, index) for row, index in enumerate(chosen)]
        tokens = max(self.encoder.count(caption or "") for caption in captions)  # of all hosts, for their arrays must have one shape
        rows = [(chosen[row], captions[row]) for row in self.rows]
        batch = batch_of(self.ways, rows, self.encoder, width_for(tokens, self.encoder.limit, self.masking))
        if self.data.dropout_to == "masked":
            batch["lengths"][[caption is None for _, caption in rows]] = 0
        return batch | {"cut": np.int32(0), "skipped": np.int32(0)}

    def _caption(self, position: int, index: int) -> str | None:
        return caption_of([self.ways.caption(index)], False, self._rules, draws(self.seed, Of.CAPTION, position))

    def start(self, step: int) -> grain.DatasetIterator[Batch]:
        """Batches from `step` on, read ahead. To be closed."""
        steps = grain.MapDataset.range(step, self.steps)
        return grain.experimental.ThreadPrefetchIterDataset(
            steps.map(self.__getitem__).to_iter_dataset(), prefetch_buffer_size=AHEAD
        ).__iter__()


def batch_of(ways: Trajectories, rows: Sequence[tuple[int, str | None]], encoder: Encoder, width: int) -> Batch:
    """Trajectories by number with captions, in arrays."""
    text, lengths = encoder.pad(encoder.encode([caption or "" for _, caption in rows], cut=True), width)
    return {
        "image": np.stack([ways.points(index) for index, _ in rows]),
        "seed": np.array([ways.seed(index) for index, _ in rows], np.uint32),
        "text": text,
        "lengths": lengths,
        "weight": np.ones(len(rows), np.float32),
    }


def fixed_trajectories(ways: Trajectories, encoder: Encoder, masking: str, size: int) -> list[Batch]:
    """All of them in batches of one shape; the last one is filled up with rows of weight 0."""
    captions = [ways.caption(index) for index in range(ways.count)]
    width = width_for(max(map(encoder.count, captions)), encoder.limit, masking)
    size, batches = min(size, ways.count), []
    for first in range(0, ways.count, size):
        rows = [(min(index, ways.count - 1), captions[min(index, ways.count - 1)]) for index in range(first, first + size)]
        batch = batch_of(ways, rows, encoder, width)
        batch["weight"][ways.count - first :] = 0
        batches.append(batch)
    return batches
