"""Measure what matters most on a GPU that is lent for minutes, in order of worth.

    python -m benchmarks.first_gpu --minutes 9
    python -m benchmarks.first_gpu --minutes 9 --parts "sampling" "fine-tuning"
    python -m benchmarks.first_gpu --minutes 5 --toy --out runs/rehearsal       (on a CPU)

Each part is a process of its own with a limit of its own, so that neither its failure nor its
memory reaches the next. After each part, FOLDER/first_gpu.jsonl has a line with its tables, and
FOLDER/first_gpu.md its output; a part that is stopped leaves what it printed until then. The last
part trains the masking suite until the time is up; its results remain, and the same command
resumes it.

Beside an image with CUDA, JAX and PyTorch (2.5 or later) for it, this needs this repository with
its tests (`tests/golden`), the packages of `pip install -e .`, and for the peers
`diffusers>=0.36`. No weights and no network: networks are random, texts are noise. The largest
part takes about 80 GB of GPU memory, PyTorch's training of FLUX more; such a row says so and the
others remain.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from radiance.base.files import replace_atomically

GRACE_SECONDS = 5  # between the request to stop and the end by force
SAVING_SECONDS = 15  # that a run needs to save before its limit
LEAST_SECONDS = 10  # a part does not start with less
MAX_OUTPUT = 30_000  # characters of a part in the report
MINUTES, FOLDER = "{minutes}", "{folder}"  # of the part, in its command
# All state of the optimizer in bfloat16, without an average.
SMALL_STATE = (
    "optimizer.weights_dtype=bfloat16",
    "optimizer.mu_dtype=bfloat16",
    "optimizer.nu_dtype=bfloat16",
)
TOY_MODEL = (
    "model.hidden=48", "model.heads=2", "model.double_blocks=1", "model.single_blocks=1",
    "model.rope_axes=4,10,10", "model.text_dim=32", "model.approximator_hidden=40",
    "model.patch=4", "model.head=linear",
)  # fmt: skip
TOY_SIZE = (
    "--model", "nano", "--resolution", "8", "--text-limit", "16", "--prompt-tokens", "3",
    "--batch", "2", "--repeats", "1",
)  # fmt: skip


class Part(NamedTuple):
    """A measurement: its name, the most seconds that it may take, and its command."""

    name: str
    seconds: float
    command: tuple[str, ...]


def make_parts() -> list[Part]:
    """Return the parts, the most valuable first."""
    sampling = ("--model", "chroma1-radiance-x0", "--resolution", "1024", "--steps", "4")
    step = ("--parts", "step", "--repeats", "3")
    tuned = ("--model", "chroma1-radiance-x0", "--resolution", "512", "--batch", "4")
    # MLPerf trains FLUX at 256², which are 16×16 tokens of packed latents, with 256 text tokens.
    flux = (
        "--model",
        "flux1-schnell",
        "--resolution",
        "16",
        "--text-limit",
        "256",
        "--prompt-tokens",
        "255",
        "--batch",
        "32",
    )
    formats = ("--weight-formats", "int8", "q8_0", "float8_e4m3fn")
    suite = ("ablate", "masking", "--scale", "gpu", "--minutes", MINUTES)
    folders = ("--results", f"{FOLDER}/masking", "--work", f"{FOLDER}/masking_runs")
    return [
        _command("verify", 90, "radiance", "verify", *list_golden_files()),
        _command("bfloat16", 40, "benchmarks.first_gpu", "--golden-errors"),
        _command(
            "attention", 80, "benchmarks.attention", "--tokens", "1536", "4608", "--repeats", "3"
        ),
        _command("sampling", 90, "benchmarks.sampling", *sampling, "--repeats", "3", "--peers"),
        _command(
            "training large", 80, "benchmarks.training", *step, "--model", "large", "--peers"
        ),
        _command(
            "fine-tuning", 110, "benchmarks.training", *SMALL_STATE, *step, *tuned,
            "--remat", "full", "--peers",
        ),
        _command(
            "sampling beside eager peers", 90, "benchmarks.sampling", *sampling, "--repeats", "2",
            "--modes", "eager",
        ),
        _command(
            "training FLUX", 110, "benchmarks.training", *SMALL_STATE, *step, *flux,
            "--remat", "full", "--peers",
        ),
        _command(
            "sampling with quantized weights", 90, "benchmarks.sampling", *sampling,
            "--repeats", "2", "--peers", *formats,
        ),
        _command(
            "sampling beside compiled peers", 120, "benchmarks.sampling", *sampling,
            "--repeats", "2", "--modes", "compiled",
        ),
        _command(
            "training large beside PyTorch", 90, "benchmarks.training", *step, "--model", "large"
        ),
        _command("masking suite", math.inf, "radiance", *suite, *folders),
    ]  # fmt: skip


def make_toy_parts() -> list[Part]:
    """Return the parts at a size for CPUs, without PyTorch's compiler and the suite."""
    attention = ("--tokens", "48", "--hidden-tokens", "7", "--heads", "2", "--head-dim", "16")
    return [
        _command("verify", 300, "radiance", "verify", *list_golden_files()[:1]),
        _command("bfloat16", 300, "benchmarks.first_gpu", "--golden-errors"),
        _command("attention", 300, "benchmarks.attention", *attention, "--repeats", "1"),
        _command(
            "sampling beside eager peers", 300, "benchmarks.sampling", *TOY_MODEL, *TOY_SIZE,
            "--steps", "2", "--modes", "eager",
        ),
        _command(
            "fine-tuning", 300, "benchmarks.training", *SMALL_STATE, *TOY_MODEL, *TOY_SIZE,
            "--remat", "full", "--peers",
        ),
        _command(
            "sampling with quantized weights", 300, "benchmarks.sampling", *TOY_MODEL, *TOY_SIZE,
            "--steps", "2", "--peers", "--weight-formats", "int8",
        ),
    ]  # fmt: skip


def _command(name: str, seconds: float, module: str, *arguments: str) -> Part:
    return Part(name, seconds, (sys.executable, "-m", module, *arguments))


def list_golden_files() -> list[str]:
    """Return the outputs of the published implementation that are compared with."""
    folder = Path(__file__).parents[1] / "tests" / "golden"
    return sorted(os.path.relpath(path) for path in folder.glob("*.safetensors"))


def format_golden_errors() -> str:
    """Return the errors of bfloat16 against the published implementation's float32."""
    from benchmarks.measure import format_table
    from radiance import config
    from radiance.evaluation.verify import verify_golden_file

    compute = config.Compute(dtype="bfloat16", attention="xla")
    rows = [
        (result.file, result.output, f"{result.error:.1e}")
        for path in list_golden_files()
        for result in verify_golden_file(path, compute)
        if result.output != "sampled"  # so ill-conditioned that bfloat16 says nothing
    ]
    return format_table(("file", "output", "error in bfloat16"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, and return the number of those that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these alone, in this order")
    parser.add_argument("--toy", action="store_true", help="a rehearsal at toy size on a CPU")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/first_gpu"), metavar="FOLDER", help="of the results"
    )
    parser.add_argument(
        "--golden-errors", action="store_true", help="only compare bfloat16 with golden files"
    )
    options = parser.parse_args(arguments)
    if options.golden_errors:
        print(format_golden_errors())
        return 0
    parts = {part.name: part for part in (make_toy_parts() if options.toy else make_parts())}
    unknown = [name for name in options.parts or () if name not in parts]
    if unknown:
        parser.error(f"There is no part {unknown[0]!r}: the parts are {', '.join(parts)}.")
    selected = [parts[name] for name in options.parts or parts]
    records = run_parts(selected, 60 * options.minutes, options.out)
    return sum(record["status"] == "failed" for record in records)


def run_parts(parts: Sequence[Part], seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Run parts one after the other, and write the result of each at once.

    Args:
        parts: The parts.
        seconds: Time for all of them; parts beyond it are recorded as not started.
        folder: Folder of `first_gpu.jsonl`, which is continued, and of `first_gpu.md`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline, records = time.monotonic() + seconds, []
    for part in parts:
        remaining = deadline - time.monotonic() - GRACE_SECONDS
        limit = min(part.seconds, remaining)
        if limit < LEAST_SECONDS:
            record = _make_record(part, "not started", 0.0, f"{max(remaining, 0):.0f} s were left.")
        else:
            print(f"{part.name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
            record = run_part(part, limit, folder)
        records.append(record)
        with (folder / "first_gpu.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        with replace_atomically(folder / "first_gpu.md") as temp_path:
            temp_path.write_text(format_report(records), "utf-8")
    return records


def run_part(part: Part, limit: float, folder: Path) -> dict[str, Any]:
    """Run a part for at most `limit` seconds, and return its record."""
    minutes = f"{max(limit - SAVING_SECONDS, 1) / 60:.2f}"
    command = [word.replace(MINUTES, minutes).replace(FOLDER, str(folder)) for word in part.command]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        try:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return _make_record(part, "failed", 0.0, str(error))
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
        finally:
            _end_group(process)
        output.seek(0)
        return _make_record(part, status, time.monotonic() - start, output.read()[-MAX_OUTPUT:])


def _end_group(process: subprocess.Popen):
    """End a part and its children: by request, then by force."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(GRACE_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _make_record(part: Part, status: str, seconds: float, output: str) -> dict[str, Any]:
    return {
        "part": part.name,
        "command": shlex.join(["python", *part.command[1:]]),
        "status": status,
        "seconds": round(seconds, 1),
        "tables": parse_tables(output),
        "output": output,
    }


def parse_tables(text: str) -> list[list[dict[str, str]]]:
    """Return the rows of each Markdown table by column; the first column has the name "row"."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        columns = ["row", *lines[0][1:]]
        tables.append([dict(zip(columns, line)) for line in lines[2:]])
    return tables


def format_report(records: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown page: a table of the parts, then the output of each."""
    lines = ["# First measurements on a GPU", "", "| part | status | seconds |", "|---|---|---|"]
    lines += [f"| {r['part']} | {r['status']} | {r['seconds']} |" for r in records]
    for record in records:
        output = record["output"]
        # The reports of benchmarks are Markdown; other output is kept as it is.
        text = output if record["tables"] else f"```text\n{output.strip()}\n```"
        lines += ["", f"# {record['part']}: {record['status']}", "", f"`{record['command']}`"]
        lines += ["", text.strip()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
