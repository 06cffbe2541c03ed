"""Settings of distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from radiance.base.settings import Section, require, resumable
from radiance.config.sample import Sample


@dataclass(frozen=True)
class Distill(Section):
    """Distillation of a teacher of the same architecture, for fewer steps or built-in guidance."""

    kind: Literal["none", "guidance", "trajectories", "mean_flow", "distribution_matching"] = "none"
    """What the student learns. guidance: the guided velocity in one evaluation. trajectories:
    straight lines between points of the teacher's trajectories (reflow, arXiv 2209.03003; in
    segments PeRFlow, arXiv 2405.07510), without images. mean_flow: the mean velocity over any step,
    whose length replaces the guidance input (arXiv 2505.13447). distribution_matching: images of
    the teacher's guided distribution in `segments` steps, by a LoRA, without images (TDM, arXiv
    2503.06674)."""
    teacher: str = resumable("")
    """Run directory or checkpoint file of the teacher; empty: the one of `init`."""
    sample: Sample = field(default_factory=lambda: Sample(solver="heun", steps=10))
    """How the teacher samples. kind=guidance and mean_flow use only its guidance, which must be
    equal at all times; kind=distribution_matching uses its schedule too, for the student's
    steps."""
    guidance_target: Literal["prediction", "image"] = "prediction"
    """With kind=guidance, the conditional part of the guided target: the teacher's prediction, or
    the velocity of the training image. The latter is Chroma's rule. It needs no
    teacher, because the student predicts the unconditional part, and the variance of its targets
    is guidance_scale² times as large."""
    segments: int = 1
    """With kind=trajectories, number of segments that are straightened separately; 1 is reflow.
    With kind=distribution_matching, number of the student's steps."""
    num_trajectories: int = 16_384
    """Trajectories that are sampled and stored for training. train.validation_images more are
    sampled for validation."""
    trajectory_dir: str = resumable("")
    """Folder of the trajectories, which several runs may share; empty: in the run directory."""
    finite_difference: float = 0.05
    """With kind=mean_flow, fraction of a step that the teacher computes; 0: the derivative, by
    forward-mode differentiation."""
    fake_lr_multiplier: float = 5.0
    """With kind=distribution_matching, learning rate of the fake score as a multiple of
    optimizer.learning_rate."""
    noise_limit: Literal["segment", "trajectory"] = "trajectory"
    """With kind=distribution_matching, time up to which the end of a segment is mixed with noise:
    the start of the segment, as in the paper, or that of the trajectory."""

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
            self.kind == "trajectories" or not self.trajectory_dir,
            "distill.trajectory_dir is for distill.kind=trajectories, not for "
            f"{self.kind}: do not set it.",
        )
        require(
            self.kind in ("trajectories", "distribution_matching") or self.segments == 1,
            "distill.segments is for distill.kind=trajectories and distribution_matching, not for "
            f"{self.kind}: do not set it.",
        )
        require(
            self.fake_lr_multiplier > 0,
            f"distill.fake_lr_multiplier={self.fake_lr_multiplier} must be positive.",
        )

    @property
    def has_guided_targets(self) -> bool:
        """Whether every training step computes targets with guidance."""
        return self.kind in ("guidance", "mean_flow", "distribution_matching")

    @property
    def needs_teacher(self) -> bool:
        """Whether every training step needs a teacher besides the weights of the run."""
        uses_images = (self.kind, self.guidance_target) == ("guidance", "image")
        return self.has_guided_targets and not uses_images and not self.has_fake_score

    @property
    def has_fake_score(self) -> bool:
        """Whether a second LoRA learns the student's images; the teacher is the base of both."""
        return self.kind == "distribution_matching"

    @property
    def reads_images(self) -> bool:
        """Whether training reads images, and not only captions."""
        return self.kind not in ("trajectories", "distribution_matching")
