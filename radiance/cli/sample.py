"""`radiance sample`: sample images from prompts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radiance import config
from radiance.base.files import require_folder
from radiance.base.text_files import check_text
from radiance.cli.arguments import (
    add_changes_argument,
    add_model_arguments,
    add_verb,
    get_model_overrides,
    parse_mesh,
    parse_path_with_number,
    parse_seeds,
    parse_size,
    read_option_file,
    read_prompts,
)
from radiance.cli.hosts import add_host_arguments, join_independent_hosts
from radiance.cli.output import (
    MAX_SHEET_IMAGES,
    DatasetFolder,
    OutputFolder,
    SampleJob,
    Writer,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from radiance.flow.inpainting import InitImage
    from radiance.pipeline import GeneratedImage, Pipeline

MAX_IMAGES = 10_000_000  # of a command
MAX_SHEET_COLUMNS = 10


def add_parser(subparsers):
    """Add the arguments of `radiance sample`."""
    parser = add_verb(
        subparsers,
        "sample",
        "sample images from prompts",
        main.__doc__,
        'radiance sample runs/quickstart --prompt "a handwritten seven" --seeds 0-7',
        "radiance sample radiance.safetensors --text-encoder t5.gguf --prompts prompts.txt "
        "guidance_scale=4 steps=28",
        'radiance sample runs/mine --prompt "a red barn" --image photo.png --strength 0.5',
    )
    add_model_arguments(parser)
    add_changes_argument(parser, "guidance_scale=2 (of the section sample)")
    _add_input_arguments(parser)
    _add_loading_arguments(parser)
    add_host_arguments(parser)
    _add_output_arguments(parser)
    parser.set_defaults(run=main)


def _add_input_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--prompt", action="append", default=[], help="a prompt; may be given more than once"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a file with one prompt per line; with --suite, its own file or folder",
    )
    parser.add_argument(
        "--seeds",
        type=parse_seeds,
        help="seeds of every prompt, such as 0, 0-3 or 1,5,9 (default: 0, or those of the suite)",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="WIDTHxHEIGHT",
        help="pixels; by default those of the run or the preset",
    )
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="start from this image, scaled and cropped to --size, and not from noise alone",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="mask of --image: white is sampled anew, black remains unchanged, gray is blended; if "
        "all visible pixels have one color, the alpha channel is the mask (opaque like white)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="time at which sampling from --image starts: near 0 little changes, 1 changes "
        "everything (default: 0.6, with --mask 1)",
    )
    parser.add_argument(
        "--preset",
        help=f"recommended settings of a published model: {', '.join(config.PRESETS)}",
    )


def _add_loading_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--text-encoder",
        default="",
        metavar="FILE",
        help="T5 v1.1: safetensors (file, index or folder) or GGUF",
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="spiece.model or tokenizer.json; by default the one beside T5",
    )
    parser.add_argument(
        "--autoencoder", default="", metavar="FILE", help="FLUX's autoencoder, for latent models"
    )
    parser.add_argument(
        "--lora",
        action="append",
        type=parse_path_with_number,
        default=[],
        metavar="FILE[:STRENGTH]",
        help="apply a LoRA; may be given more than once",
    )
    parser.add_argument(
        "--weight-format",
        choices=["none", *config.WEIGHT_FORMATS],
        help="quantization of the blocks' matrices in memory; by default that of the file",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="type of a checkpoint file's weights and of the computation (default: bfloat16)",
    )
    parser.add_argument(
        "--product-dtype",
        choices=["compute", "float8"],
        help="factors of products with the blocks' matrices; by default those of the run",
    )
    parser.add_argument(
        "--mesh",
        type=parse_mesh,
        help="shard the model and the images over devices, such as fsdp=8 or data=2,fsdp=4",
    )


def _add_output_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples"),
        metavar="FOLDER",
        help="folder of the numbered PNG files and, for up to "
        f"{MAX_SHEET_IMAGES} images, a contact sheet; files that exist remain (default: samples)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="in place of --out: a data set for data.source=folder, with each prompt in a .txt "
        "file beside its image; the same command continues it",
    )
    parser.add_argument(
        "--suite",
        choices=config.PROMPT_SUITES,
        help="sample a public set of prompts into the folders that its scorer reads; the same "
        "command continues it",
    )


def main(options: argparse.Namespace) -> int:
    """Sample every prompt with every seed. PNG files contain their prompt, seed and settings.

    Several hosts share the images.
    """
    if options.suite:
        return _sample_suite(options)
    options.seeds = options.seeds or [0]
    prompts = options.prompt + (read_prompts(options.prompts) if options.prompts else [])
    if not prompts:
        raise config.ConfigError("There is no prompt: give --prompt TEXT or --prompts FILE.")
    if len(prompts) * len(options.seeds) > MAX_IMAGES:
        raise config.ConfigError(
            f"{len(prompts):,} prompts with {len(options.seeds):,} seeds are more than "
            f"{MAX_IMAGES:,} images: give them in several commands."
        )
    for prompt in options.prompt:
        check_text(prompt, "--prompt")
    with join_independent_hosts(options) as (host_index, num_hosts):
        return _sample_prompts(options, prompts, host_index, num_hosts)


def _sample_prompts(
    options: argparse.Namespace, prompts: list[str], host_index: int, num_hosts: int
) -> int:
    """Sample this host's part of the images."""
    pairs = [(prompt, seed) for prompt in prompts for seed in options.seeds]
    jobs = [SampleJob(index, prompt, seed) for index, (prompt, seed) in enumerate(pairs)]
    init_image = _load_init_image(options)
    require_folder(options.folder or options.out)
    writer: Writer
    if options.folder:
        writer = DatasetFolder(options.folder, jobs)
    else:
        writer = OutputFolder(options.out, len(jobs), num_hosts)
    pending = writer.find_pending(jobs[host_index::num_hosts])
    if not pending:
        print(f"All images of {writer.folder} exist.")
        return 0

    pipeline = _load_pipeline(options)
    size = _image_size(options, pipeline) if init_image is None else init_image.size
    writer.check_metadata(pipeline.make_metadata(*size))
    images = _generate_images(
        options, pipeline, [(job.prompt, job.seed) for job in pending], init_image
    )
    for job, result in zip(pending, images):
        writer.write(job, result)
    has_seeds = len(options.seeds) > 1
    description = writer.finish(
        sheet_columns=len(options.seeds) if has_seeds else min(len(prompts), MAX_SHEET_COLUMNS),
        metadata={
            "prompts": prompts,
            "seeds": options.seeds,
            "settings": config.to_dict(pipeline.run.sample),
        },
    )
    print(f"{len(pending)} images{description} are in {writer.folder}.")
    return 0


def _image_size(options: argparse.Namespace, pipeline: Pipeline) -> tuple[int, int]:
    """Return width and height of the images in pixels."""
    resolution = pipeline.run.data.resolution
    return options.size or (resolution, resolution)


def _load_pipeline(options: argparse.Namespace) -> Pipeline:
    """Load the model that the options name."""
    from radiance.loading import load

    return load(
        options.model,
        text_encoder=options.text_encoder,
        tokenizer=options.tokenizer,
        autoencoder=options.autoencoder,
        loras=[(path, 1.0 if strength is None else strength) for path, strength in options.lora],
        preset=options.preset,
        changes=options.changes,
        weight_format=options.weight_format,
        dtype=options.dtype,
        product_dtype=options.product_dtype,
        mesh=options.mesh,
        **get_model_overrides(options),
    )


def _generate_images(
    options: argparse.Namespace,
    pipeline: Pipeline,
    jobs: Sequence[tuple[str, int]],
    init_image: InitImage | None = None,
) -> Iterator[GeneratedImage]:
    """Yield the images of (prompt, seed) pairs one by one, with a progress bar."""
    from tqdm import tqdm

    from radiance.base.compilation import report_compilation

    width, height = options.size or (None, None)
    images = pipeline.generate(
        [prompt for prompt, _ in jobs],
        [seed for _, seed in jobs],
        width,
        height,
        init_image=init_image,
    )
    with report_compilation("the sampler and sampling the first images"):
        first = next(images)
    # None: no bar in a log.
    yield from tqdm(chain([first], images), total=len(jobs), unit="image", disable=None)


def _load_init_image(options: argparse.Namespace) -> InitImage | None:
    """Load the image to start from, with its mask."""
    if options.image is None:
        if options.mask or options.strength is not None:
            raise config.ConfigError(
                "--mask and --strength need an image to start from: give --image FILE too."
            )
        return None
    import numpy as np

    from radiance.data.decode import decode_image, decode_mask
    from radiance.flow.inpainting import InitImage

    mask = None
    if options.mask:
        mask_pixels = _load_pixels(options.mask, options.size, decode_mask)[..., 0]
        mask = mask_pixels.astype(np.float32) / np.float32(255)
    default_strength = 0.6 if mask is None else 1.0
    strength = default_strength if options.strength is None else options.strength
    return InitImage(_load_pixels(options.image, options.size, decode_image), mask, strength)


def _load_pixels(
    path: Path, size: tuple[int, int] | None, decode: Callable[[bytes], Image.Image]
) -> np.ndarray:
    """Return the 8-bit pixels of an image file, scaled and cropped to `size` if given."""
    from radiance.base.images import resize_and_crop
    from radiance.data.unusable import UnusableError

    try:
        image = decode(read_option_file(path)).convert("RGB")
    except UnusableError as reason:
        raise config.ConfigError(f"{path} cannot be used: {reason}.") from None
    return resize_and_crop(image, *(size or image.size))


def _sample_suite(options: argparse.Namespace) -> int:
    """Sample this host's part of a suite of prompts."""
    from radiance.evaluation import prompt_suites

    if options.folder or options.prompt or options.image or not options.prompts:
        raise config.ConfigError(
            f"--suite {options.suite} takes its prompts only from --prompts PATH, and writes into "
            "--out: do not give --prompt, --image and --folder."
        )
    suite = prompt_suites.SUITES[options.suite]
    suite_prompts = suite.load_prompts(options.suite, options.prompts, options.seeds)
    require_folder(options.out)
    with join_independent_hosts(options) as (host_index, num_hosts):
        host_prompts = suite_prompts[host_index::num_hosts]
        pending = suite.find_pending(options.out, host_prompts)
        if not pending:
            print(f"All images of {options.out} exist.")
            return 0
        pipeline = _load_pipeline(options)
        if finished := set(host_prompts) - set(pending):
            metadata: dict[str, Any] = pipeline.make_metadata(*_image_size(options, pipeline))
            last_file = suite.last_file(finished.pop())
            prompt_suites.check_same_metadata(options.out / last_file, metadata)
        pairs = [(x.prompt, seed) for x in pending for seed in x.seeds]
        images = _generate_images(options, pipeline, pairs)
        for suite_prompt in pending:
            results = list(islice(images, len(suite_prompt.seeds)))
            suite.write_images(options.out, suite_prompt, results)
    print(f"Images of {len(pending)} of {len(suite_prompts)} prompts are in {options.out}.")
    return 0
