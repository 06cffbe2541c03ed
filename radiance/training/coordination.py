"""Coordination of a training with signals and with other hosts."""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from radiance import config
from radiance.base.errors import OutputError, TrainingError
from radiance.base.locks import LOCK_NAME, hold_lock
from radiance.training.checkpoints import Checkpoints
from radiance.training.seed_checkpoints import SeedCheckpoints


def is_any_host_stopping(stop_event: threading.Event, step: int, every: int) -> bool:
    """Return whether any host was asked to stop.

    Args:
        stop_event: Event of this host.
        step: Number of steps done.
        every: Interval at which hosts exchange their events, so that all stop after the same step.
    """
    if jax.process_count() == 1:
        return stop_event.is_set()
    return step % every == 0 and bool(
        multihost_utils.process_allgather(np.array(stop_event.is_set())).any()
    )


@contextmanager
def lock_run_directory(path: Path) -> Iterator[None]:
    """Hold the lock of a run directory during the block; the first host holds it for all.

    Raises:
        OutputError: Another process trains there.
    """
    remedy = "Wait until it ends, or choose another name=."
    error = None
    with ExitStack() as stack:
        try:
            if jax.process_index() == 0:
                stack.enter_context(hold_lock(path / LOCK_NAME, str(path), remedy))
        except OutputError as lock_error:
            error = lock_error
        if jax.process_count() > 1:
            is_failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
            if is_failed and error is None:
                error = OutputError(f"The first host could not lock {path}: see its message.")
        if error is not None:
            raise error
        yield


@contextmanager
def exit_if_host_fails(checkpoints: Checkpoints | SeedCheckpoints) -> Iterator[None]:
    """End this process at once after an error that other hosts do not have.

    Without one of the hosts nothing can be computed or saved, and an ordinary exit of JAX would
    wait for it for minutes.
    """
    try:
        yield
    except Exception as error:
        # All hosts raise the same TrainingError.
        if jax.process_count() == 1 or isinstance(error, TrainingError):
            raise
        latest = checkpoints.latest_complete_step
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        print(
            f"radiance: another host has failed, or this one cannot continue ({reason}): start all "
            "hosts again with the same command, which resumes "
            f"from {'the beginning' if latest is None else f'step {latest}'}.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def check_hosts_agree(data: Mapping[str, Any]):
    """Raise ConfigError if hosts have different data, because their batches would not match.

    Args:
        data: JSON values by name.
    """
    if jax.process_count() == 1:
        return
    hashes = [
        hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
        for value in data.values()
    ]
    own_hashes = np.stack([np.frombuffer(value, np.uint8) for value in hashes])
    all_hashes = multihost_utils.process_allgather(own_hashes)  # [hosts, names, bytes]
    is_different = (all_hashes != all_hashes[0]).any(axis=(0, 2))
    if names := [name for name, different in zip(data, is_different) if different]:
        raise config.ConfigError(
            f"The hosts do not see the same data ({', '.join(names)}): check data.path on each, "
            "and remove data.cache_dir where it is outdated."
        )


@contextmanager
def handle_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or Ctrl-C sets; a second signal ends the process at once."""
    stop_event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_event
        return
    old_handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}

    def restore_handlers(*_):
        for kind, handler in old_handlers.items():
            signal.signal(kind, handler)

    def stop(*_):
        stop_event.set()
        restore_handlers()

    for kind in old_handlers:
        signal.signal(kind, stop)
    try:
        yield stop_event
    finally:
        restore_handlers()
