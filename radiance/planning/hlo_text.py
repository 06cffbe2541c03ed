"""Parse the text of a compiled program (optimized HLO) into instructions, loops and device groups.

A program is a list of computations, and a computation a list of instructions such as

    %sum = f32[8,16]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add

XLA writes the same fact in several notations; every notation has a parser of its own here.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

DeviceGroups = Int[np.ndarray, "groups devices"]

# Bytes of an element, for types whose name does not end with their number of bits.
ELEMENT_BYTES = {"pred": 1, "bf16": 2, "token": 0, "s4": 0.5, "u4": 0.5}


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str  # one array, or a tuple of arrays in parentheses
    op: str
    arguments: str  # in parentheses: operands, the value of a constant, or a parameter's index
    attributes: str  # the rest of the line
    is_root: bool  # whether its result is the result of the computation

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results this one reads."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, name: str) -> str:
        """Return the value of an attribute, such as the computation of `body=%loop_body`.

        Raises:
            ValueError: The instruction has no such attribute.
        """
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        if not match:
            raise ValueError(
                f"Instruction {self.name} of the compiled program has no {name}: "
                f"{self.attributes[:200]}"
            )
        return match[1]


Computation = dict[str, Instruction]  # by name, in order


class Program(NamedTuple):
    """The computations of a program by name, and the name of the one that runs first."""

    computations: dict[str, Computation]
    entry: str


def parse_hlo(text: str) -> Program:
    """Return the computations of `compiled.as_text()`."""
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
    return Program(computations, entry)


def _parse_instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    hlo_type, right = _split_parentheses(right) if right.startswith("(") else right.split(" ", 1)
    op, _, _ = right.strip().partition("(")
    arguments, attributes = _split_parentheses(right.strip()[len(op) :])
    return Instruction(
        left.split("%")[-1], hlo_type, op, arguments, attributes, left.startswith("ROOT")
    )


def _split_parentheses(text: str) -> tuple[str, str]:
    """Return `text` up to the end of its first parenthesis, and the rest."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    raise ValueError(f"An instruction of the compiled program ends early: {text[:80]}")


def find_root(computation: Computation) -> Instruction:
    """Return the instruction whose result is the result of the computation."""
    return next(x for x in computation.values() if x.is_root)


def parse_shapes(hlo_type: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Return element type, sizes and layout of each array of an instruction's type."""
    matches = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", hlo_type)
    return [
        (dtype, tuple(map(int, sizes.split(","))) if sizes else (), layout)
        for dtype, sizes, layout in matches
    ]


def byte_size(hlo_type: str, main_memory_only: bool = False) -> float:
    """Return the bytes of an instruction's type.

    Args:
        hlo_type: One array, or a tuple of arrays.
        main_memory_only: Leave out arrays in a memory on the chip, whose layout says `S(1)`.
    """
    total = 0.0
    for dtype, sizes, layout in parse_shapes(hlo_type):
        if main_memory_only and re.search(r"S\([1-9]", layout):
            continue
        bits = re.match(r"[a-z]+(\d+)", dtype)
        element_bytes = ELEMENT_BYTES.get(dtype, int(bits[1]) / 8 if bits else 0)
        total += element_bytes * math.prod(sizes)
    return total


def parse_integer(instruction: Instruction) -> int:
    """Return the value of an integer constant, or the index of a parameter."""
    return int(instruction.arguments.strip("()"))


# --- source lines --------------------------------------------------------------------------------


def parse_source_lines(text: str) -> dict[str, list[str]]:
    """Return the stack of source lines of each `stack_frame_id`, innermost first, as FILE:LINE.

    A program has tables before its computations, whose rows refer to each other by number.
    Samples: `1 "model/blocks.py"` of FileNames, `1 {file_name_id=1 function_name_id=1 line=28}` of
    FileLocations, `2 {file_location_id=1 parent_frame_id=2}` of StackFrames. The parent of this
    frame is frame 1: 1 is added to the number of a parent, so that 1 means none.
    """
    tables: dict[str, dict[str, str]] = {}
    table: dict[str, str] = {}
    for line in text.splitlines():
        if re.match(r"(ENTRY )?%", line):
            break
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif row := re.match(r"(\d+) (.*)", line):
            table[row[1]] = row[2]

    def read_field(row: str, name: str) -> str:
        match = re.search(rf"\b{name}=(\d+)", row)
        return match[1] if match else "0"

    stacks: dict[str, list[str]] = {"0": []}
    for frame, row in tables.get("StackFrames", {}).items():
        location = tables["FileLocations"][read_field(row, "file_location_id")]
        file_name = tables["FileNames"][read_field(location, "file_name_id")].strip('"')
        parent = str(int(read_field(row, "parent_frame_id")) - 1)
        stacks[frame] = [f"{file_name}:{read_field(location, 'line')}", *stacks.get(parent, [])]
    return stacks


# --- loops ---------------------------------------------------------------------------------------


def count_trips(loop: Instruction, computations: Mapping[str, Computation]) -> int | None:
    """Return how often a `while` instruction runs its body, or None if the text does not say."""
    trips = parse_known_trip_count(loop.attributes)
    if trips is not None:
        return trips
    return parse_counted_loop(
        computations[loop.attribute("condition")], computations[loop.attribute("body")]
    )


def parse_known_trip_count(attributes: str) -> int | None:
    """Return the trip count that XLA for CPUs and GPUs writes beside a loop.

    Sample: `while(%x), body=%b, backend_config={"known_trip_count":{"n":"5"}}` runs 5 times.
    """
    match = re.search(r'known_trip_count":\{"n":"(\d+)"', attributes)
    return int(match[1]) if match else None


def parse_counted_loop(condition: Computation, body: Computation) -> int | None:
    """Return the trip count of a loop that counts from 0, as XLA for TPUs writes it.

    Sample: `ROOT %less = pred[] compare(%i, %limit), direction=LT` with `%limit = s32[]
        constant(10)` in the condition and `%next = s32[] add(%i, %two)` with `%two = s32[]
        constant(2)` in the body run 5 times.
    """
    comparison = find_root(condition)
    compared = [condition[name] for name in comparison.operands]
    if (
        comparison.op != "compare"
        or "direction=LT" not in comparison.attributes
        or [x.op for x in compared] != ["get-tuple-element", "constant"]
    ):
        return None
    counter, limit = compared
    counter_index = int(counter.attribute("index"))
    next_counter = body[find_root(body).operands[counter_index]]
    steps = [
        parse_integer(body[name]) for name in next_counter.operands if body[name].op == "constant"
    ]
    step = steps[0] if steps and next_counter.op == "add" else 1
    return math.ceil(parse_integer(limit) / step)


# --- device groups -------------------------------------------------------------------------------


def parse_device_groups(attributes: str, num_partitions: int) -> DeviceGroups:
    """Return the devices that take part in a collective together, one group a row.

    Args:
        attributes: Attributes of the instruction.
        num_partitions: Number of devices of the program; all of them are the group by default.

    Raises:
        ValueError: The groups are written in an unknown notation.
    """
    for parse in (
        parse_device_pairs,
        parse_listed_groups,
        parse_iota_groups,
        parse_mesh_groups,
    ):
        if (groups := parse(attributes)) is not None:
            return groups
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"Device groups in an unknown notation: {attributes[:200]}")
    return np.arange(num_partitions)[None]


def parse_device_pairs(attributes: str) -> DeviceGroups | None:
    """Return the pairs (from, to) of a `collective-permute`.

    Sample: `source_target_pairs={{0,1},{1,0}}` is [[0, 1], [1, 0]].
    """
    return _parse_rows(re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes))


def parse_listed_groups(attributes: str) -> DeviceGroups | None:
    """Return groups that are listed device by device.

    Sample: `replica_groups={{0,1},{2,3}}` is [[0, 1], [2, 3]].
    """
    return _parse_rows(re.search(r"replica_groups=\{(\{.*?\})\}", attributes))


def _parse_rows(match: re.Match[str] | None) -> DeviceGroups | None:
    if not match:
        return None
    return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", match[1])], int)


def parse_iota_groups(attributes: str) -> DeviceGroups | None:
    """Return groups that are written as a reshaped, and perhaps transposed, range of devices.

    Sample: `replica_groups=[2,2]<=[2,2]T(1,0)` is [[0, 2], [1, 3]].
    """
    match = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if not match:
        return None
    shape, sizes = _parse_integers(match[1]), _parse_integers(match[2])
    order = _parse_integers(match[3]) if match[3] else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape)


def parse_mesh_groups(attributes: str) -> DeviceGroups | None:
    """Return groups that are written as axes of a mesh.

    Samples: `replica_groups=mesh['x'=2,'y'=2] {'x'}` is [[0, 2], [1, 3]];
    `replica_groups=mesh['x'=2,'y'=2], device_ids=(0,3,1,2) {'y'}` is [[0, 3], [1, 2]];
    `replica_groups=mesh['x'=4] {'x':(2)2}` is [[0, 1], [2, 3]]: the factor 2 of axis x that follows
    its first factor 2.
    """
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? *\{([^}]*)\}",
        attributes,
    )
    if not match:
        return None
    sizes_text, ids_shape, ids_order, ids_list, axes_text = match.groups()
    axis_sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes_text)}
    devices = np.arange(math.prod(axis_sizes.values()))
    if ids_list:
        devices = np.array(_parse_integers(ids_list))
    elif ids_order:
        devices = devices.reshape(_parse_integers(ids_shape)).transpose(_parse_integers(ids_order))

    # Each axis is split into (preceding factors, factors of the group, following factors).
    group_factors = {
        name: (int(preceding or 1), int(size or axis_sizes[name]))
        for name, preceding, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes_text)
    }
    split_shape, group_axes = [], []
    for name, size in axis_sizes.items():
        preceding, group_size = group_factors.get(name, (size, 1))
        group_axes.append(len(split_shape) + 1)
        split_shape += [preceding, group_size, size // (preceding * group_size)]
    other_axes = [axis for axis in range(len(split_shape)) if axis not in group_axes]
    split_devices = devices.reshape(split_shape).transpose(other_axes + group_axes)
    return split_devices.reshape(-1, math.prod(size for _, size in group_factors.values()))


def _parse_integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
