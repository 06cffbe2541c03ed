"""The command line: `radiance VERB …`, also `python -m radiance VERB …`.

A verb is a module with two functions. `add_parser` declares its arguments, and `main` executes it.
Nothing here may import JAX before the environment is prepared.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from radiance import __version__
from radiance.cli import (
    ablate,
    config,
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
from radiance.cli.failures import (
    EXIT_INTERRUPTED,
    OneLineParser,
    escape_unencodable_output,
    flush_output,
    report_error,
)
from radiance.distributed.environment import prepare_environment, prepare_plan_environment

__all__ = ["main", "make_parser", "parse_arguments"]

DESCRIPTION = (
    "Train, sample, evaluate, convert and compare pixel-space text-to-image transformers. "
    "`radiance VERB --help` describes a verb."
)
# The verbs, in the order of the help.
COMMANDS = (
    *(train, ablate, encode, sample, evaluate, plan),
    *(convert, inspect, report, verify, config),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute a command, and report errors that a user can correct in one sentence.

    Args:
        arguments: Words of the command line; those of this process when None.

    Returns:
        The exit code: 2 after an error of the input, 70 after a fault of this package, 130 after
        Ctrl-C, 141 when the reader of the output has ended, 143 after SIGTERM.

    Raises:
        SystemExit: The command line is malformed, with code 2.
    """
    words = sys.argv[1:] if arguments is None else arguments
    escape_unencodable_output()
    try:
        try:
            return _execute(parse_arguments(words))
        finally:
            flush_output()
    except KeyboardInterrupt:
        print("radiance: stopped by Ctrl-C.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        return report_error(error, words)


def _execute(options: argparse.Namespace) -> int:
    """Execute a parsed command in a prepared environment, and return the exit code."""
    if options.run is plan.main:
        mesh = options.mesh
        num_devices = max(mesh.data, 1) * max(mesh.fsdp, 1) * max(mesh.tensor, 1)
        prepare_plan_environment(options.device, num_devices)
    prepare_environment(multi_process=getattr(options, "hosts", None) is not None)
    if options.run is train.main:  # which stops after a complete step
        return options.run(options)
    with _clean_up_on_signals():
        return options.run(options)


@contextmanager
def _clean_up_on_signals() -> Iterator[None]:
    """Inside the block, SIGTERM and Ctrl-C remove unfinished files and end the process."""
    previous_handlers = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    previous_handlers[signum] = signal.signal(signum, _handle_signal)
        yield
    finally:
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)


def _handle_signal(signum: int, *_):
    """Remove unfinished files and end the process.

    An exception would not do: raised inside a destructor or a callback of the garbage collector,
    it would be printed and ignored.
    """
    from radiance.base.files import remove_temp_paths

    remove_temp_paths()
    if signum == signal.SIGINT:
        os.write(2, b"radiance: stopped by Ctrl-C.\n")
    os._exit(128 + signum)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line, where key=value changes may follow flags too."""
    parser = make_parser()
    options, extra_words = parser.parse_known_args(arguments)
    if extra_words:
        is_change = [not word.startswith("-") and "=" in word for word in extra_words]
        if not hasattr(options, "changes") or not all(is_change):
            parser.error(f"unrecognized arguments: {' '.join(extra_words)}")
        options.changes = [*options.changes, *extra_words]
    return options


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OneLineParser(prog="radiance", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"radiance {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser
