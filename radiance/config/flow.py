"""Settings of the training objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require, require_at_least


@dataclass(frozen=True)
class Flow(Section):
    """Rectified flow: x_t = (1 − t)·image + t·noise, so time 1 is noise and time 0 is the image."""

    timestep_distribution: Literal[
        "parabola", "logistic", "logit_normal", "uniform", "pure_noise"
    ] = "parabola"
    """Density that training times are sampled from. pure_noise: every time is 1, or the first time
    of its segment for trajectories in segments, as one step per segment requires."""
    logit_mean: float | None = None
    """Mean of logit(t); none: 0 for logit_normal, by resolution for logistic."""
    logit_std: float = 1.0
    """Scale of logit(t): standard deviation for logit_normal, scale for logistic."""
    timestep_weighting: Literal["none", "uniform", "parabola"] = "none"
    """Weight the loss as if times had been sampled from this distribution."""
    noise_scale: float = 1.0
    """Standard deviation of the noise."""
    min_divisor: float = 0.05
    """Bounds the division by t in the loss of x0 models."""
    min_divisor_mode: Literal["add", "clamp"] = "add"
    """The divisor is t + min_divisor, or max(t, min_divisor)."""
    loss_weighting: Literal["none", "x0"] = "none"
    """Weight of the loss of velocity models; x0 makes it equal to the loss of x0 models."""
    coupling: Literal["independent", "optimal_transport", "within_caption"] = "independent"
    """How noise is assigned to the images of a batch. within_caption: by optimal transport, but
    only between images of the same caption."""
    coupling_caption_weight: float = 0.0
    """Cost of a unit of distance between captions (C²OT, arXiv 2503.10636)."""
    coupling_group_size: int = 0
    """Number of consecutive images that exchange noise; 0: the whole batch."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require(self.logit_std > 0, f"flow.logit_std={self.logit_std} must be positive.")
        require(self.noise_scale > 0, f"flow.noise_scale={self.noise_scale} must be positive.")
        require(
            self.min_divisor > 0,
            f"flow.min_divisor={self.min_divisor} must be positive: it keeps the loss of x0 "
            "models finite at t = 0.",
        )
        self._check_timesteps()
        self._check_coupling()

    def _check_timesteps(self):
        require(
            self.logit_mean is None or self.timestep_distribution in ("logistic", "logit_normal"),
            "flow.logit_mean has no meaning for flow.timestep_distribution="
            f"{self.timestep_distribution}: do not set it.",
        )
        require(
            self.timestep_weighting == "none"
            or self.timestep_distribution in ("parabola", "uniform"),
            f"flow.timestep_weighting={self.timestep_weighting} divides by the density of "
            f"flow.timestep_distribution={self.timestep_distribution}, which may be near 0: use "
            "parabola or uniform.",
        )

    def _check_coupling(self):
        require_at_least(self, 0, "coupling_caption_weight", "coupling_group_size")
        require(
            self.coupling_caption_weight == 0 or self.coupling == "optimal_transport",
            f"flow.coupling_caption_weight has no meaning for flow.coupling={self.coupling}: "
            "leave it 0.",
        )
        require(
            self.coupling_group_size == 0 or self.coupling != "independent",
            "flow.coupling_group_size has no meaning for flow.coupling=independent: leave it 0.",
        )
