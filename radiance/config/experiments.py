"""Load experiments by name, such as `experiments/quickstart.py` or `experiments.quickstart`."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from radiance.base.errors import ConfigError
from radiance.base.settings import override
from radiance.config.run import Config


def load_experiment(name: str) -> Config:
    """Return the config of an experiment.

    Args:
        name: EXPERIMENT[:VARIANT…]. EXPERIMENT is a file or a dotted module with a function
            `config()`. Variants are keys of its dictionary `VARIANTS`, whose changes are applied in
            the given order.

    Raises:
        ConfigError: When the experiment or a variant does not exist, or a setting cannot work.
    """
    location, *variant_names = name.split(":")
    module = load_module(location)
    if not hasattr(module, "config"):
        raise ConfigError(f"{location} is not an experiment: it has no function config().")
    run, variants = module.config(), getattr(module, "VARIANTS", {})
    for variant in variant_names:
        if variant not in variants:
            raise ConfigError(
                f"{location} has no variant {variant!r}: it has {', '.join(variants) or 'none'}."
            )
        run = override(run, [f"name={run.name}-{variant}", *variants[variant]])
    return run


def load_module(location: str) -> ModuleType:
    """Import a module, which may import the modules in its own folder, as a script does.

    Args:
        location: A file that ends with ".py", or a dotted name.

    Raises:
        ConfigError: When it does not exist.
    """
    path = Path(location)
    if path.suffix == ".py":
        return _load_file(path)
    sys.path.insert(0, str(Path.cwd()))  # an installed command does not search there
    sys.path.append(str(Path.cwd().joinpath(*location.split(".")[:-1])))
    try:
        return importlib.import_module(location)
    except ModuleNotFoundError as error:
        if error.name is None or not location.startswith(error.name):
            raise  # the experiment exists, but one of its own imports does not
        raise ConfigError(
            f"There is no experiment {location}: give a file such as experiments/quickstart.py "
            f"({error})."
        ) from None


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"There is no experiment file {path}.")
    sys.path.append(str(path.parent.absolute()))
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
