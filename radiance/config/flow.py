"""Settings of the training objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require


@dataclass(frozen=True)
class Flow(Section):
    """The method: time 1 is noise, 0 is the image."""

    # noise: every time is 1, or of a trajectory in segments the first of its segment, which is what one step a segment asks for.
    timestep_distribution: Literal[
        "parabola", "logistic", "logit_normal", "uniform", "pure_noise"
    ] = "parabola"
    logit_mean: float | None = (
        None  # of logit(t); none: 0 for logit_normal, by resolution for logistic
    )
    logit_std: float = 1.0  # of logit(t)
    timestep_weighting: Literal["none", "uniform", "parabola"] = (
        "none"  # training weighs times as if this law had drawn them
    )
    noise_scale: float = 1.0
    min_divisor: float = 0.05  # bounds the division by t in the loss of x0 models
    min_divisor_mode: Literal["add", "clamp"] = "add"  # t + epsilon, or max(t, epsilon)
    loss_weighting: Literal["none", "x0"] = (
        "none"  # of the loss of velocity models; x0: such that it is the loss of x0 models
    )
    # Which noise meets which image of the batch; within_caption: by optimal transport, but only between images of the same caption.
    coupling: Literal["independent", "optimal_transport", "within_caption"] = "independent"
    coupling_caption_weight: float = (
        0.0  # what a unit of distance between captions adds to the cost (C²OT, arXiv 2503.10636)
    )
    coupling_group_size: int = (
        0  # images, one after the other, that noise is exchanged between; 0: the whole batch
    )

    def check(self):
        require(self.logit_std > 0, f"flow.logit_std={self.logit_std} must be positive.")
        require(self.noise_scale > 0, f"flow.noise_scale={self.noise_scale} must be positive.")
        require(
            self.min_divisor > 0,
            f"flow.min_divisor={self.min_divisor} must be positive: it keeps the loss of x0 models finite at t = 0.",
        )
        require(
            self.logit_mean is None or self.timestep_distribution in ("logistic", "logit_normal"),
            f"flow.logit_mean has no meaning for flow.timestep_distribution={self.timestep_distribution}: leave it none.",
        )
        require(
            self.timestep_weighting == "none"
            or self.timestep_distribution in ("parabola", "uniform"),
            f"flow.timestep_weighting={self.timestep_weighting} divides by the density of flow.timestep_distribution={self.timestep_distribution}, which may be near 0: "
            "use parabola or uniform.",
        )
        require(
            self.coupling_caption_weight >= 0,
            f"flow.coupling_caption_weight={self.coupling_caption_weight} cannot be negative.",
        )
        require(
            self.coupling_group_size >= 0,
            f"flow.coupling_group_size={self.coupling_group_size} cannot be negative (0 for the whole batch).",
        )
        require(
            self.coupling_caption_weight == 0 or self.coupling == "optimal_transport",
            f"flow.coupling_caption_weight has no meaning for flow.coupling={self.coupling}: leave it 0.",
        )
        require(
            self.coupling_group_size == 0 or self.coupling != "independent",
            "flow.coupling_group_size has no meaning for flow.coupling=independent: leave it 0.",
        )
