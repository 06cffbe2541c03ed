"""Experiments by name: `experiments/quickstart.py`, `experiments.quickstart`, either with `:ARM`, or several."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from radiance import config


def experiment(name: str) -> config.Config:
    """The config of EXPERIMENT[:ARM…]: a file or dotted module with `config()`, and in `ARMS` the changes that each arm makes, in their
    order."""
    where, *arms = name.split(":")
    module = loaded(where)
    if not hasattr(module, "config"):
        raise config.ConfigError(f"{where} is no experiment: it has no config().")
    run, known = module.config(), getattr(module, "ARMS", {})
    for arm in arms:
        if arm not in known:
            raise config.ConfigError(f"{where} has no arm {arm!r}: it has {', '.join(known) or 'none'}.")
        run = config.override(run, [f"name={run.name}-{arm}", *known[arm]])
    return run


def loaded(where: str) -> ModuleType:
    """The module of a file or dotted name. It may import those beside it, as a script does."""
    path = Path(where)
    if path.suffix == ".py":
        if not path.is_file():
            raise config.ConfigError(f"There is no experiment file {path}.")
        sys.path.append(str(path.parent.absolute()))
        spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there
    sys.path.append(str(Path.cwd().joinpath(*where.split(".")[:-1])))
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not where.startswith(error.name):
            raise  # the experiment is there, and misses something itself
        raise config.ConfigError(f"There is no experiment {where}: give a file such as experiments/quickstart.py ({error}).") from None
