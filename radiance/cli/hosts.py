"""This process: one of several hosts that run the same command."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from radiance import config, startup

PATIENCE = 7 * 24 * 3600 * 1000  # ms


def add_hosts(parser: argparse.ArgumentParser):
    """One process of several: this command, started on every host."""
    parser.add_argument("--hosts", help="how many hosts run this command; auto where SLURM, Kubernetes or Cloud TPU started them")
    parser.add_argument("--host", type=int, help="which one this is, from 0")
    parser.add_argument("--coordinator", metavar="ADDRESS:PORT", help="of host 0")


def join_hosts(options: argparse.Namespace) -> tuple[int, int]:
    """Which host this is, of how many."""
    import jax

    from radiance import sharding

    if options.hosts == "auto":
        sharding.join_hosts()
    elif options.hosts is not None:
        if not options.hosts.isdecimal():
            raise config.ConfigError(f"--hosts {options.hosts} is neither a number nor auto.")
        sharding.join_hosts(options.coordinator, int(options.hosts), options.host)
    elif options.host is not None or options.coordinator:
        raise config.ConfigError("--host and --coordinator are of several hosts: give --hosts N too.")
    return jax.process_index(), jax.process_count()


@contextmanager
def together(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """`join_hosts`, for hosts that work each by itself: one that is done, or has failed, waits for the others. Where one leaves, JAX ends those that
    are still at work five minutes later."""
    host, hosts = join_hosts(options)
    try:
        yield host, hosts
    finally:
        if hosts > 1 and not isinstance(sys.exception(), KeyboardInterrupt):
            from orbax.checkpoint import multihost

            multihost.get_barrier_sync_fn()(key="done", timeout_ms=PATIENCE)


def keep_memory():
    """On CPUs: this process keeps the memory that it frees. After the hosts have joined, which must come before JAX names its devices."""
    import jax

    if jax.default_backend() == "cpu":
        startup.keep_memory()
