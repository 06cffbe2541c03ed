"""The clock, the limits of the device measured beside it, the facts of a run, and its tables."""

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
SETTLE = (
    0.05  # seconds between calls, in which the other library's threads stop waiting for more work
)
PRODUCTS = 4  # matrix products of a call, so that its start does not count
SIZES = {
    "cpu": (2048, 1 << 26),
    "accelerator": (8192, 1 << 30),
}  # side of the matrices, and numbers that are copied


# --- the clock --------------------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """What is timed: `make()` gives a call that returns when its work is done."""

    name: str
    make: Callable[[], Callable[[], Any]]
    flops: float = 0  # of a call, counted by hand
    peer: bool = True  # a peer that cannot run becomes a row that says why; what is ours must run


class Result(NamedTuple):
    contender: Contender
    start: float  # seconds to make it and of the first call, in which it is compiled
    times: tuple[float, ...]  # seconds of the calls after the warm-up; none when it did not run
    reason: str = ""  # why it did not

    @property
    def median(self) -> float:
        return statistics.median(self.times) if self.times else float("nan")

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.contender.flops / self.median


def race(contenders: Sequence[Contender], repeats: int) -> list[Result]:
    """Each is called twice to warm up; then all in turn, `repeats` times, so that what slows the machine down meets them alike."""
    calls, starts, reasons = {}, {}, {}
    for contender in contenders:
        try:
            began = time.perf_counter()
            call = contender.make()
            call()
            starts[contender.name] = time.perf_counter() - began
            call()
            calls[contender.name] = call
        except Exception as error:  # whatever a peer's compiler comes up with
            if not contender.peer:
                raise
            reasons[contender.name] = told(error)
        print(
            contender.name,
            reasons.get(contender.name, "has warmed up"),
            sep=": ",
            file=sys.stderr,
            flush=True,
        )
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(SETTLE)
            times[name].append(seconds(call))
    return [
        Result(c, starts.get(c.name, 0.0), tuple(times.get(c.name, ())), reasons.get(c.name, ""))
        for c in contenders
    ]


def told(error: Exception) -> str:
    """Why a peer did not run, in one line of a table."""
    return f"not measured, {type(error).__name__}: {' '.join(str(error).split())}"[:160]


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def forget():
    """Frees the memory of what has been timed, for what comes next."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the limits -------------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """The best that this device was seen to do, in JAX or in PyTorch."""

    flops: float  # of matrix products a second
    bandwidth: float  # bytes a second, read and written


def measured_limits(dtype: str, repeats: int = 5) -> Limits:
    side, count = SIZES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    work = PRODUCTS * 2 * side**3
    products = [
        Contender("JAX", lambda: jax_products(side, dtype), work, peer=False),
        Contender("PyTorch", lambda: torch_products(side, dtype), work),
    ]
    moved = 2 * count * jnp.dtype(dtype).itemsize
    copies = [
        Contender("JAX", lambda: jax_copy(count, dtype), moved, peer=False),
        Contender("PyTorch", lambda: torch_copy(count, dtype), moved),
    ]
    best = [
        max(r.contender.flops / min(r.times) for r in race(pair, repeats) if r.times)
        for pair in (products, copies)
    ]
    forget()
    return Limits(*best)


def jax_products(side: int, dtype: str) -> Callable[[], Any]:
    @jax.jit
    def chain(a, b):
        for _ in range(PRODUCTS):
            a = a @ b
        return a

    a, b = (
        scale * jax.random.normal(jax.random.key(0), (side, side), dtype)
        for scale in (1, side**-0.5)
    )
    return lambda: chain(a, b).block_until_ready()


def torch_products(side: int, dtype: str) -> Callable[[], Any]:
    import torch

    a, b = (
        scale * torch.randn(side, side, dtype=getattr(torch, dtype), device=torch_device())
        for scale in (1, side**-0.5)
    )

    def chain():
        x = a
        for _ in range(PRODUCTS):
            x = x @ b
        synchronize()

    return chain


def jax_copy(count: int, dtype: str) -> Callable[[], Any]:
    x, add = jnp.ones(count, dtype), jax.jit(lambda x: x + 1)
    return lambda: add(x).block_until_ready()


def torch_copy(count: int, dtype: str) -> Callable[[], Any]:
    import torch

    x = torch.ones(count, dtype=getattr(torch, dtype), device=torch_device())
    y = torch.empty_like(x)

    def copy():
        y.copy_(x)
        synchronize()

    return copy


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize():
    """Waits for PyTorch's work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- the facts --------------------------------------------------------------------------------------------------------


def hardware() -> str:
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cpu_name()}, {cores} cores"
        if device.platform == "cpu"
        else f"{device.device_kind} (one used)"
    )


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("jax", "torch", "diffusers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def commit() -> str:
    """Of this repository, and whether it has changes that are in no commit."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = (
        " with changes"
        if git("status", "--porcelain", "--untracked-files=no", "--", ".", "../radiance")
        else ""
    )
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


# --- what is printed and recorded -------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; the first column is flushed left, numbers right."""
    rows = [list(row) + [""] * (len(header) - len(row)) for row in rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths))
            )
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


class Report:
    """Prints as it goes, and appends the whole to RESULTS.md when asked to."""

    def __init__(self, title: str, arguments: Sequence[str] | None):
        words = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(
            ["python", "-m", f"benchmarks.{title}", *(word for word in words if word != "--record")]
        )
        self.parts: list[str] = []
        self.say(f"## {title}: {hardware()}, {date.today()}")
        self.say(f"`{command}`")
        self.say(f"{versions()}; commit {commit()}.")

    def say(self, text: str):
        print(text + "\n", flush=True)
        self.parts.append(text)

    def limits(self, dtype: str) -> Limits:
        limits = measured_limits(dtype)
        self.say(
            f"Measured limits in {dtype}: {limits.flops / 1e12:.3g} TFLOP/s of matrix products, {limits.bandwidth / 1e9:.3g} GB/s of copying."
        )
        return limits

    def compare(
        self,
        results: Sequence[Result],
        limits: Limits,
        columns: Mapping[str, Callable[[Result], str]] | None = None,
    ):
        """A table with the time of each row, how many times that of the first it is, its share of the limit, and `columns`."""
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
        self.say(
            table(header, [self._row(result, results[0], limits, columns) for result in results])
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
        middle = result.median
        return [
            result.contender.name,
            f"{middle:.4g}",
            f"{min(result.times):.4g} – {max(result.times):.4g}",
            f"{middle / first.median:.2f}",
            f"{result.rate / 1e12:.3g}",
            f"{result.rate / limits.flops:.0%}",
            *(column(result) for column in columns.values()),
            f"{result.start:.1f} s",
        ]

    def record(self):
        with RESULTS.open("a") as file:
            file.write("\n" + "\n\n".join(self.parts) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """With what all benchmarks understand."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--repeats", type=int, default=5, help="timed calls of each row; default: %(default)s"
    )
    made.add_argument(
        "--record", action="store_true", help=f"append what is printed to {RESULTS.name}"
    )
    return made
