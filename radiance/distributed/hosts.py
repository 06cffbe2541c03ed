"""Join several hosts into one JAX process group."""

import jax

from radiance import config


def join_hosts(
    coordinator: str | None = None, num_hosts: int | None = None, host_index: int | None = None
):
    """Makes this process one of several that compute together. To be called before anything is computed.

    coordinator: address and port of the first of them; hosts: their number; host: which one this is. With none of them, they are
    found where SLURM, Open MPI, Kubernetes or Cloud TPU started the processes. Raises ConfigError when they are not, or when the
    others do not come.
    """
    try:
        jax.distributed.initialize(coordinator, num_hosts, host_index)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise config.ConfigError(
            f"This process could not join the others ({reason}): give --coordinator ADDRESS:PORT, --hosts N and --host I, the same "
            "address and number to all."
        ) from None
