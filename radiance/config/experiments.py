"""Experiments by name: `experiments/quickstart.py`, `experiments.quickstart`, either with `:ARM`, or several."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from radiance import config


def load_experiment(name: str) -> config.Config:
    """The config of EXPERIMENT[:ARM…]: a file or dotted module with `config()`, and in `VARIANTS` the changes that each arm makes, in their
    order.
    """
    location, *variant_names = name.split(":")
    module = load_module(location)
    if not hasattr(module, "config"):
        raise config.ConfigError(f"{location} is no experiment: it has no config().")
    run, variants = module.config(), getattr(module, "VARIANTS", {})
    for variant in variant_names:
        if variant not in variants:
            raise config.ConfigError(
                f"{location} has no arm {variant!r}: it has {', '.join(variants) or 'none'}."
            )
        run = config.override(run, [f"name={run.name}-{variant}", *variants[variant]])
    return run


def load_module(location: str) -> ModuleType:
    """The module of a file or dotted name. It may import those beside it, as a script does."""
    path = Path(location)
    if path.suffix == ".py":
        if not path.is_file():
            raise config.ConfigError(f"There is no experiment file {path}.")
        sys.path.append(str(path.parent.absolute()))
        spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there
    sys.path.append(str(Path.cwd().joinpath(*location.split(".")[:-1])))
    try:
        return importlib.import_module(location)
    except ModuleNotFoundError as error:
        if error.name is None or not location.startswith(error.name):
            raise  # the experiment is there, and misses something itself
        raise config.ConfigError(
            f"There is no experiment {location}: give a file such as experiments/quickstart.py ({error})."
        ) from None
