"""Settings of distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from radiance.base.settings import Section, require, resumable
from radiance.config.sample import Sample


@dataclass(frozen=True)
class Distill(Section):
    """Distillation of a teacher of the same architecture, for fewer steps or built-in guidance."""

    kind: Literal["none", "guidance", "trajectories", "mean_flow"] = "none"
    """What the student learns. guidance: the guided velocity in one evaluation. trajectories:
    straight lines between points of the teacher's trajectories (reflow, arXiv 2209.03003; in
    segments PeRFlow, arXiv 2405.07510), without images. mean_flow: the mean velocity over any step,
    whose length replaces the guidance input (arXiv 2505.13447)."""
    teacher: str = resumable("")
    """Run directory or checkpoint file of the teacher; empty: the one of `init`."""
    sample: Sample = field(default_factory=lambda: Sample(solver="heun", steps=10))
    """How the teacher samples. kind=guidance and mean_flow use only its guidance, which must be
    equal at all times."""
    guidance_target: Literal["prediction", "image"] = "prediction"
    """With kind=guidance, the conditional part of the guided target: the teacher's prediction, or
    the velocity of the training image. The latter is Chroma's rule. It needs no
    teacher, because the student predicts the unconditional part, and the variance of its targets
    is guidance_scale² times as large."""
    segments: int = 1
    """With kind=trajectories, number of segments that are straightened separately; 1 is reflow."""
    num_trajectories: int = 16_384
    """Trajectories that are sampled and stored for training. train.validation_images more are
    sampled for validation."""
    trajectory_dir: str = resumable("")
    """Folder of the trajectories, which several runs may share; empty: in the run directory."""
    finite_difference: float = 0.05
    """With kind=mean_flow, fraction of a step that the teacher computes; 0: the derivative, by
    forward-mode differentiation."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require(
            self.kind != "none" or not self.teacher,
            f"distill.teacher={self.teacher} is set but distill.kind=none: set distill.kind to "
            "guidance, trajectories or mean_flow.",
        )
        require(self.segments >= 1, f"distill.segments={self.segments} must be at least 1.")
        require(
            self.num_trajectories >= 1,
            f"distill.num_trajectories={self.num_trajectories} must be at least 1.",
        )
        require(
            0 <= self.finite_difference < 1,
            f"distill.finite_difference={self.finite_difference} must be at least 0 and less "
            "than 1: it is a fraction of the time.",
        )
        require(
            self.sample.steps % self.segments == 0,
            f"distill.sample.steps={self.sample.steps} does not divide into distill.segments="
            f"{self.segments}: change one of them.",
        )
        require(
            self.kind == "trajectories" or (self.segments == 1 and not self.trajectory_dir),
            "distill.segments and distill.trajectory_dir are for distill.kind=trajectories, not "
            f"for {self.kind}: do not set them.",
        )

    @property
    def has_guided_targets(self) -> bool:
        """Whether every training step computes targets with guidance."""
        return self.kind in ("guidance", "mean_flow")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher predicts in every training step."""
        uses_images = (self.kind, self.guidance_target) == ("guidance", "image")
        return self.has_guided_targets and not uses_images
