"""Settings of sampling, and the recommended ones of published models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from radiance.base.errors import ConfigError
from radiance.base.settings import (
    Section,
    require,
    require_at_least,
    require_fraction,
    suggest_name,
)
from radiance.config.model import Model
from radiance.config.optimizer import MAX_EMA_WIDTH

MAX_STEPS = 10_000
PROMPT_SUITES = ("geneval", "dpg", "coco30k")  # public sets of prompts


@dataclass(frozen=True)
class Sample(Section):
    """How images are sampled from a trained model."""

    solver: Literal["euler", "heun", "dpmpp_2m", "mean_flow"] = "euler"
    """ODE solver. mean_flow: Euler steps whose length is an input of the network, for models of
    distill.kind=mean_flow."""
    steps: int = 30
    """Number of solver steps."""
    schedule: Literal["uniform", "shifted", "beta"] = "uniform"
    """Distribution of the times of the steps."""
    shift: float | None = None
    """Logarithm of the factor of schedule=shifted; none: by resolution, as in FLUX."""
    beta: tuple[float, float] = (0.4, 0.4)
    """Parameters of schedule=beta."""
    guidance_scale: float = 3.5
    """Scale of classifier-free guidance; 1: no guidance."""
    negative_prompt: str = ""
    """Prompt of the unconditional prediction."""
    unconditional: Literal["negative", "masked"] = "negative"
    """Text of the unconditional prediction: the negative prompt, or no text token at all."""
    unguided_steps: int = 0
    """Number of first steps without guidance."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times with guidance, from low to high."""
    guidance_rescale: float = 0.0
    """Rescale guided predictions to the spread of the conditional one (arXiv 2305.08891), from 0
    (not) to 1 (fully)."""
    min_divisor: float = 0.0
    """x0 models divide x_t − x̂ by the time, or by this number if it is larger."""
    weights: str = "ema"
    """ema (the largest decay), ema=DECAY, width=WIDTH (optimizer.ema_widths) or params."""
    batch_size: int = 8
    """Images that are sampled at a time."""

    @classmethod
    def from_name(cls, name: str) -> Sample:
        """Return the recommended settings of a published model.

        Raises:
            ConfigError: For an unknown name; the message suggests the nearest one.
        """
        return get_preset(name).sample

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require_at_least(self, 1, "steps", "batch_size")
        require_at_least(self, 0, "unguided_steps")
        require(
            self.steps <= MAX_STEPS,
            f"sample.steps={self.steps} must be at most {MAX_STEPS}: more change nothing.",
        )
        require(
            all(b > 0 for b in self.beta),
            f"sample.beta={self.beta}: both numbers must be positive.",
        )
        require(
            0 <= self.min_divisor < 1,
            f"sample.min_divisor={self.min_divisor} must be at least 0 and less than 1: it is a "
            "time.",
        )
        require(
            self.weights in ("params", "ema")
            or self.weights.startswith("ema=")
            or self.ema_width is not None,
            f"sample.weights={self.weights!r}: give params, ema, ema=DECAY or width=WIDTH, with a "
            f"width between 0 and {MAX_EMA_WIDTH}.",
        )
        self._check_guidance()

    def _check_guidance(self):
        require_at_least(self, 0, "guidance_scale")
        require_fraction(self, "guidance_rescale")
        low, high = self.guidance_interval
        require(
            0 <= low <= high <= 1,
            f"sample.guidance_interval={self.guidance_interval} must be two increasing times "
            "between 0 and 1.",
        )
        require(
            self.unconditional == "negative" or not self.negative_prompt,
            f"sample.negative_prompt={self.negative_prompt!r} is not used with "
            "sample.unconditional=masked: set only one of them.",
        )

    @property
    def ema_width(self) -> float | None:
        """The relative width if `weights` is width=WIDTH, otherwise None."""
        name, _, width_text = self.weights.partition("=")
        try:
            width = float(width_text) if name == "width" else None
        except ValueError:
            return None
        return width if width is not None and 0 < width < MAX_EMA_WIDTH else None


class Preset(NamedTuple):
    """Recommended settings of a published model."""

    sample: Sample
    resolution: int  # pixels


# Sources: the training schedule (radiance), the authors' ComfyUI template (radiance-x0) and their
# users' guide (chroma-base). chroma-flash is distilled and needs no guidance.
_BETA_SCHEDULE = Sample(schedule="beta", beta=(0.4, 0.4))
PRESETS: dict[str, Preset] = {
    "radiance": Preset(Sample(steps=28, guidance_scale=4.0, schedule="shifted"), 512),
    "radiance-x0": Preset(replace(_BETA_SCHEDULE, steps=30, guidance_scale=3.5), 1024),
    "radiance-x0-patch32": Preset(replace(_BETA_SCHEDULE, steps=30, guidance_scale=3.5), 1024),
    "chroma-base": Preset(replace(_BETA_SCHEDULE, steps=26, guidance_scale=4.0), 512),
    "chroma-hd": Preset(replace(_BETA_SCHEDULE, steps=26, guidance_scale=4.0), 1024),
    "chroma-flash": Preset(Sample(solver="heun", steps=8, guidance_scale=1.0), 1024),
}


def get_preset(name: str) -> Preset:
    """Return the preset of that name. Raise ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(
            f"There is no preset {name!r}{suggest_name(name, PRESETS) or '.'} "
            f"The presets are {', '.join(PRESETS)}."
        )
    return PRESETS[name]


def find_preset_name(model: Model) -> str:
    """Return the name of the preset that suits a model best, judged by its settings."""
    if model.patch == 1:
        return "chroma-hd"
    if model.prediction == "velocity":
        return "radiance"
    return "radiance-x0" if model.patch == 16 else "radiance-x0-patch32"
