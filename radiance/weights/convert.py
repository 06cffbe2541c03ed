"""Writing a checkpoint in a format and a type, and telling what was done."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.files import create_folder_atomically, require_new_folder
from radiance.base.tables import format_table
from radiance.weights import diffusers
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.detect import MARKERS, MODEL_KEY
from radiance.weights.gguf import QUANTIZED_DTYPES, write_gguf
from radiance.weights.rounding import (
    WrittenTensor,
    choose_dtype,
    copy_tensor,
    export_scale_shape,
    find_copyable_format,
    round_tensor,
)
from radiance.weights.safetensors import write_safetensors
from radiance.weights.tensors import DTYPES, TensorShapes

EXPORT_FORMATS = ("native", "diffusers", "gguf", "torch")
FORMATS_BY_SUFFIX = {".safetensors": "native", ".gguf": "gguf"}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
# The marks that ComfyUI's files carry beside matrices of int8 and fp8 that have scales: without one it takes them for plain numbers.
SAFETENSORS_DTYPES = DTYPES | {
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
}  # types of safetensors files
COMFY_FORMATS = {
    "int8": "int8_tensorwise",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
}
PART_PATTERNS = (
    ("markers", r"__"),
    ("modulation", r"distilled_guidance_layer|time_in|guidance_in|vector_in|.*_mod\.|.*\.modulation|final_layer\.(adaLN|offset)|shared_modulation"),
    ("text blocks", r"text_blocks"),
    ("double blocks", r"double_blocks"),
    ("single blocks", r"single_blocks"),
    ("NeRF head", r"nerf_"),
    ("output layer", r"final_layer"),
    ("input", r""),
)  # fmt: skip


def find_network_part(name: str) -> str:
    """The part of the network that a native tensor belongs to."""
    return next(part for part, pattern in PART_PATTERNS if re.match(pattern, name))


@dataclass
class ConversionRow:
    """What was written of one part of the network in one type."""

    part: str
    source_dtype: str
    target_dtype: str
    num_tensors: int = 0
    num_params: int = 0
    num_bytes: int = 0
    sum_squares: float = 0.0
    sum_squared_errors: float = 0.0

    def add(self, num_params: int, tensor: WrittenTensor):
        self.num_tensors, self.num_params = self.num_tensors + 1, self.num_params + num_params
        self.num_bytes += tensor.values.nbytes + (
            0 if tensor.scales is None else tensor.scales.nbytes
        )
        self.sum_squares, self.sum_squared_errors = (
            self.sum_squares + tensor.sum_squares,
            self.sum_squared_errors + tensor.sum_squared_errors,
        )

    @property
    def relative_error(self) -> float:
        """Root mean square of what rounding changed, relative to that of the values."""
        return (
            float(np.sqrt(self.sum_squared_errors / self.sum_squares)) if self.sum_squares else 0.0
        )


@dataclass
class ConversionReport:
    path: Path
    model: config.Model
    rows: dict[tuple[str, str, str], ConversionRow] = field(default_factory=dict)

    def __str__(self) -> str:
        cells = [("part", "from", "to", "tensors", "parameters", "size", "rms error")]
        for row in self.rows.values():
            error = f"{row.relative_error:.1e}" if row.relative_error else "exact"
            cells.append(
                (
                    row.part,
                    row.source_dtype,
                    row.target_dtype,
                    f"{row.num_tensors}",
                    f"{row.num_params:,}",
                    f"{row.num_bytes / 1e6:,.3f} MB",
                    error,
                )
            )
        return format_table(cells, num_text_columns=3)


def convert_checkpoint(
    checkpoint: Checkpoint,
    path: str | Path,
    export_format: str | None = None,
    dtype: str | None = None,
    empty_markers: bool = True,
    on_progress: Callable[[int], object] = lambda num_params: None,
    on_folder: Callable[[Path], object] = lambda folder: None,
) -> ConversionReport:
    """Writes `checkpoint` to `path`, tensor by tensor, whole or not at all.

    to: native or gguf (a file), diffusers or torch (a new folder); what the path's ending says when None. dtype: float32, bfloat16,
    float16, float8_e4m3fn, in native files int8 (with scales of its rows), and in GGUF q8_0 and q4_0; when None each tensor's own where
    the format has it, and bfloat16 where it has not, or where it was quantized and has been changed. Quantized are the blocks' matrices alone.
    empty_markers: markers have no values, as published; ggml's readers need one value. progress: called with the parameters that were
    written. more: called with a new folder before it takes its name. Raises CheckpointError.
    """
    path = Path(path)
    export_format = export_format or infer_format(path)
    check_export(checkpoint.model, path, export_format, dtype)
    shapes = {
        name: (1,) if name in MARKERS and not empty_markers else shape
        for name, shape in checkpoint.shapes.items()
    }
    copyable_formats = {
        name: find_copyable_format(checkpoint, name, export_format) for name in shapes
    }
    dtypes = {
        name: choose_dtype(
            name,
            shape,
            checkpoint.dtypes[name],
            dtype,
            export_format == "gguf",
            copyable_formats[name],
        )
        for name, shape in shapes.items()
    }
    report = ConversionReport(path, checkpoint.model)
    scales: dict[str, np.ndarray] = {}

    def get_tensor(name: str) -> np.ndarray:
        """The values as they are written; what that changes goes into the report."""
        if name in MARKERS:
            return np.zeros(shapes[name], np.float32)
        is_copy = dtypes[name] == copyable_formats[name]
        result = (
            copy_tensor(checkpoint, name, export_format)
            if is_copy
            else round_tensor(
                checkpoint.get_tensor(name), dtypes[name], name, export_format == "gguf"
            )
        )
        if result.scales is not None:
            scales[name] = result.scales
        row_key, num_params = (
            (find_network_part(name), checkpoint.dtypes[name], dtypes[name]),
            math.prod(shapes[name]),
        )
        report.rows.setdefault(row_key, ConversionRow(*row_key)).add(num_params, result)
        on_progress(num_params)
        return result.values

    metadata = {k: v for k, v in checkpoint.metadata.items() if k.startswith("radiance.")}
    metadata |= {
        MODEL_KEY: json.dumps(config.to_dict(checkpoint.model)),
        "radiance.origin": checkpoint.origin,
    }
    if export_format == "gguf":
        write_gguf(path, shapes, dtypes, get_tensor, metadata)
    elif export_format == "native":
        quantized_names = [
            name
            for name, tensor_dtype in dtypes.items()
            if tensor_dtype in COMFY_FORMATS
            and (tensor_dtype == "int8" or tensor_dtype == copyable_formats[name])
        ]
        scale_shapes = {
            name: shape
            for name in quantized_names
            if (
                shape := export_scale_shape(
                    checkpoint, name, dtypes[name] == copyable_formats[name]
                )
            )
            is not None
        }
        _write_with_scales(path, shapes, dtypes, get_tensor, scale_shapes, scales, metadata)
    else:
        with create_folder_atomically(path) as folder:
            if export_format == "diffusers":
                _write_diffusers(folder, checkpoint.model, shapes, dtypes, get_tensor, metadata)
            else:
                _write_torch(folder, checkpoint.model, shapes, dtypes, get_tensor, metadata)
            on_folder(folder)
    return report


def check_export(model: config.Model, path: Path, export_format: str, dtype: str | None):
    """Raises CheckpointError when `convert` could not write the model so."""
    if export_format not in EXPORT_FORMATS:
        raise CheckpointError(
            f"There is no format {export_format!r}: the formats are {', '.join(EXPORT_FORMATS)}."
        )
    _check_dtype(export_format, dtype)
    if export_format == "diffusers":
        diffusers.check_diffusers_support(model)
    if export_format in ("diffusers", "torch"):
        require_new_folder(path)


def _check_dtype(export_format: str, dtype: str | None):
    dtypes = (*DTYPES, "int8", *QUANTIZED_DTYPES)
    if dtype is not None and dtype not in dtypes:
        raise CheckpointError(f"There is no type {dtype!r}: the types are {', '.join(dtypes)}.")
    if dtype in QUANTIZED_DTYPES and export_format != "gguf":
        raise CheckpointError(
            f"{dtype} is a type of GGUF files: write --to gguf, or a name that ends in .gguf."
        )
    if (
        export_format == "gguf"
        and dtype is not None
        and dtype not in QUANTIZED_DTYPES
        and (dtype == "int8" or DTYPES[dtype].itemsize == 1)
    ):
        raise CheckpointError(f"GGUF has no {dtype}: use q8_0.")
    if dtype == "int8" and export_format != "native":
        raise CheckpointError(
            f"int8 has scales beside the weights, which {export_format} has no place for: write --to native, or another type."
        )


def infer_format(path: Path) -> str:
    """By its ending. Raises CheckpointError where that does not say it."""
    if path.suffix not in FORMATS_BY_SUFFIX:
        raise CheckpointError(
            f"{path} does not say in what format to write: end it in {' or '.join(FORMATS_BY_SUFFIX)}, or give --to."
        )
    return FORMATS_BY_SUFFIX[path.suffix]


def _write_tensors(
    path: Path, shapes, dtypes: Mapping[str, str], get_tensor, metadata: Mapping[str, str]
):
    write_safetensors(
        path,
        shapes,
        {name: SAFETENSORS_DTYPES[dtype] for name, dtype in dtypes.items()},
        get_tensor,
        {"format": "pt", **metadata},
    )


def _write_with_scales(
    path: Path,
    shapes,
    dtypes: Mapping[str, str],
    get_tensor,
    scale_shapes: TensorShapes,
    scales: Mapping[str, np.ndarray],
    metadata,
):
    """With the scales of some matrices, which `tensor` leaves in `scales`, and their marks behind them."""
    extra_tensors: dict[str, Callable[[], np.ndarray]] = {}
    file_shapes, file_dtypes = {}, {}
    for name, shape in shapes.items():
        file_shapes[name], file_dtypes[name] = shape, dtypes[name]
        if name in scale_shapes:
            layer, comfy_metadata = (
                name.removesuffix(".weight"),
                json.dumps({"format": COMFY_FORMATS[dtypes[name]]}).encode(),
            )
            extra_tensors |= {
                f"{layer}.weight_scale": partial(scales.__getitem__, name),
                f"{layer}.comfy_quant": partial(np.frombuffer, comfy_metadata, np.uint8),
            }
            file_shapes |= {
                f"{layer}.weight_scale": scale_shapes[name],
                f"{layer}.comfy_quant": (len(comfy_metadata),),
            }
            file_dtypes |= {f"{layer}.weight_scale": "float32", f"{layer}.comfy_quant": "uint8"}
    _write_tensors(
        path,
        file_shapes,
        file_dtypes,
        lambda key: extra_tensors[key]() if key in extra_tensors else get_tensor(key),
        metadata,
    )


def _write_diffusers(folder: Path, model: config.Model, shapes, dtypes, get_tensor, metadata):
    """`diffusion_pytorch_model.safetensors` and `config.json`."""
    cache: dict[str, np.ndarray] = {}
    sources = {
        diffusers_name: (name, rows)
        for name in shapes
        for diffusers_name, (rows, _) in diffusers.locate_diffusers_slices(
            name, shapes[name], model
        ).items()
    }

    def get_slice(diffusers_name: str) -> np.ndarray:
        name, rows = sources[diffusers_name]
        if name not in cache:
            cache.clear()
            cache[name] = get_tensor(name)
        return cache[name][rows]

    file_shapes = {
        diffusers_name: shape
        for name in shapes
        for diffusers_name, (_, shape) in diffusers.locate_diffusers_slices(
            name, shapes[name], model
        ).items()
    }
    file_dtypes = {diffusers_name: dtypes[name] for diffusers_name, (name, _) in sources.items()}
    _write_tensors(
        folder / "diffusion_pytorch_model.safetensors",
        file_shapes,
        file_dtypes,
        get_slice,
        metadata,
    )
    (folder / "config.json").write_text(
        json.dumps(diffusers.make_transformer_config(model), indent=2) + "\n"
    )


def _write_torch(folder: Path, model: config.Model, shapes, dtypes, get_tensor, metadata):
    """The native file, the model's settings, and the two programs that read them without us."""
    _write_tensors(folder / "model.safetensors", shapes, dtypes, get_tensor, metadata)
    (folder / "config.json").write_text(json.dumps(config.to_dict(model), indent=2) + "\n")
    for name in ("model.py", "sample.py"):
        shutil.copy(Path(__file__).parent / "torch_export" / name, folder / name)
