"""Write a checkpoint in another format and type, and report what rounding changed."""

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.files import create_folder_atomically, require_new_folder
from radiance.weights import diffusers
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.conversion_report import ConversionReport
from radiance.weights.detect import MARKERS, MODEL_KEY
from radiance.weights.formats import EXPORT_FORMATS, FOLDER_FORMATS, FORMATS_BY_SUFFIX
from radiance.weights.gguf import QUANTIZED_DTYPES, write_gguf
from radiance.weights.rounding import (
    MapChunks,
    WrittenTensor,
    choose_dtype,
    copy_tensor,
    export_scale_shape,
    find_copyable_format,
    round_tensor,
)
from radiance.weights.safetensors import write_safetensors_stream
from radiance.weights.tensors import DTYPES, TensorShapes

SAFETENSORS_DTYPES = {**DTYPES, "int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8)}
# ComfyUI's descriptions of int8 and fp8 matrices with scales. Without one it ignores the scales.
COMFY_FORMATS = {
    "int8": "int8_tensorwise",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
}


@dataclass(frozen=True)
class Export:
    """The plan of an export: shape and type of every tensor, and the tensors that are copied."""

    checkpoint: Checkpoint
    export_format: str
    shapes: TensorShapes
    dtypes: Mapping[str, str]
    copied_names: frozenset[str]  # quantized tensors that are written exactly as stored
    metadata: Mapping[str, str]

    def scale_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor's scales in the target; None without scales."""
        is_copy = name in self.copied_names
        has_scales = self.export_format == "native" and (
            self.dtypes[name] == "int8" or (is_copy and self.dtypes[name] in COMFY_FORMATS)
        )
        return export_scale_shape(self.checkpoint, name, is_copy) if has_scales else None

    def make_tensors(self) -> Iterator[WrittenTensor]:
        """Yield all tensors as they are written, in the order of `shapes`.

        While one is written, the next is rounded in threads, and the one after it is read.
        """
        with ThreadPoolExecutor(os.cpu_count()) as chunk_pool, ThreadPoolExecutor(2) as tensor_pool:
            make_tensor = partial(self._make_tensor, map_chunks=chunk_pool.map)
            yield from _map_ahead(make_tensor, self.shapes, tensor_pool, num_ahead=2)

    def _make_tensor(self, name: str, map_chunks: MapChunks) -> WrittenTensor:
        """Read a tensor and round it."""
        if name in MARKERS:
            return WrittenTensor(name, np.zeros(self.shapes[name], np.float32))
        if name in self.copied_names and self.checkpoint.file_tensors:
            return copy_tensor(
                self.checkpoint.file_tensors, name, self.export_format, self.scale_shape(name)
            )
        values = self.checkpoint.get_tensor(name)
        is_gguf = self.export_format == "gguf"
        return round_tensor(values, self.dtypes[name], name, is_gguf, map_chunks)


def _map_ahead(
    function: Callable[[str], WrittenTensor], names: Iterable[str], pool: Executor, num_ahead: int
) -> Iterator[WrittenTensor]:
    """Yield results in order, and compute a few of them before they are asked for."""
    pending: deque[Future[WrittenTensor]] = deque()
    try:
        for name in names:
            pending.append(pool.submit(function, name))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # after an error, or when the reader stops early
        for future in pending:
            future.cancel()


def convert_checkpoint(
    checkpoint: Checkpoint,
    path: str | Path,
    export_format: str | None = None,
    dtype: str | None = None,
    has_markers: bool = True,
    on_progress: Callable[[int], object] = lambda num_params: None,
    on_folder: Callable[[Path], object] = lambda folder: None,
) -> ConversionReport:
    """Write a checkpoint in another format and type, tensor by tensor.

    Args:
        checkpoint: The source.
        path: A file, or a new folder. It appears under its name only when it is complete.
        export_format: native or gguf (a file), diffusers or torch (a folder); by default inferred
            from the suffix of the path.
        dtype: float32, bfloat16, float16 or float8_e4m3fn; in native files also int8 with a scale
            for each row; in GGUF also q8_0 and q4_0. Only the matrices of the blocks are quantized.
            By default each tensor keeps its type if the format has it, and becomes bfloat16 if not,
            or if it was quantized and has been changed since.
        has_markers: Write the empty tensors by which readers recognize variants. Strict loaders
            reject them; without them only our own metadata describe the variant.
        on_progress: Called with the number of parameters of each tensor that is written.
        on_folder: Called with a new folder before it takes its name.

    Returns:
        The table of what was written.

    Raises:
        CheckpointError: If the format cannot hold the model, or values are not finite.
        OutputError: If the file or folder cannot be written.
    """
    path = Path(path)
    export_format = export_format or infer_format(path)
    check_export(checkpoint.model, path, export_format, dtype)
    if not has_markers and export_format == "torch":
        raise CheckpointError(
            "The PyTorch programs read the markers of a variant: leave them out of other formats "
            "only."
        )
    export = _plan_export(checkpoint, export_format, dtype, has_markers)
    report = ConversionReport(path, checkpoint.model)
    tensors = _count_tensors(export, report, on_progress)
    write = WRITERS[export_format]
    if export_format in FOLDER_FORMATS:
        with create_folder_atomically(path) as folder:
            write(folder, export, tensors)
            on_folder(folder)
    else:
        write(path, export, tensors)
    return report


def _plan_export(
    checkpoint: Checkpoint, export_format: str, dtype: str | None, has_markers: bool
) -> Export:
    """Choose the type of every tensor."""
    shapes = {
        name: shape
        for name, shape in checkpoint.shapes.items()
        if has_markers or name not in MARKERS
    }
    dtypes, copied_names = {}, set()
    for name, shape in shapes.items():
        copyable_format = find_copyable_format(checkpoint, name, export_format)
        stored_dtype = checkpoint.dtypes[name]
        is_gguf = export_format == "gguf"
        dtypes[name] = choose_dtype(name, shape, stored_dtype, dtype, is_gguf, copyable_format)
        if dtypes[name] == copyable_format:
            copied_names.add(name)
    return Export(
        checkpoint=checkpoint,
        export_format=export_format,
        shapes=shapes,
        dtypes=dtypes,
        copied_names=frozenset(copied_names),
        metadata={
            **{k: v for k, v in checkpoint.metadata.items() if k.startswith("radiance.")},
            MODEL_KEY: json.dumps(config.to_dict(checkpoint.model)),
            "radiance.origin": checkpoint.origin,
        },
    )


def _count_tensors(
    export: Export, report: ConversionReport, on_progress: Callable[[int], object]
) -> Iterator[WrittenTensor]:
    """Yield the tensors of an export and count them; markers are not counted."""
    for tensor in export.make_tensors():
        if tensor.name not in MARKERS:
            num_params = math.prod(export.shapes[tensor.name])
            source_dtype = export.checkpoint.dtypes[tensor.name]
            report.add(tensor, source_dtype, export.dtypes[tensor.name], num_params)
            on_progress(num_params)
        yield tensor


def check_export(model: config.Model, path: Path, export_format: str, dtype: str | None):
    """Check that `convert_checkpoint` can write a model.

    Args:
        model: The model.
        path: The file or folder to write.
        export_format: One of EXPORT_FORMATS.
        dtype: The requested type, or None.

    Raises:
        CheckpointError: If the format or the type cannot hold the model.
        OutputError: If the folder exists already.
    """
    if export_format not in EXPORT_FORMATS:
        raise CheckpointError(
            f"There is no format {export_format!r}: use one of {', '.join(EXPORT_FORMATS)}."
        )
    _check_dtype(export_format, dtype)
    if export_format == "diffusers":
        diffusers.check_diffusers_support(model)
    if export_format in FOLDER_FORMATS:
        require_new_folder(path)


def _check_dtype(export_format: str, dtype: str | None):
    """Raise CheckpointError if a format does not have a type."""
    if dtype is None:
        return
    dtypes = (*DTYPES, "int8", *QUANTIZED_DTYPES)
    if dtype not in dtypes:
        raise CheckpointError(f"There is no type {dtype!r}: use one of {', '.join(dtypes)}.")
    is_ggml_quantized = dtype in QUANTIZED_DTYPES
    is_one_byte = dtype == "int8" or (dtype in DTYPES and DTYPES[dtype].itemsize == 1)
    if is_ggml_quantized and export_format != "gguf":
        raise CheckpointError(
            f"{dtype} is a type of GGUF files: use --to gguf, or a name that ends in .gguf."
        )
    if is_one_byte and export_format == "gguf":
        raise CheckpointError(f"GGUF files cannot have the type {dtype}: use q8_0.")
    if dtype == "int8" and export_format != "native":
        raise CheckpointError(
            f"int8 needs scales, which {export_format} cannot store: use --to native, or another "
            f"type."
        )


def infer_format(path: Path) -> str:
    """Return the export format of a path by its suffix.

    Raises:
        CheckpointError: If no format has the suffix.
    """
    if path.suffix not in FORMATS_BY_SUFFIX:
        raise CheckpointError(
            f"The name {path} does not determine a format: let it end in "
            f"{' or '.join(FORMATS_BY_SUFFIX)}, or give --to."
        )
    return FORMATS_BY_SUFFIX[path.suffix]


# --- writers, one for each format -----------------------------------------------------------------

TensorStream = Iterator[tuple[str, np.ndarray]]


def _write_safetensors(
    path: Path,
    export: Export,
    shapes: TensorShapes,
    dtypes: Mapping[str, str],
    stream: TensorStream,
):
    """Write a safetensors file with the metadata of an export."""
    numpy_dtypes = {name: SAFETENSORS_DTYPES[dtype] for name, dtype in dtypes.items()}
    write_safetensors_stream(
        path, shapes, numpy_dtypes, stream, {"format": "pt", **export.metadata}
    )


def _write_native(path: Path, export: Export, tensors: Iterator[WrittenTensor]):
    """Write a file of native tensors; scales and ComfyUI's descriptions follow their matrices."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    descriptions: dict[str, np.ndarray] = {}
    for name, shape in export.shapes.items():
        shapes[name], dtypes[name] = shape, export.dtypes[name]
        scale_shape = export.scale_shape(name)
        if scale_shape is not None:
            scales_name, description_name = _extra_names(name)
            description = json.dumps({"format": COMFY_FORMATS[export.dtypes[name]]}).encode()
            descriptions[name] = np.frombuffer(description, np.uint8)
            shapes[scales_name], dtypes[scales_name] = scale_shape, "float32"
            shapes[description_name] = descriptions[name].shape
            dtypes[description_name] = "uint8"

    def stream() -> TensorStream:
        for tensor in tensors:
            yield tensor.name, tensor.values
            if tensor.scales is not None:
                scales_name, description_name = _extra_names(tensor.name)
                yield scales_name, tensor.scales
                yield description_name, descriptions[tensor.name]

    _write_safetensors(path, export, shapes, dtypes, stream())


def _extra_names(name: str) -> tuple[str, str]:
    """Return the names of the scales and of ComfyUI's description of a matrix."""
    layer = name.removesuffix(".weight")
    return f"{layer}.weight_scale", f"{layer}.comfy_quant"


def _write_gguf(path: Path, export: Export, tensors: Iterator[WrittenTensor]):
    """Write a GGUF file of native tensors."""
    stream = ((tensor.name, tensor.values) for tensor in tensors)
    write_gguf(path, export.shapes, export.dtypes, stream, export.metadata)


def _write_diffusers(folder: Path, export: Export, tensors: Iterator[WrittenTensor]):
    """Write the weights under diffusers' names, and config.json."""
    model = export.checkpoint.model
    slices = {
        name: diffusers.locate_diffusers_slices(name, shape, model)
        for name, shape in export.shapes.items()
    }
    shapes = {key: shape for parts in slices.values() for key, (_, shape) in parts.items()}
    dtypes = {key: export.dtypes[name] for name, parts in slices.items() for key in parts}
    stream = (
        (key, tensor.values[rows])
        for tensor in tensors
        for key, (rows, _) in slices[tensor.name].items()
    )
    path = folder / "diffusion_pytorch_model.safetensors"
    _write_safetensors(path, export, shapes, dtypes, stream)
    _write_json(folder / "config.json", diffusers.make_transformer_config(model))


def _write_torch(folder: Path, export: Export, tensors: Iterator[WrittenTensor]):
    """Write native weights, the model's settings, and PyTorch programs that need only these."""
    stream = ((tensor.name, tensor.values) for tensor in tensors)
    path = folder / "model.safetensors"
    _write_safetensors(path, export, export.shapes, export.dtypes, stream)
    _write_json(folder / "config.json", config.to_dict(export.checkpoint.model))
    for name in ("model.py", "sample.py"):
        shutil.copy(Path(__file__).parent / "torch_export" / name, folder / name)


def _write_json(path: Path, content: object):
    path.write_text(json.dumps(content, indent=2) + "\n")


# Each writes the tensors that an iterator yields, in the order of `Export.shapes`.
WRITERS: dict[str, Callable[[Path, Export, Iterator[WrittenTensor]], None]] = {
    "native": _write_native,
    "diffusers": _write_diffusers,
    "gguf": _write_gguf,
    "torch": _write_torch,
}
