"""`radiance encode`: captions into an embedding cache."""

import argparse
from dataclasses import replace
from itertools import chain

from radiance import config
from radiance.config.experiments import load_experiment


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "encode",
        help="encode an experiment's captions into its text.cache",
        description=main.__doc__,
    )
    parser.add_argument("experiment", metavar="EXPERIMENT[:ARM…]")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument(
        "--host", type=int, default=0, help="this process, of --hosts that share the captions"
    )
    parser.add_argument("--hosts", type=int, default=1)
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Encodes the captions of an experiment into the folder text.cache=FOLDER, from which it then trains and samples."""
    from tqdm import tqdm

    from radiance.data.captions import wrap_caption
    from radiance.data.datasets import open_source
    from radiance.text.embedding_cache import encode_captions
    from radiance.text.factory import make_encoder

    run = config.override(load_experiment(options.experiment), options.changes)
    if not 0 <= options.host < options.hosts:
        raise config.ConfigError(
            f"--host {options.host} is none of --hosts {options.hosts}: they count from 0."
        )
    if not run.text.cache:
        raise config.ConfigError("There is no folder to write to: give text.cache=FOLDER.")
    encoder = make_encoder(replace(run.text, cache=""), run.model.text_dim)
    sources = [open_source(run.data, split) for split in ("train", "validation")]
    prompts = (
        *run.train.sample_prompts,
        run.sample.negative_prompt,
        run.distill.sample.negative_prompt,
    )
    captions = chain(
        prompts,
        *(
            [wrap_caption(caption, run.data) for caption in source.captions(i)]
            for source in sources
            for i in range(len(source))
        ),
    )
    with tqdm(unit="caption", disable=None) as bar:
        counts = encode_captions(
            captions, encoder, run.text.cache, options.host, options.hosts, bar.update
        )
    print(
        f"{run.text.cache}: {counts.num_encoded} captions encoded, {counts.num_cached} were there, {counts.num_truncated} cut to {run.text.max_length} tokens."
    )
    return 0
