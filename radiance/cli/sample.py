"""`radiance sample`: images of prompts."""

import argparse
from itertools import islice
from pathlib import Path

from radiance import config
from radiance.cli.arguments import (
    add_model_arguments,
    get_model_overrides,
    parse_mesh,
    parse_path_with_number,
    parse_seeds,
    parse_size,
    read_option_file,
    read_prompts,
)
from radiance.cli.hosts import add_host_arguments, join_hosts_and_wait, retain_freed_memory_on_cpu

MAX_SHEET_IMAGES = 400  # images that sheet.png shows at most: of more there is none
SUITE_NAMES = ("geneval", "dpg", "coco30k")  # see evaluation/prompt_suites.py


def add_parser(subparsers):
    parser = subparsers.add_parser("sample", help="make images", description=main.__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="changes of its sample settings, such as guidance=2",
    )
    parser.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="a file with one prompt a line; of a suite its own file or folder",
    )
    parser.add_argument(
        "--seeds",
        type=parse_seeds,
        help="such as 0, 0-3 or 1,5,9: every prompt is painted with each (default: 0, or the suite's)",
    )
    parser.add_argument(
        "--size", type=parse_size, help="WIDTHxHEIGHT; by default the run's or the preset's"
    )
    parser.add_argument(
        "--image",
        type=Path,
        help="start from this image instead of from noise alone; scaled and cut to --size where that is given",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        help="of --image: white is painted anew, black stays exactly as it is, grey blends",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="how much of --image is painted over: near 0 little, 1 all (default: 0.6, with --mask 1)",
    )
    parser.add_argument(
        "--preset", help=f"settings of a published model: {', '.join(config.PRESETS)}"
    )
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
        help="spiece.model or tokenizer.json; found beside T5 by default",
    )
    parser.add_argument(
        "--autoencoder", default="", metavar="FILE", help="FLUX's, for latent models"
    )
    parser.add_argument(
        "--lora",
        action="append",
        type=parse_path_with_number,
        default=[],
        metavar="FILE[:STRENGTH]",
    )
    parser.add_argument(
        "--store",
        choices=["none", *config.WEIGHT_FORMATS],
        help="how the blocks' matrices are kept in memory; by default as in the file",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of a checkpoint file's weights and computation",
    )
    parser.add_argument(
        "--mesh",
        type=parse_mesh,
        help="over which the model and the images are spread, such as fsdp=8 or data=2,fsdp=4",
    )
    add_host_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("images"),
        help=f"directory for the PNGs and, of up to {MAX_SHEET_IMAGES}, sheet.png (default: images)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="instead of --out: a data set for data.source=folder, each prompt in a .txt beside its image; the same command goes on",
    )
    parser.add_argument(
        "--suite",
        choices=SUITE_NAMES,
        help="paint a public set of prompts into the folders that its scorer reads; the same command goes on",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Paints every prompt with every seed. The PNGs carry prompt, seed and settings. Several hosts share the images."""
    if options.suite:
        return _sample_suite(options)
    options.seeds = options.seeds or [0]
    prompts = options.prompt + (read_prompts(options.prompts) if options.prompts else [])
    if not prompts:
        raise config.ConfigError("There is nothing to paint: give --prompt TEXT or --prompts FILE.")
    with join_hosts_and_wait(options) as (host_index, num_hosts):
        retain_freed_memory_on_cpu()
        return _sample_prompts(options, prompts, host_index, num_hosts)


def _sample_prompts(
    options: argparse.Namespace, prompts: list[str], host_index: int, num_hosts: int
) -> int:
    """This host's share of the images."""
    from radiance.base.files import replace_atomically, require_folder
    from radiance.base.images import make_contact_sheet, save_png
    from radiance.evaluation.prompt_suites import check_same_metadata

    jobs = [(prompt, seed) for prompt in prompts for seed in options.seeds]
    jobs_by_name = {
        f"{i:05d}_seed{seed}.png": (prompt, seed) for i, (prompt, seed) in enumerate(jobs)
    }
    host_jobs = dict(islice(jobs_by_name.items(), host_index, None, num_hosts))
    out_dir = options.folder or options.out
    require_folder(out_dir)
    if options.folder:
        _check_existing(out_dir, jobs_by_name)
        host_jobs = {name: job for name, job in host_jobs.items() if not (out_dir / name).is_file()}
        if not host_jobs:
            print(f"Nothing is left to paint for {out_dir}.")
            return 0
        finished_paths = sorted(
            out_dir / name
            for name in jobs_by_name.keys() - host_jobs.keys()
            if (out_dir / name).is_file()
        )
    elif any((out_dir / name).exists() for name in (*host_jobs, "sheet.png")):
        raise config.ConfigError(f"{out_dir} holds images already: give another --out.")
    init_image = _load_init_image(options)
    pipeline = _load_pipeline(options)
    if options.folder and finished_paths:
        width, height = (
            options.size or (pipeline.run.data.resolution,) * 2
            if init_image is None
            else init_image.image.shape[1::-1]
        )
        check_same_metadata(finished_paths[0], pipeline.make_metadata(width, height))
    images = []
    for name, result in zip(
        host_jobs, _generate_images(options, pipeline, list(host_jobs.values()), init_image)
    ):
        if options.folder:
            with replace_atomically((out_dir / name).with_suffix(".txt")) as temp_path:
                temp_path.write_text(_join_lines(host_jobs[name][0]) + "\n", "utf-8")
        elif len(jobs) <= MAX_SHEET_IMAGES:
            images.append(result.image)
        with replace_atomically(out_dir / name) as temp_path:
            save_png(temp_path, result.image, result.metadata)
    if num_hosts == 1 and images:
        sheet = make_contact_sheet(
            images, len(options.seeds) if len(options.seeds) > 1 else min(len(prompts), 10)
        )
        settings = config.to_dict(pipeline.run.sample)
        with replace_atomically(out_dir / "sheet.png") as temp_path:
            save_png(
                temp_path, sheet, {"prompts": prompts, "seeds": options.seeds, "settings": settings}
            )
    suffix = " and sheet.png" if num_hosts == 1 and images else f" of {len(jobs)}"
    print(f"{len(host_jobs)} images{suffix} are in {out_dir}.")
    return 0


def _load_pipeline(options: argparse.Namespace):
    """The pipeline that the options ask for."""
    from radiance.loading import load

    return load(
        options.model,
        text_encoder=options.text_encoder,
        tokenizer=options.tokenizer,
        autoencoder=options.autoencoder,
        loras=[(path, 1.0 if strength is None else strength) for path, strength in options.lora],
        preset=options.preset,
        changes=options.changes,
        weight_format=options.store,
        dtype=options.dtype,
        mesh=options.mesh,
        **get_model_overrides(options),
    )


def _generate_images(
    options: argparse.Namespace, pipeline, jobs: list[tuple[str, int]], init_image=None
):
    """The images of prompts with their seeds, one after another."""
    from tqdm import tqdm

    width, height = options.size or (None, None)
    images = pipeline.paint(
        [prompt for prompt, _ in jobs],
        [seed for _, seed in jobs],
        width,
        height,
        init_image=init_image,
    )
    return tqdm(images, total=len(jobs), unit="image", disable=None)  # None: no bar in a log


def _load_init_image(options: argparse.Namespace):
    """The image to start from, with its mask."""
    if options.image is None:
        if options.mask or options.strength is not None:
            raise config.ConfigError(
                "--mask and --strength are of an image to start from: give --image FILE too."
            )
        return None
    import numpy as np

    from radiance.base.images import resize_and_crop
    from radiance.data.decode import UnusableError, decode_image
    from radiance.pipeline import InitImage

    def load_pixels(path: Path) -> np.ndarray:
        try:
            image = decode_image(read_option_file(path))
        except UnusableError as reason:
            raise config.ConfigError(f"{path} cannot be used: {reason}.") from None
        return resize_and_crop(image, *(options.size or image.size))

    mask = (
        load_pixels(options.mask)[..., 0].astype(np.float32) / np.float32(255)
        if options.mask
        else None
    )
    strength = options.strength if options.strength is not None else 0.6 if mask is None else 1.0
    return InitImage(load_pixels(options.image), mask, strength)


def _sample_suite(options: argparse.Namespace) -> int:
    from radiance.base.files import require_folder
    from radiance.evaluation import prompt_suites

    if options.folder or options.prompt or options.image or not options.prompts:
        raise config.ConfigError(
            f"--suite {options.suite} takes its prompts from --prompts PATH and nothing else, and writes into --out."
        )
    suite = prompt_suites.SUITES[options.suite]
    requests = suite.load_prompts(options.suite, options.prompts, options.seeds)
    require_folder(options.out)
    with join_hosts_and_wait(options) as (host_index, num_hosts):
        retain_freed_memory_on_cpu()
        host_requests = requests[host_index::num_hosts]
        pending = suite.find_pending(options.out, host_requests)
        if not pending:
            print(f"Nothing is left to paint for {options.out}.")
            return 0
        pipeline = _load_pipeline(options)
        if finished := set(host_requests) - set(pending):
            width, height = options.size or (pipeline.run.data.resolution,) * 2
            prompt_suites.check_same_metadata(
                options.out / suite.last_file(finished.pop()), pipeline.make_metadata(width, height)
            )
        images = iter(
            _generate_images(
                options,
                pipeline,
                [(request.prompt, seed) for request in pending for seed in request.seeds],
            )
        )
        for request in pending:
            suite.write_images(options.out, request, list(islice(images, len(request.seeds))))
    print(f"Images of {len(pending)} prompts of {len(requests)} are in {options.out}.")
    return 0


def _join_lines(prompt: str) -> str:
    """One line, for each line of a caption file is a caption."""
    return " ".join(prompt.splitlines())


def _check_existing(folder: Path, jobs: dict[str, tuple[str, int]]):
    """Raises ConfigError when a data set was begun with other prompts or seeds."""
    conflicts = {path.name for path in folder.glob("*.png")} - jobs.keys()
    for name, (prompt, _) in jobs.items():
        caption_path = (folder / name).with_suffix(".txt")
        if caption_path.is_file() and caption_path.read_text("utf-8").removesuffix(
            "\n"
        ) != _join_lines(prompt):
            conflicts.add(caption_path.name)
    if conflicts:
        raise config.ConfigError(
            f"{folder} was begun with other prompts or seeds (it holds {min(conflicts)}): give another --folder."
        )
