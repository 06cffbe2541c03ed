"""A suite: one question, a base, and arms that each change one thing in it. All of it is written down before anything is run.

What is compared between arms is paired by seed: see `runner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from radiance import config
from radiance.base.settings import require
from radiance.shapes.captions import CaptionLengths

Overrides = tuple[str, ...]  # of a config, as `section.key=value`
SCALES = ("cpu", "gpu", "pod")
METRICS = ("validation_loss", "exact")  # see `measures`
TUNING_SEEDS = (100, 101)  # seeds that choose learning rates and averages, and are not reported


@dataclass(frozen=True)
class Scale:
    """How large a suite is run."""

    run: config.Config  # of the base
    # Of `shapes`, drawn from with replacement; 0: the suite is built and planned, and trained as other experiments are.
    num_images: int = 0
    num_seeds: int = 8  # unless told otherwise
    # Factors of the learning rate that each arm is tuned over, on the seeds of TUNING; none: nothing is tuned.
    learning_rate_factors: tuple[float, ...] = ()
    num_samples: int = (
        0  # held-out captions that are painted and read; 0 where so little training paints nothing
    )
    caption_lengths: CaptionLengths = "short"  # of the captions' lengths
    arms: Mapping[str, Overrides] = field(
        default_factory=dict
    )  # further ones, whose changes hang on the size of the network
    conditions: Mapping[str, Overrides] = field(
        default_factory=dict
    )  # changes under which every arm is measured too, such as another mask


@dataclass(frozen=True)
class Suite:
    """Raises ConfigError when it is built and one of its arms cannot be, or cannot be compared."""

    name: str
    question: str
    metric: Literal["validation_loss", "exact"]  # the one that decides
    base: str  # the arm that the others are compared with
    control: str  # an arm that is known to be worse: where it is not told from the base, nothing else can be
    margin: float  # share of the base's metric within which an arm counts as equal to it
    arms: Mapping[str, Overrides]
    scales: Mapping[str, Scale]

    def __post_init__(self):
        require(
            self.metric in METRICS,
            f"Suite {self.name}: metric={self.metric!r}; the choices are {', '.join(METRICS)}.",
        )
        require(self.margin > 0, f"Suite {self.name}: margin={self.margin} must be positive.")
        require(
            set(self.scales) == set(SCALES),
            f"Suite {self.name} has scales {', '.join(self.scales)}, and not {', '.join(SCALES)}.",
        )
        for scale in self.scales:
            arms = self.arms_at(scale)
            for role in ("base", "control"):
                arm = getattr(self, role)
                require(
                    arm in arms,
                    f"Suite {self.name}: its {role} {arm!r} is not among its arms {', '.join(arms)}.",
                )
            require(
                not arms[self.base],
                f"Suite {self.name}: its base {self.base!r} changes {', '.join(arms[self.base])}, and must change nothing.",
            )
            require(
                self.control != self.base, f"Suite {self.name}: base and control are the same arm."
            )
            runs = {arm: self.arm_config(scale, arm) for arm in arms}
            for arm, run in runs.items():
                _check_arm(self, arm, run, runs[self.base])
            require(
                len(set(runs.values())) == len(runs),
                f"Suite {self.name} has two arms at scale {scale} that are the same.",
            )
            require(
                self.metric != "exact"
                or not self.scales[scale].num_images
                or self.scales[scale].num_samples > 0,
                f"Suite {self.name} is decided by what is painted, but at scale {scale} painted=0.",
            )

    def arms_at(self, scale: str) -> dict[str, Overrides]:
        """All arms, the base first."""
        arms = {**self.arms, **self.scales[scale].arms}
        return {self.base: arms[self.base], **arms} if self.base in arms else arms

    def arm_config(self, scale: str, arm: str) -> config.Config:
        """The config of an arm; its seed is that of the base, and no run's."""
        return config.override(self.scales[scale].run, self.arms_at(scale)[arm])

    def condition_configs(self, scale: str, run: config.Config) -> dict[str, config.Config]:
        """The views that a run can be measured under: learned padding, for one, cannot be hidden."""
        configs = {}
        for condition, overrides in self.scales[scale].conditions.items():
            try:
                configs[condition] = config.override(run, overrides)
            except config.ConfigError:
                continue
        return configs


def _check_arm(suite: Suite, arm: str, run: config.Config, base: config.Config):
    prefix = f"Suite {suite.name}, arm {arm}:"
    expected_data = replace(
        base.data, batch_size=run.data.batch_size, caption_dropout=run.data.caption_dropout
    )
    require(
        run.data == expected_data and run.train.seed == base.train.seed,
        f"{prefix} all arms are shown the same scenes with the same seeds: of data change batch and caption_dropout alone.",
    )
    require(run.distill.kind == "none", f"{prefix} arms have no teacher: leave distill.kind=none.")
    require(
        not run.init and not run.lora.rank,
        f"{prefix} arms are trained from scratch, whole: leave init and lora out.",
    )
    require(
        run.optimizer.block_rotation == (0, 0),
        f"{prefix} optimizer.block_rotation follows train.seed, which seeds trained together share: leave it out.",
    )
    require(
        run.optimizer.lr_schedule == "constant",
        f"{prefix} optimizer.lr_schedule={run.optimizer.lr_schedule} hides how long an arm takes: use constant.",
    )
    require(
        bool(run.optimizer.ema_names),
        f"{prefix} arms are measured with averaged weights: give optimizer.ema_decays.",
    )
    require(
        run.model.pooled_dim == 0,
        f"{prefix} no encoder of `shapes` gives a pooled vector: leave model.pooled_dim at 0.",
    )
    require(
        run.data.dropped_caption == "empty",
        f"{prefix} dropped captions become the empty prompt here: leave data.dropped_caption=empty.",
    )
