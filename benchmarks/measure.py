"""Time calls, measure the device's limits, describe the machine, and print tables."""

import argparse
import gc
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

RESULTS = Path(__file__).with_name("RESULTS.md")
SETTLE_SECONDS = (
    0.05  # seconds between calls, in which the other library's threads stop waiting for more work
)
PRODUCTS_PER_CALL = 4  # matrix products per call, so that its overhead does not count
SIZES = {
    "cpu": (2048, 1 << 26),
    "accelerator": (8192, 1 << 30),
}  # size of the matrices, and number of copied values


# --- The clock ---


class Contender(NamedTuple):
    """A row of a table: `make()` returns a call that returns when its work is done."""

    name: str
    make: Callable[[], Callable[[], Any]]
    flops: float = 0  # of one call, counted by hand
    peer: bool = True  # a failing peer becomes a row with its error; ours must run


class Result(NamedTuple):
    contender: Contender
    start: float  # seconds to make it and for the first call, compilation included
    times: tuple[float, ...]  # seconds of the calls after warm-up; empty if it did not run
    reason: str = ""  # why it did not run

    @property
    def median(self) -> float:
        return statistics.median(self.times) if self.times else float("nan")

    @property
    def rate(self) -> float:
        """FLOP per second."""
        return self.contender.flops / self.median


def time_in_turn(contenders: Sequence[Contender], repeats: int) -> list[Result]:
    """Call each contender twice to warm up, then all in turn, `repeats` times.

    A disturbance of the machine then affects all rows alike.
    """
    calls, starts, reasons = {}, {}, {}
    for contender in contenders:
        try:
            start = time.perf_counter()
            call = contender.make()
            call()
            starts[contender.name] = time.perf_counter() - start
            call()
            calls[contender.name] = call
        except Exception as error:  # any error of a peer's compiler
            if not contender.peer:
                raise
            reasons[contender.name] = describe_error(error)
        print(
            contender.name,
            reasons.get(contender.name, "warmed up"),
            sep=": ",
            file=sys.stderr,
            flush=True,
        )
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(SETTLE_SECONDS)
            times[name].append(time_call(call))
    return [
        Result(c, starts.get(c.name, 0.0), tuple(times.get(c.name, ())), reasons.get(c.name, ""))
        for c in contenders
    ]


def describe_error(error: Exception) -> str:
    """Describe in one line why a peer did not run."""
    return f"not measured, {type(error).__name__}: {' '.join(str(error).split())}"[:160]


def time_call(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def free_memory():
    """Free the memory of timed contenders."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- The limits ---


class Limits(NamedTuple):
    """The highest rates that this device reached, in JAX or in PyTorch."""

    flops: float  # of matrix products, per second
    bandwidth: float  # bytes read and written, per second


def measure_limits(dtype: str, repeats: int = 5) -> Limits:
    size, count = SIZES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    work = PRODUCTS_PER_CALL * 2 * size**3
    products = [
        Contender("JAX", lambda: make_jax_products(size, dtype), work, peer=False),
        Contender("PyTorch", lambda: make_torch_products(size, dtype), work),
    ]
    moved = 2 * count * jnp.dtype(dtype).itemsize
    copies = [
        Contender("JAX", lambda: make_jax_copy(count, dtype), moved, peer=False),
        Contender("PyTorch", lambda: make_torch_copy(count, dtype), moved),
    ]
    best = [
        max(r.contender.flops / min(r.times) for r in time_in_turn(pair, repeats) if r.times)
        for pair in (products, copies)
    ]
    free_memory()
    return Limits(*best)


def make_jax_products(size: int, dtype: str) -> Callable[[], Any]:
    @jax.jit
    def chain(a, b):
        for _ in range(PRODUCTS_PER_CALL):
            a = a @ b
        return a

    a, b = (
        scale * jax.random.normal(jax.random.key(0), (size, size), dtype)
        for scale in (1, size**-0.5)
    )
    return lambda: chain(a, b).block_until_ready()


def make_torch_products(size: int, dtype: str) -> Callable[[], Any]:
    import torch

    a, b = (
        scale * torch.randn(size, size, dtype=getattr(torch, dtype), device=find_torch_device())
        for scale in (1, size**-0.5)
    )

    def chain():
        x = a
        for _ in range(PRODUCTS_PER_CALL):
            x = x @ b
        synchronize_torch()

    return chain


def make_jax_copy(count: int, dtype: str) -> Callable[[], Any]:
    x, add = jnp.ones(count, dtype), jax.jit(lambda x: x + 1)
    return lambda: add(x).block_until_ready()


def make_torch_copy(count: int, dtype: str) -> Callable[[], Any]:
    import torch

    x = torch.ones(count, dtype=getattr(torch, dtype), device=find_torch_device())
    y = torch.empty_like(x)

    def copy():
        y.copy_(x)
        synchronize_torch()

    return copy


def find_torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize_torch():
    """Wait for PyTorch's work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- The environment ---


def describe_hardware() -> str:
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{read_cpu_name()}, {cores} cores"
        if device.platform == "cpu"
        else f"{device.device_kind} (one used)"
    )


def read_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def list_versions() -> str:
    names = [f"Python {platform.python_version()}"]
    for name in ("jax", "torch", "diffusers"):
        try:
            names.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            names.append(f"no {name}")
    return ", ".join(names)


def describe_commit() -> str:
    """Return the commit of this repository, and whether there are uncommitted changes."""

    def git(*arguments: str) -> str:
        process = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        return process.stdout.strip() if process.returncode == 0 else ""

    suffix = (
        " with changes"
        if git("status", "--porcelain", "--untracked-files=no", "--", ".", "../radiance")
        else ""
    )
    return (git("rev-parse", "--short", "HEAD") or "unknown") + suffix


# --- What is printed and recorded ---


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; the first column is aligned left, numbers right."""
    rows = [list(row) + [""] * (len(header) - len(row)) for row in rows]
    text_lengths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, text_lengths))
            )
            + " |"
        )

    rule = (
        "|"
        + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(text_lengths))
        + "|"
    )
    return "\n".join([line(header), rule, *map(line, rows)])


class Report:
    """Prints sections, and appends them to RESULTS.md on request."""

    def __init__(self, title: str, arguments: Sequence[str] | None):
        arguments_given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(
            [
                "python",
                "-m",
                f"benchmarks.{title}",
                *(word for word in arguments_given if word != "--record"),
            ]
        )
        self.sections: list[str] = []
        self.write(f"## {title}: {describe_hardware()}, {date.today()}")
        self.write(f"`{command}`")
        self.write(f"{list_versions()}; commit {describe_commit()}.")

    def write(self, text: str):
        print(text + "\n", flush=True)
        self.sections.append(text)

    def measure_limits(self, dtype: str) -> Limits:
        limits = measure_limits(dtype)
        self.write(
            f"Measured limits in {dtype}: {limits.flops / 1e12:.3g} TFLOP/s of matrix products, "
            f"{limits.bandwidth / 1e9:.3g} GB/s of copying."
        )
        return limits

    def compare(
        self,
        results: Sequence[Result],
        limits: Limits,
        columns: Mapping[str, Callable[[Result], str]] | None = None,
    ):
        """Write a table: time, ratio to the first row, fraction of the limit, and `columns`."""
        columns = columns or {}
        header = [
            "",
            "seconds",
            "spread",
            "× first row",
            "TFLOP/s",
            "of limit",
            *columns,
            "to start",
        ]
        self.write(
            format_table(
                header, [self._row(result, results[0], limits, columns) for result in results]
            )
        )

    def _row(
        self,
        result: Result,
        first: Result,
        limits: Limits,
        columns: Mapping[str, Callable[[Result], str]],
    ) -> list[str]:
        if not result.times:
            return [f"{result.contender.name}: {result.reason}"]
        median = result.median
        return [
            result.contender.name,
            f"{median:.4g}",
            f"{min(result.times):.4g} – {max(result.times):.4g}",
            f"{median / first.median:.2f}",
            f"{result.rate / 1e12:.3g}",
            f"{result.rate / limits.flops:.0%}",
            *(column(result) for column in columns.values()),
            f"{result.start:.1f} s",
        ]

    def record(self):
        with RESULTS.open("a") as file:
            file.write("\n" + "\n\n".join(self.sections) + "\n")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed calls of each row; default: %(default)s"
    )
    parser.add_argument(
        "--record", action="store_true", help=f"append the output to {RESULTS.name}"
    )
    return parser
