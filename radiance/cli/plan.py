"""`radiance plan`: what a run will cost."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from radiance import config
from radiance.cli.arguments import mesh
from radiance.cli.experiments import experiment


def add(verbs):
    parser = verbs.add_parser("plan", help="say what a run will cost on devices that are not here", description=main.__doc__)
    parser.add_argument("experiment", metavar="EXPERIMENT[:ARM…]", help="or, with --sample, the name of a published model or a size")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of its config, such as data.batch=64")
    parser.add_argument("--mesh", type=mesh, default=config.Mesh(1, 1, 1), help="such as fsdp=8 or data=16,fsdp=64; by default one device")
    parser.add_argument("--device", required=True, help="a100, h100, h200, b200, v4, v5e, v5p, v6e, v7x, or cpu")
    parser.add_argument("--sample", action="store_true", help="plan the painting of sample.batch pictures, not a training step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Compiles a training step (or, with --sample, a sampling program) for devices that are not here, without weights, and tells the
    memory, work and time of one of them."""
    from radiance.plan import plan, run_named, table

    if given := [change for change in options.changes if change.startswith("mesh")]:
        raise config.ConfigError(f"{given[0]}: a plan's mesh is given as --mesh, such as --mesh fsdp=8.")
    run = run_named(options.experiment) if options.experiment in config.MODELS else experiment(options.experiment)
    run = config.override(run, options.changes)
    refused = "refuse" in (options.mesh.uneven, run.mesh.uneven)
    run = replace(run, mesh=replace(options.mesh, uneven="refuse" if refused else "whole"))
    found = plan(run, options.device, options.sample)
    print(table(found))
    if options.json:
        from radiance.weights.files import replacing

        with replacing(options.json) as part:
            part.write_text(json.dumps(found.as_json(), indent=2) + "\n")
    return 0
