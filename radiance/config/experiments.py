"""Load experiments by name, such as `experiments/quickstart.py` or `experiments.quickstart`."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from radiance.base.errors import ConfigError, RadianceError
from radiance.base.settings import override
from radiance.config.run import Config


def load_experiment(name: str) -> Config:
    """Return the config of an experiment.

    Args:
        name: EXPERIMENT[:VARIANT…]. EXPERIMENT is a file or a dotted module with a function
            `config()`. Variants are keys of its dictionary `VARIANTS`, whose changes are applied in
            the given order.

    Raises:
        ConfigError: When the experiment or a variant does not exist, its code fails, or a setting
            cannot work.
    """
    location, *variant_names = name.split(":")
    module = load_module(location)
    if not callable(getattr(module, "config", None)):
        raise ConfigError(f"{location} is not an experiment: it has no function config().")
    with _report_failure(location):
        run = module.config()
    if not isinstance(run, Config):
        raise ConfigError(
            f"config() of {location} returns {type(run).__name__}: return a radiance.config.Config."
        )
    variants = _read_variants(module, location)
    for variant in variant_names:
        if variant not in variants:
            raise ConfigError(
                f"{location} has no variant {variant!r}: it has {', '.join(variants) or 'none'}."
            )
        run = override(run, [f"name={run.name}-{variant}", *variants[variant]])
    return run


def _read_variants(module: ModuleType, location: str) -> dict[str, list[str]]:
    """Return the changes of each variant. Raise ConfigError if VARIANTS has another form."""
    variants = getattr(module, "VARIANTS", {})
    if not isinstance(variants, dict) or not all(
        isinstance(name, str)
        and isinstance(changes, list | tuple)
        and all(isinstance(change, str) for change in changes)
        for name, changes in variants.items()
    ):
        raise ConfigError(
            f"VARIANTS of {location} is not a dictionary of lists of changes: write "
            'VARIANTS = {"name": ["key=value"]}.'
        )
    return variants


def load_module(location: str) -> ModuleType:
    """Import a module, which may import the modules in its own folder, as a script does.

    Args:
        location: A file that ends with ".py", or a dotted name.

    Raises:
        ConfigError: When it does not exist, or its code fails.
    """
    path = Path(location)
    if path.suffix == ".py":
        return _load_file(path)
    if not all(name.isidentifier() for name in location.split(".")):
        raise ConfigError(_describe_missing(location))
    sys.path.insert(0, str(Path.cwd()))  # an installed command does not search there
    sys.path.append(str(Path.cwd().joinpath(*location.split(".")[:-1])))
    importlib.invalidate_caches()  # the file may have been written just now
    try:
        with _report_failure(location):
            return importlib.import_module(location)
    except ModuleNotFoundError as error:
        if error.name is None or not location.startswith(error.name):
            raise  # the experiment exists, but one of its own imports does not
        raise ConfigError(_describe_missing(location)) from None


def _describe_missing(location: str) -> str:
    return f"There is no experiment {location}: give a file such as experiments/quickstart.py."


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"There is no experiment file {path}.")
    sys.path.append(str(path.parent.absolute()))
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with _report_failure(str(path)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _report_failure(location: str) -> Iterator[None]:
    """Report errors of an experiment's own code in one sentence with the line of the file.

    Errors of settings and of missing packages remain, because they have such a sentence.

    Raises:
        ConfigError: The code failed.
    """
    try:
        yield
    except (RadianceError, ImportError):
        raise
    except SyntaxError as error:
        raise ConfigError(
            f"{error.filename or location} is not valid Python (line {error.lineno}: {error.msg})."
        ) from error
    except (Exception, SystemExit) as error:
        frames = filter(_is_experiment_code, traceback.extract_tb(error.__traceback__))
        lines = [f" in line {frame.lineno} of {frame.filename}" for frame in frames]
        raise ConfigError(
            f"The experiment {location} fails{lines[-1] if lines else ''} "
            f"({type(error).__name__}: {error}): correct it."
        ) from error


def _is_experiment_code(frame: traceback.FrameSummary) -> bool:
    """Return whether a frame is outside this package and the import system."""
    package = Path(__file__).parents[1]
    return Path(frame.filename).is_file() and package not in Path(frame.filename).parents
