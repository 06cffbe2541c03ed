"""A suite: a question, a base, and variants that each change one thing in it, fixed before any run.

Variants are compared by pairs of equal seeds, see `runner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from radiance import config
from radiance.base.settings import require

Overrides = tuple[str, ...]  # changes of a config, as `section.key=value`
SCALES = ("cpu", "gpu", "pod")
METRICS = ("validation_loss", "exact")  # see `metrics`
TUNING_SEEDS = (100, 101)  # seeds that choose learning rates and averages, and are not reported


@dataclass(frozen=True)
class Scale:
    """The size at which a suite is run.

    Attributes:
        run: Config of the base.
        num_images: Number of training images in memory, which are sampled with replacement. With 0,
            variants are planned, and trained one by one like other experiments.
        num_seeds: Number of seeds, if the command does not give another.
        learning_rate_factors: Factors of the learning rate that each variant is tuned over, on
            TUNING_SEEDS; none: nothing is tuned.
        num_samples: Number of held-out captions from which images are generated and scored; 0 where
            training is too short for that.
        variants: Additional variants, whose changes depend on the size of the network.
        conditions: Changes under which every trained variant is evaluated too, such as another
            mask.
    """

    run: config.Config
    num_images: int = 0
    num_seeds: int = 8
    learning_rate_factors: tuple[float, ...] = ()
    num_samples: int = 0
    variants: Mapping[str, Overrides] = field(default_factory=dict)
    conditions: Mapping[str, Overrides] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A question with its variants.

    Attributes:
        name: Name of the suite.
        question: The question that it decides.
        metric: The metric that decides.
        base: Variant that the others are compared with.
        control: Variant that is known to be worse. If it does not differ significantly from the
            base, inconclusive results of other variants carry no information.
        margin: Fraction of the base's metric within which a variant counts as equal to it.
        variants: Changes of each variant.
        scales: Settings of each scale.

    Raises:
        ConfigError: A variant has no valid config, or cannot be compared with the base.
    """

    name: str
    question: str
    metric: Literal["validation_loss", "exact"]
    base: str
    control: str
    margin: float
    variants: Mapping[str, Overrides]
    scales: Mapping[str, Scale]

    def __post_init__(self):
        require(
            self.metric in METRICS,
            f"Suite {self.name}: metric={self.metric!r}; the choices are {', '.join(METRICS)}.",
        )
        require(self.margin > 0, f"Suite {self.name}: margin={self.margin} must be positive.")
        require(
            set(self.scales) == set(SCALES),
            f"Suite {self.name} has scales {', '.join(self.scales)}, not {', '.join(SCALES)}.",
        )
        for scale in self.scales:
            self._check_scale(scale)

    def _check_scale(self, scale: str):
        """Raise ConfigError if the variants at a scale do not fit the suite."""
        variants = self.variants_at(scale)
        for role in ("base", "control"):
            variant = getattr(self, role)
            require(
                variant in variants,
                f"Suite {self.name}: its {role} {variant!r} is not among its variants "
                f"{', '.join(variants)}.",
            )
        require(
            not variants[self.base],
            f"Suite {self.name}: its base {self.base!r} changes {', '.join(variants[self.base])}, "
            "and must change nothing.",
        )
        require(
            self.control != self.base, f"Suite {self.name}: base and control are the same variant."
        )
        runs = {variant: self.variant_config(scale, variant) for variant in variants}
        for variant, run in runs.items():
            _check_variant(self, variant, run, runs[self.base])
        require(
            len(set(runs.values())) == len(runs),
            f"Suite {self.name} has two variants at scale {scale} that are the same.",
        )
        settings = self.scales[scale]
        require(
            self.metric != "exact" or not settings.num_images or settings.num_samples > 0,
            f"Suite {self.name} is decided by generated images, but has num_samples=0 at scale "
            f"{scale}.",
        )
        require(
            not settings.num_samples or settings.run.data.source == "shapes",
            f"Suite {self.name} scores generated images at scale {scale}, which needs captions of "
            f"data.source=shapes, not {settings.run.data.source}.",
        )

    def variants_at(self, scale: str) -> dict[str, Overrides]:
        """Return the changes of all variants at a scale, the base first."""
        variants = {**self.variants, **self.scales[scale].variants}
        return {self.base: variants[self.base], **variants} if self.base in variants else variants

    def variant_config(self, scale: str, variant: str) -> config.Config:
        """Return the config of a variant, with the seed of the base."""
        return config.override(self.scales[scale].run, self.variants_at(scale)[variant])

    def condition_configs(self, scale: str, run: config.Config) -> dict[str, config.Config]:
        """Return the configs of the evaluation conditions that are valid for a run.

        Learned padding, for example, cannot be masked.
        """
        configs = {}
        for condition, overrides in self.scales[scale].conditions.items():
            try:
                configs[condition] = config.override(run, overrides)
            except config.ConfigError:
                continue
        return configs


def _check_variant(suite: Suite, variant: str, run: config.Config, base: config.Config):
    """Raise ConfigError if a variant cannot be compared with the base."""
    prefix = f"Suite {suite.name}, variant {variant}:"
    expected_data = replace(
        base.data, batch_size=run.data.batch_size, caption_dropout=run.data.caption_dropout
    )
    require(
        run.data == expected_data and run.train.seed == base.train.seed,
        f"{prefix} all variants must see the same images with the same seeds: of data, change only "
        "batch_size and caption_dropout.",
    )
    require(
        run.distill.kind == "none", f"{prefix} variants have no teacher: leave distill.kind=none."
    )
    require(
        not run.init and not run.lora.rank,
        f"{prefix} variants are trained completely and from scratch: leave init and lora out.",
    )
    require(
        run.optimizer.block_rotation == (0, 0),
        f"{prefix} optimizer.block_rotation follows train.seed, which differs between seeds that "
        "are trained together: leave it out.",
    )
    require(
        run.optimizer.lr_schedule == "constant",
        f"{prefix} optimizer.lr_schedule={run.optimizer.lr_schedule} hides how many steps a "
        "variant needs: use constant.",
    )
    require(
        bool(run.optimizer.ema_names),
        f"{prefix} variants are evaluated with averaged weights: set optimizer.ema_decays.",
    )
    require(
        run.model.pooled_dim == 0,
        f"{prefix} no text encoder here gives a pooled vector: leave model.pooled_dim at 0.",
    )
    require(
        run.data.dropped_caption == "empty",
        f"{prefix} dropped captions become the empty prompt: leave data.dropped_caption=empty.",
    )
