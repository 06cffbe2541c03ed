"""Count the bytes of main memory that one instruction of optimized HLO reads and writes."""

import math
import re
from collections.abc import Mapping

from radiance.planning.hlo_text import (
    Computation,
    Instruction,
    byte_size,
    find_root,
    parse_integer,
    parse_shapes,
)
from radiance.planning.hlo_work import ELEMENTWISE_OPS

# Operations without memory traffic of their own: they name values that exist, or run computations
# whose instructions are counted.
FREE_OPS = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
    "async-done",
}  # fmt: skip
FUSION_OPS = {"fusion", "fusion-start"}
# Inside a fusion, a number of their result needs one number of each operand of the same size.
POINTWISE_OPS = ELEMENTWISE_OPS | {"bitcast", "bitcast-convert", "copy", "reshape", "transpose"}
# Bytes of a read from main memory at least: a sector of NVIDIA's caches.
SECTOR_BYTES = 32


def count_traffic(
    computation: Computation,
    instruction: Instruction,
    computations: Mapping[str, Computation],
) -> float:
    """Return the bytes of main memory that an instruction reads and writes.

    Args:
        computation: The computation that the instruction is in.
        instruction: The instruction.
        computations: All computations of the program by name.
    """
    if instruction.op in FREE_OPS or instruction.op.endswith("-done"):
        return 0
    if instruction.op in FUSION_OPS:
        fused = computations[instruction.attribute("calls")]
        return _count_fusion_traffic(computation, instruction, fused)
    operand_bytes = [
        byte_size(computation[name].type, main_memory_only=True) for name in instruction.operands
    ]
    result_bytes = _count_result_bytes(instruction)
    if instruction.op in ("dynamic-slice", "gather", "slice"):
        return 2 * result_bytes
    if instruction.op == "dynamic-update-slice":  # in place
        return 2 * operand_bytes[1]
    if instruction.op.endswith("-start"):  # its type repeats the operands
        return result_bytes
    return result_bytes + sum(operand_bytes)


def _count_result_bytes(instruction: Instruction) -> float:
    """Return the bytes of a result in main memory, without the workspace of libraries' kernels."""
    if instruction.op != "custom-call" or not instruction.type.startswith("("):
        return byte_size(instruction.type, main_memory_only=True)
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", instruction.type)
    if parse_shapes(arrays[-1])[0][0] in ("u8", "s8"):
        arrays = arrays[:-1]
    return sum(byte_size(array, main_memory_only=True) for array in arrays)


def _count_fusion_traffic(
    computation: Computation, instruction: Instruction, fused: Computation
) -> float:
    """Return the bytes that a fusion reads of its operands and writes of its result."""
    total = 0.0
    if byte_size(instruction.type, main_memory_only=True):
        total = _count_written_bytes(find_root(fused), fused)
    needed_elements = _count_needed_elements(fused)
    parameters = {parse_integer(x): x for x in fused.values() if x.op == "parameter"}
    for index, name in enumerate(instruction.operands):
        operand = computation[name]
        size = _count_elements(operand)
        fraction = min(needed_elements[parameters[index].name] / size, 1) if size else 1
        total += fraction * byte_size(operand.type, main_memory_only=True)
    return total


def _count_needed_elements(fused: Computation) -> dict[str, float]:
    """Return for each value of a fusion how many of its elements the result depends on.

    That is fewer than all for an operand that the fusion only slices or updates.
    """
    needed = dict.fromkeys(fused, 0.0)
    for user in reversed(fused.values()):  # users come after what they use
        if user.is_root:
            needed[user.name] = _count_elements(user)
        user_elements = _count_elements(user)
        user_needed = min(needed[user.name], user_elements)
        for index, name in enumerate(dict.fromkeys(user.operands)):
            elements = _count_elements(fused[name])
            if user.op in ("dynamic-slice", "gather") and index == 0:
                needed[name] += user_needed
            elif user.op == "slice":
                needed[name] += user_needed * _compute_read_ratio(user, fused[name])
            elif user.op == "dynamic-update-slice" and index == 0:
                continue
            elif user.op in POINTWISE_OPS and elements == user_elements:
                needed[name] += user_needed
            else:
                needed[name] += elements
    return needed


def _compute_read_ratio(result: Instruction, value: Instruction) -> float:
    """Return the bytes that a slice of a value reads, in complete sectors, over those it needs."""
    (dtype, result_sizes, _), (_, sizes, _) = parse_shapes(result.type + value.type)
    contiguous_elements = 1
    for axis in reversed(range(len(sizes))):
        contiguous_elements *= result_sizes[axis]
        if result_sizes[axis] != sizes[axis]:
            break
    contiguous_bytes = contiguous_elements * byte_size(f"{dtype}[]")
    full_ratio = math.prod(sizes) / max(math.prod(result_sizes), 1)
    return min(max(SECTOR_BYTES / max(contiguous_bytes, 1), 1), full_ratio)


def _count_elements(instruction: Instruction) -> float:
    return sum(math.prod(sizes) for _, sizes, _ in parse_shapes(instruction.type))


def _count_written_bytes(result: Instruction, fused: Computation) -> float:
    """Return the bytes of a result that a fusion writes: of an update in place, only the update."""
    if result.op == "tuple":
        return sum(_count_written_bytes(fused[name], fused) for name in result.operands)
    if result.op in ("bitcast", "get-tuple-element"):
        source = fused[result.operands[0]]
        is_part = result.op == "get-tuple-element"
        return byte_size(result.type) if is_part else _count_written_bytes(source, fused)
    if result.op == "dynamic-update-slice":
        return byte_size(fused[result.operands[1]].type)
    return _count_result_bytes(result)
