"""How images are made, and how the published models' are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from radiance.base.errors import ConfigError
from radiance.base.settings import Section, require, suggest_name
from radiance.config.model import Model
from radiance.config.optimizer import MAX_EMA_WIDTH


@dataclass(frozen=True)
class Sample(Section):
    """How images are made from a trained model."""

    # mean_flow: Euler's steps, of whose length the network is told; for models of distill.kind=mean_flow.
    solver: Literal["euler", "heun", "dpmpp_2m", "mean_flow"] = "euler"
    steps: int = 30
    schedule: Literal["uniform", "shifted", "beta"] = "uniform"
    shift: float | None = (
        None  # log of the factor of schedule=shifted; none: by resolution, as FLUX does
    )
    beta: tuple[float, float] = (0.4, 0.4)  # parameters of schedule=beta
    guidance_scale: float = 3.5  # 1 is none
    negative_prompt: str = ""
    unconditional: Literal["negative", "masked"] = (
        "negative"  # what guidance leads away from: that prompt, or no text token at all
    )
    unguided_steps: int = 0  # first steps without guidance
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times with guidance
    guidance_rescale: float = (
        0.0  # 0 none, 1 the spread of the conditional prediction (arXiv 2305.08891)
    )
    min_divisor: float = (
        0.0  # of x0 models: x_t − x̂ is divided by the time, but by no less than this
    )
    weights: str = (
        "ema"  # ema (the largest decay), ema=DECAY, width=WIDTH (optimizer.ema_widths), or params
    )
    batch_size: int = 8  # images at a time

    @classmethod
    def from_name(cls, name: str) -> Sample:
        """The recommended settings of a published model. Raises ConfigError with the nearest name."""
        return get_preset(name).sample

    def check(self):
        require(self.steps >= 1, f"sample.steps={self.steps} must be at least 1.")
        require(self.batch_size >= 1, f"sample.batch_size={self.batch_size} must be at least 1.")
        require(
            self.guidance_scale >= 0,
            f"sample.guidance_scale={self.guidance_scale} cannot be negative.",
        )
        require(
            all(b > 0 for b in self.beta),
            f"sample.beta={self.beta}: both numbers must be positive.",
        )
        low, high = self.guidance_interval
        require(
            0 <= low <= high <= 1,
            f"sample.guidance_interval={self.guidance_interval} must be two rising times between 0 and 1.",
        )
        require(
            0 <= self.min_divisor < 1,
            f"sample.min_divisor={self.min_divisor} must lie between 0 and 1: it is a time.",
        )
        require(
            self.unconditional == "negative" or not self.negative_prompt,
            f"sample.negative_prompt={self.negative_prompt!r} is not read with sample.unconditional=masked: leave one of them out.",
        )
        require(
            0 <= self.guidance_rescale <= 1,
            f"sample.guidance_rescale={self.guidance_rescale} must lie between 0 and 1.",
        )
        require(
            self.weights in ("params", "ema")
            or self.weights.startswith("ema=")
            or self.ema_width is not None,
            f"sample.weights={self.weights!r}: say params, ema, ema=DECAY or width=WIDTH, a width between 0 and {MAX_EMA_WIDTH}.",
        )

    @property
    def ema_width(self) -> float | None:
        """The relative width of the average that `weights` names, if it names one so."""
        name, _, width_text = self.weights.partition("=")
        try:
            width = float(width_text) if name == "width" else None
        except ValueError:
            return None
        return width if width is not None and 0 < width < MAX_EMA_WIDTH else None


class Preset(NamedTuple):
    sample: Sample
    resolution: int  # of the images it was made for, in pixels


_BETA_SCHEDULE = Sample(schedule="beta", beta=(0.4, 0.4))
PRESETS: dict[str, Preset] = {
    "radiance": Preset(
        Sample(steps=28, guidance_scale=4.0, schedule="shifted"), 512
    ),  # the schedule it was trained with
    "radiance-x0": Preset(
        replace(_BETA_SCHEDULE, steps=30, guidance_scale=3.5), 1024
    ),  # the authors' ComfyUI template
    "radiance-x0-patch32": Preset(replace(_BETA_SCHEDULE, steps=30, guidance_scale=3.5), 1024),
    "chroma-base": Preset(replace(_BETA_SCHEDULE, steps=26, guidance_scale=4.0), 512),  # its users' guide
    "chroma-hd": Preset(replace(_BETA_SCHEDULE, steps=26, guidance_scale=4.0), 1024),
    "chroma-flash": Preset(
        Sample(solver="heun", steps=8, guidance_scale=1.0), 1024
    ),  # distilled: no guidance
}


def get_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ConfigError(
            f"There is no preset {name!r}{suggest_name(name, PRESETS) or '.'} The presets are {', '.join(PRESETS)}."
        )
    return PRESETS[name]


def find_preset_name(model: Model) -> str:
    """The name of the settings that suit a published model best, as far as its sizes tell."""
    if model.patch == 1:
        return "chroma-hd"
    if model.prediction == "velocity":
        return "radiance"
    return "radiance-x0" if model.patch == 16 else "radiance-x0-patch32"
