"""`radiance encode`: encode captions into an embedding cache."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from radiance import config
from radiance.cli.arguments import EXPERIMENT_METAVAR, add_changes_argument, add_verb
from radiance.config.experiments import load_experiment


def add_parser(subparsers):
    """Add the arguments of `radiance encode`."""
    parser = add_verb(
        subparsers,
        "encode",
        "encode the captions of an experiment into its text.cache",
        main.__doc__,
        "radiance encode experiments.radiance_512 text.file=t5.safetensors text.cache=embeddings",
        "radiance encode experiments.radiance_512 text.cache=embeddings --host 0 --hosts 2",
    )
    parser.add_argument("experiment", metavar=EXPERIMENT_METAVAR, help="the experiment")
    add_changes_argument(parser, "text.cache=FOLDER")
    parser.add_argument(
        "--host", type=int, default=0, metavar="I", help="index of this process, from 0"
    )
    parser.add_argument(
        "--hosts", type=int, default=1, metavar="N", help="processes that share the captions"
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Encode the captions of an experiment into text.cache=FOLDER, for training and sampling."""
    from tqdm import tqdm

    from radiance.text.embedding_cache import encode_captions
    from radiance.text.factory import make_encoder

    run = config.override(load_experiment(options.experiment), options.changes)
    if not 0 <= options.host < options.hosts:
        raise config.ConfigError(
            f"--host {options.host} is not an index of --hosts {options.hosts}: indices start at 0."
        )
    if not run.text.cache:
        raise config.ConfigError("There is no folder to write to: give text.cache=FOLDER.")
    encoder = make_encoder(replace(run.text, cache=""), run.model.text_dim)
    with tqdm(unit="caption", disable=None) as bar:
        counts = encode_captions(
            _iterate_texts(run), encoder, run.text.cache, options.host, options.hosts, bar.update
        )
    print(
        f"{run.text.cache}: {counts.num_encoded} captions encoded, {counts.num_cached} were in the "
        f"cache, {counts.num_truncated} truncated to {run.text.max_length} tokens."
    )
    return 0


def _iterate_texts(run: config.Config) -> Iterator[str]:
    """Yield all texts that the run encodes: prompts and the captions of both splits."""
    from radiance.data.captions import wrap_caption
    from radiance.data.datasets import open_splits

    prompts = (
        *run.train.sample_prompts,
        run.sample.negative_prompt,
        run.distill.sample.negative_prompt,
    )
    captions = (
        wrap_caption(caption, run.data)
        for source in open_splits(run.data).values()
        for i in range(len(source))
        for caption in source.captions(i)
    )
    return chain(prompts, captions)
