"""A suite: a question, a base, and variants that each change one thing in it, fixed before any run.

Variants are compared by pairs of equal seeds, see `runner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from radiance import config
from radiance.ablation.metrics import METRICS
from radiance.base.settings import require

Overrides = tuple[str, ...]  # changes of a config, as `section.key=value`
SCALES = ("smoke", "cpu", "gpu", "pod")  # minutes and hours of two cores, one GPU, a pod
# Seeds that choose learning rates and averages, and seeds of the gate; neither is reported.
TUNING_SEEDS = (100, 101)
GATE_SEEDS = (300, 301, 302, 303)


@dataclass(frozen=True)
class Precondition:
    """What the base must reach with every seed, for a comparison to mean anything.

    Attributes:
        metric: A metric for which higher is better.
        minimum: Its lowest value that suffices.
    """

    metric: str
    minimum: float


@dataclass(frozen=True)
class Gate:
    """A first run on GATE_SEEDS that shows whether the planned seeds can decide the question.

    Attributes:
        variants: Variants that are trained beside the base.
        max_half_width: Half of the 95 % interval of a difference that the suite's seeds should
            reach, as a fraction of the base's metric.
    """

    variants: tuple[str, ...]
    max_half_width: float


@dataclass(frozen=True)
class Scale:
    """The size at which a suite is run.

    Attributes:
        run: Config of the base.
        num_images: Number of training images in memory, which are sampled with replacement. With 0,
            variants are planned, and trained one by one like other experiments.
        num_seeds: Number of seeds, if the command does not give another.
        first_seed: The first seed; the others follow it.
        learning_rate_factors: Factors of the learning rate that each variant is tuned over, on
            TUNING_SEEDS; none: nothing is tuned.
        num_samples: Number of held-out captions from which images are generated and scored; 0 where
            training is too short for that.
        precondition: What the base must reach.
        gate: The run that decides on the number of seeds.
        variants: Additional variants, whose changes depend on the size of the network.
        conditions: Changes under which every trained variant is evaluated too, such as another
            mask.
    """

    run: config.Config
    num_images: int = 0
    num_seeds: int = 8
    first_seed: int = 0
    learning_rate_factors: tuple[float, ...] = ()
    num_samples: int = 0
    precondition: Precondition | None = None
    gate: Gate | None = None
    variants: Mapping[str, Overrides] = field(default_factory=dict)
    conditions: Mapping[str, Overrides] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A question with its variants.

    Attributes:
        name: Name of the suite.
        question: The question that it decides.
        metric: The metric that decides, of `metrics.METRICS`.
        base: Variant that the others are compared with.
        controls: Variants that are known to be worse. They are not part of the correction for
            several comparisons.
        margin: Fraction of the base's metric within which a variant counts as equal to it.
        variants: Changes of each variant.
        scales: Settings of each scale, of SCALES; one is enough.

    Raises:
        ConfigError: A variant has no valid config, or cannot be compared with the base.
    """

    name: str
    question: str
    metric: str
    base: str
    margin: float
    variants: Mapping[str, Overrides]
    scales: Mapping[str, Scale]
    controls: tuple[str, ...] = ()

    def __post_init__(self):
        _require_metric(self.name, self.metric)
        require(self.margin > 0, f"Suite {self.name}: margin={self.margin} must be positive.")
        require(
            bool(self.scales) and set(SCALES).issuperset(self.scales),
            f"Suite {self.name} has scales {', '.join(self.scales) or 'none'}: name at least one "
            f"of {', '.join(SCALES)}.",
        )
        for scale in self.scales:
            self._check_scale(scale)

    def _check_scale(self, scale: str):
        """Raise ConfigError if the variants at a scale do not fit the suite."""
        variants, settings = self.variants_at(scale), self.scales[scale]
        gate_variants = settings.gate.variants if settings.gate else ()
        for role, names in (
            ("base", (self.base,)),
            ("control", self.controls),
            ("gate", gate_variants),
        ):
            for variant in names:
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
            self.base not in (*self.controls, *gate_variants),
            f"Suite {self.name}: its base can be neither a control nor in the gate.",
        )
        runs = {variant: self.variant_config(scale, variant) for variant in variants}
        for variant, run in runs.items():
            _check_variant(self, variant, run, runs[self.base])
        require(
            len(set(runs.values())) == len(runs),
            f"Suite {self.name} has two variants at scale {scale} that are the same.",
        )
        self._check_metrics(scale)

    def _check_metrics(self, scale: str):
        """Raise ConfigError if a scale does not measure what the suite is decided by."""
        settings = self.scales[scale]
        if not settings.num_images:
            return
        precondition = settings.precondition
        for metric in (self.metric, *([precondition.metric] if precondition else [])):
            _require_metric(self.name, metric)
            require(
                METRICS[metric].needs == "losses" or settings.num_samples > 0,
                f"Suite {self.name} needs {metric} of generated images, but has num_samples=0 at "
                f"scale {scale}.",
            )
            require(
                METRICS[metric].needs != "descriptions" or settings.run.data.source == "shapes",
                f"Suite {self.name} needs {metric} at scale {scale}, which only data.source=shapes "
                f"has, not {settings.run.data.source}.",
            )
        require(
            precondition is None or METRICS[precondition.metric].higher_is_better,
            f"Suite {self.name}: its precondition has a minimum, so its metric must be one for "
            "which higher is better.",
        )

    @property
    def loss_metric(self) -> str:
        """The loss that tuning and evaluation conditions use: the metric itself if it is one."""
        return self.metric if METRICS[self.metric].needs == "losses" else "validation_loss"

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


def _require_metric(suite_name: str, metric: str):
    require(
        metric in METRICS,
        f"Suite {suite_name}: there is no metric {metric!r}; the choices are {', '.join(METRICS)}.",
    )


def _check_variant(suite: Suite, variant: str, run: config.Config, base: config.Config):
    """Raise ConfigError if a variant cannot be compared with the base."""
    prefix = f"Suite {suite.name}, variant {variant}:"
    changeable = ("batch_size", "caption_dropout", "mask_group_size")
    expected_data = replace(base.data, **{name: getattr(run.data, name) for name in changeable})
    require(
        run.data == expected_data and run.train.seed == base.train.seed,
        f"{prefix} all variants must see the same images with the same seeds: of data, change only "
        f"{', '.join(changeable)}.",
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
