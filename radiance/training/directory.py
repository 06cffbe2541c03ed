"""The run directory: what was asked, on what, with what data, and what came of it."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from radiance import config

# What may change between a run and its continuation.
FREE = ("output", "compute.", "sample.", "mesh.", "data.directory", "data.threads", "train.steps", "train.init") + tuple(
    f"train.{name}" for name in ("log_every", "validate_every", "sample_every", "sample_prompts", "checkpoint_every", "keep", "keep_every", "skip_limit")
)  # fmt: skip


class RunDirectory:
    def __init__(self, path: Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.metrics = self.path / "metrics.jsonl"

    def read_config(self) -> config.Config:
        """The resolved config of the run. Raises ConfigError when this is no run directory."""
        file = self.path / "config.json"
        if not file.is_file():
            raise config.ConfigError(f"{self.path} is not a run directory: it has no config.json.")
        return config.from_json(config.Config, file.read_text())

    def open(self, run: config.Config, data: Mapping[str, Any]):
        """Makes the directory, or checks that the run in it is this one; records the command, the environment and the data."""
        if (self.path / "config.json").is_file():
            changed = {k: v for k, v in config.differences(self.read_config(), run).items() if not k.startswith(FREE)}
            if changed:
                told = ", ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
                raise config.ConfigError(
                    f"{self.path} holds a run of another config ({told}): give this one another name=, or remove the directory."
                )
        self.samples.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(config.to_json(run))
        with (self.path / "command.txt").open("a") as file:
            file.write(shlex.join(sys.argv) + "\n")
        (self.path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        (self.path / "data.json").write_text(json.dumps(data, indent=2) + "\n")

    def cut_metrics(self, step: int):
        """Forgets what was measured after `step`, which is going to be done again; a line cut short by a kill goes too."""
        if not self.metrics.exists():
            return
        lines = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
            except json.JSONDecodeError:
                break
        self.metrics.write_text("".join(lines))


class Journal:
    """metrics.jsonl, one object a line, and the same numbers for TensorBoard where tensorboardX is installed."""

    def __init__(self, directory: RunDirectory, step: int):
        directory.cut_metrics(step)
        self._file = directory.metrics.open("a")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(directory.path / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, Any]):
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        for name, value in numbers.items() if self._board else ():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def close(self):
        self._file.close()
        if self._board:
            self._board.close()


def environment() -> dict[str, Any]:
    """Versions, devices and the state of the code."""
    packages = {}
    for name in ("radiance", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tensorflow-datasets"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "packages": packages,
        "devices": [d.device_kind for d in jax.devices()],
        "hosts": jax.process_count(),
        "platform": platform.platform(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
    }


def _git(*command: str) -> str | None:
    """Of the checkout this package lies in; None where it is installed without one."""
    try:
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
