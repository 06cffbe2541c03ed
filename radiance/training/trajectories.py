"""Generate a teacher's trajectories once, store them in a folder, and read them.

A trajectory is determined by a prompt and a seed. It consists of the noise, which is computed from
the seed and not stored, and of the points at the ends of its segments; the last point is the image.
Files hold SHARD_SIZE trajectories each and are written atomically, so an interrupted generation
resumes with the first missing file.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float16

from radiance import config
from radiance.base.errors import CheckpointError, OutputError, SamplingError
from radiance.base.files import replace_atomically, require_space
from radiance.base.json_files import parse_json, read_json
from radiance.base.locks import LOCK_NAME, hold_lock
from radiance.base.random import RandomStream, make_rng, random_permutation
from radiance.data.captions import augment_caption
from radiance.data.source import Source
from radiance.pipeline import Pipeline
from radiance.text.encoder import TextEncoder
from radiance.training.progress import Progress
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors
from radiance.weights.tensors import Tensors

SHARD_SIZE = 64  # trajectories in a file
POINTS_DTYPE = np.dtype(np.float16)  # its rounding is a sixteenth of one of an image's 256 levels
SPLITS = ("train", "validation")  # seeds of the first are even numbers, of the second odd ones
CAPTION_RULES = (  # settings of `data` that change captions
    "shuffle_tags",
    "tag_dropout",
    "lowercase_probability",
    "caption_prefix",
    "caption_suffix",
)
METADATA_FILE = "trajectories.json"


class Trajectories:
    """The first trajectories of one split of a folder; their files may be missing.

    Args:
        folder: The folder.
        split: One of SPLITS.
        num_trajectories: Number of trajectories.
        segments: Segments of each trajectory; a divisor of the number that the files have.
    """

    def __init__(self, folder: Path, split: str, num_trajectories: int, segments: int):
        self.folder = folder
        self.split = split
        self.num_trajectories = num_trajectories
        self.segments = segments
        self._open_cached = lru_cache(maxsize=None)(self._open_shard)

    def seed(self, index: int) -> int:
        """Return the seed of a trajectory's noise."""
        return 2 * index + SPLITS.index(self.split)

    def shard_path(self, shard: int) -> Path:
        """Return the path of a file."""
        return self.folder / f"{self.split}-{shard:06d}.safetensors"

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return -(-self.num_trajectories // SHARD_SIZE)

    @property
    def missing_shards(self) -> list[int]:
        """Indices of the files that do not exist."""
        return [shard for shard in range(self.num_shards) if not self.shard_path(shard).is_file()]

    def points(self, index: int) -> Float16[np.ndarray, "segments height width c"]:
        """Return the points at the ends of a trajectory's segments; the last is the image."""
        tensors, _ = self._open_cached(index // SHARD_SIZE)
        location = tensors.locations["points"]
        nbytes = location.nbytes // SHARD_SIZE
        row_location = location._replace(
            offset=location.offset + index % SHARD_SIZE * nbytes,
            nbytes=nbytes,
            shape=location.shape[1:],
        )
        points = tensors.read_values(row_location)
        stride = len(points) // self.segments
        return points[stride - 1 :: stride]

    def caption(self, index: int) -> str:
        """Return the prompt of a trajectory."""
        return self._open_cached(index // SHARD_SIZE)[1][index % SHARD_SIZE]

    def _open_shard(self, shard: int) -> tuple[Tensors, list[str]]:
        """Open a file; return its tensors and prompts."""
        path = self.shard_path(shard)
        tensors = open_tensors(path)
        try:
            captions = parse_json(tensors.metadata["captions"])
            shape = tensors.locations["points"].shape
        except (KeyError, ValueError):
            captions, shape = [], ()
        is_complete = (
            isinstance(captions, list)
            and len(captions) == SHARD_SIZE
            and all(isinstance(caption, str) for caption in captions)
            and len(shape) == 5
            and shape[0] == SHARD_SIZE
            and shape[1] % self.segments == 0
        )
        if not is_complete:
            raise CheckpointError(
                f"{path} holds no trajectories: remove it, and the run generates it again."
            )
        return tensors, captions


def trajectory_folder(run: config.Config) -> Path:
    """Return the folder of a run's trajectories."""
    if run.distill.trajectory_dir:
        return Path(run.distill.trajectory_dir).expanduser()
    return run.run_dir / "trajectories"


def open_trajectories(run: config.Config) -> dict[str, Trajectories]:
    """Return the trajectories of a run by split."""
    counts = (run.distill.num_trajectories, run.train.validation_images)
    return {
        split: Trajectories(trajectory_folder(run), split, count, run.distill.segments)
        for split, count in zip(SPLITS, counts)
    }


# --- metadata -------------------------------------------------------------------------------------


class TrajectoryMetadata(NamedTuple):
    """Everything that determines trajectories, as trajectories.json stores it.

    A folder whose metadata differ in more than the segments cannot be used by a run.
    """

    teacher: str  # identity of its weights
    sample: dict[str, Any]
    segments: int
    resolution: int
    noise_scale: float
    captions: dict[str, str]  # by split, the fingerprint of the data source
    caption_rules: dict[str, Any]
    text_encoder: str  # identity
    max_length: int
    model: dict[str, Any]  # includes settings that the teacher's file may lack, such as masking


def describe_trajectories(
    run: config.Config, sources: dict[str, Source], encoder: TextEncoder, teacher: str
) -> TrajectoryMetadata:
    """Return the metadata of the trajectories that a run needs.

    Args:
        run: The run.
        sources: Data source of the captions, by split.
        encoder: The text encoder of the run.
        teacher: Identity of the teacher's weights.
    """
    sample = {
        setting: value
        for setting, value in config.to_dict(run.distill.sample).items()
        if setting not in ("weights", "batch_size")  # these do not change a trajectory
    }
    metadata = TrajectoryMetadata(
        teacher=teacher,
        sample=sample,
        segments=run.distill.segments,
        resolution=run.data.resolution,
        noise_scale=run.flow.noise_scale,
        captions={split: source.fingerprint() for split, source in sources.items()},
        caption_rules={setting: getattr(run.data, setting) for setting in CAPTION_RULES},
        text_encoder=encoder.identity,
        max_length=encoder.max_length,
        model=config.to_dict(run.model),
    )
    # Encode and decode, so that the result equals metadata that are read from a file.
    return TrajectoryMetadata(**json.loads(json.dumps(metadata._asdict())))


def resolve_segments(folder: Path, metadata: TrajectoryMetadata) -> TrajectoryMetadata:
    """Return the metadata with the number of segments that a folder's trajectories have.

    Args:
        folder: The folder, which may be empty.
        metadata: The metadata that a run needs; its segments may divide those of the folder.

    Raises:
        ConfigError: The folder's trajectories were generated with other settings.
        OutputError: The folder's metadata are damaged.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        return metadata
    remedy = "restore it, or set distill.trajectory_dir to another folder"
    stored = read_json(path, dict, remedy)
    if type(stored.get("segments")) is not int or stored["segments"] < 1:
        raise OutputError(f"{path} is damaged (segments): {remedy}.")
    mismatches = [
        name
        for name, value in metadata._asdict().items()
        if name != "segments" and stored.get(name) != value
    ]
    if stored["segments"] % metadata.segments:
        mismatches.append(f"{stored['segments']} segments")
    if mismatches:
        raise config.ConfigError(
            f"{folder} holds trajectories that were generated with other settings "
            f"({', '.join(mismatches)}): set distill.trajectory_dir to another folder."
        )
    return metadata._replace(segments=stored["segments"])


# --- generation -----------------------------------------------------------------------------------


def generate_missing_trajectories(
    run: config.Config,
    metadata: TrajectoryMetadata,
    sources: dict[str, Source],
    load_teacher: Callable[[], Pipeline],
) -> TrajectoryMetadata:
    """Generate the missing files of a run's trajectories.

    Args:
        run: The run.
        metadata: Result of `resolve_segments` for this run.
        sources: Data source of the captions, by split.
        load_teacher: Returns the teacher's pipeline, with the text encoder of the run. Called only
            if files are missing.

    Returns:
        The metadata, with the segments that the folder's trajectories have now.

    Raises:
        OutputError: The disk has no room for the files, or another process generates them.
        ConfigError: No caption fits the text encoder, or several hosts run.
    """
    missing_shards = _list_missing_shards(run)
    if not missing_shards:
        return metadata
    _check_generation(run, metadata, len(missing_shards))
    folder = trajectory_folder(run)
    remedy = "Wait until it ends; then the same command reads what it generated."
    with hold_lock(folder / LOCK_NAME, str(folder), remedy):
        return _generate_shards(run, metadata, sources, load_teacher)


def _list_missing_shards(run: config.Config) -> list[tuple[Trajectories, int]]:
    """Return the files of a run's trajectories that do not exist."""
    return [
        (trajectories, shard)
        for trajectories in open_trajectories(run).values()
        for shard in trajectories.missing_shards
    ]


def _generate_shards(
    run: config.Config,
    metadata: TrajectoryMetadata,
    sources: dict[str, Source],
    load_teacher: Callable[[], Pipeline],
) -> TrajectoryMetadata:
    """Generate the missing files of a locked folder; see `generate_missing_trajectories`."""
    folder = trajectory_folder(run)
    # The process that held the lock before may have generated all.
    metadata = resolve_segments(folder, metadata)
    missing_shards = _list_missing_shards(run)
    if not missing_shards:
        return metadata
    teacher = load_teacher()
    captions = {
        split: choose_captions(
            sources[split], teacher.encoder, run.data, trajectories.num_shards * SHARD_SIZE
        )
        for split, trajectories in open_trajectories(run).items()
        if any(missing.split == split for missing, _ in missing_shards)
    }
    if not (folder / METADATA_FILE).is_file():
        with replace_atomically(folder / METADATA_FILE) as temp_path:
            temp_path.write_text(json.dumps(metadata._asdict(), indent=2) + "\n")

    num_missing = len(missing_shards) * SHARD_SIZE
    print(f"{folder}: {num_missing} trajectories are generated first.", flush=True)
    with closing(Progress(0, len(missing_shards), SHARD_SIZE, "file")) as progress:
        for num_done, (trajectories, shard) in enumerate(missing_shards, 1):
            prompts = captions[trajectories.split][shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]
            _generate_shard(trajectories, shard, prompts, run, teacher, metadata.segments)
            if num_done == 1:
                progress.reset_rate(num_done)
            progress.update(num_done, {"trajectories": num_done * SHARD_SIZE})
    return metadata


def _check_generation(run: config.Config, metadata: TrajectoryMetadata, num_shards: int) -> None:
    """Raise ConfigError if several hosts run, and OutputError if the disk has no room."""
    num_trajectories = num_shards * SHARD_SIZE
    if jax.process_count() > 1:
        raise config.ConfigError(
            f"{num_trajectories} trajectories are missing, and one host must generate them: run "
            "the same command on one host first, with distill.trajectory_dir=FOLDER that all "
            "hosts see."
        )
    num_values = metadata.segments * run.data.resolution**2 * run.model.channels
    require_space(trajectory_folder(run), num_trajectories * num_values * POINTS_DTYPE.itemsize)


def _generate_shard(
    trajectories: Trajectories,
    shard: int,
    prompts: list[str],
    run: config.Config,
    teacher: Pipeline,
    segments: int,
) -> None:
    """Generate the trajectories of one file and write it."""
    stride = run.distill.sample.steps // segments
    seeds = [trajectories.seed(shard * SHARD_SIZE + i) for i in range(SHARD_SIZE)]
    batches = teacher.iter_trajectories(
        prompts, seeds, run.data.resolution, run.data.resolution, run.distill.sample
    )
    # from [steps + 1, b, …] to [b, segments, …]
    points = np.concatenate([batch[stride::stride].swapaxes(0, 1) for batch in batches])
    if np.abs(points).max() > np.finfo(POINTS_DTYPE).max:
        raise SamplingError(
            f"A trajectory leaves the range of {POINTS_DTYPE}: lower "
            "distill.sample.guidance_scale, or use another teacher."
        )
    write_safetensors(
        trajectories.shard_path(shard),
        {"points": points.shape},
        {"points": POINTS_DTYPE},
        lambda name: points,
        {"captions": json.dumps(prompts)},
    )


def choose_captions(
    source: Source, encoder: TextEncoder, rules: config.Data, count: int
) -> list[str]:
    """Return captions of a source in a random order that does not depend on a run's seed.

    Each image gives one caption before any image gives another. Captions that the encoder would cut
    are skipped.

    Args:
        source: The data source.
        encoder: The text encoder, for its maximum length.
        rules: Settings that change captions; caption dropout is not applied.
        count: Number of captions.

    Raises:
        ConfigError: No caption fits the encoder.
    """
    rules = replace(rules, caption_dropout=0.0)
    captions: list[str] = []
    for position, index in enumerate(_iterate_shuffled(len(source))):
        if len(captions) == count:
            break
        if position == len(source) and not captions:
            raise config.ConfigError(
                f"No caption fits text.max_length={encoder.max_length}: increase it."
            )
        rng = make_rng(0, RandomStream.CAPTION, position)
        caption = augment_caption(source.captions(index), source.has_tags(index), rules, rng)
        if caption is not None and encoder.count_tokens(caption) <= encoder.max_length:
            captions.append(caption)
    return captions


def _iterate_shuffled(count: int) -> Iterator[int]:
    """Yield the indices below `count` in a new random order in each epoch, without end."""
    epoch = 0
    while True:
        yield from random_permutation(make_rng(0, RandomStream.IMAGE_ORDER, epoch), count).tolist()
        epoch += 1
