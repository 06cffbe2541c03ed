"""This process: one of several hosts that run the same command."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from radiance import config
from radiance.distributed import environment, hosts

BARRIER_TIMEOUT_MS = 7 * 24 * 3600 * 1000  # ms


def add_host_arguments(parser: argparse.ArgumentParser):
    """One process of several: this command, started on every host."""
    parser.add_argument(
        "--hosts",
        help="how many hosts run this command; auto where SLURM, Kubernetes or Cloud TPU started them",
    )
    parser.add_argument("--host", type=int, help="which one this is, from 0")
    parser.add_argument("--coordinator", metavar="ADDRESS:PORT", help="of host 0")


def join_hosts_from_options(options: argparse.Namespace) -> tuple[int, int]:
    """Which host this is, of how many."""
    import jax

    if options.hosts == "auto":
        hosts.join_hosts()
    elif options.hosts is not None:
        if not options.hosts.isdecimal():
            raise config.ConfigError(f"--hosts {options.hosts} is neither a number nor auto.")
        hosts.join_hosts(options.coordinator, int(options.hosts), options.host)
    elif options.host is not None or options.coordinator:
        raise config.ConfigError(
            "--host and --coordinator are of several hosts: give --hosts N too."
        )
    return jax.process_index(), jax.process_count()


@contextmanager
def join_hosts_and_wait(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """`join_hosts`, for hosts that work each by itself: one that is done, or has failed, waits for the others. Where one leaves, JAX ends those that
    are still at work five minutes later.
    """
    host_index, num_hosts = join_hosts_from_options(options)
    try:
        yield host_index, num_hosts
    finally:
        if num_hosts > 1 and not isinstance(sys.exception(), KeyboardInterrupt):
            from orbax.checkpoint import multihost

            multihost.get_barrier_sync_fn()(key="done", timeout_ms=BARRIER_TIMEOUT_MS)


def retain_freed_memory_on_cpu():
    """On CPUs: this process keeps the memory that it frees. After the hosts have joined, which must come before JAX names its devices."""
    import jax

    if jax.default_backend() == "cpu":
        environment.retain_freed_memory()
