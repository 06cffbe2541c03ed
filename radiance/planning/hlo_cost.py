"""What a compiled program does on one device, counted in the text of its optimized HLO, every loop as often as it runs.

XLA's own cost analysis counts the body of a loop once, which for a network that is one loop over its blocks counts nearly nothing.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

TYPE_BYTES = {
    "pred": 1,
    "bf16": 2,
    "token": 0,
    "s4": 0.5,
    "u4": 0.5,
}  # bytes; of the others the name has the bits
COLLECTIVE_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# No work of their own: names for what is there, or control, whose bodies are counted.
FREE_OPS = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip


class Collective(NamedTuple):
    kind: str
    sent_bytes: float  # that one device sends, by a ring, over all the times it is run
    groups: np.ndarray  # [groups, devices] that take part together


class ProgramCost(NamedTuple):
    """Of one device in one run of a program."""

    flops: (
        float  # of matrix products, convolutions and fused attention: two for each multiplication
    )
    traffic: float  # bytes read from and written to memory, between kernels
    collectives: tuple[Collective, ...]
    unbounded_loops: (
        int  # loops whose number of turns the text does not tell; they are counted as one turn
    )


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    arguments: str  # in parentheses: the operands, or the value of a constant, or the number of a parameter
    attributes: str  # the attributes
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)


Computation = dict[str, Instruction]


def read_hlo(text: str) -> ProgramCost:
    """The work of the program whose `compiled.as_text()` this is."""
    return _CostCounter(text).count_program()


def parse_hlo(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, computation, lines = "", {}, []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation, lines = computations.setdefault(header[2], {}), []
            entry = header[2] if header[1] else entry
        elif re.match(r"  (ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line)
        elif line == "}":
            for instruction in map(_parse_instruction, lines):
                computation[instruction.name] = instruction
        elif lines:
            lines[-1] += line  # metadata with line breaks
    return computations, entry


def _parse_instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    hlo_type, right = _split_parentheses(right) if right.startswith("(") else right.split(" ", 1)
    op, _, _ = right.strip().partition("(")
    arguments, attributes = _split_parentheses(right.strip()[len(op) :])
    return Instruction(
        left.split("%")[-1], hlo_type, op, arguments, attributes, left.startswith("ROOT")
    )


def _split_parentheses(text: str) -> tuple[str, str]:
    """`text` up to the end of its first parenthesis, and what follows."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    raise ValueError(f"An instruction of the compiled program ends early: {text[:80]}")


def parse_shapes(hlo_type: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Type, sizes and layout of each array in the type of an instruction."""
    matches = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", hlo_type)
    return [
        (dtype, tuple(map(int, dims.split(","))) if dims else (), layout)
        for dtype, dims, layout in matches
    ]


def byte_size(hlo_type: str, main_memory_only: bool = False) -> float:
    """Bytes; with `main` only of what lies in the device's main memory, not in a memory on the chip."""
    total = 0.0
    for dtype, dims, layout in parse_shapes(hlo_type):
        digits = re.match(r"[a-z]+(\d+)", dtype)
        element_bytes = (
            TYPE_BYTES[dtype] if dtype in TYPE_BYTES else int(digits[1]) / 8 if digits else 0
        )
        total += (
            0
            if main_memory_only and re.search(r"S\([1-9]", layout)
            else element_bytes * math.prod(dims)
        )
    return total


class _CostCounter:
    def __init__(self, text: str):
        self.computations, self.entry = parse_hlo(text)
        self.num_partitions = int((re.search(r"num_partitions=(\d+)", text) or [0, "1"])[1])
        self.unbounded_loops = 0
        self.fused_collectives: dict[str, Collective] = {}
        self.collectives: list[Collective] = []

    def count_program(self) -> ProgramCost:
        flops, traffic = self.count_computation(self.entry, 1)
        return ProgramCost(
            flops,
            traffic,
            (*self.collectives, *self.fused_collectives.values()),
            self.unbounded_loops,
        )

    def count_computation(
        self, name: str, num_runs: float, in_fusion: bool = False
    ) -> tuple[float, float]:
        """FLOPs and traffic of a computation that is run so many times. Inside a fusion nothing passes through memory."""
        flops = traffic = 0.0
        computation = self.computations[name]
        for instruction in computation.values():
            kind = instruction.op.removesuffix("-start")
            if kind in COLLECTIVE_KINDS:
                self.add_collective(
                    self.make_collective(
                        computation,
                        instruction,
                        "reduce-scatter" if "all-reduce-scatter" in name else kind,
                        num_runs,
                    ),
                    instruction,
                    in_fusion,
                )
            flops += num_runs * _count_flops(computation, instruction)
            if not in_fusion:
                traffic += num_runs * self.count_traffic(computation, instruction)
            for body, trip_count in self.iterate_bodies(instruction):
                body_cost = self.count_computation(
                    body, num_runs * trip_count, in_fusion or instruction.op == "fusion"
                )
                flops, traffic = flops + body_cost[0], traffic + body_cost[1]
        return flops, traffic

    def add_collective(self, collective: Collective, instruction: Instruction, in_fusion: bool):
        """The TPU's compiler spreads a collective over several fusions, of inner loops too, all with its channel: it is one, and as
        often as the outermost says.
        """
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if not in_fusion or not channel:
            self.collectives.append(collective)
        elif (
            channel[1] not in self.fused_collectives
            or collective.sent_bytes < self.fused_collectives[channel[1]].sent_bytes
        ):
            self.fused_collectives[channel[1]] = collective

    def iterate_bodies(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """The computations that an instruction runs, and how often."""
        if instruction.op == "while":
            body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)[1]
            yield body, self.count_trips(instruction)
        elif instruction.op in ("fusion", "call", "async-start"):
            yield re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.attributes)[1], 1
        elif instruction.op == "conditional":
            match = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = (
                re.findall(r"%?([\w.\-]+)", match[1])
                if match
                else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
            )
            yield (
                max(names, key=lambda name: len(self.computations[name])),
                1,
            )  # the branch that does more

    def count_trips(self, instruction: Instruction) -> int:
        if match := re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes):
            return int(match[1])
        # The TPU's compiler does not say; its loops count from 0 to a number in their condition, by a number in their body.
        condition, body = (
            self.computations[re.search(rf"{name}=%?([\w.\-]+)", instruction.attributes)[1]]
            for name in ("condition", "body")
        )
        comparison = next(x for x in condition.values() if x.is_root)
        compared = [condition[name] for name in comparison.operands]
        if (
            comparison.op != "compare"
            or "direction=LT" not in comparison.attributes
            or [x.op for x in compared] != ["get-tuple-element", "constant"]
        ):
            self.unbounded_loops += 1
            return 1
        counter_index = int(re.search(r"index=(\d+)", compared[0].attributes)[1])
        increment = body[next(x for x in body.values() if x.is_root).operands[counter_index]]
        increment_values = (
            [
                _parse_integer(body[name])
                for name in increment.operands
                if body[name].op == "constant"
            ]
            if increment.op == "add"
            else []
        )
        return -(-_parse_integer(compared[1]) // (increment_values[0] if increment_values else 1))

    def make_collective(
        self, computation: Computation, instruction: Instruction, kind: str, num_runs: float
    ) -> Collective:
        size = sum(byte_size(computation[name].type) for name in instruction.operands)
        groups = parse_device_groups(instruction.attributes, self.num_partitions)
        group_size = groups.shape[1]
        bytes_factor = {
            "all-gather": group_size - 1,
            "all-reduce": 2 * (group_size - 1) / group_size,
            "collective-permute": 1,
        }.get(kind, (group_size - 1) / group_size)
        return Collective(kind, num_runs * size * bytes_factor, groups)

    def count_traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that pass through the main memory: results, and of operands what is looked at."""
        if instruction.op in FREE_OPS or instruction.op.endswith("-done"):
            return 0
        if instruction.op == "fusion":
            return self.count_fusion_traffic(computation, instruction)
        if "__cublas" in instruction.attributes:  # its second result is room to work in
            return sum(
                byte_size(hlo_type, main_memory_only=True)
                for hlo_type in (
                    instruction.type.split("}")[0] + "}",
                    *(computation[name].type for name in instruction.operands),
                )
            )
        operand_bytes = [
            byte_size(computation[name].type, main_memory_only=True)
            for name in instruction.operands
        ]
        if instruction.op in ("dynamic-slice", "gather"):
            return 2 * byte_size(instruction.type, main_memory_only=True)
        if instruction.op == "dynamic-update-slice":  # in place
            return 2 * operand_bytes[1]
        if instruction.op.endswith("-start"):  # its type repeats the operands
            return byte_size(instruction.type, main_memory_only=True)
        return byte_size(instruction.type, main_memory_only=True) + sum(operand_bytes)

    def count_fusion_traffic(self, computation: Computation, instruction: Instruction) -> float:
        fused_computation = self.computations[
            re.search(r"calls=%?([\w.\-]+)", instruction.attributes)[1]
        ]
        users: dict[str, list[Instruction]] = {}
        for x in fused_computation.values():
            for name in x.operands:
                users.setdefault(name, []).append(x)

        def count_read_bytes(x: Instruction) -> float:
            """What is looked at of a parameter: all, but for those that are only cut or only written into."""
            total = 0.0
            for user in users.get(x.name, []):
                if user.op == "bitcast":
                    total += count_read_bytes(user)
                elif user.op in ("dynamic-slice", "gather") and user.operands[0] == x.name:
                    total += byte_size(user.type)
                elif not (user.op == "dynamic-update-slice" and user.operands[0] == x.name):
                    return byte_size(x.type)
            return total

        def count_written_bytes(x: Instruction) -> float:
            if x.op == "tuple":
                return sum(count_written_bytes(fused_computation[name]) for name in x.operands)
            if x.op == "bitcast":
                return count_written_bytes(fused_computation[x.operands[0]])
            return byte_size(
                fused_computation[x.operands[1]].type if x.op == "dynamic-update-slice" else x.type
            )

        total = (
            count_written_bytes(next(x for x in fused_computation.values() if x.is_root))
            if byte_size(instruction.type, main_memory_only=True)
            else 0.0
        )
        parameters = {
            _parse_integer(x): x for x in fused_computation.values() if x.op == "parameter"
        }
        for index, name in enumerate(instruction.operands):
            operand_bytes = byte_size(computation[name].type, main_memory_only=True)
            total += min(count_read_bytes(parameters[index]), operand_bytes)
        return total


def _parse_integer(instruction: Instruction) -> int:
    """Of a whole constant, or of a parameter."""
    return int(instruction.arguments.strip("()"))


def parse_device_groups(attributes: str, num_partitions: int) -> np.ndarray:
    """The devices that take part together, a row each: written out, as a permuted count, or as axes of a mesh."""
    if pairs_match := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return np.array(
            [row.split(",") for row in re.findall(r"\{([\d,]+)\}", pairs_match[1])], int
        )
    if rows_match := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", rows_match[1])], int)
    if iota_match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, dims, order = (
            [int(n) for n in numbers.split(",")] if numbers else None
            for numbers in iota_match.groups()
        )
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    mesh_match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? *\{([^}]*)\}",
        attributes,
    )
    if mesh_match:
        axis_sizes = {
            name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh_match[1])
        }
        devices = np.arange(math.prod(axis_sizes.values()))
        if mesh_match[4]:
            devices = np.array(mesh_match[4].split(","), int)
        elif mesh_match[3]:
            devices = devices.reshape([int(n) for n in mesh_match[2].split(",")]).transpose(
                [int(n) for n in mesh_match[3].split(",")]
            )
        devices = devices.reshape(tuple(axis_sizes.values()))
        # An axis may be taken in part: 'name':(m)n is the n that follow the first m of its factors.
        axis_parts = {
            name: (int(m or 1), int(n or axis_sizes[name]))
            for name, m, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh_match[5])
        }
        split_shape, inner_axes = [], []
        for name, size in axis_sizes.items():
            preceding, n = axis_parts.get(name, (size, 1))
            inner_axes.append(len(split_shape) + 1)
            split_shape += [preceding, n, size // (preceding * n)]
        outer_axes = [axis for axis in range(len(split_shape)) if axis not in inner_axes]
        return (
            devices.reshape(split_shape)
            .transpose(outer_axes + inner_axes)
            .reshape(-1, math.prod(n for _, n in axis_parts.values()))
        )
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"Groups of devices that are written in another way: {attributes[:200]}")
    return np.arange(num_partitions)[None]


# --- operations ---------------------------------------------------------------------------------------------------------


def _count_flops(computation: Computation, instruction: Instruction) -> float:
    def dims(index: int) -> tuple[int, ...]:
        return parse_shapes(computation[instruction.operands[index]].type)[0][1]

    if instruction.op == "dot" or "__cublas" in instruction.attributes:
        axes = re.search(
            r"lhs_contracting_dim(?:s=\{|ensions\": ?\[)([^}\]]*)", instruction.attributes
        )[1]
        return (
            2
            * math.prod(parse_shapes(instruction.type)[0][1])
            * math.prod(dims(0)[int(axis)] for axis in re.findall(r"\d+", axes))
        )
    if instruction.op == "convolution":
        return _count_convolution_flops(
            parse_shapes(instruction.type)[0][1], dims(0), dims(1), instruction.attributes
        )
    # Fused attention multiplies queries by keys and weights by values; its backward pass computes five such products.
    if "__cudnn$fmha" in instruction.attributes:
        b, n, h, k = dims(0)
        m = dims(1)[1]
        return 2 * b * h * n * m * k * (5 if "Backward" in instruction.attributes else 2)
    if "tpu_custom_call" in instruction.attributes and "splash_mha" in instruction.name:
        arrays = [parse_shapes(computation[name].type)[0] for name in instruction.operands]
        q, k = [dims for dtype, dims, _ in arrays if dtype in ("bf16", "f32")][:2]
        return 2 * math.prod(q) * k[-2] * (5 if "dkv" in instruction.name else 2)
    return 0


def _count_convolution_flops(
    output_dims: tuple[int, ...],
    input_dims: tuple[int, ...],
    kernel_dims: tuple[int, ...],
    attributes: str,
) -> float:
    """Two for each multiplication by something that is not padding: the TPU's compiler writes matrix products of several axes as
    convolutions with mostly padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    window = dict(
        re.findall(
            r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]
        )
    )
    total = (
        2
        * output_dims[labels[3].index("b")]
        * output_dims[labels[3].index("f")]
        * kernel_dims[labels[2].index("i")]
    )

    def window_value(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    for axis in range(sum(label.isdigit() for label in labels[3])):
        input_size, kernel_size, output_size = (
            input_dims[labels[1].index(str(axis))],
            kernel_dims[labels[2].index(str(axis))],
            output_dims[labels[3].index(str(axis))],
        )
        stride, input_dilation, kernel_dilation = (
            int(window_value(name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        padding = int(window_value("pad", axis, "0_0").split("_")[0])
        positions = (
            np.arange(output_size)[:, None] * stride
            + np.arange(kernel_size) * kernel_dilation
            - padding
        )
        total *= int(
            (
                (positions >= 0)
                & (positions % input_dilation == 0)
                & (positions // input_dilation < input_size)
            ).sum()
        )
    return total
