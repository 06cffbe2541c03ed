"""The run directory: what was asked, on what, with what data, and what came of it."""

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
from radiance.base.files import open_for_append, replace_atomically, require_folder
from radiance.base.images import save_png
from radiance.training.tracking import Loggers

# What may change between a run and its continuation.
CHANGEABLE_SETTINGS = ("output", "compute.", "sample.", "mesh.", "init", "distill.teacher", "distill.trajectory_dir", "data.cache_dir", "data.path", "data.root", "data.num_workers", "data.num_threads", "data.max_broken_fraction", "text.file", "text.tokenizer", "text.cache", "train.steps") + tuple(
    f"train.{name}" for name in ("log_every", "validate_every", "sample_every", "sample_prompts", "checkpoint_every", "snapshot_every", "max_to_keep", "max_nonfinite_steps", "loggers", "profile_steps")
)  # fmt: skip


# What is being written and has not its name yet: by `replacing`, and by Orbax.
UNFINISHED_PATTERNS = (
    ".*.part", "samples/.*.part", "trajectories/.*.part", "checkpoints/*.orbax-checkpoint-tmp*", "averages/*.orbax-checkpoint-tmp*",
)  # fmt: skip
ABANDONED_SECONDS = 3600  # seconds


class RunDirectory:
    def __init__(self, path: Path):
        self.path = Path(path).expanduser()
        self.checkpoint_dir = self.path / "checkpoints"
        self.average_dir = self.path / "averages"
        self.sample_dir = self.path / "samples"
        self.metrics_path = self.path / "metrics.jsonl"

    def read_config(self) -> config.Config:
        """The resolved config of the run. Raises ConfigError when this is no run directory."""
        file = self.path / "config.json"
        if not file.is_file():
            raise config.ConfigError(f"{self.path} is not a run directory: it has no config.json.")
        return config.from_json(config.Config, file.read_text())

    def check_resumable(self, run: config.Config, data: Mapping[str, Any]):
        """Raises ConfigError when the directory holds a run of another config or of other data, and OutputError when it cannot be one; changes
        nothing.
        """
        require_folder(self.path)
        if (self.path / "config.json").is_file():
            changeable = (
                CHANGEABLE_SETTINGS
                if run.optimizer.lr_schedule == "constant"
                else tuple(key for key in CHANGEABLE_SETTINGS if key != "train.steps")
            )
            changes = {
                k: v
                for k, v in config.differences(self.read_config(), run).items()
                if not k.startswith(changeable)
            }
            if changes:
                changes_text = ", ".join(
                    f"{key} was {old!r}, now {new!r}" for key, (old, new) in changes.items()
                )
                raise config.ConfigError(
                    f"{self.path} holds a run of another config ({changes_text}): give this one another name=, or remove the directory."
                )
        recorded_data = (
            json.loads((self.path / "data.json").read_text())
            if (self.path / "data.json").is_file()
            else data
        )
        if changed_names := [
            name
            for name in recorded_data.keys() | data.keys()
            if recorded_data.get(name) != data.get(name)
        ]:
            raise config.ConfigError(
                f"{self.path} holds a run on other data ({', '.join(sorted(changed_names))} in data.json): give this one another name=, or remove the "
                "directory."
            )

    def remove_partial_files(self):
        """Removes what a killed run left half written, which may be as large as a checkpoint; for the one process that writes here. Trajectories
        other runs may be painting too: of those what nothing was written to for an hour.
        """
        for path in (path for pattern in UNFINISHED_PATTERNS for path in self.path.glob(pattern)):
            if (
                path.parent.name != "trajectories"
                or time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            ):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def write_metadata(self, run: config.Config, data: Mapping[str, Any], step: int):
        """Writes down the config, the command, the data, and the environment of every start."""
        path = self.path / "environment.json"
        environments = json.loads(path.read_text()) if path.is_file() else []
        texts = {
            "config.json": config.to_json(run),
            "data.json": json.dumps(data, indent=2) + "\n",
            "environment.json": json.dumps(
                [*environments, {"from_step": step, **describe_environment()}], indent=2
            )
            + "\n",
        }
        for name, text in texts.items():
            with replace_atomically(self.path / name) as partial_path:
                partial_path.write_text(text)
        with open_for_append(self.path / "command.txt") as file:
            file.write(shlex.join(sys.argv) + "\n")

    def read_base_identity(self) -> str | None:
        """What a LoRA run was trained on; None where it does not say."""
        file = self.path / "data.json"
        return (
            json.loads(file.read_text()).get("base", {}).get("identity") if file.is_file() else None
        )

    def read_metrics(self) -> list[dict[str, Any]]:
        """All that was measured; a line cut short by a kill is left out."""
        rows = []
        for line in (
            self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else []
        ):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def last_validation_loss(self) -> float | None:
        """The last validation loss; None before the first, and of a run that a teacher taught, whose loss is another."""
        losses = [row["validation_loss"] for row in self.read_metrics() if "validation_loss" in row]
        return losses[-1] if losses and self.read_config().distill.kind == "none" else None

    def truncate_metrics(self, step: int):
        """Forgets what was measured after `step`, which is going to be done again; from step 0 on that is all, for it is measured too."""
        lines = [
            json.dumps(row) + "\n" for row in self.read_metrics() if step and row["step"] <= step
        ]
        with replace_atomically(self.metrics_path) as partial_path:
            partial_path.write_text("".join(lines))

    def sample_path(self, step: int) -> Path:
        """The file of what was painted at that step."""
        return self.sample_dir / f"{step:08d}.png"


class MetricWriter:
    """metrics.jsonl, one object a line, and samples/<step>.png; the same to the trackers."""

    def __init__(self, run_dir: RunDirectory, step: int, loggers: Loggers):
        run_dir.truncate_metrics(step)
        self._run_dir, self._loggers = run_dir, loggers

    def write_metrics(self, step: int, metrics: Mapping[str, Any]):
        with open_for_append(self._run_dir.metrics_path) as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._loggers.write_metrics(step, metrics)

    def write_samples(
        self, step: int, sheet: Image.Image, prompts: Sequence[str], metadata: Mapping[str, Any]
    ):
        with replace_atomically(self._run_dir.sample_path(step)) as partial_path:
            save_png(partial_path, sheet, {"prompts": list(prompts), **metadata})
        self._loggers.write_samples(step, sheet, prompts)

    def close(self):
        self._loggers.close()


class NullMetricWriter:
    """A journal of a host that writes none: one host writes for all."""

    def write_metrics(self, step: int, metrics: Mapping[str, Any]):
        pass

    def write_samples(
        self, step: int, sheet: Image.Image, prompts: Sequence[str], metadata: Mapping[str, Any]
    ):
        pass

    def close(self):
        pass


def is_run_directory(path: str | Path) -> bool:
    """Whether that is a run directory, and not a checkpoint. Raises ConfigError when it is neither."""
    path = Path(path).expanduser()
    if not path.exists():
        raise config.ConfigError(f"There is no run directory and no checkpoint {path}.")
    if (path / "config.json").is_file() and (path / "command.txt").is_file():
        return True  # whatever was exported into it
    if any(
        any(path.glob(pattern))
        for pattern in ("*.safetensors", "*.safetensors.index.json", "*.gguf", "transformer")
    ):
        return False  # diffusers' folders have a config.json too
    if path.is_dir() and not (path / "config.json").is_file():
        raise config.ConfigError(
            f"{path} is not a run directory (it has no config.json), and holds no safetensors or GGUF file."
        )
    return path.is_dir()


def describe_environment() -> dict[str, Any]:
    """Versions, devices and the state of the code."""
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
    return {
        "python": platform.python_version(),
        "packages": packages,
        "devices": [device.device_kind for device in jax.devices()],
        "hosts": jax.process_count(),
        "platform": platform.platform(),
        "commit": _run_git("rev-parse", "HEAD"),
        "dirty": None if (status := _run_git("status", "--porcelain")) is None else bool(status),
    }


def _run_git(*command: str) -> str | None:
    """Of the checkout this package lies in; None where it is installed without one."""
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
