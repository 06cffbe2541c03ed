"""Experiments by name: `experiments/quickstart.py`, `experiments.quickstart`, either with `:ARM`."""

import importlib
import importlib.util
import sys
from pathlib import Path

from radiance import config


def experiment(name: str) -> config.Config:
    """The config of EXPERIMENT[:ARM]: a file or dotted module with `config()`, and in `ARMS` the changes that each arm makes."""
    where, _, arm = name.rpartition(":") if ":" in name else (name, "", "")
    path = Path(where)
    if path.suffix == ".py":
        if not path.is_file():
            raise config.ConfigError(f"There is no experiment file {path}.")
        spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not where.startswith(error.name):
                raise  # the experiment is there, and misses something itself
            raise config.ConfigError(f"There is no experiment {where}: give a file such as experiments/quickstart.py ({error}).") from None
    if not hasattr(module, "config"):
        raise config.ConfigError(f"{where} is no experiment: it has no config().")
    run = module.config()
    if not arm:
        return run
    arms = getattr(module, "ARMS", {})
    if arm not in arms:
        raise config.ConfigError(f"{where} has no arm {arm!r}: it has {', '.join(arms) or 'none'}.")
    return config.override(run, [f"name={run.name}-{arm}", *arms[arm]])
