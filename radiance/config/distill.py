"""What a model learns from another: fewer steps, and guidance at no further cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from radiance.base.settings import Section, require
from radiance.config.sample import Sample


@dataclass(frozen=True)
class Distill(Section):
    """Learning from a teacher, a model of the same sizes, in place of the images' own velocities."""

    # guidance: the guided velocity in one evaluation. trajectories: straight lines between points of the ways that the teacher paints along
    # (reflow, arXiv 2209.03003; in segments PeRFlow, arXiv 2405.07510), without images. mean_flow: the mean velocity over any step, whose length
    # the network is told in place of the guidance number (arXiv 2505.13447).
    kind: Literal["none", "guidance", "trajectories", "mean_flow"] = "none"
    teacher: str = ""  # a run directory or a checkpoint file; empty: what `init` names
    # How it paints. Of kind=guidance and mean_flow how it is guided alone, which is the same at all times.
    sample: Sample = field(default_factory=lambda: Sample(solver="heun", steps=10))
    # Of kind=guidance, what is led away from the unconditional prediction: the teacher's prediction, or the velocity of the image at hand. The latter,
    # Chroma's rule, needs no teacher (the student predicts the unconditional part), and its targets scatter guidance² times as much.
    guidance_target: Literal["prediction", "image"] = "prediction"
    segments: int = (
        1  # of trajectories: parts of the way that are made straight, each by itself; 1 is reflow
    )
    num_trajectories: int = (
        16_384  # that are painted and kept, beside train.validation_images for validation
    )
    trajectory_dir: str = (
        ""  # folder to keep them in, which several runs may share; empty: in the run directory
    )
    finite_difference: float = 0.05  # of mean_flow: the part of a step that is the teacher's; 0: a derivative, by differentiating forwards

    def check(self):
        require(
            self.kind != "none" or not self.teacher,
            f"distill.teacher={self.teacher} teaches nothing yet: say what, by distill.kind.",
        )
        require(self.segments >= 1, f"distill.segments={self.segments} must be at least 1.")
        require(
            self.num_trajectories >= 1,
            f"distill.num_trajectories={self.num_trajectories} must be at least 1.",
        )
        require(
            0 <= self.finite_difference < 1,
            f"distill.finite_difference={self.finite_difference} must lie between 0 and 1: it is a part of the time.",
        )
        require(
            self.sample.steps % self.segments == 0,
            f"distill.sample.steps={self.sample.steps} does not divide into distill.segments={self.segments}: change one of them.",
        )
        require(
            self.kind == "trajectories" or (self.segments == 1 and not self.trajectory_dir),
            f"distill.segments and distill.trajectory_dir are of distill.kind=trajectories, not of {self.kind}: leave them alone.",
        )

    @property
    def has_guided_targets(self) -> bool:
        """Whether targets are made in every step, by guidance."""
        return self.kind in ("guidance", "mean_flow")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher predicts in every step."""
        return self.has_guided_targets and (self.kind, self.guidance_target) != (
            "guidance",
            "image",
        )
