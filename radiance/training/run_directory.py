"""The run directory: config, command, environment, metrics, samples and checkpoints of a run."""

import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from radiance import config
from radiance.base.errors import OutputError
from radiance.base.files import open_for_append, replace_atomically, require_folder
from radiance.base.images import save_png
from radiance.training.tracking import Loggers

# Temporary files of `replace_atomically` and of Orbax.
UNFINISHED_PATTERNS = (
    ".*.part",
    "samples/.*.part",
    "trajectories/.*.part",
    "checkpoints/*.orbax-checkpoint-tmp*",
    "averages/*.orbax-checkpoint-tmp*",
)
ABANDONED_SECONDS = 3600  # after which a temporary file of trajectories belongs to no process


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
        self.metrics_path = self.path / "metrics.jsonl"

    def read_config(self) -> config.Config:
        """Return the resolved config of the run. Raise ConfigError if this is no run directory."""
        file = self.path / "config.json"
        if not file.is_file():
            raise config.ConfigError(f"{self.path} is not a run directory: it has no config.json.")
        return config.from_json(config.Config, file.read_text())

    def check_resumable(self, run: config.Config, data: Mapping[str, Any]):
        """Check that the directory is new, or holds this run on the same data; change nothing.

        Args:
            run: Config of the run.
            data: Identities of the data and weights that it uses.

        Raises:
            ConfigError: The directory holds a run of another config or on other data.
            OutputError: The directory cannot be written.
        """
        require_folder(self.path)
        if (self.path / "config.json").is_file():
            changes = {
                key: values
                for key, values in config.differences(self.read_config(), run).items()
                if key not in _resumable_settings(run)
            }
            if changes:
                changes_text = ", ".join(
                    f"{key} was {old!r}, now {new!r}" for key, (old, new) in changes.items()
                )
                raise config.ConfigError(
                    f"{self.path} holds a run of another config ({changes_text}): choose another "
                    "name=, or remove the directory."
                )
        recorded_data = self._read_data()
        if recorded_data is None:
            return
        if changed_names := [
            name
            for name in recorded_data.keys() | data.keys()
            if recorded_data.get(name) != data.get(name)
        ]:
            raise config.ConfigError(
                f"{self.path} holds a run on other data ({', '.join(sorted(changed_names))} in "
                "data.json): choose another name=, or remove the directory."
            )

    def remove_partial_files(self):
        """Remove files that a killed process left partially written. One process may call this.

        Several runs may write trajectories into one folder; only abandoned files are removed there.
        """
        for path in (path for pattern in UNFINISHED_PATTERNS for path in self.path.glob(pattern)):
            is_shared = path.parent.name == "trajectories"
            if is_shared and time.time() - path.stat().st_mtime <= ABANDONED_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_metadata(self, run: config.Config, data: Mapping[str, Any], step: int):
        """Write config and data, and append the command and the environment of this start.

        Args:
            run: Config of the run.
            data: Identities of the data and weights that it uses.
            step: Number of steps done before this start.
        """
        path = self.path / "environment.json"
        environments = json.loads(path.read_text()) if path.is_file() else []
        environments.append({"from_step": step, **describe_environment()})
        texts = {
            "config.json": config.to_json(run),
            "data.json": json.dumps(data, indent=2) + "\n",
            "environment.json": json.dumps(environments, indent=2) + "\n",
        }
        for name, text in texts.items():
            with replace_atomically(self.path / name) as partial_path:
                partial_path.write_text(text)
        with open_for_append(self.path / "command.txt") as file:
            file.write(shlex.join(sys.argv) + "\n")

    def read_base_identity(self) -> str | None:
        """Return the identity of the weights that a LoRA run adds to; None if not recorded."""
        data = self._read_data() or {}
        return data.get("base", {}).get("identity")

    def _read_data(self) -> dict[str, Any] | None:
        """Return the recorded identities of the data; None before the first start."""
        file = self.path / "data.json"
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise OutputError(f"{file} is damaged ({error}): remove the run directory.") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all rows of metrics, without a last line that was cut by a kill."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def last_validation_loss(self) -> float | None:
        """Return the last validation loss.

        None if there is none, or if the run was distilled: its loss is not comparable.
        """
        losses = [row["validation_loss"] for row in self.read_metrics() if "validation_loss" in row]
        return losses[-1] if losses and self.read_config().distill.kind == "none" else None

    def truncate_metrics(self, step: int):
        """Remove the metrics of steps after `step`, which are repeated; all of them for step 0."""
        lines = [
            json.dumps(row) + "\n" for row in self.read_metrics() if step and row["step"] <= step
        ]
        with replace_atomically(self.metrics_path) as partial_path:
            partial_path.write_text("".join(lines))

    def sample_path(self, step: int) -> Path:
        """Return the file of the samples after a step."""
        return self.sample_dir / f"{step:08d}.png"


def _resumable_settings(run: config.Config) -> frozenset[str]:
    """Return the settings that may change when the run resumes."""
    keys = config.resumable_settings(config.Config)
    # Other schedules than the constant one depend on the number of steps.
    return keys if run.optimizer.lr_schedule == "constant" else keys - {"train.steps"}


class MetricWriter:
    """Writes metrics.jsonl, an object a line, and samples/STEP.png, and sends both to the loggers.

    Args:
        run_dir: Directory of the run.
        step: Number of steps done before this start; later rows are removed.
        loggers: Loggers of the run.
    """

    def __init__(self, run_dir: RunDirectory, step: int, loggers: Loggers):
        run_dir.truncate_metrics(step)
        self._run_dir, self._loggers = run_dir, loggers

    def write_metrics(self, step: int, metrics: Mapping[str, Any]):
        """Append a row. Raise OutputError if it cannot be written."""
        with open_for_append(self._run_dir.metrics_path) as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._loggers.write_metrics(step, metrics)

    def write_samples(
        self, step: int, sheet: Image.Image, prompts: Sequence[str], metadata: Mapping[str, Any]
    ):
        """Write a contact sheet. Raise OutputError if it cannot be written.

        Args:
            step: Number of steps done.
            sheet: Images of the prompts in rows.
            prompts: Prompt of each image.
            metadata: Further metadata of the PNG file.
        """
        with replace_atomically(self._run_dir.sample_path(step)) as partial_path:
            save_png(partial_path, sheet, {"prompts": list(prompts), **metadata})
        self._loggers.write_samples(step, sheet, prompts)

    def close(self):
        """Close the loggers."""
        self._loggers.close()


class NullMetricWriter:
    """A writer that writes nothing, for hosts other than the first."""

    def write_metrics(self, step: int, metrics: Mapping[str, Any]):
        """Do nothing."""

    def write_samples(
        self, step: int, sheet: Image.Image, prompts: Sequence[str], metadata: Mapping[str, Any]
    ):
        """Do nothing."""

    def close(self):
        """Do nothing."""


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
    status = _run_git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "packages": packages,
        "devices": [device.device_kind for device in jax.devices()],
        "hosts": jax.process_count(),
        "platform": platform.platform(),
        "commit": _run_git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def _run_git(*command: str) -> str | None:
    """Return the output of git in the checkout of this package; None without a checkout."""
    try:
        result = subprocess.run(
            ["git", *command],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
