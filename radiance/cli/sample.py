"""`radiance sample`: pictures of prompts."""

import argparse
from itertools import islice
from pathlib import Path

from radiance import config
from radiance.cli.arguments import add_model, known, lines, mesh, read, seeds, size, with_number
from radiance.cli.hosts import add_hosts, keep_memory, together

STORES = ("q8_0", "int8", "float8_e4m3fn")
SHEET = 400  # pictures that sheet.png shows at most: of more there is none
SUITES = ("geneval", "dpg", "coco30k")  # see evaluation/prompt_suites.py


def add(verbs):
    parser = verbs.add_parser("sample", help="make pictures", description=main.__doc__)
    add_model(parser)
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of its sample settings, such as guidance=2")
    parser.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt a line; of a suite its own file or folder")
    parser.add_argument(
        "--seeds", type=seeds, help="such as 0, 0-3 or 1,5,9: every prompt is painted with each (default: 0, or the suite's)"
    )
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT; by default the run's or the preset's")
    parser.add_argument(
        "--image", type=Path, help="start from this picture instead of from noise alone; scaled and cut to --size where that is given"
    )
    parser.add_argument("--mask", type=Path, help="of --image: white is painted anew, black stays exactly as it is, grey blends")
    parser.add_argument(
        "--strength", type=float, help="how much of --image is painted over: near 0 little, 1 all (default: 0.6, with --mask 1)"
    )
    parser.add_argument("--preset", help=f"settings of a published model: {', '.join(config.PRESETS)}")
    parser.add_argument("--text-encoder", default="", metavar="FILE", help="T5 v1.1: safetensors (file, index or folder) or GGUF")
    parser.add_argument("--tokenizer", default="", metavar="FILE", help="spiece.model or tokenizer.json; found beside T5 by default")
    parser.add_argument("--autoencoder", default="", metavar="FILE", help="FLUX's, for latent models")
    parser.add_argument("--lora", action="append", type=with_number, default=[], metavar="FILE[:STRENGTH]")
    parser.add_argument("--store", choices=["none", *STORES], help="how the blocks' matrices are kept in memory; by default as in the file")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of a checkpoint file's weights and computation"
    )
    parser.add_argument("--mesh", type=mesh, help="over which the model and the pictures are spread, such as fsdp=8 or data=2,fsdp=4")
    add_hosts(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("pictures"), help=f"directory for the PNGs and, of up to {SHEET}, sheet.png (default: pictures)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="instead of --out: a data set for data.source=folder, each prompt in a .txt beside its picture; the same command goes on",
    )
    parser.add_argument(
        "--suite", choices=SUITES, help="paint a public set of prompts into the folders that its scorer reads; the same command goes on"
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Paints every prompt with every seed. The PNGs carry prompt, seed and settings. Several hosts share the pictures."""
    if options.suite:
        return _suite(options)
    options.seeds = options.seeds or [0]
    prompts = options.prompt + (lines(options.prompts) if options.prompts else [])
    if not prompts:
        raise config.ConfigError("There is nothing to paint: give --prompt TEXT or --prompts FILE.")
    with together(options) as (host, hosts):
        keep_memory()
        return _sample(options, prompts, host, hosts)


def _sample(options: argparse.Namespace, prompts: list[str], host: int, hosts: int) -> int:
    """This host's share of the pictures."""
    from radiance.evaluation.prompt_suites import check_like
    from radiance.pictures import contact_sheet, save_png
    from radiance.weights.files import replacing, require_folder

    jobs = [(prompt, seed) for prompt in prompts for seed in options.seeds]
    named = {f"{i:05d}_seed{seed}.png": (prompt, seed) for i, (prompt, seed) in enumerate(jobs)}
    mine = dict(islice(named.items(), host, None, hosts))
    out = options.folder or options.out
    require_folder(out)
    if options.folder:
        _check_begun(out, named)
        mine = {name: job for name, job in mine.items() if not (out / name).is_file()}
        if not mine:
            print(f"Nothing is left to paint for {out}.")
            return 0
        begun = sorted(out / name for name in named.keys() - mine.keys() if (out / name).is_file())
    elif any((out / name).exists() for name in (*mine, "sheet.png")):
        raise config.ConfigError(f"{out} holds pictures already: give another --out.")
    start = _start(options)
    pipeline = _loaded(options)
    if options.folder and begun:
        width, height = options.size or (pipeline.run.data.side,) * 2 if start is None else start.image.shape[1::-1]
        check_like(begun[0], pipeline.facts(width, height))
    pictures = []
    for name, picture in zip(mine, _painted(options, pipeline, list(mine.values()), start)):
        if options.folder:
            with replacing((out / name).with_suffix(".txt")) as part:
                part.write_text(_caption(mine[name][0]) + "\n", "utf-8")
        elif len(jobs) <= SHEET:
            pictures.append(picture.image)
        with replacing(out / name) as part:
            save_png(part, picture.image, picture.facts)
    if hosts == 1 and pictures:
        sheet = contact_sheet(pictures, len(options.seeds) if len(options.seeds) > 1 else min(len(prompts), 10))
        settings = config.to_dict(pipeline.run.sample)
        with replacing(out / "sheet.png") as part:
            save_png(part, sheet, {"prompts": prompts, "seeds": options.seeds, "settings": settings})
    others = " and sheet.png" if hosts == 1 and pictures else f" of {len(jobs)}"
    print(f"{len(mine)} pictures{others} are in {out}.")
    return 0


def _loaded(options: argparse.Namespace):
    """The pipeline that the options ask for."""
    from radiance.models import load

    return load(
        options.model,
        text_encoder=options.text_encoder,
        tokenizer=options.tokenizer,
        autoencoder=options.autoencoder,
        loras=[(path, 1.0 if strength is None else strength) for path, strength in options.lora],
        preset=options.preset,
        changes=options.changes,
        store=options.store,
        dtype=options.dtype,
        mesh=options.mesh,
        **known(options),
    )


def _painted(options: argparse.Namespace, pipeline, jobs: list[tuple[str, int]], start=None):
    """The pictures of prompts with their seeds, one after another."""
    from tqdm import tqdm

    width, height = options.size or (None, None)
    painted = pipeline.paint([prompt for prompt, _ in jobs], [seed for _, seed in jobs], width, height, start=start)
    return tqdm(painted, total=len(jobs), unit="picture", disable=None)  # None: no bar in a log


def _start(options: argparse.Namespace):
    """The picture to start from, with its mask."""
    if options.image is None:
        if options.mask or options.strength is not None:
            raise config.ConfigError("--mask and --strength are of a picture to start from: give --image FILE too.")
        return None
    import numpy as np

    from radiance.data.decode import Broken, picture
    from radiance.pictures import fitted
    from radiance.pipeline import Start

    def pixels(path: Path) -> np.ndarray:
        try:
            found = picture(read(path))
        except Broken as reason:
            raise config.ConfigError(f"{path} cannot be used: {reason}.") from None
        return fitted(found, *(options.size or found.size))

    mask = pixels(options.mask)[..., 0].astype(np.float32) / np.float32(255) if options.mask else None
    strength = options.strength if options.strength is not None else 0.6 if mask is None else 1.0
    return Start(pixels(options.image), mask, strength)


def _suite(options: argparse.Namespace) -> int:
    from radiance.evaluation import prompt_suites
    from radiance.weights.files import require_folder

    if options.folder or options.prompt or options.image or not options.prompts:
        raise config.ConfigError(f"--suite {options.suite} takes its prompts from --prompts PATH and nothing else, and writes into --out.")
    suite = prompt_suites.SUITES[options.suite]
    asked = suite.asked(options.suite, options.prompts, options.seeds)
    require_folder(options.out)
    with together(options) as (host, hosts):
        keep_memory()
        mine = asked[host::hosts]
        left = suite.left(options.out, mine)
        if not left:
            print(f"Nothing is left to paint for {options.out}.")
            return 0
        pipeline = _loaded(options)
        if done := set(mine) - set(left):
            width, height = options.size or (pipeline.run.data.side,) * 2
            prompt_suites.check_like(options.out / suite.last(done.pop()), pipeline.facts(width, height))
        painted = iter(_painted(options, pipeline, [(one.prompt, seed) for one in left for seed in one.seeds]))
        for one in left:
            suite.write(options.out, one, list(islice(painted, len(one.seeds))))
    print(f"Pictures of {len(left)} prompts of {len(asked)} are in {options.out}.")
    return 0


def _caption(prompt: str) -> str:
    """One line, for each line of a caption file is a caption."""
    return " ".join(prompt.splitlines())


def _check_begun(folder: Path, jobs: dict[str, tuple[str, int]]):
    """Raises ConfigError when a data set was begun with other prompts or seeds."""
    others = {path.name for path in folder.glob("*.png")} - jobs.keys()
    for name, (prompt, _) in jobs.items():
        beside = (folder / name).with_suffix(".txt")
        if beside.is_file() and beside.read_text("utf-8").removesuffix("\n") != _caption(prompt):
            others.add(beside.name)
    if others:
        raise config.ConfigError(f"{folder} was begun with other prompts or seeds (it holds {min(others)}): give another --folder.")
