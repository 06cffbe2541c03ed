"""Progress for whoever watches: a bar on a terminal, plain lines in a log."""

import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

LINE_INTERVAL = 10.0  # seconds


class Progress:
    """Of `steps` of some `unit`, of which `start` were done before, and in each of which so many images are."""

    def __init__(self, start_step: int, total_steps: int, images_per_step: int, unit: str = "step"):
        self.total_steps, self.images_per_step, self.unit, self.start_step, self.current_step = (
            total_steps,
            images_per_step,
            unit,
            start_step,
            start_step,
        )
        self.start_time = self.last_line_time = time.monotonic()
        self.bar = (
            tqdm(total=total_steps, initial=start_step, unit=unit, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    @property
    def images_per_second(self) -> float:
        """Images a second since the first step of this process."""
        return (
            (self.current_step - self.start_step)
            * self.images_per_step
            / max(time.monotonic() - self.start_time, 1e-9)
        )

    def reset_rate(self, step: int):
        """The first step includes compilation: it is left out of the rate."""
        self.start_step = self.current_step = step
        self.start_time = time.monotonic()

    def update(self, step: int, metrics: dict[str, float]):
        self.current_step = step
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_postfix(
                {
                    "images/s": f"{self.images_per_second:.0f}",
                    **{k: f"{v:.4g}" for k, v in metrics.items()},
                },
                refresh=False,
            )
            self.bar.update(0)
        elif metrics and (
            time.monotonic() - self.last_line_time >= LINE_INTERVAL or step == self.total_steps
        ):
            self.last_line_time = time.monotonic()
            seconds_left = (
                (self.total_steps - step) * self.images_per_step / self.images_per_second
                if self.images_per_second
                else float("nan")
            )
            metrics_text = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            self.print_line(
                f"{self.unit} {step}/{self.total_steps}  {metrics_text}  {self.images_per_second:.0f} images/s  {seconds_left / 60:.1f} min left"
            )

    def print_line(self, line: str):
        """A line that does not break the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self):
        if self.bar is not None:
            self.bar.close()


class StepProfiler:
    """A trace of some steps for TensorBoard's profiler. It begins with the third: the first compiles, and the second warms up."""

    def __init__(self, directory: Path, first_step: int, num_steps: int):
        self.directory, self.is_running = directory, False
        self.profile_steps = range(first_step + 2, first_step + 2 + num_steps)

    def before_step(self, step: int):
        if step in self.profile_steps and not self.is_running:
            jax.profiler.start_trace(self.directory)
            self.is_running = True
        elif step not in self.profile_steps:
            self.close()

    def close(self):
        if self.is_running:
            jax.profiler.stop_trace()
            self.is_running = False
