"""Count the arithmetic of one instruction of optimized HLO."""

import math
import re
from collections.abc import Mapping

import numpy as np

from radiance.planning.hlo_text import Computation, Instruction, parse_shapes

# Matrix products of fused attention: two forwards (queries × keys, weights × values), five
# backwards.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
# Operations that compute one number for each number of their result.
ELEMENTWISE_OPS = {
    "abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "clz", "compare", "convert", "cosine",
    "divide", "erf", "exponential", "exponential-minus-one", "floor", "is-finite", "log",
    "log-plus-one", "logistic", "maximum", "minimum", "multiply", "negate", "not", "or", "popcnt",
    "power", "remainder", "round-nearest-afz", "round-nearest-even", "rsqrt", "select",
    "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign", "sine", "sqrt",
    "stochastic-convert", "subtract", "tan", "tanh", "xor",
}  # fmt: skip
REDUCTION_OPS = {"reduce", "reduce-window"}


def count_elementwise_operations(computation: Computation, instruction: Instruction) -> int:
    """Return the operations outside of matrix products; a transcendental function counts as one."""
    if instruction.op in ELEMENTWISE_OPS:
        return math.prod(parse_shapes(instruction.type)[0][1])
    if instruction.op in REDUCTION_OPS:
        return math.prod(parse_shapes(computation[instruction.operands[0]].type)[0][1])
    return 0


def find_product_type(computation: Computation, instruction: Instruction) -> str:
    """Return the element type of the first factor of a matrix product."""
    return parse_shapes(computation[instruction.operands[0]].type)[0][0]


def count_product_flops(computation: Computation, instruction: Instruction) -> float:
    """Return the FLOPs of matrix products, convolutions and fused attention."""
    attributes = instruction.attributes

    def operand_sizes(index: int) -> tuple[int, ...]:
        return parse_shapes(computation[instruction.operands[index]].type)[0][1]

    if instruction.op == "dot" or "__cublas" in attributes:
        return _count_dot_flops(instruction, operand_sizes(0))
    if instruction.op == "convolution":
        output_sizes = parse_shapes(instruction.type)[0][1]
        return _count_convolution_flops(
            output_sizes, operand_sizes(0), operand_sizes(1), attributes
        )
    if "__cudnn$conv" in attributes:
        result_sizes = parse_shapes(instruction.type)[0][1]
        sizes = result_sizes, operand_sizes(0), operand_sizes(1)  # output, input, kernel
        if "BackwardInput" in attributes:
            sizes = operand_sizes(0), result_sizes, operand_sizes(1)
        elif "BackwardFilter" in attributes:
            sizes = operand_sizes(1), operand_sizes(0), result_sizes
        return _count_convolution_flops(*sizes, attributes)
    if "__cudnn$fmha" in attributes:
        batch, num_queries, heads, head_dim = operand_sizes(0)
        num_keys = operand_sizes(1)[1]
        num_products = BACKWARD_PRODUCTS if "Backward" in attributes else FORWARD_PRODUCTS
        return 2 * batch * heads * num_queries * num_keys * head_dim * num_products
    if "tpu_custom_call" in attributes and "splash_mha" in instruction.name:
        arrays = [parse_shapes(computation[name].type)[0] for name in instruction.operands]
        query_sizes, key_sizes = [s for dtype, s, _ in arrays if dtype in ("bf16", "f32")][:2]
        num_products = BACKWARD_PRODUCTS if "dkv" in instruction.name else FORWARD_PRODUCTS
        return 2 * math.prod(query_sizes) * key_sizes[-2] * num_products
    return 0


def _count_dot_flops(instruction: Instruction, left_sizes: tuple[int, ...]) -> float:
    """Return the FLOPs of a matrix product: two for each output and contracted position."""
    axes = re.search(r"lhs_contracting_dim(?:s=\{|ensions\": ?\[)([^}\]]*)", instruction.attributes)
    if not axes:
        raise ValueError(
            f"A matrix product without contracted axes: {instruction.attributes[:200]}"
        )
    contracted = math.prod(left_sizes[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    return 2 * math.prod(parse_shapes(instruction.type)[0][1]) * contracted


def _count_convolution_flops(
    output_sizes: tuple[int, ...],
    input_sizes: tuple[int, ...],
    kernel_sizes: tuple[int, ...],
    attributes: str,
) -> float:
    """Return the FLOPs of a convolution: two for each multiplication by a value of the input.

    XLA for TPUs writes matrix products over several axes as convolutions of mostly padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if not labels:
        raise ValueError(f"A convolution without labels of its axes: {attributes[:200]}")
    input_labels, kernel_labels, output_labels = labels.groups()
    window_text = re.search(r"window=\{([^}]*)\}", attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", window_text[1] if window_text else ""))
    batch = output_sizes[output_labels.index("b")]
    out_channels = output_sizes[output_labels.index("f")]
    total = 2 * batch * out_channels * kernel_sizes[kernel_labels.index("i")]
    for axis in range(sum(label.isdigit() for label in output_labels)):
        input_size = input_sizes[input_labels.index(str(axis))]
        kernel_size = kernel_sizes[kernel_labels.index(str(axis))]
        output_size = output_sizes[output_labels.index(str(axis))]
        stride, input_dilation, kernel_dilation = (
            int(_window_value(window, name, axis, "1"))
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        padding = int(_window_value(window, "pad", axis, "0_0").split("_")[0])
        # Positions in the dilated input, [output, kernel]; those between or beyond inputs are
        # padding.
        positions = (
            np.arange(output_size)[:, None] * stride
            + np.arange(kernel_size) * kernel_dilation
            - padding
        )
        is_input = (
            (positions >= 0)
            & (positions % input_dilation == 0)
            & (positions // input_dilation < input_size)
        )
        total *= int(is_input.sum())
    return total


def _window_value(window: Mapping[str, str], name: str, axis: int, default: str) -> str:
    """Return the entry of one axis in a window attribute such as `stride=2x1`."""
    return window[name].split("x")[axis] if name in window else default
