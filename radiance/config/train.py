"""Settings of the training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require, require_at_least, resumable


@dataclass(frozen=True)
class Train(Section):
    """Length of the run, and the intervals of its outputs in steps."""

    steps: int = resumable(100_000)
    """Number of training steps. It may change on resumption unless the learning rate depends on
    it (optimizer.lr_schedule=cosine)."""
    seed: int = 0
    """Seed of initialization, data order and noise, from 0 to 2³² − 1."""
    log_every: int = resumable(10)
    """Steps between entries of the log."""
    validate_every: int = resumable(1000)
    """Steps between validations."""
    validation_images: int = 256
    """Images of a validation."""
    sample_every: int = resumable(1000)
    """Steps between contact sheets of samples."""
    sample_prompts: tuple[str, ...] = resumable(())
    """Prompts of the samples; none: captions of the validation split."""
    checkpoint_every: int = resumable(1000)
    """Steps between checkpoints."""
    snapshot_every: int = resumable(5000)
    """Steps between snapshots of the averages of optimizer.ema_widths, which are never removed."""
    max_to_keep: int = resumable(3)
    """Number of newest checkpoints that are kept."""
    max_nonfinite_steps: int = resumable(20)
    """Number of consecutive non-finite steps that ends the run."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = resumable(())
    """Where metrics and samples are logged besides the run directory."""
    profile_steps: int = resumable(0)
    """Steps that are traced into profile/ for TensorBoard, from the third step after each start."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require_at_least(
            self,
            1,
            "steps",
            "log_every",
            "validate_every",
            "validation_images",
            "sample_every",
            "checkpoint_every",
            "snapshot_every",
            "max_to_keep",
            "max_nonfinite_steps",
        )
        require_at_least(self, 0, "profile_steps")
        require(self.steps < 2**31, f"train.steps={self.steps} must be less than 2**31.")
        require(0 <= self.seed < 2**32, f"train.seed={self.seed} must be between 0 and 2**32 - 1.")
        require(
            len(set(self.loggers)) == len(self.loggers),
            f"train.loggers={self.loggers} names a logger twice.",
        )
