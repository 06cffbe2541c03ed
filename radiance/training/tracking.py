"""Report metrics and samples to TensorBoard and Weights & Biases, as `train.loggers` selects.

They receive the same numbers and images as the run directory.
"""

import importlib
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tqdm import tqdm

from radiance import config

LOGGER_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@runtime_checkable
class Logger(Protocol):
    """A service that receives the metrics and samples of a run."""

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Report numbers by name."""
        ...

    def write_samples(self, step: int, sheet: Image.Image, prompts: Sequence[str]) -> None:
        """Report a sheet of samples, one for each prompt."""
        ...

    def close(self) -> None:
        """End the report."""
        ...


def require_loggers(names: Iterable[str]) -> None:
    """Check that the packages of loggers are installed.

    Args:
        names: Keys of LOGGER_PACKAGES.

    Raises:
        ConfigError: A package is not installed.
    """
    for name in names:
        try:
            importlib.import_module(LOGGER_PACKAGES[name])
        except ImportError:
            raise config.ConfigError(
                f"train.loggers={name}, but {LOGGER_PACKAGES[name]} is not installed: "
                f"pip install radiance[{name}], or remove {name} from train.loggers."
            ) from None


class Loggers:
    """All loggers of a run, as one.

    An error of a logger never stops the run. The first error of each logger is printed, and later
    calls try again.

    Args:
        run: The run.
        step: Step at which the run starts or resumes.
    """

    def __init__(self, run: config.Config, step: int):
        self._loggers: dict[str, Logger] = {}
        self._failed_names: set[str] = set()
        logger_classes = {"tensorboard": TensorBoardLogger, "wandb": WandBLogger}
        for name in run.train.loggers:
            with self._suppress_errors(name):
                self._loggers[name] = logger_classes[name](run, step)

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Report numbers by name; lists and objects are flattened."""
        for name, logger in self._loggers.items():
            with self._suppress_errors(name):
                logger.write_metrics(step, flatten_metrics(metrics))

    def write_samples(self, step: int, sheet: Image.Image, prompts: Sequence[str]) -> None:
        """Report a sheet of samples, one for each prompt."""
        for name, logger in self._loggers.items():
            with self._suppress_errors(name):
                logger.write_samples(step, sheet, prompts)

    def close(self) -> None:
        """Close all loggers."""
        for name, logger in self._loggers.items():
            with self._suppress_errors(name):
                logger.close()

    @contextmanager
    def _suppress_errors(self, name: str) -> Iterator[None]:
        """Print the first error of a logger in place of raising it."""
        try:
            yield
        except Exception as error:  # of any kind, because the run matters more
            if name not in self._failed_names:
                first_line = (str(error).splitlines() or [""])[0]
                tqdm.write(
                    f"radiance: {name} failed ({type(error).__name__}: {first_line}); "
                    "the run continues, and further errors are not printed.",
                    sys.stderr,
                )
            self._failed_names.add(name)


class TensorBoardLogger:
    """Event files in tensorboard/ of the run directory.

    Steps that are repeated after a crash replace what was written before.

    Args:
        run: The run.
        step: Step at which the run starts or resumes.
    """

    def __init__(self, run: config.Config, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=step + 1)

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report numbers by name."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def write_samples(self, step: int, sheet: Image.Image, prompts: Sequence[str]) -> None:
        """Report a sheet of samples; prompts are not shown."""
        self._writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandBLogger:
    """A W&B run that continues whenever the run directory's run resumes.

    wandb/id.txt stores its id. The project is $WANDB_PROJECT, or radiance. With WANDB_MODE=offline,
    the data stay in wandb/ until `wandb sync`. If steps are repeated after a crash, W&B keeps their
    first values.

    Args:
        run: The run.
        step: Step at which the run starts or resumes.
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
            allow_val_change=True,  # some settings may change when a run resumes
        )

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report numbers by name."""
        self._run.log(dict(metrics), step=step)

    def write_samples(self, step: int, sheet: Image.Image, prompts: Sequence[str]) -> None:
        """Report a sheet of samples with its prompts as caption."""
        self._run.log({"samples": self._image_class(sheet, caption="\n".join(prompts))}, step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers by name; those of a list or an object become name/0 or name/key."""
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
    """Return the id that a file stores, or write a new one."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n", "utf-8")
    return path.read_text("utf-8").strip()
