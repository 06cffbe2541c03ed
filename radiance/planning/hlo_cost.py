"""Count the work of a compiled program on one device from the text of its optimized HLO.

XLA's own cost analysis counts the body of a loop once. A transformer is one loop over its blocks,
so nearly all of its work would be missing; here every loop counts as often as it runs.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from radiance.planning.hlo_text import (
    Computation,
    DeviceGroups,
    Instruction,
    byte_size,
    count_trips,
    parse_device_groups,
    parse_hlo,
)
from radiance.planning.hlo_traffic import FUSION_OPS, count_traffic
from radiance.planning.hlo_work import (
    count_elementwise_operations,
    count_product_flops,
    find_product_type,
)

COLLECTIVE_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


class Collective(NamedTuple):
    """A collective operation and its traffic."""

    kind: str
    sent_bytes: float  # by one device over a ring, in all runs of the instruction
    groups: DeviceGroups


class Kernel(NamedTuple):
    """An instruction that runs on the device as one kernel, and the work of one run."""

    instruction: Instruction
    num_runs: float  # trips of all loops around it
    flops: float  # of matrix products, convolutions and fused attention; a multiply-add is two
    product_type: str  # element type of the first factor of its products; "" without products
    elementwise_operations: float
    traffic: float  # bytes read from and written to main memory
    is_async: bool  # whether it runs beside other kernels


class ProgramCost(NamedTuple):
    """The work of one device in one run of a program."""

    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    unbounded_loops: int  # loops without a known trip count, which are counted as one trip

    @property
    def flops(self) -> float:
        """FLOPs of matrix products, convolutions and fused attention in all runs."""
        return sum(kernel.num_runs * kernel.flops for kernel in self.kernels)

    @property
    def traffic(self) -> float:
        """Bytes that all kernels read from and write to main memory in all runs."""
        return sum(kernel.num_runs * kernel.traffic for kernel in self.kernels)


class _FusedWork(NamedTuple):
    """The work inside a fusion, which leaves intermediate values out of main memory."""

    flops: float
    product_type: str
    elementwise_operations: float


def count_program_cost(text: str) -> ProgramCost:
    """Return the cost of the program with the text `compiled.as_text()`."""
    return _CostCounter(text).count_program()


class _CostCounter:
    """Walk over the computations of a program and list their kernels."""

    def __init__(self, text: str):
        self.computations, self.entry = parse_hlo(text)
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.num_partitions = int(partitions[1]) if partitions else 1
        self.unbounded_loops = 0
        self.fused_collectives: dict[str, Collective] = {}  # by channel
        self.collectives: list[Collective] = []
        self.kernels: list[Kernel] = []

    def count_program(self) -> ProgramCost:
        self.add_kernels(self.entry, 1)
        collectives = (*self.collectives, *self.fused_collectives.values())
        return ProgramCost(tuple(self.kernels), collectives, self.unbounded_loops)

    def add_kernels(self, name: str, num_runs: float, is_async: bool = False):
        """List the kernels of a computation that is run `num_runs` times."""
        computation = self.computations[name]
        for instruction in computation.values():
            self.add_collective(name, instruction, num_runs, in_fusion=False)
            runs_async = is_async or instruction.op.endswith("-start")
            traffic = count_traffic(computation, instruction, self.computations)
            if instruction.op in FUSION_OPS:
                work = self.count_fused_work(instruction.attribute("calls"), num_runs)
            else:
                work = _count_instruction_work(computation, instruction)
                for body, trips in self.iterate_bodies(instruction):
                    self.add_kernels(body, num_runs * trips, runs_async)
            if traffic or work.flops:
                self.kernels.append(Kernel(instruction, num_runs, *work, traffic, runs_async))

    def count_fused_work(self, name: str, num_runs: float) -> _FusedWork:
        """Return the work of one run of a fusion, and record its collectives."""
        flops = elementwise_operations = 0.0
        product_type = ""
        computation = self.computations[name]
        for instruction in computation.values():
            self.add_collective(name, instruction, num_runs, in_fusion=True)
            works = [(_count_instruction_work(computation, instruction), 1)]
            for body, trips in self.iterate_bodies(instruction):
                works.append((self.count_fused_work(body, num_runs * trips), trips))
            for work, trips in works:
                flops += trips * work.flops
                elementwise_operations += trips * work.elementwise_operations
                product_type = product_type or work.product_type
        return _FusedWork(flops, product_type, elementwise_operations)

    def iterate_bodies(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """Yield the computations that an instruction runs, with the number of runs."""
        if instruction.op == "while":
            trips = count_trips(instruction, self.computations)
            self.unbounded_loops += trips is None
            yield instruction.attribute("body"), 1 if trips is None else trips
        elif instruction.op in (*FUSION_OPS, "call", "async-start"):
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

    def add_collective(self, name: str, instruction: Instruction, num_runs: float, in_fusion: bool):
        """Record a collective of the computation `name`, once for each channel.

        XLA for TPUs splits one collective over several fusions with the same channel, some of them
        in inner loops. The outermost one, which sends least, has the true number of runs.
        """
        kind = instruction.op.removesuffix("-start")
        if kind not in COLLECTIVE_KINDS:
            return
        if "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        collective = self.make_collective(self.computations[name], instruction, kind, num_runs)
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if not in_fusion or not channel:
            self.collectives.append(collective)
            return
        recorded = self.fused_collectives.get(channel[1])
        if recorded is None or collective.sent_bytes < recorded.sent_bytes:
            self.fused_collectives[channel[1]] = collective

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


def _count_instruction_work(computation: Computation, instruction: Instruction) -> _FusedWork:
    flops = count_product_flops(computation, instruction)
    product_type = find_product_type(computation, instruction) if flops else ""
    return _FusedWork(flops, product_type, count_elementwise_operations(computation, instruction))
