"""The changes of a weight that LoRA files hold: low-rank pairs, LoHa, LoKr, DoRA, full values.

LoRA is arXiv 2106.09685, LoHa arXiv 2108.06098, LoKr arXiv 2212.10650, DoRA arXiv 2402.09353. A
convolution's weight [out, in, height, width] counts as the matrix [out, in · height · width].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32

Array = Float32[np.ndarray, "..."]
NORM_EPSILON = np.finfo(np.float32).eps  # added to the norms of DoRA, as LyCORIS does


@runtime_checkable
class WeightChange(Protocol):
    """A change of one weight, or of some of its rows."""

    @property
    def is_zero(self) -> bool:
        """Whether the change is known to leave every weight as it is."""
        ...

    def apply(self, weight: Array, strength: float) -> Array:
        """Return a weight in float32, changed at a strength (1 is as trained)."""
        ...


class LoraPair(NamedTuple):
    """Two factors of the change of one module's weight."""

    down: Float32[np.ndarray, "rank in"]
    up: Float32[np.ndarray, "out rank"]
    scale: float = 1.0  # alpha / rank

    @property
    def is_zero(self) -> bool:
        """Whether the product is zero, as it is before training."""
        return not (self.scale and self.down.any() and self.up.any())

    def compute_delta(self, strength: float = 1.0) -> Float32[np.ndarray, "out in"]:
        """Return the change of the weight at a strength."""
        return np.float32(strength * self.scale) * (self.up @ self.down)

    def apply(self, weight: Array, strength: float) -> Array:
        """Return weight + strength · scale · up · down."""
        return weight + self.compute_delta(strength).reshape(weight.shape)


class Factor(NamedTuple):
    """A matrix as it is in a file: complete, a product, or a Tucker decomposition.

    A product is `left` [rows, rank] · `right` [rank, columns]. With a core [rank, rank, height,
    width] of a convolution, `left` is [rank, rows].
    """

    left: Array
    right: Float32[np.ndarray, "rank columns"] | None = None
    core: Float32[np.ndarray, "rank rank height width"] | None = None

    @property
    def is_zero(self) -> bool:
        """Whether one of the arrays is zero."""
        return not all(x.any() for x in self if x is not None)

    @property
    def rank(self) -> int | None:
        """Rank of a product; None for a complete matrix."""
        return None if self.right is None else len(self.right)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        if self.right is None:
            return len(self.left), math.prod(self.left.shape[1:])
        if self.core is None:
            return len(self.left), self.right.shape[1]
        return self.left.shape[1], self.right.shape[1] * math.prod(self.core.shape[2:])

    def expand(self) -> Float32[np.ndarray, "rows columns"]:
        """Return the matrix."""
        if self.right is None:
            return self.left.reshape(self.shape)
        if self.core is None:
            return self.left @ self.right
        with_rows = np.tensordot(self.left, self.core, (0, 0))  # [rows, rank, height, width]
        return np.einsum("prhw,rc->pchw", with_rows, self.right).reshape(self.shape)


@dataclass(frozen=True)
class _ProductChange:
    """A change by a product of two factors."""

    first: Factor
    second: Factor
    scale: float

    @property
    def is_zero(self) -> bool:
        """Whether a factor is zero, as it is before training."""
        return not self.scale or self.first.is_zero or self.second.is_zero


@dataclass(frozen=True)
class HadamardChange(_ProductChange):
    """LoHa: scale · (first ⊙ second), two products of low rank multiplied value by value."""

    def apply(self, weight: Array, strength: float) -> Array:
        """Return weight + strength · scale · (first ⊙ second)."""
        delta = self.first.expand() * self.second.expand()
        return weight + np.float32(strength * self.scale) * delta.reshape(weight.shape)


@dataclass(frozen=True)
class KroneckerChange(_ProductChange):
    """LoKr: scale · (first ⊗ second), the Kronecker product of two matrices."""

    def apply(self, weight: Array, strength: float) -> Array:
        """Return weight + strength · scale · (first ⊗ second)."""
        delta = np.kron(
            np.float32(strength * self.scale) * self.first.expand(), self.second.expand()
        )
        return weight + delta.reshape(weight.shape)


@dataclass(frozen=True)
class DoraChange:
    """DoRA: the directions of the changed weight, with learned norms.

    At a strength other than 1 the result is interpolated between the weight and the trained one, as
    in ComfyUI.
    """

    change: WeightChange
    magnitude: Float32[np.ndarray, " n"]  # of each output (axis 0) or each input (axis 1)
    axis: int

    @property
    def is_zero(self) -> bool:
        """False: whether the norms differ from those of the weight is not known."""
        return False

    def apply(self, weight: Array, strength: float) -> Array:
        """Return the weight with its direction changed and its norms replaced."""
        directions = self.change.apply(weight, 1.0)
        other_axes = tuple(axis for axis in range(weight.ndim) if axis != self.axis)
        norms = np.sqrt(np.square(directions).sum(axis=other_axes, keepdims=True))
        magnitude = self.magnitude.reshape(norms.shape)
        return _interpolate(weight, directions * (magnitude / (norms + NORM_EPSILON)), strength)


@dataclass(frozen=True)
class FullDifference:
    """A difference that is stored value by value."""

    values: Float[np.ndarray, "..."]  # in its stored type
    scale: float = 1.0

    @property
    def is_zero(self) -> bool:
        """Whether all values are zero."""
        return not self.scale or not self.values.any()

    def apply(self, weight: Array, strength: float) -> Array:
        """Return weight + strength · scale · difference."""
        delta = self.values.astype(np.float32).reshape(weight.shape)
        return weight + np.float32(strength * self.scale) * delta


@dataclass(frozen=True)
class Replacement:
    """Values that take the place of the weight's own."""

    values: Float[np.ndarray, "..."]  # in its stored type

    @property
    def is_zero(self) -> bool:
        """False: whether the values differ from the weight is not known."""
        return False

    def apply(self, weight: Array, strength: float) -> Array:
        """Return the values; at a strength other than 1, interpolated."""
        return _interpolate(weight, self.values.astype(np.float32).reshape(weight.shape), strength)


@dataclass(frozen=True)
class StackedChange:
    """Changes of several ranges of a weight's rows, such as queries, keys and values."""

    parts: Sequence[tuple[slice, WeightChange]]

    @property
    def is_zero(self) -> bool:
        """Whether all parts are zero."""
        return all(change.is_zero for _, change in self.parts)

    def apply(self, weight: Array, strength: float) -> Array:
        """Return the weight with each range of rows changed."""
        result = weight.copy()
        for rows, change in self.parts:
            result[rows] = change.apply(weight[rows], strength)
        return result


def _interpolate(weight: Array, target: Array, strength: float) -> Array:
    """Return (1 − strength) · weight + strength · target; at 1 this is exactly the target."""
    return np.float32(1 - strength) * weight + np.float32(strength) * target
