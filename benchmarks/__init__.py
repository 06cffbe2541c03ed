"""Measure speed beside named peers and the device's limits, and memory.

Run one with `python -m benchmarks.sampling`. Nothing imports this package.
"""

import os

from radiance.distributed.environment import prepare_environment, retain_freed_memory

# Before JAX starts: the flags that `radiance` sets, and room for PyTorch in the same GPU's memory.
prepare_environment()
retain_freed_memory()  # as training and sampling do on CPUs; PyTorch's rows share it
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
