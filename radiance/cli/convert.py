"""`radiance convert`: change the format, type or architecture of a model, and write LoRA files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from radiance import config
from radiance.cli.arguments import (
    MAX_SEED,
    add_model_arguments,
    add_verb,
    get_model_overrides,
    parse_path_with_number,
    parse_whole_number,
)
from radiance.cli.convert_lora import (
    LORA_DTYPES,
    add_lora_arguments,
    count_params,
    is_lora_output,
    open_other_model,
    read_lora,
    write_lora,
)
from radiance.config.experiments import load_experiment
from radiance.weights.formats import DTYPE_ALIASES, EXPORT_FORMATS, LORA_NAMINGS

if TYPE_CHECKING:
    import numpy as np

    from radiance.weights.checkpoint import Checkpoint

MAX_FIT_STEPS = 10_000_000


def add_parser(subparsers):
    """Add the arguments of `radiance convert`."""
    parser = add_verb(
        subparsers,
        "convert",
        "write a model in another format or type, or change its architecture",
        main.__doc__,
        "radiance convert runs/mine model.safetensors --dtype bf16",
        "radiance convert radiance.safetensors radiance-q8_0.gguf --dtype q8_0",
        "radiance convert tuned.safetensors lora.safetensors --extract base.safetensors --rank 16",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="a file (.safetensors or .gguf), or a new folder"
    )
    parser.add_argument(
        "--to",
        choices=list(dict.fromkeys([*EXPORT_FORMATS, *LORA_NAMINGS])),
        help="format of OUT; by default the one of its suffix. peft, kohya and, if OUT is a "
        ".safetensors file, diffusers are the names in a LoRA",
    )
    parser.add_argument(
        "--dtype",
        help="fp32, bf16 or fp16; fp8 and int8; in GGUF q8_0 and q4_0 (K-quants: see "
        "docs/checkpoints.md); by default the type of each tensor, or bf16 if OUT does not support "
        "it",
    )
    parser.add_argument(
        "--weights",
        help="weights of a run: params, ema, ema=DECAY or width=WIDTH (optimizer.ema_widths)",
    )
    parser.add_argument(
        "--merge",
        type=parse_path_with_number,
        metavar="FILE:RATIO",
        help="add (1 - RATIO) of MODEL and RATIO of another model of the same architecture",
    )
    parser.add_argument(
        "--lora",
        action="append",
        type=parse_path_with_number,
        default=[],
        metavar="FILE[:STRENGTH]",
        help="merge a LoRA; a negative strength removes it",
    )
    _add_surgery_arguments(parser)
    add_lora_arguments(parser)
    parser.add_argument(
        "--no-markers",
        action="store_true",
        help="leave out the empty tensors by which readers recognize variants (__x0__, "
        "__32x32__, __sequential__), which strict loaders reject",
    )
    parser.set_defaults(run=main)


def _add_surgery_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--head",
        choices=["nerf_conv"],
        help="turn a linear NeRF head into a convolution with the same output",
    )
    parser.add_argument(
        "--dilate",
        choices=["conv", "conv_half"],
        help="double the patch size: by a larger kernel, or by reading every second pixel",
    )
    parser.add_argument(
        "--graft",
        metavar="MODEL",
        help="put the blocks between a new pixel embedding and head, those of a named model or of "
        "an experiment (a file)",
    )
    parser.add_argument(
        "--pooled",
        metavar="zero|FILE",
        help="fix the pooled text vector of a FLUX-style model: at zero, or at the mean of the "
        "vectors in a safetensors file, [prompts, width]",
    )
    parser.add_argument(
        "--modulation",
        choices=["approximator"],
        help="replace FLUX's modulation layers by Chroma's approximator; the pooled vector is "
        "fixed, by default at zero",
    )
    parser.add_argument(
        "--modulation-steps",
        type=parse_whole_number(1, MAX_FIT_STEPS),
        metavar="N",
        help="steps of the approximator's fit (default: 5000)",
    )
    parser.add_argument(
        "--seed",
        type=parse_whole_number(0, MAX_SEED),
        default=0,
        help="seed of the new head and of the approximator's fit",
    )


def main(options: argparse.Namespace) -> int:
    """Write MODEL to OUT tensor by tensor, and report what was changed.

    Operations are applied in the order of the flags in this help.
    """
    from radiance.loading import open_model
    from radiance.weights.convert import check_export, infer_format

    target_format = options.to or ("peft" if options.extract else infer_format(options.out))
    dtype = DTYPE_ALIASES.get(options.dtype, options.dtype)
    _check_options(options, target_format, dtype)
    checkpoint = open_model(options.model, options.weights, **get_model_overrides(options))
    if options.merge:
        from radiance.weights import surgery

        checkpoint = surgery.merge_checkpoints(
            checkpoint, open_other_model(options.merge[0], options), options.merge[1]
        )
    if is_lora_output(options, target_format):
        return write_lora(options, checkpoint, target_format, dtype or "bfloat16")
    checkpoint = _apply_surgery(options, checkpoint)
    checkpoint, pooled_description = _fix_pooled_vector(options, checkpoint)
    if options.modulation:
        from radiance.weights.surgery import make_approximator_model

        # Before the fit, which takes long.
        check_export(make_approximator_model(checkpoint), options.out, target_format, dtype)
        checkpoint = _fit_approximator(checkpoint, options)
    _write_model(options, checkpoint, target_format, dtype)
    if pooled_description:
        print(
            f"The pooled text vector is {pooled_description} for every prompt: its information "
            "about prompts is lost."
        )
    print(f"{checkpoint.origin} is written to {options.out}.")
    return 0


def _check_options(options: argparse.Namespace, target_format: str, dtype: str | None):
    """Raise ConfigError if options contradict each other."""
    if re.fullmatch(r"i?q\d_(k|xs|xxs|s|m|nl)(_[sml])?", (dtype or "").lower()):
        raise config.ConfigError(
            f"--dtype {options.dtype} is written by ggml's own tool: follow docs/checkpoints.md, "
            "section K-quants, or choose q8_0 or q4_0."
        )
    is_lora = is_lora_output(options, target_format)
    if options.extract and not is_lora:
        raise config.ConfigError(
            f"--extract writes a LoRA: --to must be {' or '.join(LORA_NAMINGS)}, not "
            f"{target_format}."
        )
    if options.modulation_steps is not None and not options.modulation:
        raise config.ConfigError(
            "--modulation-steps is for --modulation approximator: give that too."
        )
    if options.merge and options.merge[1] is None:
        raise config.ConfigError(
            f"--merge {options.merge[0]} needs a ratio, such as {options.merge[0]}:0.5."
        )
    if not is_lora:
        return
    if options.no_markers:
        raise config.ConfigError(
            f"--to {target_format} writes a LoRA, which has no markers: leave out --no-markers."
        )
    if options.modulation or options.pooled:
        raise config.ConfigError(
            f"--modulation and --pooled change the architecture, and --to {target_format} writes "
            "a LoRA: convert the model first."
        )
    changes_model = options.head or options.dilate or options.graft
    if changes_model or (options.extract and options.lora):
        raise config.ConfigError(
            f"--to {target_format} writes a LoRA, and --lora, --head, --dilate and --graft change "
            "the model: convert it first."
        )
    if dtype not in (None, *LORA_DTYPES):
        raise config.ConfigError(
            f"--dtype {options.dtype}: a LoRA is written as fp32, bf16 or fp16."
        )


# --- operations on a model ------------------------------------------------------------------------


def _apply_surgery(options: argparse.Namespace, checkpoint: Checkpoint) -> Checkpoint:
    """Merge LoRAs, and change the head, the patches and the latent space."""
    from radiance.weights import lora, surgery

    for path, strength in options.lora:
        checkpoint = lora.merge_lora(
            checkpoint,
            read_lora(path, checkpoint.model),
            1.0 if strength is None else strength,
        )
    if options.head:
        checkpoint = surgery.convert_head_to_conv(checkpoint)
    if options.dilate:
        checkpoint = surgery.dilate_patches(checkpoint, options.dilate)
    if options.graft:
        checkpoint = surgery.graft(checkpoint, _resolve_model(options.graft), options.seed)
    return checkpoint


def _resolve_model(name: str) -> config.Model:
    """Return a named model, or the model of an experiment."""
    if name.partition(":")[0].endswith(".py"):
        return load_experiment(name).model
    return config.Model.from_name(name)


def _fix_pooled_vector(
    options: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[Checkpoint, str | None]:
    """Fix the pooled text vector if an option asks for it, and return its description."""
    from radiance.weights import surgery

    if not options.pooled and not (options.modulation and checkpoint.model.pooled_dim):
        return checkpoint, None
    vector, description = _load_pooled_vector(options.pooled or "zero", checkpoint.model)
    return surgery.fix_pooled_vector(checkpoint, vector, description), description


def _load_pooled_vector(source: str, model: config.Model) -> tuple[np.ndarray, str]:
    """Return the fixed vector, and its description."""
    import numpy as np

    from radiance.evaluation.modulation_variance import make_grid

    if source == "zero":
        return np.zeros(model.pooled_dim, np.float32), "zero"
    grid = make_grid(model, Path(source))
    return grid.pooled.mean(axis=0), f"the mean of {grid.pooled_description}"


def _fit_approximator(checkpoint: Checkpoint, options: argparse.Namespace) -> Checkpoint:
    """Fit an approximator to the modulation layers, and replace them by it."""
    from tqdm import tqdm

    from radiance.training import modulation_fit
    from radiance.weights import surgery

    steps = options.modulation_steps or modulation_fit.DEFAULT_STEPS
    with tqdm(total=steps, unit="step", desc="modulation", disable=None) as bar:
        fit = modulation_fit.fit_modulation(checkpoint, steps, options.seed, bar.update)
    print(fit.report)
    if checkpoint.model.guidance_embed:
        print(
            "The guidance input remains: Chroma's tools set it to 0, and get what this model "
            "computes at 0."
        )
    return surgery.replace_modulation(checkpoint, fit.modulation)


def _write_model(
    options: argparse.Namespace, checkpoint: Checkpoint, target_format: str, dtype: str | None
):
    """Write the model, and print the report of the conversion."""
    from tqdm import tqdm

    from radiance.loading import make_prompts_writer
    from radiance.training.run_directory import RunDirectory, is_run_directory
    from radiance.weights.convert import convert_checkpoint

    def write_no_files(folder: Path):
        pass

    write_extra_files = write_no_files
    if target_format == "torch" and is_run_directory(options.model):
        write_extra_files = make_prompts_writer(RunDirectory(Path(options.model)).read_config())
    with tqdm(
        total=count_params(checkpoint), unit="parameter", unit_scale=True, disable=None
    ) as bar:
        report = convert_checkpoint(
            checkpoint,
            options.out,
            target_format,
            dtype,
            not options.no_markers,
            bar.update,
            write_extra_files,
        )
    print(report)
