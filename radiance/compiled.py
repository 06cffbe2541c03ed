"""What a compiled program does on one device, counted in the text of its optimized HLO, every loop as often as it runs.

XLA's own cost analysis counts the body of a loop once, which for a network that is one loop over its blocks counts nearly nothing.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SIZES = {"pred": 1, "bf16": 2, "token": 0, "s4": 0.5, "u4": 0.5}  # bytes; of the others the name has the bits
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# No work of their own: names for what is there, or control, whose bodies are counted.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip


class Collective(NamedTuple):
    kind: str
    bytes: float  # that one device sends, by a ring, over all the times it is run
    groups: np.ndarray  # [groups, devices] that take part together


class Work(NamedTuple):
    """Of one device in one run of a program."""

    flops: float  # of matrix products, convolutions and fused attention: two for each multiplication
    traffic: float  # bytes read from and written to memory, between kernels
    collectives: tuple[Collective, ...]
    endless: int  # loops whose number of turns the text does not tell; they are counted as one turn


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    arguments: str  # in parentheses: the operands, or the value of a constant, or the number of a parameter
    rest: str  # the attributes
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)


Computation = dict[str, Instruction]


def read(text: str) -> Work:
    """The work of the program whose `compiled.as_text()` this is."""
    return _Reader(text).work()


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current, lines = "", {}, []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current, lines = computations.setdefault(header[2], {}), []
            entry = header[2] if header[1] else entry
        elif re.match(r"  (ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line)
        elif line == "}":
            for instruction in map(_instruction, lines):
                current[instruction.name] = instruction
        elif lines:
            lines[-1] += line  # metadata with line breaks
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    kind, right = _balanced(right) if right.startswith("(") else right.split(" ", 1)
    op, _, _ = right.strip().partition("(")
    arguments, rest = _balanced(right.strip()[len(op) :])
    return Instruction(left.split("%")[-1], kind, op, arguments, rest, left.startswith("ROOT"))


def _balanced(text: str) -> tuple[str, str]:
    """`text` up to the end of its first parenthesis, and what follows."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    raise ValueError(f"An instruction of the compiled program ends early: {text[:80]}")


def shapes(kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Type, sizes and layout of each array in the type of an instruction."""
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", kind)
    return [(dtype, tuple(map(int, sizes.split(","))) if sizes else (), layout) for dtype, sizes, layout in found]


def size_of(kind: str, main: bool = False) -> float:
    """Bytes; with `main` only of what lies in the device's main memory, not in a memory on the chip."""
    total = 0.0
    for dtype, sizes, layout in shapes(kind):
        digits = re.match(r"[a-z]+(\d+)", dtype)
        width = SIZES[dtype] if dtype in SIZES else int(digits[1]) / 8 if digits else 0
        total += 0 if main and re.search(r"S\([1-9]", layout) else width * math.prod(sizes)
    return total


class _Reader:
    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self.partitions = int((re.search(r"num_partitions=(\d+)", text) or [0, "1"])[1])
        self.endless = 0
        self.spread: dict[str, Collective] = {}
        self.collectives: list[Collective] = []

    def work(self) -> Work:
        flops, traffic = self.visit(self.entry, 1)
        return Work(flops, traffic, (*self.collectives, *self.spread.values()), self.endless)

    def visit(self, name: str, times: float, fused: bool = False) -> tuple[float, float]:
        """FLOPs and traffic of a computation that is run so many times. Inside a fusion nothing passes through memory."""
        flops = traffic = 0.0
        computation = self.computations[name]
        for i in computation.values():
            kind = i.op.removesuffix("-start")
            if kind in KINDS:
                self.add(self.collective(computation, i, "reduce-scatter" if "all-reduce-scatter" in name else kind, times), i, fused)
            flops += times * _flops(computation, i)
            if not fused:
                traffic += times * self.traffic(computation, i)
            for body, turns in self.bodies(i):
                inner = self.visit(body, times * turns, fused or i.op == "fusion")
                flops, traffic = flops + inner[0], traffic + inner[1]
        return flops, traffic

    def add(self, collective: Collective, i: Instruction, fused: bool):
        """The TPU's compiler spreads a collective over several fusions, of inner loops too, all with its channel: it is one, and as
        often as the outermost says."""
        channel = re.search(r"channel_id=(\d+)", i.rest)
        if not fused or not channel:
            self.collectives.append(collective)
        elif channel[1] not in self.spread or collective.bytes < self.spread[channel[1]].bytes:
            self.spread[channel[1]] = collective

    def bodies(self, i: Instruction) -> Iterator[tuple[str, int]]:
        """The computations that an instruction runs, and how often."""
        if i.op == "while":
            body = re.search(r"body=%?([\w.\-]+)", i.rest)[1]
            yield body, self.turns(i)
        elif i.op in ("fusion", "call", "async-start"):
            yield re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", i.rest)[1], 1
        elif i.op == "conditional":
            found = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            names = re.findall(r"%?([\w.\-]+)", found[1]) if found else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.rest)
            yield max(names, key=lambda name: len(self.computations[name])), 1  # the branch that does more

    def turns(self, i: Instruction) -> int:
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', i.rest):
            return int(known[1])
        # The TPU's compiler does not say; its loops count from 0 to a number in their condition, by a number in their body.
        condition, body = (self.computations[re.search(rf"{name}=%?([\w.\-]+)", i.rest)[1]] for name in ("condition", "body"))
        test = next(x for x in condition.values() if x.root)
        sides = [condition[name] for name in test.operands]
        if test.op != "compare" or "direction=LT" not in test.rest or [x.op for x in sides] != ["get-tuple-element", "constant"]:
            self.endless += 1
            return 1
        index = int(re.search(r"index=(\d+)", sides[0].rest)[1])
        advance = body[next(x for x in body.values() if x.root).operands[index]]
        steps = [_number(body[name]) for name in advance.operands if body[name].op == "constant"] if advance.op == "add" else []
        return -(-_number(sides[1]) // (steps[0] if steps else 1))

    def collective(self, computation: Computation, i: Instruction, kind: str, times: float) -> Collective:
        size = sum(size_of(computation[name].type) for name in i.operands)
        groups = groups_of(i.rest, self.partitions)
        n = groups.shape[1]
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
        return Collective(kind, times * size * share, groups)

    def traffic(self, computation: Computation, i: Instruction) -> float:
        """Bytes that pass through the main memory: results, and of operands what is looked at."""
        if i.op in FREE or i.op.endswith("-done"):
            return 0
        if i.op == "fusion":
            return self.fusion_traffic(computation, i)
        if "__cublas" in i.rest:  # its second result is room to work in
            return sum(size_of(kind, main=True) for kind in (i.type.split("}")[0] + "}", *(computation[name].type for name in i.operands)))
        reads = [size_of(computation[name].type, main=True) for name in i.operands]
        if i.op in ("dynamic-slice", "gather"):
            return 2 * size_of(i.type, main=True)
        if i.op == "dynamic-update-slice":  # in place
            return 2 * reads[1]
        if i.op.endswith("-start"):  # its type repeats the operands
            return size_of(i.type, main=True)
        return size_of(i.type, main=True) + sum(reads)

    def fusion_traffic(self, computation: Computation, i: Instruction) -> float:
        inner = self.computations[re.search(r"calls=%?([\w.\-]+)", i.rest)[1]]
        users: dict[str, list[Instruction]] = {}
        for x in inner.values():
            for name in x.operands:
                users.setdefault(name, []).append(x)

        def read_of(x: Instruction) -> float:
            """What is looked at of a parameter: all, but for those that are only cut or only written into."""
            total = 0.0
            for user in users.get(x.name, []):
                if user.op == "bitcast":
                    total += read_of(user)
                elif user.op in ("dynamic-slice", "gather") and user.operands[0] == x.name:
                    total += size_of(user.type)
                elif not (user.op == "dynamic-update-slice" and user.operands[0] == x.name):
                    return size_of(x.type)
            return total

        def written(x: Instruction) -> float:
            if x.op == "tuple":
                return sum(written(inner[name]) for name in x.operands)
            if x.op == "bitcast":
                return written(inner[x.operands[0]])
            return size_of(inner[x.operands[1]].type if x.op == "dynamic-update-slice" else x.type)

        total = written(next(x for x in inner.values() if x.root)) if size_of(i.type, main=True) else 0.0
        parameters = {_number(x): x for x in inner.values() if x.op == "parameter"}
        for number, name in enumerate(i.operands):
            limit = size_of(computation[name].type, main=True)
            total += min(read_of(parameters[number]), limit)
        return total


def _number(i: Instruction) -> int:
    """Of a whole constant, or of a parameter."""
    return int(i.arguments.strip("()"))


def groups_of(attributes: str, partitions: int) -> np.ndarray:
    """The devices that take part together, a row each: written out, as a permuted count, or as axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", pairs[1])], int)
    if rows := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", rows[1])], int)
    if count := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in count.groups())
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? *\{([^}]*)\}", attributes
    )
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        devices = np.arange(math.prod(sizes.values()))
        if mesh[4]:
            devices = np.array(mesh[4].split(","), int)
        elif mesh[3]:
            devices = devices.reshape([int(n) for n in mesh[2].split(",")]).transpose([int(n) for n in mesh[3].split(",")])
        devices = devices.reshape(tuple(sizes.values()))
        # An axis may be taken in part: 'name':(m)n is the n that follow the first m of its factors.
        taken = {name: (int(m or 1), int(n or sizes[name])) for name, m, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[5])}
        split, inner = [], []
        for name, size in sizes.items():
            before, n = taken.get(name, (size, 1))
            inner.append(len(split) + 1)
            split += [before, n, size // (before * n)]
        outer = [axis for axis in range(len(split)) if axis not in inner]
        return devices.reshape(split).transpose(outer + inner).reshape(-1, math.prod(n for _, n in taken.values()))
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"Groups of devices that are written in another way: {attributes[:200]}")
    return np.arange(partitions)[None]


# --- operations ---------------------------------------------------------------------------------------------------------


def _flops(computation: Computation, i: Instruction) -> float:
    def sizes(number: int) -> tuple[int, ...]:
        return shapes(computation[i.operands[number]].type)[0][1]

    if i.op == "dot" or "__cublas" in i.rest:
        axes = re.search(r"lhs_contracting_dim(?:s=\{|ensions\": ?\[)([^}\]]*)", i.rest)[1]
        return 2 * math.prod(shapes(i.type)[0][1]) * math.prod(sizes(0)[int(axis)] for axis in re.findall(r"\d+", axes))
    if i.op == "convolution":
        return _convolution_flops(shapes(i.type)[0][1], sizes(0), sizes(1), i.rest)
    # Fused attention multiplies queries by keys and weights by values; its backward pass computes five such products.
    if "__cudnn$fmha" in i.rest:
        b, n, h, k = sizes(0)
        m = sizes(1)[1]
        return 2 * b * h * n * m * k * (5 if "Backward" in i.rest else 2)
    if "tpu_custom_call" in i.rest and "splash_mha" in i.name:
        arrays = [shapes(computation[name].type)[0] for name in i.operands]
        q, k = [sizes for dtype, sizes, _ in arrays if dtype in ("bf16", "f32")][:2]
        return 2 * math.prod(q) * k[-2] * (5 if "dkv" in i.name else 2)
    return 0


def _convolution_flops(out: tuple[int, ...], image: tuple[int, ...], kernel: tuple[int, ...], attributes: str) -> float:
    """Two for each multiplication by something that is not padding: the TPU's compiler writes matrix products of several axes as
    convolutions with mostly padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]))
    total = 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]

    def of(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    for axis in range(sum(label.isdigit() for label in labels[3])):
        size, reach, steps = image[labels[1].index(str(axis))], kernel[labels[2].index(str(axis))], out[labels[3].index(str(axis))]
        stride, spread, apart = (int(of(name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(of("pad", axis, "0_0").split("_")[0])
        place = np.arange(steps)[:, None] * stride + np.arange(reach) * apart - before
        total *= int(((place >= 0) & (place % spread == 0) & (place // spread < size)).sum())
    return total
