"""The run directory: what was asked, on what, with what data, and what came of it."""

import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import jax
from PIL import Image

from radiance import config
from radiance.pictures import save_png
from radiance.training.tracking import Trackers
from radiance.weights.files import replacing, require_folder, unwritten

# What may change between a run and its continuation.
FREE = ("output", "compute.", "sample.", "mesh.", "init", "distill.teacher", "distill.path", "data.directory", "data.path", "data.root", "data.workers", "data.threads", "data.broken_limit", "text.file", "text.tokenizer", "text.cache", "train.steps") + tuple(
    f"train.{name}" for name in ("log_every", "validate_every", "sample_every", "sample_prompts", "checkpoint_every", "snapshot_every", "keep", "keep_every", "skip_limit", "track", "profile_steps")
)  # fmt: skip


# What is being written and has not its name yet: by `replacing`, and by Orbax.
UNFINISHED = (
    ".*.part", "samples/.*.part", "trajectories/.*.part", "checkpoints/*.orbax-checkpoint-tmp*", "averages/*.orbax-checkpoint-tmp*",
)  # fmt: skip
ABANDONED = 3600  # seconds


class RunDirectory:
    def __init__(self, path: Path):
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.averages = self.path / "averages"
        self.samples = self.path / "samples"
        self.metrics = self.path / "metrics.jsonl"

    def read_config(self) -> config.Config:
        """The resolved config of the run. Raises ConfigError when this is no run directory."""
        file = self.path / "config.json"
        if not file.is_file():
            raise config.ConfigError(f"{self.path} is not a run directory: it has no config.json.")
        return config.from_json(config.Config, file.read_text())

    def check(self, run: config.Config, data: Mapping[str, Any]):
        """Raises ConfigError when the directory holds a run of another config or of other data, and CheckpointError when it cannot be one; changes
        nothing."""
        require_folder(self.path)
        if (self.path / "config.json").is_file():
            free = FREE if run.optimizer.decay == "constant" else tuple(key for key in FREE if key != "train.steps")
            changed = {k: v for k, v in config.differences(self.read_config(), run).items() if not k.startswith(free)}
            if changed:
                told = ", ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
                raise config.ConfigError(
                    f"{self.path} holds a run of another config ({told}): give this one another name=, or remove the directory."
                )
        recorded = json.loads((self.path / "data.json").read_text()) if (self.path / "data.json").is_file() else data
        if other := [name for name in recorded.keys() | data.keys() if recorded.get(name) != data.get(name)]:
            raise config.ConfigError(
                f"{self.path} holds a run on other data ({', '.join(sorted(other))} in data.json): give this one another name=, or remove the "
                "directory."
            )

    def clean(self):
        """Removes what a killed run left half written, which may be as large as a checkpoint; for the one process that writes here. Trajectories
        other runs may be painting too: of those what nothing was written to for an hour."""
        for path in (path for pattern in UNFINISHED for path in self.path.glob(pattern)):
            if path.parent.name != "trajectories" or time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def record(self, run: config.Config, data: Mapping[str, Any], step: int):
        """Writes down the config, the command, the data, and the environment of every start."""
        path = self.path / "environment.json"
        starts = json.loads(path.read_text()) if path.is_file() else []
        texts = {
            "config.json": config.to_json(run),
            "data.json": json.dumps(data, indent=2) + "\n",
            "environment.json": json.dumps([*starts, {"from_step": step, **environment()}], indent=2) + "\n",
        }
        for name, text in texts.items():
            with replacing(self.path / name) as part:
                part.write_text(text)
        with appending(self.path / "command.txt") as file:
            file.write(shlex.join(sys.argv) + "\n")

    def base_identity(self) -> str | None:
        """What a LoRA run was trained on; None where it does not say."""
        file = self.path / "data.json"
        return json.loads(file.read_text()).get("base", {}).get("identity") if file.is_file() else None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All that was measured; a line cut short by a kill is left out."""
        rows = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def plain_loss(self) -> float | None:
        """The last validation loss; None before the first, and of a run that a teacher taught, whose loss is another."""
        losses = [row["validation_loss"] for row in self.read_metrics() if "validation_loss" in row]
        return losses[-1] if losses and self.read_config().distill.kind == "none" else None

    def cut_metrics(self, step: int):
        """Forgets what was measured after `step`, which is going to be done again; from step 0 on that is all, for it is measured too."""
        kept = [json.dumps(row) + "\n" for row in self.read_metrics() if step and row["step"] <= step]
        with replacing(self.metrics) as part:
            part.write_text("".join(kept))

    def sample(self, step: int) -> Path:
        """The file of what was painted at that step."""
        return self.samples / f"{step:08d}.png"


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """A file to write more into. Raises CheckpointError when it cannot be written, and then a part of it may be."""
    try:
        with path.open("a") as file:
            yield file
    except OSError as error:
        raise unwritten(path, error) from error


class Journal:
    """metrics.jsonl, one object a line, and samples/<step>.png; the same to the trackers."""

    def __init__(self, directory: RunDirectory, step: int, trackers: Trackers):
        directory.cut_metrics(step)
        self._directory, self._trackers = directory, trackers

    def write(self, step: int, numbers: Mapping[str, Any]):
        with appending(self._directory.metrics) as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._trackers.write(step, numbers)

    def paint(self, step: int, sheet: Image.Image, prompts: Sequence[str], facts: Mapping[str, Any]):
        with replacing(self._directory.sample(step)) as part:
            save_png(part, sheet, {"prompts": list(prompts), **facts})
        self._trackers.paint(step, sheet, prompts)

    def close(self):
        self._trackers.close()


class Silence:
    """A journal of a host that writes none: one host writes for all."""

    def write(self, step: int, numbers: Mapping[str, Any]):
        pass

    def paint(self, step: int, sheet: Image.Image, prompts: Sequence[str], facts: Mapping[str, Any]):
        pass

    def close(self):
        pass


def is_run(path: str | Path) -> bool:
    """Whether that is a run directory, and not a checkpoint. Raises ConfigError when it is neither."""
    path = Path(path).expanduser()
    if not path.exists():
        raise config.ConfigError(f"There is no run directory and no checkpoint {path}.")
    if (path / "config.json").is_file() and (path / "command.txt").is_file():
        return True  # whatever was exported into it
    if any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.safetensors.index.json", "*.gguf", "transformer")):
        return False  # diffusers' folders have a config.json too
    if path.is_dir() and not (path / "config.json").is_file():
        raise config.ConfigError(f"{path} is not a run directory (it has no config.json), and holds no safetensors or GGUF file.")
    return path.is_dir()


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
