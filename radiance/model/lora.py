"""LoRA kernels (arXiv 2106.09685): low-rank matrices that are kept beside a base kernel."""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

M = TypeVar("M", bound=nnx.Module)


@partial(jax.tree_util.register_dataclass, data_fields=["base", "down", "up"], meta_fields=[])
@dataclass(frozen=True)
class LoraKernel:
    """A base kernel with an unmerged adapter: base + down · up.

    Attributes:
        base: An array, or a `QuantizedKernel`.
        down: Matrices [*stack, in, rank].
        up: Matrices [*stack, rank, out], multiplied by strength · alpha / rank.
    """

    base: Any
    down: Any
    up: Any


class LoraLinear:
    """A linear layer whose kernel is a `LoraKernel`: x · base + (x · down) · up.

    The product down · up is never computed, and neither is its gradient: both are as large as the
    base kernel.
    """

    def __init__(self, linear: nnx.Linear | nnx.LinearGeneral, kernel: LoraKernel):
        self.linear, self.kernel = linear, kernel
        linear.kernel.set_value(kernel.base)

    def __call__(self, x: Float[Array, "b n ..."]) -> Float[Array, "b n ..."]:
        """Apply the layer to each token."""
        y = self.linear(x)
        flat_x = rearrange(x, "b n ... -> b n (...)").astype(y.dtype)
        down, up = self.kernel.down.astype(y.dtype), self.kernel.up.astype(y.dtype)
        return y + (flat_x @ down @ up).reshape(y.shape)


def replace_lora_layers(module: M) -> M:
    """Replace linear layers whose kernels are `LoraKernel`s by `LoraLinear` layers, in place."""
    submodules = [submodule for _, submodule in nnx.iter_modules(module)]
    for submodule in submodules:
        for name, layer in [*vars(submodule).items()]:
            if isinstance(layer, (nnx.Linear, nnx.LinearGeneral)):
                kernel: Any = layer.kernel.get_value()
                if isinstance(kernel, LoraKernel):
                    setattr(submodule, name, LoraLinear(layer, kernel))
    return module
