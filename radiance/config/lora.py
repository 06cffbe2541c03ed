"""Settings of LoRA fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from radiance.base.settings import Section, require

WeightFormat = Literal["none", "q8_0", "int8", "float8_e4m3fn"]
WEIGHT_FORMATS = tuple(name for name in get_args(WeightFormat) if name != "none")


@dataclass(frozen=True)
class Lora(Section):
    """Low-rank adapters of the blocks' matrices (arXiv 2106.09685), trained on frozen weights.

    `init` names the frozen weights.
    """

    rank: int = 0
    """Rank of the adapters; 0: the weights themselves are trained."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank; none: by 1."""
    target_modules: tuple[str, ...] = ("refiner", "double", "single")
    """Prefixes of the paths of the adapted matrices, such as "single/attention"."""
    weight_format: WeightFormat = "none"
    """Quantization of the frozen matrices in memory."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the frozen weights that are not quantized."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require(
            self.rank >= 0,
            f"lora.rank={self.rank} cannot be negative (0 trains the weights themselves).",
        )
        require(self.alpha is None or self.alpha > 0, f"lora.alpha={self.alpha} must be positive.")
        for module in self.target_modules:
            require(
                module.split("/")[0] in ("refiner", "double", "single"),
                f"lora.target_modules={module!r}: only matrices of the blocks are adapted, as in "
                "double or single/mlp.",
            )
        require(
            bool(self.target_modules),
            "lora.target_modules is empty: name the adapted modules, such as double,single.",
        )

    @property
    def scale(self) -> float:
        """Factor of the adapters."""
        return 1.0 if self.alpha is None else self.alpha / max(self.rank, 1)
