"""Convert a full-size checkpoint: seconds beside a plain copy of the file, and resident memory.

    python benchmarks/convert.py --folder /scratch          (writes and removes up to 60 GB there)

A checkpoint of random bfloat16 values under the published names is written, copied with `cp`, and
converted with the command that users type. Each runs in its own process, with the input out of the
page cache. The copy is the peer and, moving the same bytes, nearly the limit of the disk. Results
are in benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from radiance import config
from radiance.weights import native
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.safetensors import write_safetensors

FLOAT32_PREFIXES = ("nerf_image_embedder.", "__")  # as published
CONVERSIONS = {
    "native, each type as it is": ("copy.safetensors", []),
    "native, fp16": ("fp16.safetensors", ["--dtype", "fp16"]),
    "native, fp8": ("fp8.safetensors", ["--dtype", "fp8"]),
    "native, int8": ("int8.safetensors", ["--dtype", "int8"]),
    "GGUF, BF16": ("bf16.gguf", []),
    "GGUF, Q8_0": ("q8_0.gguf", ["--dtype", "q8_0"]),
    "GGUF, Q4_0": ("q4_0.gguf", ["--dtype", "q4_0"]),
    "PyTorch folder": ("torch", ["--to", "torch"]),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="chroma1-radiance-x0", choices=sorted(config.MODELS))
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="with room for three such files",
    )
    parser.add_argument("--modes", nargs="*", default=list(CONVERSIONS), choices=list(CONVERSIONS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure_conversions(Path(folder), config.Model.from_name(options.model), options.modes)


def measure_conversions(folder: Path, model: config.Model, modes: list[str]):
    source = folder / "source.safetensors"
    seconds, memory = run_child(
        [sys.executable, __file__, "--write", str(source), json.dumps(config.to_dict(model))]
    )
    size = source.stat().st_size
    print(
        f"{size / 1e9:.2f} GB written in {seconds:.0f} s ({memory / 1e9:.2f} GB resident)",
        flush=True,
    )

    drop_from_page_cache(source)
    copied, _ = run_child(["cp", str(source), str(folder / "cp")], folder / "cp")
    (folder / "cp").unlink()
    print(f"{'what':28} {'output':>9} {'seconds':>8} {'× cp':>6} {'GB/s in':>8} {'resident':>9}")
    print(
        f"{'cp':28} {size / 1e9:6.2f} GB {copied:8.1f} {1:6.2f} {size / 1e9 / copied:8.2f}",
        flush=True,
    )
    for mode in modes:
        name, flags = CONVERSIONS[mode]
        out = folder / name
        drop_from_page_cache(source)
        seconds, memory = run_child(
            [sys.executable, "-m", "radiance", "convert", str(source), str(out), *flags], out
        )
        written = sum(x.stat().st_size for x in (out.rglob("*") if out.is_dir() else [out]))
        assert open_checkpoint(out).shapes.keys() == open_checkpoint(source).shapes.keys()
        print(
            f"{mode:28} {written / 1e9:6.2f} GB {seconds:8.1f} {seconds / copied:6.2f} "
            f"{size / 1e9 / seconds:8.2f} {memory / 1e9:6.2f} GB",
            flush=True,
        )
        shutil.rmtree(out) if out.is_dir() else out.unlink()


def run_child(command: list[str], out: Path | None = None) -> tuple[float, int]:
    """Return seconds until the output is on disk, and the child's peak resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed.")
    for path in (
        () if out is None else [x for x in out.rglob("*") if x.is_file()] if out.is_dir() else [out]
    ):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def drop_from_page_cache(path: Path):
    """Drop a file from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_random_checkpoint(path: Path, model: config.Model):
    """Write random values with the names and types of the published checkpoints."""
    rng, shapes = np.random.default_rng(0), native.native_layout(model)[0]
    noise = rng.standard_normal(1 << 20, np.float32)

    def tensor(name: str) -> np.ndarray:
        count = int(np.prod(shapes[name]))
        # The same million values, rotated: sampling ten billion would take as long as all else.
        return np.resize(np.roll(noise, int(rng.integers(noise.size))), count).reshape(
            shapes[name]
        ) * np.float32(0.02)

    types = {
        name: np.dtype(np.float32 if name.startswith(FLOAT32_PREFIXES) else ml_dtypes.bfloat16)
        for name in shapes
    }
    write_safetensors(path, shapes, types, tensor, {})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_random_checkpoint(Path(sys.argv[2]), config.from_json(config.Model, sys.argv[3]))
    else:
        main()
