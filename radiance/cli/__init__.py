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
from radiance.cli import (
    ablate,
    convert,
    encode,
    evaluate,
    inspect,
    plan,
    report,
    sample,
    train,
    verify,
)
from radiance.config.experiments import load_experiment
from radiance.distributed.environment import prepare_environment, prepare_plan_environment

__all__ = ["load_experiment", "main"]

COMMANDS = (
    train,
    ablate,
    encode,
    sample,
    evaluate,
    plan,
    convert,
    inspect,
    report,
    verify,
)  # as the help lists them


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. What the user can mend is told in one sentence, with exit code 2; 130 after Ctrl-C and 143 after SIGTERM."""
    options = _parse_arguments(arguments)
    if options.run is plan.main:
        prepare_plan_environment(
            options.device,
            max(options.mesh.data, 1) * max(options.mesh.fsdp, 1) * max(options.mesh.tensor, 1),
        )
    prepare_environment(multi_process=getattr(options, "hosts", None) is not None)
    from radiance.base.errors import CheckpointError, TextError, TrainingError
    from radiance.data.datasets import DataError

    previous_handlers = {}
    try:
        if options.run is not train.main and threading.current_thread() is threading.main_thread():
            signals = (
                signum
                for signum in (signal.SIGTERM, signal.SIGINT)
                if signal.getsignal(signum) is not signal.SIG_IGN
            )
            previous_handlers = {
                signum: signal.signal(signum, _handle_signal) for signum in signals
            }
        return options.run(options)
    except KeyboardInterrupt:
        print("radiance: stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except (
        config.ConfigError,
        CheckpointError,
        DataError,
        TextError,
        TrainingError,
        ImportError,
        OSError,
    ) as error:
        print(f"radiance: {error}", file=sys.stderr)
        return 2
    finally:
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)


def _handle_signal(signum: int, *_):
    """An end by SIGTERM or Ctrl-C that removes what is half written; training has a way of its own to stop.

    No exception: raised inside a destructor or a callback of the garbage collector it would be told and forgotten.
    """
    from radiance.base.files import remove_temp_paths

    remove_temp_paths()
    if signum == signal.SIGINT:
        os.write(2, b"radiance: stopped by Ctrl-C.\n")
    os._exit(128 + signum)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse, with key=value changes allowed among and behind the flags too."""
    parser = _make_parser()
    options, extra_words = parser.parse_known_args(arguments)
    if extra_words and (
        not hasattr(options, "changes")
        or any(word.startswith("-") or "=" not in word for word in extra_words)
    ):
        parser.error(f"unrecognized arguments: {' '.join(extra_words)}")
    if extra_words:
        options.changes += extra_words
    return options


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="radiance", description=__doc__.partition("\n")[0])
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser
