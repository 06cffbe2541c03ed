"""Write the metrics and samples of a run, and send them to its loggers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from radiance.base.files import open_for_append, replace_atomically
from radiance.base.images import save_png
from radiance.training.run_directory import RunDirectory
from radiance.training.tracking import Loggers


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
