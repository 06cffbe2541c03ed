"""TensorBoard and Weights & Biases, where `train.track` asks for them: the same numbers and pictures as in the run directory."""

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

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def require_trackers(names: Iterable[str]):
    """Raises ConfigError when one is not installed."""
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise config.ConfigError(
                f"train.track={name}, but {PACKAGES[name]} is not installed: pip install radiance[{name}], or leave it out."
            ) from None


class Trackers:
    """Those that a run asks for. A failure of theirs never ends the run: the first of each is told, and the next call is tried again."""

    def __init__(self, run: config.Config, step: int):
        """step: after which this start goes on."""
        self._open: dict[str, TensorBoard | WandB] = {}
        self._failed: set[str] = set()
        for name in run.train.track:
            with self._surviving(name):
                self._open[name] = {"tensorboard": TensorBoard, "wandb": WandB}[name](run, step)

    def write(self, step: int, numbers: Mapping[str, Any]):
        for name, tracker in self._open.items():
            with self._surviving(name):
                tracker.write(step, flat(numbers))

    def paint(self, step: int, sheet: Image.Image, prompts: Sequence[str]):
        for name, tracker in self._open.items():
            with self._surviving(name):
                tracker.paint(step, sheet, prompts)

    def close(self):
        for name, tracker in self._open.items():
            with self._surviving(name):
                tracker.close()

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: the run is worth more
            if name not in self._failed:
                told = (str(error).splitlines() or [""])[0]
                tqdm.write(f"radiance: {name} failed ({type(error).__name__}: {told}); the run goes on, and this is told once.", sys.stderr)
            self._failed.add(name)


class TensorBoard:
    """Event files in tensorboard/ of the run directory; what is done again after a kill replaces what was written before."""

    def __init__(self, run: config.Config, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, float]):
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def paint(self, step: int, sheet: Image.Image, prompts: Sequence[str]):
        self._writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

    def close(self):
        self._writer.close()


class WandB:
    """A W&B run that every start of the same run directory goes on with: its id is kept in wandb/id.txt. The project is $WANDB_PROJECT, or radiance;
    with WANDB_MODE=offline it stays in wandb/ until `wandb sync`. Steps that are done again after a kill are left as W&B has them."""

    def __init__(self, run: config.Config, step: int):
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "radiance"),
            name=run.name,
            id=_kept_id(run.directory / "wandb" / "id.txt"),
            resume="allow",
            dir=str(run.directory),
            config=config.to_dict(run),
            allow_val_change=True,  # of what may change between a run and its continuation
        )

    def write(self, step: int, numbers: Mapping[str, float]):
        self._run.log(dict(numbers), step=step)

    def paint(self, step: int, sheet: Image.Image, prompts: Sequence[str]):
        self._run.log({"samples": self._image(sheet, caption="\n".join(prompts))}, step=step)

    def close(self):
        self._run.finish()


def flat(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name; those of a list or an object as name/0 or name/key."""
    found = {}
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            found |= flat({f"{name}/{key}": x for key, x in value.items()})
        elif isinstance(value, Sequence):
            found |= flat({f"{name}/{i}": x for i, x in enumerate(value)})
        else:
            found[name] = value
    return found


def _kept_id(path: Path) -> str:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
