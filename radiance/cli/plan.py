"""`radiance plan`: estimate the cost of a run."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from radiance import config
from radiance.cli.arguments import (
    EXPERIMENT_METAVAR,
    add_changes_argument,
    add_verb,
    parse_mesh,
)
from radiance.config.experiments import load_experiment
from radiance.distributed.hardware import DEVICE_ALIASES


def add_parser(subparsers):
    """Add the arguments of `radiance plan`."""
    parser = add_verb(
        subparsers,
        "plan",
        "estimate memory, work and time of a run on devices that are absent",
        main.__doc__,
        "radiance plan experiments/quickstart.py --device cpu",
        "radiance plan experiments.radiance_512 --device h100 --mesh fsdp=8",
        "radiance plan chroma1-radiance --sample --device h200 --kernels",
    )
    parser.add_argument(
        "experiment",
        metavar=EXPERIMENT_METAVAR,
        help="an experiment, or the name of a published model or of a size for research",
    )
    add_changes_argument(parser, "data.batch_size=64")
    parser.add_argument(
        "--mesh",
        type=parse_mesh,
        default=config.Mesh(1, 1, 1),
        help="such as fsdp=8 or data=16,fsdp=64; by default one device",
    )
    parser.add_argument(
        "--device", required=True, help="a100, h100, h200, b200, v4, v5e, v5p, v6e, v7x or cpu"
    )
    parser.add_argument(
        "--sample",
        action="store_true",
        help="plan the sampling of sample.batch_size images, not a training step",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="also list the kernels that cost most beyond their matrix products",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan as JSON")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Compile a training step, or a sampling program, for devices that are not present.

    No weights are needed. The plan reports memory, work and time of one device.
    """
    from radiance.base.compilation import report_compilation
    from radiance.base.files import replace_atomically, require_file
    from radiance.planning.plan import format_plan, make_plan

    if mesh_changes := [change for change in options.changes if change.startswith("mesh")]:
        raise config.ConfigError(
            f"{mesh_changes[0]}: the mesh of a plan is given as --mesh, such as --mesh fsdp=8."
        )
    if options.kernels and options.device == "cpu":
        raise config.ConfigError(
            "--kernels needs a device with known rates: give one of "
            f"{', '.join(DEVICE_ALIASES)} as --device."
        )
    if options.json:
        require_file(options.json)
    name = options.experiment
    if name in config.MODELS:
        run = config.make_sampling_config(config.Model.from_name(name), name)
    else:
        run = load_experiment(name)
    run = config.override(run, options.changes)
    error_on_uneven = "error" in (options.mesh.uneven, run.mesh.uneven)
    mesh = replace(options.mesh, uneven="error" if error_on_uneven else "replicate")
    program = "the sampler" if options.sample else "the training step"
    with report_compilation(program, f"for {options.device}; minutes for models of billions"):
        estimate = make_plan(replace(run, mesh=mesh), options.device, options.sample)
    if options.json:
        with replace_atomically(options.json) as temp_path:
            temp_path.write_text(json.dumps(estimate.to_dict(), indent=2) + "\n", "utf-8")
    print(format_plan(estimate, options.kernels))
    return 0
