"""`radiance inspect`: what a model's file holds, or what a data set does."""

import argparse
from pathlib import Path

from radiance import config
from radiance.cli.experiments import experiment

SHARDS = {".tar": "tar", ".parquet": "parquet"}
FILES = {".jsonl": "jsonl", **SHARDS}


def add(verbs):
    parser = verbs.add_parser("inspect", help="say what a model's file or a data set holds", description=main.__doc__)
    parser.add_argument(
        "what",
        metavar="MODEL|DATA",
        help="a checkpoint, LoRA, T5 or autoencoder file, a run directory, or a size name; or a folder of pictures, a .jsonl, shards "
        "(.tar, .parquet), or an EXPERIMENT[:ARM], whose data it then is",
    )
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of data: settings by which it is judged, such as data.side=1024")
    parser.add_argument("--duplicates", action="store_true", help="decode all pictures and find near-duplicates")
    parser.add_argument("--distance", type=int, metavar="BITS", help="of 64 that may differ between near-duplicates; by default 4")
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
    parser.add_argument("--pooled", type=Path, metavar="FILE", help="safetensors with pooled text vectors [prompts, width] (--modulation)")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Of a model: variant, sizes, parameters by part, types and metadata. Of data: what is used and left out, sizes, shapes, lengths of captions,
    and near-duplicates. Of a model's modulation: what share of its variance time alone explains, read layer by layer."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the accelerators may be a run's
    if options.pooled and not options.modulation:
        raise config.ConfigError("--pooled is for --modulation: give that too.")
    if (run := data_of(options.what)) is not None:
        if options.modulation:
            raise config.ConfigError(f"{options.what} is data, and --modulation is for a checkpoint.")
        return _data(config.override(run, options.changes), options)
    if given := [
        *options.changes,
        *(f"--{flag}" for flag in ("duplicates", "distance") if getattr(options, flag) not in (None, False)),
        *(["--write"] if options.write and not options.modulation else []),
    ]:
        raise config.ConfigError(f"{options.what} is a model, and {given[0]} is for data: leave it out.")
    from radiance.training.directory import RunDirectory, is_run
    from radiance.weights.inspect import inspect_file, inspect_model

    if options.modulation:
        return _modulation(options)
    if options.what in config.MODELS:
        print(inspect_model(config.Model.named(options.what)))
    elif is_run(options.what):
        print(inspect_model(RunDirectory(Path(options.what)).read_config().model))
    else:
        print(inspect_file(options.what))
    return 0


def _modulation(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from radiance.evaluation import modulation
    from radiance.training.directory import is_run
    from radiance.weights.checkpoint import open_checkpoint

    if options.what in config.MODELS or is_run(options.what):
        raise config.ConfigError(
            f"--modulation reads the weights of a checkpoint file, and {options.what} is none: of a run, convert it first."
        )
    checkpoint = open_checkpoint(options.what)
    if why := modulation.by_construction(checkpoint.model):
        print(why)
        return 0
    grid = modulation.make_grid(checkpoint.model, options.pooled)
    vectors = list(tqdm(modulation.measure(checkpoint, grid), total=modulation.count(checkpoint.model), unit="vector", disable=None))
    page = options.write or Path("modulation.html")
    modulation.write_page(page, Path(options.what).name, vectors, grid)
    print(f"{modulation.summary(vectors, grid)}\n\n{modulation.told(vectors)}\n\n{page} shows every block.")
    return 0


def data_of(what: str) -> config.Config | None:
    """The config of an experiment, or the default one with the data that lies there; None where it is no data but a model."""
    where = what.partition(":")[0]
    path = Path(what).expanduser()
    if where.endswith(".py") or (not path.exists() and Path(f"{where.replace('.', '/')}.py").is_file()):
        return experiment(what)
    source = FILES.get(path.suffix)
    if source is None and path.is_dir() and not _holds_model(path):
        source = _kept_as(path)
    return None if source is None else config.override(config.Config(), [f"data.source={source}", f"data.path={what}"])


def _holds_model(path: Path) -> bool:
    """Whether a folder is a run's or a checkpoint's."""
    signs = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf", "transformer")
    return any(any(path.glob(sign)) for sign in signs)


def _kept_as(path: Path) -> str:
    """What a folder of data holds: shards, unless pictures lie beside them."""
    from radiance.data.folder import SUFFIXES

    suffixes = {file.suffix.lower() for file in path.iterdir()}
    shards = [source for suffix, source in SHARDS.items() if suffix in suffixes]
    return shards[0] if shards and not suffixes & SUFFIXES else "folder"


def _data(run: config.Config, options: argparse.Namespace) -> int:
    import numpy as np
    from tqdm import tqdm

    from radiance.cli.survey import told_data, told_duplicates
    from radiance.data import duplicates
    from radiance.data.datasets import DataError, Mixture, open_source
    from radiance.data.lists import check_list, write_list
    from radiance.data.survey import survey
    from radiance.text.encoders import token_counter

    distance = duplicates.DISTANCE if options.distance is None else options.distance
    if not 0 <= distance <= duplicates.FARTHEST:
        raise config.ConfigError(f"--distance {distance} must lie between 0 and {duplicates.FARTHEST}.")
    if options.distance is not None and not options.duplicates:
        raise config.ConfigError("--distance is for --duplicates: give that too.")
    tokens = token_counter(run.text)
    splits = {"train": open_source(run.data, "train", tell=False)}
    try:
        splits["validation"] = open_source(run.data, "validation", tell=False)
    except DataError as error:
        splits["validation"] = str(error)
    sources = [split for split in splits.values() if not isinstance(split, str)]
    whole = Mixture(sources, [1.0] * len(sources))
    if options.write:
        for source in sources:
            check_list(options.write, source, run.data.parts)
    with tqdm(total=len(sources[0]), unit="caption", disable=None) as bar:
        found = survey(sources[0], run, tokens, bar.update)
    print(told_data(run, splits, found))
    stay = range(len(whole))
    if options.duplicates:
        with tqdm(total=len(whole), unit="picture", disable=None) as bar:
            hashed = duplicates.hashed(whole, run.data.threads, bar.update)
        groups = duplicates.groups(hashed, whole.sizes, distance)
        print("\n" + told_duplicates(whole, len(sources[0]), hashed, groups, distance))
        stay = [int(index) for index in np.flatnonzero(duplicates.kept(len(whole), groups)) if index not in hashed.broken]
    if options.write:
        with tqdm(total=len(stay), unit="line", disable=None) as bar:
            renamed = write_list(options.write, whole, stay, bar.update)
        print(f"\n{options.write} lists {len(stay):,} of the {len(whole):,} pictures, for data.source=jsonl data.path=…")
        if renamed:
            print("Under new names, other pictures are held out: a list in the pictures' own folder keeps the splits as they are.")
    return 0
