"""Writing a checkpoint in a format and a type, and telling what was done."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from radiance import config
from radiance.weights import diffusers
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.detect import MARKERS, METADATA_KEY
from radiance.weights.files import DTYPES, CheckpointError, Shapes, replacing, write_safetensors
from radiance.weights.gguf import QUANTISED, write_gguf
from radiance.weights.rounding import Written, copied, copyable, rounded, scale_shape, type_of

FORMATS = ("native", "diffusers", "gguf", "torch")
ENDINGS = {".safetensors": "native", ".gguf": "gguf"}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
# The marks that ComfyUI's files carry beside matrices of int8 and fp8 that have scales: without one it takes them for plain numbers.
SAFE = DTYPES | {"int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8)}  # types of safetensors files
MARKS = {"int8": "int8_tensorwise", "float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2"}
PARTS = (
    ("markers", r"__"),
    ("modulation", r"distilled_guidance_layer|time_in|guidance_in|vector_in|.*_mod\.|.*\.modulation|final_layer\.(adaLN|offset)|shared_modulation"),
    ("text blocks", r"text_blocks"),
    ("double blocks", r"double_blocks"),
    ("single blocks", r"single_blocks"),
    ("NeRF head", r"nerf_"),
    ("output layer", r"final_layer"),
    ("input", r""),
)  # fmt: skip


def part_of(name: str) -> str:
    """The part of the network that a native tensor belongs to."""
    return next(part for part, pattern in PARTS if re.match(pattern, name))


@dataclass
class Line:
    """What was written of one part of the network in one type."""

    part: str
    before: str
    after: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    squares: float = 0.0
    errors: float = 0.0

    def add(self, parameters: int, written: Written):
        self.tensors, self.parameters = self.tensors + 1, self.parameters + parameters
        self.bytes += written.values.nbytes + (0 if written.scales is None else written.scales.nbytes)
        self.squares, self.errors = self.squares + written.squares, self.errors + written.errors

    @property
    def error(self) -> float:
        """Root mean square of what rounding changed, relative to that of the values."""
        return float(np.sqrt(self.errors / self.squares)) if self.squares else 0.0


@dataclass
class Report:
    path: Path
    model: config.Model
    lines: dict[tuple[str, str, str], Line] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("part", "from", "to", "tensors", "parameters", "size", "rms error")]
        for x in self.lines.values():
            told = f"{x.error:.1e}" if x.error else "exact"
            rows.append((x.part, x.before, x.after, f"{x.tensors}", f"{x.parameters:,}", f"{x.bytes / 1e6:,.3f} MB", told))
        return table(rows, left=3)


def table(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows in columns, the first `left` of which are words."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < left else '>'}{w}}" for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows
    )


def convert(
    checkpoint: Checkpoint,
    path: str | Path,
    to: str | None = None,
    dtype: str | None = None,
    empty_markers: bool = True,
    progress: Callable[[int], object] = lambda count: None,
    more: Callable[[Path], object] = lambda folder: None,
) -> Report:
    """Writes `checkpoint` to `path`, tensor by tensor, whole or not at all.

    to: native or gguf (a file), diffusers or torch (a new folder); what the path's ending says when None. dtype: float32, bfloat16,
    float16, float8_e4m3fn, in native files int8 (with scales of its rows), and in GGUF q8_0 and q4_0; when None each tensor's own where
    the format has it, and bfloat16 where it has not, or where it was quantised and has been changed. Quantised are the blocks' matrices alone.
    empty_markers: markers have no values, as published; ggml's readers need one value. progress: called with the parameters that were
    written. more: called with a new folder before it takes its name. Raises CheckpointError.
    """
    path = Path(path)
    to = to or format_of(path)
    check(checkpoint.model, path, to, dtype)
    shapes = {name: (1,) if name in MARKERS and not empty_markers else shape for name, shape in checkpoint.shapes.items()}
    small = {name: copyable(checkpoint, name, to) for name in shapes}
    types = {name: type_of(name, shape, checkpoint.dtypes[name], dtype, to == "gguf", small[name]) for name, shape in shapes.items()}
    report = Report(path, checkpoint.model)
    scales: dict[str, np.ndarray] = {}

    def tensor(name: str) -> np.ndarray:
        """The values as they are written; what that changes goes into the report."""
        if name in MARKERS:
            return np.zeros(shapes[name], np.float32)
        copy = types[name] == small[name]
        written = copied(checkpoint, name, to) if copy else rounded(checkpoint.tensor(name), types[name], name, to == "gguf")
        if written.scales is not None:
            scales[name] = written.scales
        key, count = (part_of(name), checkpoint.dtypes[name], types[name]), math.prod(shapes[name])
        report.lines.setdefault(key, Line(*key)).add(count, written)
        progress(count)
        return written.values

    metadata = {k: v for k, v in checkpoint.metadata.items() if k.startswith("radiance.")}
    metadata |= {METADATA_KEY: json.dumps(config.to_dict(checkpoint.model)), "radiance.origin": checkpoint.origin}
    if to == "gguf":
        write_gguf(path, shapes, types, tensor, metadata)
    elif to == "native":
        coarse = [name for name, kind in types.items() if kind in MARKS and (kind == "int8" or kind == small[name])]
        scaled = {name: shape for name in coarse if (shape := scale_shape(checkpoint, name, types[name] == small[name])) is not None}
        _write_scaled(path, shapes, types, tensor, scaled, scales, metadata)
    else:
        with new_folder(path) as folder:
            if to == "diffusers":
                _write_diffusers(folder, checkpoint.model, shapes, types, tensor, metadata)
            else:
                _write_torch(folder, checkpoint.model, shapes, types, tensor, metadata)
            more(folder)
    return report


def check(model: config.Model, path: Path, to: str, dtype: str | None):
    """Raises CheckpointError when `convert` could not write the model so."""
    if to not in FORMATS:
        raise CheckpointError(f"There is no format {to!r}: the formats are {', '.join(FORMATS)}.")
    _check_type(to, dtype)
    if to == "diffusers":
        diffusers.check(model)
    if to in ("diffusers", "torch"):
        _check_new(path)


def _check_type(to: str, dtype: str | None):
    known = (*DTYPES, "int8", *QUANTISED)
    if dtype is not None and dtype not in known:
        raise CheckpointError(f"There is no type {dtype!r}: the types are {', '.join(known)}.")
    if dtype in QUANTISED and to != "gguf":
        raise CheckpointError(f"{dtype} is a type of GGUF files: write --to gguf, or a name that ends in .gguf.")
    if to == "gguf" and dtype is not None and dtype not in QUANTISED and (dtype == "int8" or DTYPES[dtype].itemsize == 1):
        raise CheckpointError(f"GGUF has no {dtype}: use q8_0.")
    if dtype == "int8" and to != "native":
        raise CheckpointError(f"int8 has scales beside the weights, which {to} has no place for: write --to native, or another type.")


def format_of(path: Path) -> str:
    """By its ending. Raises CheckpointError where that does not say it."""
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path} does not say in what format to write: end it in {' or '.join(ENDINGS)}, or give --to.")
    return ENDINGS[path.suffix]


def _write(path: Path, shapes, types: Mapping[str, str], tensor, metadata: Mapping[str, str]):
    write_safetensors(path, shapes, {name: SAFE[kind] for name, kind in types.items()}, tensor, {"format": "pt", **metadata})


def _write_scaled(path: Path, shapes, types: Mapping[str, str], tensor, scaled: Shapes, scales: Mapping[str, np.ndarray], metadata):
    """With the scales of some matrices, which `tensor` leaves in `scales`, and their marks behind them."""
    beside: dict[str, Callable[[], np.ndarray]] = {}
    their_shapes, their_types = {}, {}
    for name, shape in shapes.items():
        their_shapes[name], their_types[name] = shape, types[name]
        if name in scaled:
            layer, mark = name.removesuffix(".weight"), json.dumps({"format": MARKS[types[name]]}).encode()
            beside |= {
                f"{layer}.weight_scale": partial(scales.__getitem__, name),
                f"{layer}.comfy_quant": partial(np.frombuffer, mark, np.uint8),
            }
            their_shapes |= {f"{layer}.weight_scale": scaled[name], f"{layer}.comfy_quant": (len(mark),)}
            their_types |= {f"{layer}.weight_scale": "float32", f"{layer}.comfy_quant": "uint8"}
    _write(path, their_shapes, their_types, lambda key: beside[key]() if key in beside else tensor(key), metadata)


def _write_diffusers(folder: Path, model: config.Model, shapes, types, tensor, metadata):
    """`diffusion_pytorch_model.safetensors` and `config.json`."""
    held: dict[str, np.ndarray] = {}
    places = {theirs: (name, rows) for name in shapes for theirs, (rows, _) in diffusers.parts(name, shapes[name], model).items()}

    def part(theirs: str) -> np.ndarray:
        name, rows = places[theirs]
        if name not in held:
            held.clear()
            held[name] = tensor(name)
        return held[name][rows]

    their_shapes = {theirs: shape for name in shapes for theirs, (_, shape) in diffusers.parts(name, shapes[name], model).items()}
    their_types = {theirs: types[name] for theirs, (name, _) in places.items()}
    _write(folder / "diffusion_pytorch_model.safetensors", their_shapes, their_types, part, metadata)
    (folder / "config.json").write_text(json.dumps(diffusers.class_config(model), indent=2) + "\n")


def _write_torch(folder: Path, model: config.Model, shapes, types, tensor, metadata):
    """The native file, the model's settings, and the two programs that read them without us."""
    _write(folder / "model.safetensors", shapes, types, tensor, metadata)
    (folder / "config.json").write_text(json.dumps(config.to_dict(model), indent=2) + "\n")
    here = Path(__file__).parent
    shutil.copy(here / "torch_model.py", folder / "model.py")
    shutil.copy(here / "torch_sample.py", folder / "sample.py")


def _check_new(path: Path):
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is there already: give the name of a new folder.")


@contextmanager
def new_folder(path: Path):
    """A temporary folder beside `path` that takes its name when the block ends well, and is gone when it does not."""
    _check_new(path)
    with replacing(path) as part:
        part.mkdir()
        try:
            yield part
        except BaseException:
            shutil.rmtree(part)
            raise
        if path.is_dir():
            path.rmdir()
