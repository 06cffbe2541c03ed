"""TensorBoard and Weights & Biases, where `train.loggers` asks for them: the same numbers and images as in the run directory."""

import importlib
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from radiance import config

LOGGER_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def require_loggers(names: Iterable[str]):
    """Raises ConfigError when one is not installed."""
    for name in names:
        try:
            importlib.import_module(LOGGER_PACKAGES[name])
        except ImportError:
            raise config.ConfigError(
                f"train.loggers={name}, but {LOGGER_PACKAGES[name]} is not installed: pip install radiance[{name}], or leave it out."
            ) from None


class Loggers:
    """Those that a run asks for. A failure of theirs never ends the run: the first of each is told, and the next call is tried again."""

    def __init__(self, run: config.Config, step: int):
        """step: after which this start goes on."""
        self._loggers: dict[str, TensorBoardLogger | WandBLogger] = {}
        self._failed_names: set[str] = set()
        for name in run.train.loggers:
            with self._suppress_errors(name):
                self._loggers[name] = {"tensorboard": TensorBoardLogger, "wandb": WandBLogger}[
                    name
                ](run, step)

    def write_metrics(self, step: int, metrics: Mapping[str, Any]):
        for name, logger in self._loggers.items():
            with self._suppress_errors(name):
                logger.write_metrics(step, flatten_metrics(metrics))

    def write_samples(self, step: int, sheet: Image.Image, prompts: Sequence[str]):
        for name, logger in self._loggers.items():
            with self._suppress_errors(name):
                logger.write_samples(step, sheet, prompts)

    def close(self):
        for name, logger in self._loggers.items():
            with self._suppress_errors(name):
                logger.close()

    @contextmanager
    def _suppress_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: the run is worth more
            if name not in self._failed_names:
                first_line = (str(error).splitlines() or [""])[0]
                tqdm.write(
                    f"radiance: {name} failed ({type(error).__name__}: {first_line}); the run goes on, and this is told once.",
                    sys.stderr,
                )
            self._failed_names.add(name)


class TensorBoardLogger:
    """Event files in tensorboard/ of the run directory; what is done again after a kill replaces what was written before."""

    def __init__(self, run: config.Config, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=step + 1)

    def write_metrics(self, step: int, metrics: Mapping[str, float]):
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def write_samples(self, step: int, sheet: Image.Image, prompts: Sequence[str]):
        self._writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

    def close(self):
        self._writer.close()


class WandBLogger:
    """A W&B run that every start of the same run directory goes on with: its id is kept in wandb/id.txt. The project is $WANDB_PROJECT, or radiance;
    with WANDB_MODE=offline it stays in wandb/ until `wandb sync`. Steps that are done again after a kill are left as W&B has them.
    """

    def __init__(self, run: config.Config, step: int):
        import wandb

        self._image_class = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "radiance"),
            name=run.name,
            id=_load_or_create_id(run.run_dir / "wandb" / "id.txt"),
            resume="allow",
            dir=str(run.run_dir),
            config=config.to_dict(run),
            allow_val_change=True,  # of what may change between a run and its continuation
        )

    def write_metrics(self, step: int, metrics: Mapping[str, float]):
        self._run.log(dict(metrics), step=step)

    def write_samples(self, step: int, sheet: Image.Image, prompts: Sequence[str]):
        self._run.log({"samples": self._image_class(sheet, caption="\n".join(prompts))}, step=step)

    def close(self):
        self._run.finish()


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name; those of a list or an object as name/0 or name/key."""
    flat_metrics = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat_metrics |= flatten_metrics({f"{name}/{key}": x for key, x in value.items()})
        elif isinstance(value, Sequence):
            flat_metrics |= flatten_metrics({f"{name}/{i}": x for i, x in enumerate(value)})
        else:
            flat_metrics[name] = value
    return flat_metrics


def _load_or_create_id(path: Path) -> str:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
