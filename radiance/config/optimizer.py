"""Settings of the optimizer and of the weight averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require

MAX_EMA_WIDTH = (
    0.288  # relative width of the plain mean, 1 / √12: no growing weight has a larger one
)


@dataclass(frozen=True)
class Optimizer(Section):
    """AdamW (arXiv 1711.05101) or Muon behind a clip, and the averages of the weights."""

    # muon (Jordan et al. 2024): for the matrices of the blocks, every layer by itself, and AdamW for the rest. Its steps are as large as Adam's
    # (arXiv 2502.16982), so that learning rates carry over. Of a LoRA it takes both factors of every matrix, each as a matrix.
    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    lr_schedule: Literal["constant", "cosine"] = (
        "constant"  # after the warm-up; cosine falls to 0 at train.steps
    )
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_beta: float = 0.95  # of Muon's momentum, which is kept in mu_dtype
    weight_decay: float = 0.0  # never on norms, biases, tables and registers
    clip_norm: float = 1.0
    gradient_accumulation_steps: int = 1  # parts that a batch is computed in
    frozen: tuple[
        str, ...
    ] = ()  # parameter paths that start so are not trained, such as "modulation" or "double/image"
    block_rotation: tuple[int, int] = (
        0,
        0,
    )  # double and single blocks trained at a time, with moments of no more; 0,0 for all
    block_rotation_every: int = (
        100  # steps until the next of them; the moments of the optimizer begin anew
    )
    # The first double and the last single blocks are trained, with moments of no more, and those between stay (L2P, arXiv 2605.12013); 0,0 for all.
    edge_blocks: tuple[int, int] = (0, 0)
    lr_multipliers: tuple[
        str, ...
    ] = ()  # PATH=FACTOR: the learning rate of what starts so is multiplied, as in "head=4"; the longest path counts
    ema_decays: tuple[float, ...] = (0.9999,)  # decays; ramped up as (1 + step) / (10 + step)
    # Relative widths of averages whose weight grows as a power of the step (arXiv 2312.02696), such as 0.05,0.1; snapshots of them (train.snapshot_every)
    # give the average of any other width afterwards.
    ema_widths: tuple[float, ...] = ()
    # What weights and their averages, and Adam's first and second moments are kept in. bfloat16 is rounded up or down at random, in proportion to what lies
    # between: a small change, which rounding to the nearest would lose every time, then arrives on average.
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    nu_dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self):
        require(
            self.learning_rate > 0,
            f"optimizer.learning_rate={self.learning_rate} must be positive.",
        )
        require(
            self.gradient_accumulation_steps >= 1,
            f"optimizer.gradient_accumulation_steps={self.gradient_accumulation_steps} must be at least 1.",
        )
        require(
            self.clip_norm > 0,
            f"optimizer.clip_norm={self.clip_norm} must be positive (1e9 for none).",
        )
        require(
            self.warmup_steps >= 0 and self.weight_decay >= 0,
            "optimizer.warmup_steps and optimizer.weight_decay cannot be negative.",
        )
        for name in ("beta1", "beta2", "muon_beta"):
            require(
                0 <= getattr(self, name) < 1,
                f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).",
            )
        require(
            self.block_rotation_every >= 1,
            f"optimizer.block_rotation_every={self.block_rotation_every} must be at least 1.",
        )
        require(
            all(0 < factor < float("inf") for factor in self.lr_multiplier_by_path.values()),
            f"optimizer.lr_multipliers={self.lr_multipliers}: factors are positive numbers (optimizer.frozen names what does not move).",
        )
        require(
            len(self.lr_multiplier_by_path) == len(self.lr_multipliers),
            f"optimizer.lr_multipliers={self.lr_multipliers} names a path twice.",
        )
        require(
            all(0 < d < 1 for d in self.ema_decays),
            f"optimizer.ema_decays={self.ema_decays}: decays lie between 0 and 1.",
        )
        require(
            len(set(self.ema_decays)) == len(self.ema_decays),
            f"optimizer.ema_decays={self.ema_decays} names a decay twice.",
        )
        require(
            all(0 < w < MAX_EMA_WIDTH for w in self.ema_widths),
            f"optimizer.ema_widths={self.ema_widths}: widths lie between 0 and {MAX_EMA_WIDTH}.",
        )
        require(
            len(set(self.ema_widths)) == len(self.ema_widths),
            f"optimizer.ema_widths={self.ema_widths} names a width twice.",
        )

    @property
    def ema_names(self) -> tuple[str, ...]:
        """Names of the averages that are kept: decays, and width=WIDTH."""
        return (
            *(str(decay) for decay in self.ema_decays),
            *(f"width={width}" for width in self.ema_widths),
        )

    @property
    def lr_multiplier_by_path(self) -> dict[str, float]:
        """`rates` by path."""
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
