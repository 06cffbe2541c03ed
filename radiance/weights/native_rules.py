"""Rules that map native tensors (the published checkpoints' names and layouts) to our leaves."""

from collections.abc import Callable
from typing import Any, NamedTuple

from einops import rearrange

from radiance import config
from radiance.weights.tensors import TensorShapes

ModelPredicate = Callable[[config.Model], bool]


class TensorSlice(NamedTuple):
    """One leaf of the parameter tree, which makes up a native tensor or a part of it."""

    path: str  # of the leaf
    layout: str = "same"  # a key of LAYOUT_TO_NATIVE


class NativeRule(NamedTuple):
    """A native tensor, or one per block, and the leaves that it consists of."""

    native_name: str  # `{i}` is the index of a block: axis 0 of the stacked leaves
    slices: tuple[TensorSlice, ...]
    axis: int = 0  # of the native tensor, along which the slices are concatenated
    applies_to: ModelPredicate = lambda model: True


# Our leaf of one block → native tensor.
LAYOUT_TO_NATIVE: dict[str, Callable[..., Any]] = {
    "same": lambda x: x,
    "flat": lambda x: rearrange(x, "... -> (...)"),
    "matrix": lambda x: rearrange(x, "i ... -> (...) i"),
    "heads": lambda x: rearrange(x, "... o -> o (...)"),
    "patch": lambda x, kernel_size: rearrange(
        x, "(height width c) d -> d c height width", height=kernel_size, width=kernel_size
    ),
    "conv": lambda x: rearrange(x, "height width i o -> o i height width"),
}
# Native tensor → our leaf of one block, before it is reshaped to the leaf's shape.
LAYOUT_TO_LEAF: dict[str, Callable[[Any], Any]] = {
    "same": lambda x: x,
    "flat": lambda x: x,
    "matrix": lambda x: rearrange(x, "o i -> i o"),
    "heads": lambda x: rearrange(x, "o i -> i o"),
    "patch": lambda x: rearrange(x, "d c height width -> height width c d"),
    "conv": lambda x: rearrange(x, "o i height width -> height width i o"),
}


def leaf_rule(
    native_name: str,
    path: str,
    layout: str = "same",
    applies_to: ModelPredicate = lambda model: True,
) -> NativeRule:
    """Return the rule of a native tensor that is one leaf.

    Args:
        native_name: Its name, or the pattern of the names of its blocks.
        path: Path of the leaf in our tree.
        layout: A key of `LAYOUT_TO_NATIVE`.
        applies_to: Predicate of the models that have the tensor under this name.
    """
    return NativeRule(native_name, (TensorSlice(path, layout),), applies_to=applies_to)


def linear_rules(
    native_prefix: str,
    path: str,
    layout: str = "matrix",
    applies_to: ModelPredicate = lambda model: True,
) -> list[NativeRule]:
    """Return the rules of weight and bias of a linear layer or convolution.

    Args:
        native_prefix: Native name of the layer.
        path: Path of the layer in our tree.
        layout: Layout of the kernel, a key of `LAYOUT_TO_NATIVE`.
        applies_to: Predicate of the models that have the layer under this name.
    """
    return [
        leaf_rule(f"{native_prefix}.weight", f"{path}/kernel", layout, applies_to),
        leaf_rule(f"{native_prefix}.bias", f"{path}/bias", "flat", applies_to),
    ]


def count_blocks(shapes: TensorShapes, pattern: str) -> int:
    """Return the number of consecutive blocks that have a tensor.

    Args:
        shapes: Native tensors.
        pattern: A native name with `{i}` for the index of the block.
    """
    return next(i for i in range(len(shapes) + 1) if pattern.format(i=i) not in shapes)
