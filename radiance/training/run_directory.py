"""The run directory: config, command, environment, metrics, samples and checkpoints of a run."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path
from typing import Any

import jax

from radiance import config
from radiance.base.errors import OutputError
from radiance.base.files import open_for_append, replace_atomically, write_error
from radiance.base.json_files import read_json
from radiance.base.temp_files import remove_abandoned
from radiance.training.metrics_file import describe_damage, read_metrics_file

ORBAX_TEMP_PATTERN = "*.orbax-checkpoint-tmp*"
NUM_SCANS = 3
PACKAGE_DIR = Path(__file__).parents[1]


class RunDirectory:
    """The files of a run.

    Args:
        path: The directory, which may not exist yet.
    """

    def __init__(self, path: Path):
        self.path = Path(path).expanduser()
        self.checkpoint_dir = self.path / "checkpoints"
        self.average_dir = self.path / "averages"
        self.sample_dir = self.path / "samples"
        self.damaged_dir = self.path / "damaged"
        self.metrics_path = self.path / "metrics.jsonl"

    def read_config(self) -> config.Config:
        """Return the resolved config of the run.

        Raises:
            ConfigError: This is not a run directory, or its config has unknown or wrong settings.
            OutputError: The config is damaged.
        """
        file = self.path / "config.json"
        if not file.is_file():
            raise config.ConfigError(f"{self.path} is not a run directory: it has no config.json.")
        try:
            return config.from_dict(config.Config, read_json(file, dict, "restore it from a copy"))
        except config.ConfigError as error:
            raise config.ConfigError(f"{file} cannot be used: {error}") from None

    def remove_partial_files(self):
        """Remove what killed processes left partially written. One process may call this."""
        for folder in (self.path, self.sample_dir, self.path / "trajectories"):
            remove_abandoned(folder)
        for folder in (self.checkpoint_dir, self.average_dir):
            for path in folder.glob(ORBAX_TEMP_PATTERN):
                shutil.rmtree(path)

    def write_metadata(
        self,
        run: config.Config,
        data: Mapping[str, Any],
        step: int,
        changes: Mapping[str, tuple[Any, Any]] | None = None,
    ):
        """Write config and data, and append the command and the environment of this start.

        Args:
            run: Config of the run.
            data: Identities of the data and weights that it uses.
            step: Number of steps done before this start.
            changes: Old and new values of what the user has allowed to change at this start.
        """
        start = {"from_step": step, **describe_environment()}
        if changes:
            start["allowed_changes"] = changes
        environments = [*self._read_environments(), start]
        texts = {
            "config.json": config.to_json(run),
            "data.json": json.dumps(data, indent=2) + "\n",
            "environment.json": json.dumps(environments, indent=2) + "\n",
        }
        for name, text in texts.items():
            with replace_atomically(self.path / name) as partial_path:
                partial_path.write_text(text, "utf-8")
        with open_for_append(self.path / "command.txt") as file:
            file.write(shlex.join(sys.argv) + "\n")

    def _read_environments(self) -> list[Any]:
        """Return the environments of earlier starts; a damaged file is reported and kept."""
        path = self.path / "environment.json"
        if not path.is_file():
            return []
        try:
            return read_json(path, list, "earlier starts are not listed in the new one")
        except OutputError as error:
            print(f"{error} The damaged one is kept as {self.move_to_damaged(path)}.", flush=True)
            return []

    def read_base_identity(self) -> str | None:
        """Return the identity of the weights that a LoRA run adds to; None if not recorded."""
        data = self.read_data() or {}
        return data.get("base", {}).get("identity")

    def read_data(self) -> dict[str, Any] | None:
        """Return the recorded identities of the data; None before the first start."""
        file = self.path / "data.json"
        if not file.is_file():
            return None
        remedy = "restore it, or remove this file to resume without a comparison of the data"
        data = read_json(file, dict, remedy)
        if not all(isinstance(value, dict) for value in data.values()):
            raise OutputError(f"{file} is damaged (it holds other values): {remedy}.")
        return data

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics that can be read."""
        return read_metrics_file(self.metrics_path).rows

    def read_last_validation_loss(self) -> float | None:
        """Return the last validation loss, or None if there is no comparable one.

        The loss of a distilled run is not comparable.
        """
        losses = [row["validation_loss"] for row in self.read_metrics() if "validation_loss" in row]
        return losses[-1] if losses and self.read_config().distill.kind == "none" else None

    def truncate_metrics(self, step: int):
        """Remove the metrics of steps after `step`, which are repeated; all of them for step 0.

        Lines that cannot be read are reported, and the file with them is kept in `damaged_dir`.
        """
        rows, damaged_lines = read_metrics_file(self.metrics_path)
        if damaged_lines:
            kept_path = self.move_to_damaged(self.metrics_path)
            print(f"{describe_damage(damaged_lines)}; the file is kept as {kept_path}.", flush=True)
        lines = [json.dumps(row) + "\n" for row in rows if step and row["step"] <= step]
        with replace_atomically(self.metrics_path) as partial_path:
            partial_path.write_text("".join(lines), "utf-8")

    def move_to_damaged(self, path: Path) -> Path:
        """Move a damaged file or folder of the run to `damaged_dir`, and return its path there."""
        kept_path = find_free_path(self.damaged_dir / path.name)
        try:
            self.damaged_dir.mkdir(exist_ok=True)
            os.replace(path, kept_path)
        except OSError as error:
            raise write_error(kept_path, error) from error
        return kept_path

    def sample_path(self, step: int) -> Path:
        """Return the file of the samples after a step."""
        return self.sample_dir / f"{step:08d}.png"


def is_run_directory(path: str | Path) -> bool:
    """Return whether a path is a run directory and not a checkpoint.

    Raises:
        ConfigError: It is neither.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise config.ConfigError(f"There is no run directory and no checkpoint {path}.")
    if (path / "config.json").is_file() and (path / "command.txt").is_file():
        return True  # even if a checkpoint was exported into it
    weight_patterns = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "transformer")
    if any(any(path.glob(pattern)) for pattern in weight_patterns):
        return False  # folders of diffusers have a config.json too
    if path.is_dir() and not (path / "config.json").is_file():
        raise config.ConfigError(
            f"{path} is not a run directory (it has no config.json), and holds no safetensors or "
            "GGUF file."
        )
    return path.is_dir()


def find_free_path(path: Path) -> Path:
    """Return a path, or PATH.2, PATH.3 and so on if it exists."""
    paths = chain([path], (path.with_name(f"{path.name}.{i}") for i in count(2)))
    return next(free_path for free_path in paths if not free_path.exists())


def find_complete_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a directory, which may not exist."""
    steps: list[int] = []
    # A single scan can miss the only checkpoint while a training replaces it by the next one.
    for _ in range(NUM_SCANS):
        with suppress(FileNotFoundError, NotADirectoryError):
            steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
        if steps:
            break
    return steps


def find_latest_complete_step(directory: Path) -> int | None:
    """Return the step of the newest complete checkpoint in a directory, which may not exist."""
    return max(find_complete_steps(directory), default=None)


def describe_environment() -> dict[str, Any]:
    """Return versions of packages, devices, and the commit of the code."""
    packages = {}
    for name in (
        "radiance",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "numpy",
        "grain",
        "tensorflow-datasets",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    # Untracked files are part of the code only inside the package.
    changed = _run_git("status", "--porcelain", "--untracked-files=no")
    added = _run_git("status", "--porcelain", "--", ".")
    return {
        "python": platform.python_version(),
        "packages": packages,
        "devices": [device.device_kind for device in jax.devices()],
        "hosts": jax.process_count(),
        "platform": platform.platform(),
        "commit": _run_git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed or added),
    }


def _run_git(*command: str) -> str | None:
    """Return the output of git in the checkout of this package; None without a checkout."""
    try:
        result = subprocess.run(
            ["git", *command],
            cwd=PACKAGE_DIR,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
