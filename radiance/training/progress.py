"""Show progress as a bar on a terminal, or as plain lines in a log; profile steps."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from tqdm import tqdm

LINE_INTERVAL = 10.0  # seconds between two lines of a log


class Progress:
    """Progress of a loop, with throughput.

    Args:
        start_step: Steps that are already done.
        total_steps: Steps in all.
        images_per_step: Images of a step, for the throughput.
        unit: Name of a step.
    """

    def __init__(self, start_step: int, total_steps: int, images_per_step: int, unit: str = "step"):
        self.start_step = self.current_step = start_step
        self.total_steps = total_steps
        self.images_per_step = images_per_step
        self.unit = unit
        self.start_time = self.last_line_time = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=start_step, unit=unit, dynamic_ncols=True)

    @property
    def images_per_second(self) -> float:
        """Mean throughput since the start or the last `reset_rate`."""
        seconds = max(time.monotonic() - self.start_time, 1e-9)
        return (self.current_step - self.start_step) * self.images_per_step / seconds

    def reset_rate(self, step: int) -> None:
        """Restart the measurement of throughput, to exclude the compilation in the first step."""
        self.start_step = self.current_step = step
        self.start_time = time.monotonic()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step.

        Args:
            step: Steps done.
            metrics: Numbers to show; without any, a log gets no line.
        """
        self.current_step = step
        now = time.monotonic()
        if self.bar is not None:
            self.bar.n = step
            rate = {"images/s": f"{self.images_per_second:.0f}"}
            numbers = {name: f"{value:.4g}" for name, value in metrics.items()}
            self.bar.set_postfix(rate | numbers, refresh=False)
            self.bar.update(0)
        elif metrics and (now - self.last_line_time >= LINE_INTERVAL or step == self.total_steps):
            self.last_line_time = now
            self.print_line(self._format_line(metrics))

    def _format_line(self, metrics: Mapping[str, float]) -> str:
        """Return the line of a log for the current step, with the time left if it is known."""
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        line = f"{self.unit} {self.current_step}/{self.total_steps}  {numbers}"
        images_per_second = self.images_per_second
        if not images_per_second:  # only the first step is done, which is left out of the rate
            return line
        images_left = (self.total_steps - self.current_step) * self.images_per_step
        minutes_left = images_left / images_per_second / 60
        return f"{line}  {images_per_second:.0f} images/s  {minutes_left:.1f} min left"

    def print_line(self, line: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class StepProfiler:
    """A trace of some steps for TensorBoard's profiler.

    It starts with the third step: the first compiles, and the second warms up.

    Args:
        directory: Output folder.
        first_step: Step at which the run starts or resumes.
        num_steps: Steps to profile.
    """

    def __init__(self, directory: Path, first_step: int, num_steps: int):
        self.directory = directory
        self.is_running = False
        self.profile_steps = range(first_step + 2, first_step + 2 + num_steps)

    def before_step(self, step: int) -> None:
        """Start or stop the trace, as the next step requires."""
        if step in self.profile_steps and not self.is_running:
            jax.profiler.start_trace(self.directory)
            self.is_running = True
        elif step not in self.profile_steps:
            self.close()

    def close(self) -> None:
        """Stop the trace if it is running."""
        if self.is_running:
            jax.profiler.stop_trace()
            self.is_running = False
