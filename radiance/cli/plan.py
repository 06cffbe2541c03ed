"""`radiance plan`: what a run will cost."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from radiance import config
from radiance.cli.arguments import parse_mesh
from radiance.config.experiments import load_experiment


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "plan",
        help="say what a run will cost on devices that are not here",
        description=main.__doc__,
    )
    parser.add_argument(
        "experiment",
        metavar="EXPERIMENT[:ARM…]",
        help="or, with --sample, the name of a published model or a size",
    )
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="changes of its config, such as data.batch_size=64",
    )
    parser.add_argument(
        "--mesh",
        type=parse_mesh,
        default=config.Mesh(1, 1, 1),
        help="such as fsdp=8 or data=16,fsdp=64; by default one device",
    )
    parser.add_argument(
        "--device", required=True, help="a100, h100, h200, b200, v4, v5e, v5p, v6e, v7x, or cpu"
    )
    parser.add_argument(
        "--sample",
        action="store_true",
        help="plan the painting of sample.batch_size images, not a training step",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Compiles a training step (or, with --sample, a sampling program) for devices that are not here, without weights, and tells the
    memory, work and time of one of them.
    """
    from radiance.planning.plan import format_plan, make_plan

    if mesh_changes := [change for change in options.changes if change.startswith("mesh")]:
        raise config.ConfigError(
            f"{mesh_changes[0]}: a plan's mesh is given as --mesh, such as --mesh fsdp=8."
        )
    run = (
        config.make_sampling_config(config.Model.from_name(options.experiment), options.experiment)
        if options.experiment in config.MODELS
        else load_experiment(options.experiment)
    )
    run = config.override(run, options.changes)
    error_on_uneven = "error" in (options.mesh.uneven, run.mesh.uneven)
    run = replace(run, mesh=replace(options.mesh, uneven="error" if error_on_uneven else "replicate"))
    estimate = make_plan(run, options.device, options.sample)
    print(format_plan(estimate))
    if options.json:
        from radiance.base.files import replace_atomically

        with replace_atomically(options.json) as temp_path:
            temp_path.write_text(json.dumps(estimate.to_dict(), indent=2) + "\n")
    return 0
