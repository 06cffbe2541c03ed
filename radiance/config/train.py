"""The method, the optimizer, LoRA, the run, and the devices it is spread over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require


@dataclass(frozen=True)
class Train(Section):
    """The run."""

    steps: int = 100_000
    seed: int = 0
    log_every: int = 10
    validate_every: int = 1000
    validation_images: int = 256
    sample_every: int = 1000
    sample_prompts: tuple[str, ...] = ()  # none: captions of the validation split
    checkpoint_every: int = 1000
    snapshot_every: int = 5000  # steps between snapshots of the averages of optimizer.ema_widths, which are never removed
    max_to_keep: int = 3  # newest checkpoints to keep
    max_nonfinite_steps: int = 20  # non-finite steps in a row that end the run
    loggers: tuple[
        Literal["tensorboard", "wandb"], ...
    ] = ()  # where numbers and images go beside the run directory
    profile_steps: int = (
        0  # steps, from the third of this start, that are traced into profile/ for TensorBoard
    )

    def check(self):
        for name in (
            "steps", "log_every", "validate_every", "validation_images", "sample_every", "checkpoint_every", "snapshot_every", "max_to_keep", "max_nonfinite_steps",
        ):  # fmt: skip
            require(
                getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1."
            )
        require(0 <= self.seed < 2**32, f"train.seed={self.seed} must lie between 0 and 2**32 - 1.")
        require(
            len(set(self.loggers)) == len(self.loggers),
            f"train.loggers={self.loggers} names a tracker twice.",
        )
