"""Settings of the device mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require


@dataclass(frozen=True)
class Mesh(Section):
    """Devices along each axis; -1 takes what is left."""

    data: int = -1  # replicas of the weights, each with its part of the batch
    fsdp: int = 1  # weights, optimizer and batch in parts
    tensor: int = 1  # attention heads and MLP channels in parts
    uneven: Literal["replicate", "error"] = (
        "replicate"  # what a parameter does whose axis does not divide: every device has that axis whole, or nothing starts
    )

    def check(self):
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh={sizes}: sizes are at least 1, and one of them may be -1.",
        )
