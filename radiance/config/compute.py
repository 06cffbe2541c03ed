"""Settings of numerics, memory and speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require


@dataclass(frozen=True)
class Compute(Section):
    """How the network is run. Changes speed, memory and rounding, never what is computed."""

    dtype: Literal["bfloat16", "float32"] = (
        "bfloat16"  # of matrix products and activations; parameters are float32
    )
    # auto takes the fastest for the device; pieces needs memory that grows with the tokens and not with their square
    attention: Literal["auto", "xla", "chunked", "cudnn", "splash"] = "auto"
    remat: Literal["none", "full", "dots"] = (
        "none"  # what the backward pass recomputes: nothing, each block, all but its matrix products
    )
    head_chunk_size: int = (
        512  # tokens of an image that the NeRF head paints at a time; 0 for all at once
    )

    def check(self):
        require(
            self.head_chunk_size >= 0,
            f"compute.head_chunk_size={self.head_chunk_size}: give a number of tokens, or 0 for all at once.",
        )
