"""Settings of numerics, memory and speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require


@dataclass(frozen=True)
class Compute(Section):
    """How the network is executed.

    These settings change speed, memory and rounding, but not the function that is computed.
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of matrix products and activations; parameters are float32."""
    product_dtype: Literal["compute", "float8"] = "compute"
    """Type of the factors of products with the blocks' matrices: that of compute.dtype, or float8.
    float8 is faster only on devices that multiply it, from NVIDIA's H100 on."""
    attention: Literal["auto", "xla", "chunked", "cudnn", "splash"] = "auto"
    """Attention backend; auto chooses the fastest of the device. The memory of chunked grows with
    the number of tokens, not with its square."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, each block, or all but its matrix products."""
    head_chunk_size: int = 512
    """Image tokens that the NeRF head computes at a time; 0 for all at once."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require(
            self.product_dtype == "compute" or self.dtype == "bfloat16",
            f"compute.product_dtype={self.product_dtype} rounds much more than compute.dtype="
            f"{self.dtype} keeps: use compute.dtype=bfloat16 with it.",
        )
        require(
            self.head_chunk_size >= 0,
            f"compute.head_chunk_size={self.head_chunk_size}: give a number of tokens, or 0 for "
            "all at once.",
        )
