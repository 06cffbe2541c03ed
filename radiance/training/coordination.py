"""Coordinate hosts and signals of a training run."""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from radiance import config
from radiance.base.errors import TrainingError
from radiance.training.checkpoints import Checkpoints


def is_any_host_stopping(stop_event: threading.Event, step: int, every: int) -> bool:
    """Whether any host was asked to stop. Hosts agree on it now and then, so that all stop after the same step."""
    if jax.process_count() == 1:
        return stop_event.is_set()
    return step % every == 0 and bool(
        multihost_utils.process_allgather(np.array(stop_event.is_set())).any()
    )


@contextmanager
def exit_if_host_fails(checkpoints: Checkpoints) -> Iterator[None]:
    """Ends this process at once when another host is gone: without it nothing can be computed or saved, and what waits for it, as JAX does
    at an ordinary end, would wait for minutes.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, TrainingError):  # which all hosts raise
            raise
        latest = checkpoints.latest_complete_step
        print(
            f"radiance: another host is gone, or this one cannot go on ({str(error).splitlines()[0][:300]}): start all hosts again with the same "
            f"command, which goes on from {'the beginning' if latest is None else f'step {latest}'}.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def check_hosts_agree(data: Mapping[str, Any]):
    """Raises ConfigError where hosts see other data than the first: each would have an order of its own."""
    if jax.process_count() == 1:
        return
    ours = np.stack(
        [
            np.frombuffer(
                hashlib.sha256(json.dumps(part, sort_keys=True).encode()).digest(), np.uint8
            )
            for part in data.values()
        ]
    )
    of_all = multihost_utils.process_allgather(ours)  # [hosts, parts, bytes]
    if other := [name for i, name in enumerate(data) if (of_all[:, i] != of_all[0, i]).any()]:
        raise config.ConfigError(
            f"The hosts do not see the same data ({', '.join(other)}): look at data.path on each, and remove data.cache_dir where it is stale."
        )


@contextmanager
def handle_signals() -> Iterator[threading.Event]:
    """Inside, SIGTERM and Ctrl-C ask for a clean stop after the step at hand; a second one stops at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}

    def restore(*_):
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def stop(*_):
        stopping.set()
        restore()

    for kind in before:
        signal.signal(kind, stop)
    try:
        yield stopping
    finally:
        restore()
