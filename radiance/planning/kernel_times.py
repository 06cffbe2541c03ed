"""Estimate how long each kernel of a compiled program runs, and list those that cost most.

A kernel takes the longest of three times: that of its matrix products, that of its memory traffic,
and that of its elementwise operations. Kernels run one after the other, except asynchronous ones,
such as copies of weights for the next block: they run beside the others and take no time here.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from radiance.base.tables import format_table
from radiance.distributed import hardware
from radiance.planning.hlo_cost import Kernel, ProgramCost
from radiance.planning.hlo_text import parse_source_lines

NUM_LISTED = 20
# Without float32 products, a device computes one as this many products of bfloat16 parts
# (`Precision.HIGHEST` on TPUs).
BFLOAT16_PARTS = 6
FLOAT8_TYPES = ("f8e4m3fn", "f8e5m2")


class DeviceRates(NamedTuple):
    """The rates by which kernels are timed.

    Attributes:
        product_flops_per_second: Matrix products by element type; "" for all other types.
        memory_bandwidth: Bytes per second, read and written.
        elementwise_per_second: Elementwise operations; 0 if unknown, they then take no time.
        is_measured: Whether products in bfloat16 and memory were measured; otherwise all are of
            data sheets. Products in float8 are assumed to reach the same fraction of theirs.
    """

    product_flops_per_second: Mapping[str, float]
    memory_bandwidth: float
    elementwise_per_second: float
    is_measured: bool


class KernelTime(NamedTuple):
    """The time of equal kernels in one run of the program, in seconds."""

    name: str  # of one of the kernels, without its number
    source: str  # FILE:LINE of this package that they come from, or the operation's name
    result_type: str
    num_runs: float
    traffic: float  # bytes of one run
    bound: str  # products, memory or elementwise: what takes the longest
    seconds: float
    product_seconds: float  # of matrix products alone

    @property
    def seconds_beyond_products(self) -> float:
        """The part of the time that matrix products do not explain."""
        return self.seconds - self.product_seconds


class KernelTimes(NamedTuple):
    """The times of a program's kernels.

    Attributes:
        kernels: Kernels that run one after the other, longest beyond their products first.
        async_seconds: Memory time of the asynchronous kernels, which run beside them.
    """

    kernels: tuple[KernelTime, ...]
    async_seconds: float

    @property
    def seconds(self) -> float:
        """The time of one run of the program."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def seconds_beyond_products(self) -> float:
        """The part of the time that matrix products do not explain."""
        return sum(kernel.seconds_beyond_products for kernel in self.kernels)


def get_device_rates(kind: str) -> DeviceRates:
    """Return the measured rates of a device, or those of its data sheet.

    Args:
        kind: A key of `hardware.DEVICE_SPECS`.
    """
    spec = hardware.DEVICE_SPECS[kind]
    sustained = hardware.SUSTAINED_RATES.get(kind)
    flops_per_second, bandwidth = sustained or (spec.flops_per_second, spec.memory_bandwidth)
    float32_rate = spec.float32_flops_per_second or flops_per_second / BFLOAT16_PARTS
    float8_speedup = _get_float8_flops_per_second(spec) / spec.flops_per_second
    return DeviceRates(
        {"": flops_per_second, "f32": float32_rate}
        | dict.fromkeys(FLOAT8_TYPES, float8_speedup * flops_per_second),
        bandwidth,
        spec.float32_flops_per_second / 2,
        sustained is not None,
    )


def _get_float8_flops_per_second(spec: hardware.DeviceSpec) -> float:
    """Return the peak rate of products of float8: that of bfloat16 where a device has none."""
    return spec.float8_flops_per_second or spec.flops_per_second


def count_compute_seconds(cost: ProgramCost, spec: hardware.DeviceSpec) -> float:
    """Return the time of a program's products at the peak rates of bfloat16 and float8."""
    float8_flops = sum(
        kernel.num_runs * kernel.flops
        for kernel in cost.kernels
        if kernel.product_type in FLOAT8_TYPES
    )
    other_flops = cost.flops - float8_flops
    return other_flops / spec.flops_per_second + float8_flops / _get_float8_flops_per_second(spec)


def time_kernels(text: str, cost: ProgramCost, rates: DeviceRates) -> KernelTimes:
    """Return the time of every kernel.

    Args:
        text: The text `compiled.as_text()`, for the source lines.
        cost: Its cost.
        rates: Rates of the device.
    """
    source_lines = parse_source_lines(text)
    equal_kernels = defaultdict(list)
    async_seconds = 0.0
    for kernel in cost.kernels:
        if kernel.is_async:
            async_seconds += kernel.num_runs * kernel.traffic / rates.memory_bandwidth
            continue
        time = _time_kernel(kernel, source_lines, rates)
        equal_kernels[time.name, time.source, time.result_type, time.traffic].append(time)
    kernels = [
        times[0]._replace(
            num_runs=sum(time.num_runs for time in times),
            seconds=sum(time.seconds for time in times),
            product_seconds=sum(time.product_seconds for time in times),
        )
        for times in equal_kernels.values()
    ]
    kernels.sort(key=lambda kernel: -kernel.seconds_beyond_products)
    return KernelTimes(tuple(kernels), async_seconds)


def _time_kernel(
    kernel: Kernel, source_lines: Mapping[str, Sequence[str]], rates: DeviceRates
) -> KernelTime:
    product_rates = rates.product_flops_per_second
    seconds = {
        "products": kernel.flops / product_rates.get(kernel.product_type, product_rates[""]),
        "memory": kernel.traffic / rates.memory_bandwidth,
        "elementwise": 0.0,
    }
    # Elementwise operations of a product's kernel run beside the matrix units.
    if rates.elementwise_per_second and not kernel.flops:
        seconds["elementwise"] = kernel.elementwise_operations / rates.elementwise_per_second
    bound = max(seconds, key=seconds.__getitem__)
    instruction = kernel.instruction
    return KernelTime(
        name=instruction.name.split(".")[0],
        source=_describe_source(kernel, source_lines),
        result_type=re.sub(r"\{[^}]*\}", "", instruction.type),
        num_runs=kernel.num_runs,
        traffic=kernel.traffic,
        bound=bound,
        seconds=kernel.num_runs * seconds[bound],
        product_seconds=kernel.num_runs * seconds["products"],
    )


def _describe_source(kernel: Kernel, source_lines: Mapping[str, Sequence[str]]) -> str:
    """Return the innermost line of this package, else the operation's name in the program."""
    attributes = kernel.instruction.attributes
    package = f"/{Path(__file__).parents[1].name}/"
    frame = re.search(r"stack_frame_id=(\d+)", attributes)
    for line in source_lines.get(frame[1], []) if frame else []:
        if package in line:
            return line.rpartition(package)[2]
    operation = re.search(r'op_name="([^"]*)"', attributes)
    return operation[1].split("/")[-1] if operation else kernel.instruction.op


# --- formatting ----------------------------------------------------------------------------------


def format_kernel_times(times: KernelTimes, rates: DeviceRates, model_flops: float) -> str:
    """Return the totals, and a table of the kernels that cost most beyond their products.

    Args:
        times: Times of the kernels.
        rates: The rates that they follow from.
        model_flops: Operations that the model needs, without recomputation.
    """
    seconds, beyond = times.seconds, times.seconds_beyond_products
    product_rate = rates.product_flops_per_second[""]
    origin = "measured" if rates.is_measured else "of the data sheet"
    utilization = model_flops / (seconds * product_rate)
    header = (
        f"Kernels: {seconds:.3g} s, of which products {seconds - beyond:.3g} s, others "
        f"{beyond:.3g} s.\n"
        f"The model's products in bfloat16 alone take {utilization:.0%} of this time, at "
        f"{product_rate / 1e12:.0f} TFLOP/s and {rates.memory_bandwidth / 1e12:.3g} TB/s "
        f"({origin})."
    )
    if times.async_seconds:
        header += f"\nCopies beside other kernels, not included: {times.async_seconds:.3g} s."
    rows = [["kernel", "from", "result", "runs", "traffic", "bound by", "beyond products"]]
    for kernel in times.kernels[:NUM_LISTED]:
        rows.append(
            [
                kernel.name,
                kernel.source,
                _shorten(kernel.result_type),
                f"{kernel.num_runs:.0f}",
                f"{kernel.traffic / 1e6:.1f} MB",
                kernel.bound,
                f"{1e3 * kernel.seconds_beyond_products:.2f} ms",
            ]
        )
    return f"{header}\n\n{format_table(rows, num_text_columns=3)}"


def _shorten(text: str, max_length: int = 48) -> str:
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
