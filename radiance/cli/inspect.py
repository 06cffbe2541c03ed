"""`radiance inspect`: what a model's file holds, or what a data set does."""

import argparse
from pathlib import Path

from radiance import config
from radiance.config.experiments import load_experiment

SHARD_SOURCES = {".tar": "tar", ".parquet": "parquet"}
FILE_SOURCES = {".jsonl": "jsonl", **SHARD_SOURCES}


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "inspect", help="say what a model's file or a data set holds", description=main.__doc__
    )
    parser.add_argument(
        "what",
        metavar="MODEL|DATA",
        help="a checkpoint, LoRA, T5 or autoencoder file, a run directory, or a size name; or a folder of images, a .jsonl, shards "
        "(.tar, .parquet), or an EXPERIMENT[:ARM], whose data it then is",
    )
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="of data: settings by which it is judged, such as data.resolution=1024",
    )
    parser.add_argument(
        "--duplicates", action="store_true", help="decode all images and find near-duplicates"
    )
    parser.add_argument(
        "--distance",
        type=int,
        metavar="BITS",
        help="of 64 that may differ between near-duplicates; by default 4",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="a list for data.source=jsonl, of near-duplicates with the largest alone (--duplicates); or the page of --modulation, by default "
        "modulation.html",
    )
    parser.add_argument(
        "--modulation",
        action="store_true",
        help="of a FLUX-style checkpoint: how much of each block's modulation is a function of time alone",
    )
    parser.add_argument(
        "--pooled",
        type=Path,
        metavar="FILE",
        help="safetensors with pooled text vectors [prompts, width] (--modulation)",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Of a model: variant, sizes, parameters by part, types and metadata. Of data: what is used and left out, sizes, shapes, lengths of captions,
    and near-duplicates. Of a model's modulation: what share of its variance time alone explains, read layer by layer.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # the accelerators may be a run's
    if options.pooled and not options.modulation:
        raise config.ConfigError("--pooled is for --modulation: give that too.")
    if (run := load_data_config(options.what)) is not None:
        if options.modulation:
            raise config.ConfigError(
                f"{options.what} is data, and --modulation is for a checkpoint."
            )
        return _inspect_data(config.override(run, options.changes), options)
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
            f"{options.what} is a model, and {data_options[0]} is for data: leave it out."
        )
    from radiance.training.run_directory import RunDirectory, is_run_directory
    from radiance.weights.inspect import inspect_file, inspect_model

    if options.modulation:
        return _inspect_modulation(options)
    if options.what in config.MODELS:
        print(inspect_model(config.Model.from_name(options.what)))
    elif is_run_directory(options.what):
        print(inspect_model(RunDirectory(Path(options.what)).read_config().model))
    else:
        print(inspect_file(options.what))
    return 0


def _inspect_modulation(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from radiance.evaluation import modulation_report, modulation_variance
    from radiance.training.run_directory import is_run_directory
    from radiance.weights.checkpoint import open_checkpoint

    if options.what in config.MODELS or is_run_directory(options.what):
        raise config.ConfigError(
            f"--modulation reads the weights of a checkpoint file, and {options.what} is none: of a run, convert it first."
        )
    checkpoint = open_checkpoint(options.what)
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
    modulation_report.write_modulation_report(page_path, Path(options.what).name, vectors, grid)
    summary = modulation_report.format_summary(vectors, grid)
    table = modulation_report.format_vector_table(vectors)
    print(f"{summary}\n\n{table}\n\n{page_path} shows every block.")
    return 0


def load_data_config(address: str) -> config.Config | None:
    """The config of an experiment, or the default one with the data that lies there; None where it is no data but a model."""
    location = address.partition(":")[0]
    path = Path(address).expanduser()
    if location.endswith(".py") or (
        not path.exists() and Path(f"{location.replace('.', '/')}.py").is_file()
    ):
        return load_experiment(address)
    source = FILE_SOURCES.get(path.suffix)
    if source is None and path.is_dir() and not _is_model_dir(path):
        source = _detect_source(path)
    return (
        None
        if source is None
        else config.override(config.Config(), [f"data.source={source}", f"data.path={address}"])
    )


def _is_model_dir(path: Path) -> bool:
    """Whether a folder is a run's or a checkpoint's."""
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf", "transformer")
    return any(any(path.glob(pattern)) for pattern in patterns)


def _detect_source(path: Path) -> str:
    """What a folder of data holds: shards, unless images lie beside them."""
    from radiance.data.sources.folder import IMAGE_SUFFIXES

    suffixes = {file.suffix.lower() for file in path.iterdir()}
    shard_sources = [source for suffix, source in SHARD_SOURCES.items() if suffix in suffixes]
    return shard_sources[0] if shard_sources and not suffixes & IMAGE_SUFFIXES else "folder"


def _inspect_data(run: config.Config, options: argparse.Namespace) -> int:
    import numpy as np
    from tqdm import tqdm

    from radiance.cli.survey import format_data_report, format_duplicates
    from radiance.data.datasets import DataError, open_source
    from radiance.data.inspection import duplicates
    from radiance.data.inspection.lists import check_list_path, write_list
    from radiance.data.inspection.survey import survey_dataset
    from radiance.data.source import Mixture
    from radiance.text.factory import make_token_counter

    distance = duplicates.DEFAULT_DISTANCE if options.distance is None else options.distance
    if not 0 <= distance <= duplicates.MAX_DISTANCE:
        raise config.ConfigError(
            f"--distance {distance} must lie between 0 and {duplicates.MAX_DISTANCE}."
        )
    if options.distance is not None and not options.duplicates:
        raise config.ConfigError("--distance is for --duplicates: give that too.")
    count_tokens = make_token_counter(run.text)
    splits = {"train": open_source(run.data, "train", verbose=False)}
    try:
        splits["validation"] = open_source(run.data, "validation", verbose=False)
    except DataError as error:
        splits["validation"] = str(error)
    sources = [split for split in splits.values() if not isinstance(split, str)]
    all_images = Mixture(sources, [1.0] * len(sources))
    if options.write:
        for source in sources:
            check_list_path(options.write, source, run.data.sources)
    with tqdm(total=len(sources[0]), unit="caption", disable=None) as bar:
        summary = survey_dataset(sources[0], run, count_tokens, bar.update)
    print(format_data_report(run, splits, summary))
    indices = range(len(all_images))
    if options.duplicates:
        with tqdm(total=len(all_images), unit="image", disable=None) as bar:
            hashes = duplicates.hash_source(all_images, run.data.num_threads, bar.update)
        groups = duplicates.find_duplicate_groups(
            hashes, all_images.sizes, distance, run.data.num_threads
        )
        print("\n" + format_duplicates(all_images, len(sources[0]), hashes, groups, distance))
        indices = [
            int(index)
            for index in np.flatnonzero(duplicates.keep_mask(len(all_images), groups))
            if index not in hashes.errors
        ]
    if options.write:
        with tqdm(total=len(indices), unit="line", disable=None) as bar:
            has_new_names = write_list(options.write, all_images, indices, bar.update)
        print(
            f"\n{options.write} lists {len(indices):,} of the {len(all_images):,} images, for data.source=jsonl data.path=…"
        )
        if has_new_names:
            print(
                "Under new names, other images are held out: a list in the images' own folder keeps the splits as they are."
            )
    return 0
