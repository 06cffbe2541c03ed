"""`radiance convert`: formats, types, surgery and LoRA."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from radiance import config
from radiance.cli.arguments import add_model_arguments, get_model_overrides, parse_path_with_number
from radiance.config.experiments import load_experiment
from radiance.weights.formats import DTYPE_ALIASES, EXPORT_FORMATS

if TYPE_CHECKING:
    import numpy as np

    from radiance.weights.checkpoint import Checkpoint

LORA_NAMES = ("peft", "kohya")


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "convert",
        help="write a model in another format or type, or operate on it",
        description=main.__doc__,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="a file (.safetensors or .gguf), or a new folder"
    )
    parser.add_argument(
        "--to", choices=[*EXPORT_FORMATS, *LORA_NAMES], help="by default what the name of OUT says"
    )
    parser.add_argument(
        "--dtype",
        help="fp32, bf16, fp16; fp8 and int8, or in GGUF q8_0 and q4_0; by default each tensor's own, if OUT can have it, else bf16",
    )
    parser.add_argument(
        "--weights", help="of a run: params, ema, ema=DECAY or width=WIDTH (optimizer.ema_widths)"
    )
    parser.add_argument(
        "--merge",
        type=parse_path_with_number,
        metavar="FILE:RATIO",
        help="(1 - RATIO) of MODEL and RATIO of another of its kind",
    )
    parser.add_argument(
        "--lora",
        action="append",
        type=parse_path_with_number,
        default=[],
        metavar="FILE[:STRENGTH]",
        help="merge; negative to unmerge",
    )
    parser.add_argument(
        "--head",
        choices=["nerf_conv"],
        help="turn a linear NeRF head into a convolution with the same output",
    )
    parser.add_argument(
        "--dilate",
        choices=["conv", "conv_half"],
        help="patches twice as large: a larger kernel, or every second pixel",
    )
    parser.add_argument(
        "--graft",
        metavar="MODEL",
        help="put the blocks under a fresh pixel head of this named model, or of this experiment's (a file)",
    )
    parser.add_argument(
        "--pooled",
        metavar="zero|FILE",
        help="of a FLUX-style model: hold its pooled text vector at zero, or at the mean of those in a safetensors file, [prompts, width]",
    )
    parser.add_argument(
        "--modulation",
        choices=["approximator"],
        help="replace FLUX's layers of modulation as Chroma did; the pooled vector is held, by default at zero",
    )
    parser.add_argument(
        "--modulation-steps",
        type=int,
        metavar="N",
        help="of the approximator's fit; by default 5000",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the fresh head, and of the approximator's fit"
    )
    parser.add_argument(
        "--extract",
        metavar="BASE",
        help="write what MODEL changed in BASE as a LoRA (--to peft or kohya)",
    )
    parser.add_argument("--rank", type=int, default=32, help="of the extracted LoRA")
    parser.add_argument(
        "--ggml-markers",
        action="store_true",
        help="markers with one value: ggml refuses empty tensors, ComfyUI others",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Writes MODEL to OUT, tensor by tensor, and tells what was done. Operations come in the order of the flags in this help."""
    from tqdm import tqdm

    from radiance.loading import make_prompts_writer, open_model
    from radiance.training.run_directory import RunDirectory, is_run_directory
    from radiance.weights import lora, surgery
    from radiance.weights.convert import (
        check_export,
        convert_checkpoint,
        infer_format,
    )

    target_format = options.to or ("peft" if options.extract else infer_format(options.out))
    dtype = DTYPE_ALIASES.get(options.dtype, options.dtype)
    if options.extract and target_format not in LORA_NAMES:
        raise config.ConfigError(
            f"--extract writes a LoRA: --to is {' or '.join(LORA_NAMES)}, not {target_format}."
        )
    if options.modulation_steps is not None and (
        not options.modulation or options.modulation_steps < 1
    ):
        raise config.ConfigError(
            "--modulation-steps is a number of at least 1, for --modulation approximator: give that too."
        )
    if target_format in LORA_NAMES and (options.modulation or options.pooled):
        raise config.ConfigError(
            f"--modulation and --pooled make another model, and --to {target_format} writes a LoRA: convert first."
        )
    if target_format in LORA_NAMES and (
        options.head or options.dilate or options.graft or (options.extract and options.lora)
    ):
        raise config.ConfigError(
            f"--to {target_format} writes a LoRA, and --lora, --head, --dilate and --graft make another model: convert first."
        )
    if target_format in LORA_NAMES and (dtype or "bfloat16") not in (
        "float32",
        "bfloat16",
        "float16",
    ):
        raise config.ConfigError(
            f"--dtype {options.dtype}: a LoRA is written as fp32, bf16 or fp16."
        )
    if options.merge and options.merge[1] is None:
        raise config.ConfigError(
            f"--merge {options.merge[0]} needs a ratio, such as {options.merge[0]}:0.5."
        )
    checkpoint = open_model(options.model, options.weights, **get_model_overrides(options))
    if options.merge:
        checkpoint = surgery.merge_checkpoints(
            checkpoint, _open_other(options.merge[0], options), options.merge[1]
        )
    if target_format in LORA_NAMES:
        return _write_lora(options, checkpoint, target_format)
    for path, strength in options.lora:
        checkpoint = lora.merge_lora(
            checkpoint,
            lora.read_lora(path, checkpoint.model),
            1.0 if strength is None else strength,
        )
    if options.head:
        checkpoint = surgery.convert_head_to_conv(checkpoint)
    if options.dilate:
        checkpoint = surgery.dilate_patches(checkpoint, options.dilate)
    if options.graft:
        checkpoint = surgery.graft(checkpoint, _resolve_model(options.graft), options.seed)
    if options.pooled or (options.modulation and checkpoint.model.pooled_dim):
        pooled_vector, pooled_description = _load_pooled(options.pooled or "zero", checkpoint.model)
        checkpoint = surgery.fix_pooled_vector(checkpoint, pooled_vector, pooled_description)
    else:
        pooled_description = None
    if options.modulation:
        check_export(
            surgery.make_approximator_model(checkpoint), options.out, target_format, dtype
        )  # before the fit
        checkpoint = _fit_approximator(checkpoint, options)
    write_extra_files = (
        make_prompts_writer(RunDirectory(Path(options.model)).read_config())
        if target_format == "torch" and is_run_directory(options.model)
        else lambda folder: None
    )
    num_params = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    with tqdm(total=num_params, unit="parameter", unit_scale=True, disable=None) as bar:
        report = convert_checkpoint(
            checkpoint,
            options.out,
            target_format,
            dtype,
            not options.ggml_markers,
            bar.update,
            write_extra_files,
        )
    print(report)
    if pooled_description:
        print(
            f"The pooled text vector is {pooled_description}, whatever the prompt: what it said of prompts is lost."
        )
    print(f"{checkpoint.origin} is written to {options.out}.")
    return 0


def _resolve_model(name: str) -> config.Model:
    """A named one, or an experiment's."""
    return (
        load_experiment(name).model
        if name.partition(":")[0].endswith(".py")
        else config.Model.from_name(name)
    )


def _open_other(path: str, options: argparse.Namespace) -> "Checkpoint":
    """A second model. What is told of the first is meant for it too, unless it is a run, which knows."""
    from radiance.loading import open_model
    from radiance.training.run_directory import is_run_directory

    return (
        open_model(path)
        if is_run_directory(path)
        else open_model(path, **get_model_overrides(options))
    )


def _load_pooled(pooled_source: str, model: config.Model) -> tuple["np.ndarray", str]:
    """The vector that is held, and what it is."""
    import numpy as np

    from radiance.evaluation.modulation_variance import make_grid

    if pooled_source == "zero":
        return np.zeros(model.pooled_dim, np.float32), "zero"
    grid = make_grid(model, Path(pooled_source))
    return grid.pooled.mean(axis=0), f"the mean of {grid.pooled_description}"


def _fit_approximator(checkpoint: "Checkpoint", options: argparse.Namespace) -> "Checkpoint":
    """With an approximator, fitted here."""
    from tqdm import tqdm

    from radiance.training import modulation_fit
    from radiance.weights import surgery

    steps = options.modulation_steps or modulation_fit.DEFAULT_STEPS
    with tqdm(total=steps, unit="step", desc="modulation", disable=None) as bar:
        fit = modulation_fit.fit_modulation(checkpoint, steps, options.seed, bar.update)
    print(fit.report)
    if checkpoint.model.guidance_embed:
        print(
            "Guidance is read as before: Chroma's tools give 0, and get what this model does at 0."
        )
    return surgery.replace_modulation(checkpoint, fit.modulation)


def _write_lora(options: argparse.Namespace, checkpoint: "Checkpoint", naming: str) -> int:
    """The difference to another checkpoint as a LoRA, or a LoRA file under other names."""
    from tqdm import tqdm

    from radiance.loading import trained_lora
    from radiance.training.run_directory import RunDirectory, is_run_directory
    from radiance.weights import lora
    from radiance.weights.lora_extraction import extract_lora

    dtype = DTYPE_ALIASES.get(options.dtype, options.dtype) or "bfloat16"
    run = (
        RunDirectory(Path(options.model)).read_config() if is_run_directory(options.model) else None
    )
    if run is not None and run.lora.rank and not options.extract and not options.lora:
        run = replace(
            run, sample=replace(run.sample, weights=options.weights or run.sample.weights)
        )
        result = trained_lora(options.model, run)
        lora.write_lora(options.out, result, naming, dtype)
        print(f"{result.origin} is written to {options.out}: {len(result.pairs)} matrices.")
    elif options.extract:
        base = _open_other(options.extract, options)
        num_params = sum(math.prod(shape) for shape in checkpoint.shapes.values())
        with tqdm(total=num_params, unit="parameter", unit_scale=True, disable=None) as bar:
            result = extract_lora(base, checkpoint, options.rank, on_progress=bar.update)
        lora.write_lora(options.out, result.lora, naming, dtype)
        print(
            f"{options.out} keeps {result.total_explained_fraction:.1%} of the squared difference of {len(result.lora.pairs)} matrices at rank {options.rank}."
        )
        if result.remaining_changes:
            largest_changes = ", ".join(
                f"{name} ({change:.1e})"
                for name, change in sorted(result.remaining_changes.items(), key=lambda x: -x[1])[
                    :3
                ]
            )
            print(
                f"{len(result.remaining_changes)} other tensors changed too, which a LoRA of the blocks' matrices cannot carry; most of all {largest_changes}."
            )
    elif len(options.lora) == 1:
        (path, strength), *_ = options.lora
        if strength is not None:
            raise config.ConfigError(
                f"--lora {path}:{strength:g}: a LoRA is renamed as it is; give it a strength where it is used."
            )
        lora.write_lora(options.out, lora.read_lora(path, checkpoint.model), naming, dtype)
        print(f"{path} is written to {options.out} with the names of {naming}.")
    else:
        raise config.ConfigError(
            f"--to {naming} writes a LoRA: give a run that trained one, --extract BASE, from which MODEL was trained, or one --lora FILE to rename."
        )
    return 0
