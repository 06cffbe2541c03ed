"""Settings of JAX, and checks of array types, for all tests."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# These are set before JAX is imported, and also for the processes that tests start. Compiled
# programs are cached, because toy models take more time to compile than to run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Toy models compile three times as fast without LLVM's optimizations, and still faster with the
# older code generator. Only some versions have it, and an unknown flag would end the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)

import pytest
from jaxtyping import install_import_hook

# Types and array shapes in signatures are checked at every call of these modules. Not checked are
# modules whose annotations beartype cannot check at run time: `typing.Self` (base.settings), the
# data source, a Protocol with properties (data, and modules that import it), train states, into
# which JAX puts other objects than arrays (training.step), and functions that tests call with stubs
# of the network (the rest of flow).
CHECKED_MODULES = (  # after a change, delete all __pycache__ folders: they hold checked code
    "base.images",
    "base.random",
    "distributed",
    "flow.coupling",
    "flow.objective",
    "flow.schedules",
    "flow.solvers",
    "flow.timesteps",
    "model",
    "shapes",
    "text",
    "training.adam",
    "training.ema",
    "training.muon",
    "training.stochastic_rounding",
)
install_import_hook([f"radiance.{name}" for name in CHECKED_MODULES], "beartype.beartype")


def pytest_collection_finish():
    """Exclude the objects of imported modules from garbage collection."""
    gc.freeze()


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory) -> str:
    """Return the folder where datasets are prepared, once per session."""
    return str(tmp_path_factory.mktemp("data"))
