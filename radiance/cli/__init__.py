"""`radiance train · ablate · encode · sample · evaluate · plan · convert · inspect · report · verify` (also `python -m radiance`).

A verb is a module with `add`, which tells argparse its arguments, and `main`. Nothing here may import JAX before `prepare`.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence

from radiance import config
from radiance.cli import ablate, convert, encode, evaluate, inspect, plan, report, sample, train, verify
from radiance.cli.experiments import experiment
from radiance.startup import prepare, prepare_plan

__all__ = ["experiment", "main"]

VERBS = (train, ablate, encode, sample, evaluate, plan, convert, inspect, report, verify)  # as the help lists them


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. What the user can mend is told in one sentence, with exit code 2; 130 after Ctrl-C and 143 after SIGTERM."""
    options = _parse(arguments)
    if options.run is plan.main:
        prepare_plan(options.device, max(options.mesh.data, 1) * max(options.mesh.fsdp, 1) * max(options.mesh.tensor, 1))
    prepare(several=getattr(options, "hosts", None) is not None)
    from radiance.data.datasets import DataError
    from radiance.text.encoders import TextError
    from radiance.training.loop import TrainingError
    from radiance.weights.files import CheckpointError

    handlers = {}
    try:
        if options.run is not train.main and threading.current_thread() is threading.main_thread():
            heard = (number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN)
            handlers = {number: signal.signal(number, _end) for number in heard}
        return options.run(options)
    except KeyboardInterrupt:
        print("radiance: stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except (config.ConfigError, CheckpointError, DataError, TextError, TrainingError, ImportError, OSError) as error:
        print(f"radiance: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, *_):
    """An end by SIGTERM or Ctrl-C that removes what is half written; training has a way of its own to stop.

    No exception: raised inside a destructor or a callback of the garbage collector it would be told and forgotten.
    """
    from radiance.weights.files import remove_unfinished

    remove_unfinished()
    if number == signal.SIGINT:
        os.write(2, b"radiance: stopped by Ctrl-C.\n")
    os._exit(128 + number)


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
    parser = argparse.ArgumentParser(prog="radiance", description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return parser
