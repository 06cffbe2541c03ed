"""Progress for whoever watches: a bar on a terminal, plain lines in a log."""

import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

LINE_EVERY = 10.0  # seconds


class Progress:
    """Of `steps` of some `unit`, of which `start` were done before, and in each of which so many pictures are."""

    def __init__(self, start: int, steps: int, pictures: int, unit: str = "step"):
        self.steps, self.pictures, self.unit, self.start, self.done = steps, pictures, unit, start, start
        self.began = self.told = time.monotonic()
        self.bar = tqdm(total=steps, initial=start, unit=unit, dynamic_ncols=True) if sys.stderr.isatty() else None

    @property
    def rate(self) -> float:
        """Pictures a second since the first step of this process."""
        return (self.done - self.start) * self.pictures / max(time.monotonic() - self.began, 1e-9)

    def first_step_done(self, step: int):
        """The first step includes compilation: it is left out of the rate."""
        self.start = self.done = step
        self.began = time.monotonic()

    def update(self, step: int, facts: dict[str, float]):
        self.done = step
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_postfix({"pictures/s": f"{self.rate:.0f}", **{k: f"{v:.4g}" for k, v in facts.items()}}, refresh=False)
            self.bar.update(0)
        elif facts and (time.monotonic() - self.told >= LINE_EVERY or step == self.steps):
            self.told = time.monotonic()
            left = (self.steps - step) * self.pictures / self.rate if self.rate else float("nan")
            numbers = "  ".join(f"{k} {v:.4g}" for k, v in facts.items())
            self.say(f"{self.unit} {step}/{self.steps}  {numbers}  {self.rate:.0f} pictures/s  {left / 60:.1f} min left")

    def say(self, line: str):
        """A line that does not break the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self):
        if self.bar is not None:
            self.bar.close()


class Profile:
    """A trace of some steps for TensorBoard's profiler. It begins with the third: the first compiles, and the second warms up."""

    def __init__(self, directory: Path, first: int, steps: int):
        self.directory, self.running = directory, False
        self.steps = range(first + 2, first + 2 + steps)

    def before_step(self, number: int):
        if number in self.steps and not self.running:
            jax.profiler.start_trace(self.directory)
            self.running = True
        elif number not in self.steps:
            self.close()

    def close(self):
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
