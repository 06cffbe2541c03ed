"""`radiance inspect`: describe a model file or a data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from radiance import config
from radiance.cli.arguments import add_changes_argument, add_verb
from radiance.config.experiments import load_experiment

if TYPE_CHECKING:
    from radiance.data.source import Source

SHARD_SOURCES = {".tar": "tar", ".parquet": "parquet"}
FILE_SOURCES = {".jsonl": "jsonl", **SHARD_SOURCES}


def add_parser(subparsers):
    """Add the arguments of `radiance inspect`."""
    parser = add_verb(
        subparsers,
        "inspect",
        "describe a model file or a data set",
        main.__doc__,
        "radiance inspect model.safetensors",
        "radiance inspect photos data.resolution=512 data.bucket_step=32 --duplicates",
        "radiance inspect flux1-schnell.safetensors --modulation",
    )
    parser.add_argument(
        "target",
        metavar="MODEL|DATA",
        help="a checkpoint, LoRA, T5 or autoencoder file, a run directory, or the name of a model; "
        "or a folder of images, a .jsonl file, shards (.tar, .parquet), or an experiment, whose "
        "data is described",
    )
    add_changes_argument(parser, "data.resolution=1024 (for data)")
    parser.add_argument(
        "--duplicates", action="store_true", help="decode all images and find near-duplicates"
    )
    parser.add_argument(
        "--distance",
        type=int,
        metavar="BITS",
        help="number of the 64 bits of a hash in which near-duplicates may differ (default: 4)",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write a list for data.source=jsonl, with only the largest image of near-duplicates "
        "(--duplicates); or the page of --modulation (default: modulation.html)",
    )
    parser.add_argument(
        "--modulation",
        action="store_true",
        help="measure how much of each block's modulation depends on time alone; FLUX-style "
        "checkpoints only",
    )
    parser.add_argument(
        "--pooled",
        type=Path,
        metavar="FILE",
        help="safetensors file with pooled text vectors [prompts, width], for --modulation",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Describe a model file (architecture, parameters, types, metadata) or a data set.

    The description of a data set has the images that are used and skipped, their sizes and buckets,
    the lengths of captions, and near-duplicates.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # a running training may use the accelerators
    if options.pooled and not options.modulation:
        raise config.ConfigError("--pooled is for --modulation: give that too.")
    if (run := load_data_config(options.target)) is not None:
        if options.modulation:
            raise config.ConfigError(
                f"{options.target} is a data set, and --modulation is for a checkpoint."
            )
        return _inspect_data(run, options)
    if data_options := [
        *options.changes,
        *(
            f"--{flag}"
            for flag in ("duplicates", "distance")
            if getattr(options, flag) not in (None, False)
        ),
        *(["--write"] if options.write and not options.modulation else []),
    ]:
        raise config.ConfigError(
            f"{options.target} is a model, and {data_options[0]} is for data: do not give it."
        )
    from radiance.training.run_directory import RunDirectory, is_run_directory
    from radiance.weights.inspect import inspect_file, inspect_model

    if options.modulation:
        return _inspect_modulation(options)
    if options.target in config.MODELS:
        print(inspect_model(config.Model.from_name(options.target)))
    elif is_run_directory(options.target):
        print(inspect_model(RunDirectory(Path(options.target)).read_config().model))
    else:
        print(inspect_file(options.target))
    return 0


def _inspect_modulation(options: argparse.Namespace) -> int:
    """Measure the variance of the modulation, and write its page."""
    from tqdm import tqdm

    from radiance.evaluation import modulation_report, modulation_variance
    from radiance.training.run_directory import is_run_directory
    from radiance.weights.checkpoint import open_checkpoint

    if options.target in config.MODELS or is_run_directory(options.target):
        raise config.ConfigError(
            f"--modulation reads a checkpoint file, and {options.target} is not one: convert a run "
            "first."
        )
    checkpoint = open_checkpoint(options.target)
    if reason := modulation_variance.explain_trivial_case(checkpoint.model):
        print(reason)
        return 0
    grid = modulation_variance.make_grid(checkpoint.model, options.pooled)
    vectors = list(
        tqdm(
            modulation_variance.measure_variance(checkpoint, grid),
            total=modulation_variance.count_vectors(checkpoint.model),
            unit="vector",
            disable=None,
        )
    )
    page_path = options.write or Path("modulation.html")
    modulation_report.write_modulation_report(page_path, Path(options.target).name, vectors, grid)
    summary = modulation_report.format_summary(vectors, grid)
    table = modulation_report.format_vector_table(vectors)
    print(f"{summary}\n\n{table}\n\n{page_path} shows every block.")
    return 0


def load_data_config(address: str) -> config.Config | None:
    """Return the config of an experiment, or the default one with a data set.

    Args:
        address: An experiment, or the location of a data set.

    Returns:
        The config, or None if the address is a model.
    """
    location = address.partition(":")[0]
    path = Path(address).expanduser()
    if location.endswith(".py") or (
        not path.exists() and Path(f"{location.replace('.', '/')}.py").is_file()
    ):
        return load_experiment(address)
    source = FILE_SOURCES.get(path.suffix.lower())
    if source is None and path.is_dir() and not _is_model_dir(path):
        source = _detect_source(path)
    return (
        None
        if source is None
        else config.override(config.Config(), [f"data.source={source}", f"data.path={address}"])
    )


def _is_model_dir(path: Path) -> bool:
    """Return whether a folder is a run directory or a checkpoint."""
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf", "transformer")
    return any(any(path.glob(pattern)) for pattern in patterns)


def _detect_source(path: Path) -> str:
    """Return the source of a folder: shards, unless there are also images."""
    from radiance.data.sources.folder import IMAGE_SUFFIXES

    suffixes = {file.suffix.lower() for file in path.iterdir()}
    shard_sources = [source for suffix, source in SHARD_SOURCES.items() if suffix in suffixes]
    return shard_sources[0] if shard_sources and not suffixes & IMAGE_SUFFIXES else "folder"


def _inspect_data(run: config.Config, options: argparse.Namespace) -> int:
    import numpy as np
    from tqdm import tqdm

    from radiance.cli.survey import format_data_report, format_duplicates
    from radiance.data.inspection import duplicates
    from radiance.data.inspection.lists import check_list_path, write_list
    from radiance.data.inspection.survey import survey_dataset
    from radiance.data.source import Mixture
    from radiance.text.factory import make_token_counter

    is_experiment = run.data.path != options.target
    run = config.override(run, options.changes)
    distance = duplicates.DEFAULT_DISTANCE if options.distance is None else options.distance
    if not 0 <= distance <= duplicates.MAX_DISTANCE:
        raise config.ConfigError(
            f"--distance {distance} must be between 0 and {duplicates.MAX_DISTANCE}."
        )
    if options.distance is not None and not options.duplicates:
        raise config.ConfigError("--distance is for --duplicates: give that too.")
    count_tokens = make_token_counter(run.text)
    run, resolutions = _survey_resolutions(run, options.changes, is_experiment)
    splits = _open_splits(run.data)
    sources = [split for split in splits.values() if not isinstance(split, str)]
    all_images = Mixture(sources, [1.0] * len(sources))
    if options.write:
        for source in sources:
            check_list_path(options.write, source, run.data.sources)
    with tqdm(total=len(sources[0]), unit="caption", disable=None) as bar:
        summary = survey_dataset(sources[0], run, count_tokens, bar.update)
    print(format_data_report(run, splits, summary) + resolutions)
    if not is_experiment:
        print(
            f"\nTokens are those of the encoder {run.text.encoder}. For the one of an experiment:\n"
            f"radiance inspect EXPERIMENT data.source={run.data.source} data.path={run.data.path}"
        )
    indices = range(len(all_images))
    if options.duplicates:
        with tqdm(total=len(all_images), unit="image", disable=None) as bar:
            hashes = duplicates.hash_source(all_images, run.data.num_threads, bar.update)
        num_hashes = len(np.unique(hashes.hashes[hashes.has_hash]))
        with tqdm(total=num_hashes, unit="hash", disable=None) as bar:
            groups = duplicates.find_duplicate_groups(
                hashes, all_images.sizes, distance, run.data.num_threads, bar.update
            )
        print("\n" + format_duplicates(all_images, len(sources[0]), hashes, groups, distance))
        indices = [
            int(index)
            for index in np.flatnonzero(duplicates.make_keep_mask(len(all_images), groups))
            if index not in hashes.errors
        ]
    if options.write:
        with tqdm(total=len(indices), unit="line", disable=None) as bar:
            has_new_names = write_list(options.write, all_images, indices, bar.update)
        print(
            f"\n{options.write} lists {len(indices):,} of the {len(all_images):,} images, for "
            "data.source=jsonl data.path=…"
        )
        if has_new_names:
            print(
                "The names of the images change, and so does the validation split: write the list "
                "into the folder of the images to keep it."
            )
    return 0


def _open_splits(data: config.Data) -> dict[str, Source | str]:
    """Return the splits of the data, or the reason why the validation split is empty."""
    from radiance.data.datasets import open_source
    from radiance.data.indexed import EmptySplitError

    splits: dict[str, Source | str] = {"train": open_source(data, "train", verbose=False)}
    try:
        splits["validation"] = open_source(data, "validation", verbose=False)
    except EmptySplitError as error:
        if data.validation_fraction:
            splits["validation"] = str(error)
    return splits


def _survey_resolutions(
    run: config.Config, changes: list[str], is_experiment: bool
) -> tuple[config.Config, str]:
    """Return the run and a table of the images that resolutions keep, empty for shapes.

    Without an experiment or a resolution of the user, the run gets one that keeps the images.
    """
    from radiance.cli.survey import format_resolutions
    from radiance.data.inspection.survey import choose_resolution, count_kept_images

    if any(source.source == "shapes" for source in run.data.sources):
        return run, ""
    num_images, kept = count_kept_images(run.data)
    if not is_experiment and not any("resolution" in x.partition("=")[0] for x in changes):
        run = config.override(run, [f"data.resolution={choose_resolution(kept)}"])
    return run, "\n\n" + format_resolutions(run.data, num_images, kept)
