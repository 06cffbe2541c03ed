"""Settings of the optimizer and of the averages of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import MAX_FLOAT, MIN_FLOAT, Section, require, require_at_least

# Relative width of the plain mean, 1 / √12. No average whose weights grow has a larger one.
MAX_EMA_WIDTH = 0.288
MAX_DECAY = 1 - 2.0**-24  # the largest number below 1 in float32


@dataclass(frozen=True)
class Optimizer(Section):
    """AdamW (arXiv 1711.05101) or Muon with gradient clipping, and averages of the weights."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon (Jordan et al. 2024): for the matrices of the blocks, each layer separately, and AdamW
    for the rest. Its steps are scaled to those of Adam (arXiv 2502.16982), so that learning rates
    carry over. Both factors of a LoRA count as matrices."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warmup."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warmup; cosine decays to 0 at train.steps."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    muon_beta: float = 0.95
    """Decay of Muon's momentum, which is stored as mu_dtype."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never of norms, biases, tables and registers."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    gradient_accumulation_steps: int = 1
    """Number of microbatches that a batch is divided into."""
    frozen: tuple[str, ...] = ()
    """Prefixes of parameter paths that are not trained, such as "modulation" or "double/image"."""
    block_rotation: tuple[int, int] = (0, 0)
    """Double and single blocks that are trained at a time, in turn; only these have moments. 0,0
    trains all."""
    block_rotation_every: int = 100
    """Steps until the next blocks are trained; the moments of the optimizer are reset."""
    edge_blocks: tuple[int, int] = (0, 0)
    """Train only the first double and the last single blocks, as many as given; only these have
    moments (L2P, arXiv 2605.12013). 0,0 trains all."""
    lr_multipliers: tuple[str, ...] = ()
    """PREFIX=FACTOR: multiply the learning rate of parameters whose path has the prefix, as in
    "head=4"; the longest prefix applies."""
    ema_decays: tuple[float, ...] = (0.9999,)
    """Decays of exponential moving averages; each starts at (1 + step) / (10 + step)."""
    ema_widths: tuple[float, ...] = ()
    """Relative widths of power-function averages (arXiv 2312.02696), such as 0.05,0.1. From their
    snapshots (train.snapshot_every), the average of any other width can be computed later."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights and averages. bfloat16 is rounded stochastically, so that small
    updates are not lost."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored first moment; bfloat16 is rounded stochastically."""
    nu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored second moment; bfloat16 is rounded stochastically."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require(
            self.learning_rate > 0,
            f"optimizer.learning_rate={self.learning_rate} must be positive.",
        )
        require_at_least(self, 1, "gradient_accumulation_steps", "block_rotation_every")
        require_at_least(self, 0, "warmup_steps", "weight_decay")
        require(
            self.clip_norm > 0,
            f"optimizer.clip_norm={self.clip_norm} must be positive (1e9 for none).",
        )
        require(self.eps > 0, f"optimizer.eps={self.eps} must be positive, such as 1e-8.")
        require(
            self.learning_rate * self.weight_decay < 1,
            f"optimizer.weight_decay={self.weight_decay} times optimizer.learning_rate="
            f"{self.learning_rate} must be less than 1: it is what a step takes from every weight.",
        )
        for name in ("beta1", "beta2", "muon_beta"):
            require(
                0 <= getattr(self, name) <= MAX_DECAY,
                f"optimizer.{name}={getattr(self, name)} must be at least 0 and less than 1, also "
                "when it is rounded to float32.",
            )
        require(
            all(
                MIN_FLOAT <= factor * self.learning_rate <= MAX_FLOAT
                for factor in self.lr_multiplier_by_path.values()
            ),
            f"optimizer.lr_multipliers={self.lr_multipliers}: factors are positive numbers "
            "(optimizer.frozen names parameters that are not trained).",
        )
        require(
            len(self.lr_multiplier_by_path) == len(self.lr_multipliers),
            f"optimizer.lr_multipliers={self.lr_multipliers} names a path twice.",
        )
        _check_numbers("ema_decays", self.ema_decays, MAX_DECAY)
        _check_numbers("ema_widths", self.ema_widths, MAX_EMA_WIDTH)

    @property
    def ema_names(self) -> tuple[str, ...]:
        """Names of the averages that a run stores: DECAY, and width=WIDTH."""
        return (
            *(str(decay) for decay in self.ema_decays),
            *(f"width={width}" for width in self.ema_widths),
        )

    @property
    def lr_multiplier_by_path(self) -> dict[str, float]:
        """Factors of the learning rate by prefix of the parameter path."""
        multipliers = {}
        for entry in self.lr_multipliers:
            path, _, factor = entry.rpartition("=")
            try:
                multipliers[path] = float(factor)
            except ValueError:
                path = ""
            require(
                path != "",
                f"optimizer.lr_multipliers={entry!r}: write PATH=FACTOR, such as head=4.",
            )
        return multipliers


def _check_numbers(name: str, values: Sequence[float], upper_bound: float):
    """Raise ConfigError unless all values are different and between 0 and the bound."""
    require(
        all(0 < value < upper_bound for value in values),
        f"optimizer.{name}={values}: values must be between 0 and {upper_bound}.",
    )
    require(len(set(values)) == len(values), f"optimizer.{name}={values} contains a value twice.")
