"""Count the work of a compiled program on one device from the text of its optimized HLO.

XLA's own cost analysis counts the body of a loop once. A transformer is one loop over its blocks,
so nearly all of its work would be missing; here every loop counts as often as it runs.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from radiance.planning.hlo_text import (
    Computation,
    DeviceGroups,
    Instruction,
    byte_size,
    count_trips,
    find_root,
    parse_device_groups,
    parse_hlo,
    parse_integer,
    parse_shapes,
)

COLLECTIVE_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Operations without memory traffic of their own: they name values that exist, or run computations
# whose instructions are counted.
FREE_OPS = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
    "async-done",
}  # fmt: skip
# Matrix products of fused attention: two forwards (queries × keys, weights × values), five
# backwards.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


class Collective(NamedTuple):
    """A collective operation and its traffic."""

    kind: str
    sent_bytes: float  # by one device over a ring, in all runs of the instruction
    groups: DeviceGroups


class ProgramCost(NamedTuple):
    """The work of one device in one run of a program."""

    flops: (
        float  # of matrix products, convolutions and fused attention; a multiply-add counts twice
    )
    traffic: float  # bytes read from and written to main memory by all kernels
    collectives: tuple[Collective, ...]
    unbounded_loops: int  # loops without a known trip count, which are counted as one trip


def count_program_cost(text: str) -> ProgramCost:
    """Return the cost of the program with the text `compiled.as_text()`."""
    return _CostCounter(text).count_program()


class _CostCounter:
    """Walk over the computations of a program and add up their work."""

    def __init__(self, text: str):
        self.computations, self.entry = parse_hlo(text)
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.num_partitions = int(partitions[1]) if partitions else 1
        self.unbounded_loops = 0
        self.fused_collectives: dict[str, Collective] = {}  # by channel
        self.collectives: list[Collective] = []

    def count_program(self) -> ProgramCost:
        flops, traffic = self.count_computation(self.entry, 1)
        collectives = (*self.collectives, *self.fused_collectives.values())
        return ProgramCost(flops, traffic, collectives, self.unbounded_loops)

    def count_computation(
        self, name: str, num_runs: float, in_fusion: bool = False
    ) -> tuple[float, float]:
        """Return FLOPs and traffic of a computation that is run `num_runs` times.

        Intermediate values of a fusion never reach memory, so its inside has no traffic.
        """
        flops = traffic = 0.0
        computation = self.computations[name]
        for instruction in computation.values():
            kind = instruction.op.removesuffix("-start")
            if kind in COLLECTIVE_KINDS:
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                collective = self.make_collective(computation, instruction, kind, num_runs)
                self.add_collective(collective, instruction, in_fusion)
            flops += num_runs * _count_flops(computation, instruction)
            if not in_fusion:
                traffic += num_runs * self.count_traffic(computation, instruction)
            for body, trips in self.iterate_bodies(instruction):
                body_cost = self.count_computation(
                    body, num_runs * trips, in_fusion or instruction.op == "fusion"
                )
                flops, traffic = flops + body_cost[0], traffic + body_cost[1]
        return flops, traffic

    def iterate_bodies(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """Yield the computations that an instruction runs, with the number of runs."""
        if instruction.op == "while":
            trips = count_trips(instruction, self.computations)
            self.unbounded_loops += trips is None
            yield instruction.attribute("body"), 1 if trips is None else trips
        elif instruction.op in ("fusion", "call", "async-start"):
            has_calls = "calls=" in instruction.attributes
            yield instruction.attribute("calls" if has_calls else "to_apply"), 1
        elif instruction.op == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = (
                re.findall(r"%?([\w.\-]+)", branches[1])
                if branches
                else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
            )
            # The longest branch counts.
            yield max(names, key=lambda name: len(self.computations[name])), 1

    def make_collective(
        self, computation: Computation, instruction: Instruction, kind: str, num_runs: float
    ) -> Collective:
        """Return a collective with the bytes that a ring sends for it."""
        size = sum(byte_size(computation[name].type) for name in instruction.operands)
        groups = parse_device_groups(instruction.attributes, self.num_partitions)
        group_size = groups.shape[1]
        sent_fraction = {
            "all-gather": group_size - 1,
            "all-reduce": 2 * (group_size - 1) / group_size,
            "collective-permute": 1,
        }.get(kind, (group_size - 1) / group_size)
        return Collective(kind, num_runs * size * sent_fraction, groups)

    def add_collective(self, collective: Collective, instruction: Instruction, in_fusion: bool):
        """Record a collective, once for each channel.

        XLA for TPUs splits one collective over several fusions with the same channel, some of them
        in inner loops. The outermost one, which sends least, has the true number of runs.
        """
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if not in_fusion or not channel:
            self.collectives.append(collective)
            return
        recorded = self.fused_collectives.get(channel[1])
        if recorded is None or collective.sent_bytes < recorded.sent_bytes:
            self.fused_collectives[channel[1]] = collective

    def count_traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Return the bytes of main memory that an instruction reads and writes."""
        if instruction.op in FREE_OPS or instruction.op.endswith("-done"):
            return 0
        if instruction.op == "fusion":
            fused = self.computations[instruction.attribute("calls")]
            return _count_fusion_traffic(computation, instruction, fused)
        operand_bytes = [
            byte_size(computation[name].type, main_memory_only=True)
            for name in instruction.operands
        ]
        result_bytes = byte_size(instruction.type, main_memory_only=True)
        if "__cublas" in instruction.attributes:  # its second result is workspace
            product_type = instruction.type.split("}")[0] + "}"
            return byte_size(product_type, main_memory_only=True) + sum(operand_bytes)
        if instruction.op in ("dynamic-slice", "gather"):
            return 2 * result_bytes
        if instruction.op == "dynamic-update-slice":  # in place
            return 2 * operand_bytes[1]
        if instruction.op.endswith("-start"):  # its type repeats the operands
            return result_bytes
        return result_bytes + sum(operand_bytes)


# --- traffic of fusions --------------------------------------------------------------------------


def _count_fusion_traffic(
    computation: Computation, instruction: Instruction, fused: Computation
) -> float:
    """Return the bytes that a fusion reads of its operands and writes of its result."""
    users: dict[str, list[Instruction]] = {}
    for x in fused.values():
        for name in x.operands:
            users.setdefault(name, []).append(x)
    total = 0.0
    if byte_size(instruction.type, main_memory_only=True):
        total = _count_written_bytes(find_root(fused), fused)
    parameters = {parse_integer(x): x for x in fused.values() if x.op == "parameter"}
    for index, name in enumerate(instruction.operands):
        operand_bytes = byte_size(computation[name].type, main_memory_only=True)
        total += min(_count_read_bytes(parameters[index], users), operand_bytes)
    return total


def _count_read_bytes(value: Instruction, users: Mapping[str, list[Instruction]]) -> float:
    """Return the bytes of a value that a fusion reads: all, unless it only slices or updates it."""
    total = 0.0
    for user in users.get(value.name, []):
        is_first_operand = user.operands[0] == value.name
        if user.op == "bitcast":
            total += _count_read_bytes(user, users)
        elif user.op in ("dynamic-slice", "gather") and is_first_operand:
            total += byte_size(user.type)
        elif not (user.op == "dynamic-update-slice" and is_first_operand):
            return byte_size(value.type)
    return total


def _count_written_bytes(result: Instruction, fused: Computation) -> float:
    """Return the bytes of a result that a fusion writes: of an update in place, only the update."""
    if result.op == "tuple":
        return sum(_count_written_bytes(fused[name], fused) for name in result.operands)
    if result.op == "bitcast":
        return _count_written_bytes(fused[result.operands[0]], fused)
    if result.op == "dynamic-update-slice":
        return byte_size(fused[result.operands[1]].type)
    return byte_size(result.type)


# --- FLOPs ---------------------------------------------------------------------------------------


def _count_flops(computation: Computation, instruction: Instruction) -> float:
    """Return the FLOPs of one instruction; those of elementwise operations are left out."""
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
