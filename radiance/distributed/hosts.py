"""Join several hosts into one JAX process group."""

import jax

from radiance import config


def join_hosts(
    coordinator: str | None = None, num_hosts: int | None = None, host_index: int | None = None
):
    """Make this process one of several that compute together, before it computes anything.

    Without arguments, they are detected where SLURM, Open MPI, Kubernetes or Cloud TPU started the
    processes.

    Args:
        coordinator: Address and port of the first host.
        num_hosts: Number of hosts.
        host_index: Index of this host, from 0.

    Raises:
        ConfigError: The arguments cannot be detected, or the other hosts do not answer.
    """
    try:
        jax.distributed.initialize(coordinator, num_hosts, host_index)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise config.ConfigError(
            f"This process could not join the others ({reason}): give --coordinator ADDRESS:PORT, "
            "--hosts N and --host I, with the same address and number to all."
        ) from None
