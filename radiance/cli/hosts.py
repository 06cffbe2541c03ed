"""Arguments of commands that run on several hosts."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from radiance import config


def add_host_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of a command that is started on every host."""
    parser.add_argument(
        "--hosts",
        metavar="N",
        help="number of hosts that run this command; auto where SLURM, Kubernetes or Cloud TPU "
        "started them",
    )
    parser.add_argument("--host", type=int, metavar="I", help="index of this host, from 0")
    parser.add_argument("--coordinator", metavar="ADDRESS:PORT", help="address and port of host 0")


def join_hosts_from_options(options: argparse.Namespace) -> tuple[int, int]:
    """Join the hosts that the options name, and return the index and the number of hosts."""
    import jax

    from radiance.distributed.hosts import join_hosts

    if options.hosts == "auto":
        join_hosts()
    elif options.hosts is not None:
        if not options.hosts.isdecimal():
            raise config.ConfigError(f"--hosts {options.hosts} is neither a number nor auto.")
        join_hosts(options.coordinator, int(options.hosts), options.host)
    elif options.host is not None or options.coordinator:
        raise config.ConfigError(
            "--host and --coordinator are for several hosts: give --hosts N too."
        )
    return jax.process_index(), jax.process_count()


@contextmanager
def join_independent_hosts(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Join hosts that work independently, and wait for all of them after the block.

    Yields:
        The index of this host and the number of hosts.
    """
    from radiance.distributed.hosts import retain_freed_memory_on_cpu, wait_for_hosts

    host_index, num_hosts = join_hosts_from_options(options)
    with wait_for_hosts():
        retain_freed_memory_on_cpu()
        yield host_index, num_hosts
