"""Join several hosts into one JAX process group, and wait for each other at the end."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from radiance import config
from radiance.distributed import environment

BARRIER_TIMEOUT_MS = 7 * 24 * 3600 * 1000


def join_hosts(
    coordinator: str | None = None, num_hosts: int | None = None, host_index: int | None = None
):
    """Make this process one of several that compute together, before anything is computed.

    Without arguments, the hosts are found where SLURM, Open MPI, Kubernetes or Cloud TPU started
    the processes.

    Args:
        coordinator: Address and port of the first host.
        num_hosts: Number of hosts.
        host_index: Index of this host, from 0.

    Raises:
        ConfigError: When the hosts are not found, or the other hosts do not join.
    """
    try:
        jax.distributed.initialize(coordinator, num_hosts, host_index)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise config.ConfigError(
            f"This process could not join the others ({reason}): give --coordinator ADDRESS:PORT, "
            "--hosts N and --host I, with the same address and number on all hosts."
        ) from None


@contextmanager
def wait_for_hosts() -> Iterator[None]:
    """After the block, wait for all hosts, also when it raises an error.

    This is for hosts that work independently: five minutes after one has ended, JAX would end the
    others too.
    """
    try:
        yield
    finally:
        if jax.process_count() > 1 and not isinstance(sys.exception(), KeyboardInterrupt):
            from orbax.checkpoint import multihost

            multihost.get_barrier_sync_fn()(key="done", timeout_ms=BARRIER_TIMEOUT_MS)


def retain_freed_memory_on_cpu():
    """On CPUs, let this process keep the memory that it frees.

    It must be called after the hosts have joined, because it initializes the devices.
    """
    if jax.default_backend() == "cpu":
        environment.retain_freed_memory()
