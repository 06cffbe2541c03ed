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

import tests.helpers.type_checks  # noqa: F401  the hook imports only the folder

# Types and array shapes in signatures are checked at every call, except in these modules. After a
# change of this list, delete all __pycache__ folders: they hold the checked code.
UNCHECKED_MODULES = {
    "config": "sections convert and check their fields themselves, and raise ConfigError",
    "training.step": "JAX fills a TrainState with other objects than arrays, such as axes of vmap",
}
PACKAGE_FOLDER = Path(__file__).parents[1] / "radiance"


def _list_checked_modules() -> list[str]:
    """Return the names of all modules that are checked."""
    paths = sorted(path.relative_to(PACKAGE_FOLDER) for path in PACKAGE_FOLDER.rglob("[!_]*.py"))
    names = [".".join(path.with_suffix("").parts) for path in paths]
    unchecked = tuple(f"{name}." for name in UNCHECKED_MODULES)
    return [f"radiance.{name}" for name in names if not f"{name}.".startswith(unchecked)]


install_import_hook(_list_checked_modules(), "tests.helpers.type_checks.check_types")


def pytest_collection_finish():
    """Exclude the objects of imported modules from garbage collection."""
    gc.freeze()


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory) -> str:
    """Return the folder where datasets are prepared, once per session."""
    return str(tmp_path_factory.mktemp("data"))
