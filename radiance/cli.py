"""`radiance train · encode · sample · plan · convert · inspect · report · verify` (also `python -m radiance`)."""

import argparse
import importlib
import importlib.util
import json
import math
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from radiance import config
from radiance.startup import prepare, prepare_plan

if TYPE_CHECKING:
    from radiance.weights.checkpoint import Checkpoint

FORMATS = ("native", "diffusers", "gguf", "torch")
LORA_NAMES = ("peft", "kohya")
STORES = ("q8_0", "int8", "float8_e4m3fn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. What the user can mend is told in one sentence, with exit code 2; 130 after Ctrl-C and 143 after SIGTERM."""
    options = _parse(arguments)
    if options.run is _plan:
        prepare_plan(options.device, max(options.mesh.data, 1) * max(options.mesh.fsdp, 1) * max(options.mesh.tensor, 1))
    prepare(several=getattr(options, "hosts", None) is not None)
    from radiance.data.datasets import DataError
    from radiance.text.encoders import TextError
    from radiance.training.loop import TrainingError
    from radiance.weights.files import CheckpointError

    before = signal.getsignal(signal.SIGTERM)
    try:
        if options.run is not _train and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        return options.run(options)
    except KeyboardInterrupt:
        print("radiance: stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except (config.ConfigError, CheckpointError, DataError, TextError, TrainingError, ImportError, OSError) as error:
        print(f"radiance: {error}", file=sys.stderr)
        return 2
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _terminate(*_):
    """An end by SIGTERM that removes what is half written; training has a way of its own to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse, with key=value changes allowed among and behind the flags too."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "changes") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.changes += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="radiance", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train an experiment, or go on with it", description=_train.__doc__)
    train.add_argument("experiment", metavar="EXPERIMENT[:ARM]", help="a file of experiments/, or its dotted name")
    train.add_argument("changes", nargs="*", metavar="key=value", help="changes of its config, such as optimizer.learning_rate=2e-4")
    _add_hosts(train)
    train.set_defaults(run=_train)

    encode = verbs.add_parser("encode", help="encode an experiment's captions into its text.cache", description=_encode.__doc__)
    encode.add_argument("experiment", metavar="EXPERIMENT[:ARM]")
    encode.add_argument("changes", nargs="*", metavar="key=value")
    encode.add_argument("--host", type=int, default=0, help="this process, of --hosts that share the captions")
    encode.add_argument("--hosts", type=int, default=1)
    encode.set_defaults(run=_encode)

    sample = verbs.add_parser("sample", help="make pictures", description=_sample.__doc__)
    _add_model(sample)
    sample.add_argument("changes", nargs="*", metavar="key=value", help="changes of its sample settings, such as guidance=2")
    sample.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    sample.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    sample.add_argument("--seeds", type=_seeds, default=[0], help="such as 0, 0-3 or 1,5,9: every prompt is painted with each")
    sample.add_argument("--size", type=_size, help="WIDTHxHEIGHT; by default the run's or the preset's")
    sample.add_argument("--preset", help=f"settings of a published model: {', '.join(config.PRESETS)}")
    sample.add_argument("--text-encoder", default="", metavar="FILE", help="T5 v1.1: safetensors (file, index or folder) or GGUF")
    sample.add_argument("--tokenizer", default="", metavar="FILE", help="spiece.model or tokenizer.json; found beside T5 by default")
    sample.add_argument("--autoencoder", default="", metavar="FILE", help="FLUX's, for latent models")
    sample.add_argument("--lora", action="append", type=_with_number, default=[], metavar="FILE[:STRENGTH]")
    sample.add_argument("--store", choices=["none", *STORES], help="how the blocks' matrices are kept in memory; by default as in the file")
    sample.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of a checkpoint file's weights and computation"
    )
    sample.add_argument("--mesh", type=_mesh, help="over which the model and the pictures are spread, such as fsdp=8 or data=2,fsdp=4")
    _add_hosts(sample)
    sample.add_argument("--out", type=Path, default=Path("pictures"), help="directory for the PNGs and sheet.png (default: pictures)")
    sample.set_defaults(run=_sample)

    plan = verbs.add_parser("plan", help="say what a run will cost on devices that are not here", description=_plan.__doc__)
    plan.add_argument("experiment", metavar="EXPERIMENT[:ARM]", help="or, with --sample, the name of a published model or a size")
    plan.add_argument("changes", nargs="*", metavar="key=value", help="changes of its config, such as data.batch=64")
    plan.add_argument("--mesh", type=_mesh, default=config.Mesh(1, 1, 1), help="such as fsdp=8 or data=16,fsdp=64; by default one device")
    plan.add_argument("--device", required=True, help="a100, h100, h200, b200, v4, v5e, v5p, v6e, v7x, or cpu")
    plan.add_argument("--sample", action="store_true", help="plan the painting of sample.batch pictures, not a training step")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    plan.set_defaults(run=_plan)

    convert = verbs.add_parser("convert", help="write a model in another format or type, or operate on it", description=_convert.__doc__)
    _add_model(convert)
    convert.add_argument("out", type=Path, metavar="OUT", help="a file (.safetensors or .gguf), or a new folder")
    convert.add_argument("--to", choices=[*FORMATS, *LORA_NAMES], help="by default what the name of OUT says")
    convert.add_argument(
        "--dtype",
        help="fp32, bf16, fp16; fp8 and int8, or in GGUF q8_0 and q4_0; by default each tensor's own, if OUT can have it, else bf16",
    )
    convert.add_argument("--weights", help="of a run: params, ema, ema=DECAY or width=WIDTH (optimizer.ema_widths)")
    convert.add_argument("--merge", type=_with_number, metavar="FILE:RATIO", help="(1 - RATIO) of MODEL and RATIO of another of its kind")
    convert.add_argument(
        "--lora", action="append", type=_with_number, default=[], metavar="FILE[:STRENGTH]", help="merge; negative to unmerge"
    )
    convert.add_argument("--head", choices=["nerf_conv"], help="turn a linear NeRF head into a convolution with the same output")
    convert.add_argument("--dilate", choices=["conv", "conv_half"], help="patch 16 to 32: a larger kernel, or every second pixel")
    convert.add_argument("--graft", metavar="NAME", help="put the blocks under a fresh pixel head of this named model")
    convert.add_argument("--seed", type=int, default=0, help="of the fresh head")
    convert.add_argument("--extract", metavar="BASE", help="write what MODEL changed in BASE as a LoRA (--to peft or kohya)")
    convert.add_argument("--rank", type=int, default=32, help="of the extracted LoRA")
    convert.add_argument("--ggml-markers", action="store_true", help="markers with one value: ggml refuses empty tensors, ComfyUI others")
    convert.set_defaults(run=_convert)

    inspect = verbs.add_parser("inspect", help="say what a file holds", description=_inspect.__doc__)
    inspect.add_argument("model", metavar="MODEL", help="a checkpoint, LoRA, T5 or autoencoder file, a run directory, or a size name")
    inspect.set_defaults(run=_inspect)

    report = verbs.add_parser("report", help="write a run's report.html", description=_report.__doc__)
    report.add_argument("run_directory", metavar="RUN", type=Path)
    report.set_defaults(run=_report)

    verify = verbs.add_parser("verify", help="compare with golden files", description=_verify.__doc__)
    verify.add_argument("files", nargs="+", metavar="FILE")
    verify.set_defaults(run=_verify)
    return parser


def _train(options: argparse.Namespace) -> int:
    """Trains an experiment in its run directory; the same command goes on where it stopped. Exit code 143 after SIGTERM."""
    from radiance.evaluation.report import write_report
    from radiance.training.loop import train

    run = config.override(experiment(options.experiment), options.changes)
    first_host = _join_hosts(options)[0] == 0
    _keep_memory()
    reached = train(run)
    if not first_host:
        return 0 if reached == run.train.steps else 143
    if reached < run.train.steps:
        print(f"Stopped at step {reached}: the same command goes on.", file=sys.stderr)
        return 143
    print(f"{run.directory} is trained for {reached} steps; see {write_report(run.directory)}.")
    return 0


def _encode(options: argparse.Namespace) -> int:
    """Encodes the captions of an experiment into the folder text.cache=FOLDER, from which it then trains and samples."""
    from tqdm import tqdm

    from radiance.data.datasets import open_source
    from radiance.text.cache import encode_captions
    from radiance.text.encoders import make_encoder

    run = config.override(experiment(options.experiment), options.changes)
    if not run.text.cache:
        raise config.ConfigError("There is no folder to write to: give text.cache=FOLDER.")
    encoder = make_encoder(replace(run.text, cache=""), run.model.text_dim)
    sources = [open_source(run.data, split) for split in ("train", "validation")]
    prompts = (*run.train.sample_prompts, run.sample.negative)
    captions = chain(prompts, *(source.captions(i) for source in sources for i in range(len(source))))
    with tqdm(unit="caption", disable=None) as bar:
        counts = encode_captions(captions, encoder, run.text.cache, options.host, options.hosts, bar.update)
    print(
        f"{run.text.cache}: {counts.encoded} captions encoded, {counts.already} were there, {counts.cut} cut to {run.text.length} tokens."
    )
    return 0


def _sample(options: argparse.Namespace) -> int:
    """Paints every prompt with every seed. The PNGs carry prompt, seed and settings. Several hosts share the pictures."""
    from tqdm import tqdm

    from radiance.models import load
    from radiance.pictures import contact_sheet, save_png

    prompts = options.prompt + (_lines(options.prompts) if options.prompts else [])
    if not prompts:
        raise config.ConfigError("There is nothing to paint: give --prompt TEXT or --prompts FILE.")
    jobs = [(prompt, seed) for prompt in prompts for seed in options.seeds]
    host, hosts = _join_hosts(options)
    _keep_memory()
    mine = {f"{i:05d}_seed{jobs[i][1]}.png": jobs[i] for i in range(host, len(jobs), hosts)}
    if any((options.out / name).exists() for name in (*mine, "sheet.png")):
        raise config.ConfigError(f"{options.out} holds pictures already: give another --out.")
    pipeline = load(
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
        **_known(options),
    )
    width, height = options.size or (None, None)
    painted = pipeline.paint([p for p, _ in mine.values()], [s for _, s in mine.values()], width, height)
    pictures = []
    for name, picture in zip(mine, tqdm(painted, total=len(mine), unit="picture", disable=None)):  # disable=None: no bar in a log
        save_png(options.out / name, picture.image, picture.facts)
        pictures.append(picture.image)
    if hosts == 1:
        sheet = contact_sheet(pictures, len(options.seeds) if len(options.seeds) > 1 else min(len(prompts), 10))
        settings = config.to_dict(pipeline.run.sample)
        save_png(options.out / "sheet.png", sheet, {"prompts": prompts, "seeds": options.seeds, "settings": settings})
    print(f"{len(pictures)} pictures{' and sheet.png' if hosts == 1 else f' of {len(jobs)}'} are in {options.out}.")
    return 0


def _plan(options: argparse.Namespace) -> int:
    """Compiles a training step (or, with --sample, a sampling program) for devices that are not here, without weights, and tells the
    memory, work and time of one of them."""
    from radiance.plan import plan, run_named, table

    if given := [change for change in options.changes if change.startswith("mesh")]:
        raise config.ConfigError(f"{given[0]}: a plan's mesh is given as --mesh, such as --mesh fsdp=8.")
    run = run_named(options.experiment) if options.experiment in config.MODELS else experiment(options.experiment)
    run = config.override(run, options.changes)
    run = replace(run, mesh=replace(options.mesh, uneven=run.mesh.uneven))
    found = plan(run, options.device, options.sample)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found.as_json(), indent=2) + "\n")
    return 0


def _convert(options: argparse.Namespace) -> int:
    """Writes MODEL to OUT, tensor by tensor, and tells what was done. Operations come in the order of the flags in this help."""
    from tqdm import tqdm

    from radiance.models import encoded_prompts, opened
    from radiance.training.directory import RunDirectory, is_run
    from radiance.weights import lora, surgery
    from radiance.weights.convert import SHORT, convert, format_of

    to = options.to or ("peft" if options.extract else format_of(options.out))
    if options.extract and to not in LORA_NAMES:
        raise config.ConfigError(f"--extract writes a LoRA: --to is {' or '.join(LORA_NAMES)}, not {to}.")
    if options.merge and options.merge[1] is None:
        raise config.ConfigError(f"--merge {options.merge[0]} needs a ratio, such as {options.merge[0]}:0.5.")
    checkpoint = opened(options.model, options.weights, **_known(options))
    if options.merge:
        checkpoint = surgery.merge(checkpoint, opened(options.merge[0], **_known(options)), options.merge[1])
    if to in LORA_NAMES:
        return _write_lora(options, checkpoint, to)
    for path, strength in options.lora:
        checkpoint = lora.merged(checkpoint, lora.read(path, checkpoint.model), 1.0 if strength is None else strength)
    if options.head:
        checkpoint = surgery.conv_head(checkpoint)
    if options.dilate:
        checkpoint = surgery.dilate(checkpoint, options.dilate)
    if options.graft:
        checkpoint = surgery.graft(checkpoint, config.Model.named(options.graft), options.seed)
    more = (
        encoded_prompts(RunDirectory(Path(options.model)).read_config()) if to == "torch" and is_run(options.model) else lambda folder: None
    )
    count = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    with tqdm(total=count, unit="parameter", unit_scale=True, disable=None) as bar:
        report = convert(checkpoint, options.out, to, SHORT.get(options.dtype, options.dtype), not options.ggml_markers, bar.update, more)
    print(report)
    print(f"{checkpoint.origin} is written to {options.out}.")
    return 0


def _write_lora(options: argparse.Namespace, checkpoint: "Checkpoint", names: str) -> int:
    """The difference to another checkpoint as a LoRA, or a LoRA file under other names."""
    from tqdm import tqdm

    from radiance.models import opened, trained_lora
    from radiance.training.directory import RunDirectory, is_run
    from radiance.weights import lora
    from radiance.weights.convert import SHORT

    dtype = SHORT.get(options.dtype, options.dtype) or "bfloat16"
    run = RunDirectory(Path(options.model)).read_config() if is_run(options.model) else None
    if run is not None and run.lora.rank and not options.extract and not options.lora:
        run = replace(run, sample=replace(run.sample, weights=options.weights or run.sample.weights))
        found = trained_lora(options.model, run)
        lora.write(options.out, found, names, dtype)
        print(f"{found.origin} is written to {options.out}: {len(found.pairs)} matrices.")
    elif options.extract:
        base = opened(options.extract, **_known(options))
        count = sum(math.prod(shape) for shape in checkpoint.shapes.values())
        with tqdm(total=count, unit="parameter", unit_scale=True, disable=None) as bar:
            found = lora.extract(base, checkpoint, options.rank, progress=bar.update)
        lora.write(options.out, found.lora, names, dtype)
        print(
            f"{options.out} keeps {found.kept_in_all:.1%} of the squared difference of {len(found.lora.pairs)} matrices at rank {options.rank}."
        )
        if found.left:
            worst = ", ".join(f"{name} ({change:.1e})" for name, change in sorted(found.left.items(), key=lambda x: -x[1])[:3])
            print(f"{len(found.left)} other tensors changed too, which a LoRA of the blocks' matrices cannot carry; most of all {worst}.")
    elif len(options.lora) == 1:
        (path, strength), *_ = options.lora
        if strength is not None:
            raise config.ConfigError(f"--lora {path}:{strength:g}: a LoRA is renamed as it is; give it a strength where it is used.")
        lora.write(options.out, lora.read(path, checkpoint.model), names, dtype)
        print(f"{path} is written to {options.out} with the names of {names}.")
    else:
        raise config.ConfigError(
            f"--to {names} writes a LoRA: give a run that trained one, --extract BASE, from which MODEL was trained, or one --lora FILE to rename."
        )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    """Variant, sizes, parameters by part, types and metadata."""
    from radiance.training.directory import RunDirectory, is_run
    from radiance.weights.inspect import inspect_file, inspect_model

    if options.model in config.MODELS:
        print(inspect_model(config.Model.named(options.model)))
    elif is_run(options.model):
        print(inspect_model(RunDirectory(Path(options.model)).read_config().model))
    else:
        print(inspect_file(options.model))
    return 0


def _report(options: argparse.Namespace) -> int:
    """Writes report.html into the run directory: curves, pictures, config."""
    from radiance.evaluation.report import write_report

    print(write_report(options.run_directory))
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Compares this installation's outputs with the published implementation's. Exit code 1 when one is too far off."""
    from radiance.evaluation.verify import verify

    results = [result for file in options.files for result in verify(file)]
    for r in results:
        print(
            f"{r.file:40} {r.output:10} {r.error:.1e} of {r.tolerance:.1e} (rounding moves it by {r.rounding:.1e})  {'ok' if r.good else 'TOO FAR'}"
        )
    return 0 if all(r.good for r in results) else 1


def experiment(name: str) -> config.Config:
    """The config of EXPERIMENT[:ARM]: a file or dotted module with `config()`, and in `ARMS` the changes that each arm makes."""
    where, _, arm = name.rpartition(":") if ":" in name else (name, "", "")
    path = Path(where)
    if path.suffix == ".py":
        if not path.is_file():
            raise config.ConfigError(f"There is no experiment file {path}.")
        spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not where.startswith(error.name):
                raise  # the experiment is there, and misses something itself
            raise config.ConfigError(f"There is no experiment {where}: give a file such as experiments/quickstart.py ({error}).") from None
    if not hasattr(module, "config"):
        raise config.ConfigError(f"{where} is no experiment: it has no config().")
    run = module.config()
    if not arm:
        return run
    arms = getattr(module, "ARMS", {})
    if arm not in arms:
        raise config.ConfigError(f"{where} has no arm {arm!r}: it has {', '.join(arms) or 'none'}.")
    return config.override(run, [f"name={run.name}-{arm}", *arms[arm]])


def _add_model(parser: argparse.ArgumentParser):
    """MODEL, and what the user may have to tell of it."""
    parser.add_argument(
        "model", metavar="MODEL", help="a run directory, or a checkpoint: safetensors (native or diffusers), an index, GGUF"
    )
    parser.add_argument("--text-ids", choices=["zero", "sequential"], help="where a file does not say it")
    parser.add_argument("--prediction", choices=["velocity", "x0"], help="where a file does not say it")


def _add_hosts(parser: argparse.ArgumentParser):
    """One process of several: this command, started on every host."""
    parser.add_argument("--hosts", help="how many hosts run this command; auto where SLURM, Kubernetes or Cloud TPU started them")
    parser.add_argument("--host", type=int, help="which one this is, from 0")
    parser.add_argument("--coordinator", metavar="ADDRESS:PORT", help="of host 0")


def _join_hosts(options: argparse.Namespace) -> tuple[int, int]:
    """Which host this is, of how many."""
    import jax

    from radiance.sharding import join_hosts

    if options.hosts == "auto":
        join_hosts()
    elif options.hosts is not None:
        if not options.hosts.isdecimal():
            raise config.ConfigError(f"--hosts {options.hosts} is neither a number nor auto.")
        join_hosts(options.coordinator, int(options.hosts), options.host)
    return jax.process_index(), jax.process_count()


def _keep_memory():
    import jax

    from radiance.startup import keep_memory

    if jax.default_backend() == "cpu":
        keep_memory()


def _known(options: argparse.Namespace) -> dict[str, str]:
    told = {"text_ids": options.text_ids, "prediction": options.prediction}
    return {name: value for name, value in told.items() if value is not None}


def _with_number(text: str) -> tuple[str, float | None]:
    """FILE:NUMBER, or FILE alone."""
    path, colon, number = text.rpartition(":")
    try:
        value = float(number) if colon else None
    except ValueError:
        return text, None  # a colon in the name
    if value is None:
        return text, None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{number} is not a finite number")
    return path, value


def _lines(path: Path) -> list[str]:
    """The prompts of a file, one a line."""
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise config.ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None


def _mesh(text: str) -> config.Mesh:
    try:
        return config.override(config.Mesh(data=1, fsdp=1, tensor=1), text.split(","))
    except config.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seeds(text: str) -> list[int]:
    seeds = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        seeds += range(int(low), int(high) + 1) if dash else [int(low)]
    if not seeds or max(seeds) >= 2**32:
        raise argparse.ArgumentTypeError("seeds are whole numbers below 2**32")
    return seeds


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    size = int(width), int(height or width)
    if min(size) < 1:
        raise argparse.ArgumentTypeError("a size is WIDTHxHEIGHT in pixels")
    return size
