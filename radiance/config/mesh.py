"""Settings of the device mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require


@dataclass(frozen=True)
class Mesh(Section):
    """Number of devices along each axis; -1 uses all remaining devices."""

    data: int = -1
    """Replicas of the weights, each of which computes a part of the batch."""
    fsdp: int = 1
    """Shards of weights, optimizer state and batch."""
    tensor: int = 1
    """Shards of attention heads and MLP channels."""
    uneven: Literal["replicate", "error"] = "replicate"
    """What happens to a parameter whose axis does not divide evenly: the axis is replicated on
    every device, or the run does not start."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh={sizes}: sizes are at least 1, and one of them may be -1.",
        )
