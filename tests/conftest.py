import gc
import os
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported, and for the processes that tests start: programs are compiled once and kept, for compiling is what
# takes the time at toy size.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Toys compile three times as fast without LLVM's optimisations, and faster again with the older code generator where there is one:
# an unknown flag would end the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)

import pytest
from jaxtyping import install_import_hook

# The shapes in the signatures are checked at every call of a test.
install_import_hook([f"radiance.{room}" for room in ("model", "images")], "beartype.beartype")


def pytest_collection_finish():
    """What the imports have made is no garbage to the end."""
    gc.freeze()


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory) -> str:
    """Where data sets are prepared, once a session."""
    return str(tmp_path_factory.mktemp("data"))
