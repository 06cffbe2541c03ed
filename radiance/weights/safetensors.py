"""Write safetensors files tensor by tensor."""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from radiance.base.files import replace_atomically, require_space
from radiance.weights.tensors import DTYPE_CODES, TensorShapes, cast_array


def write_safetensors(
    path: str | Path,
    shapes: TensorShapes,
    dtypes: Mapping[str, np.dtype],
    get_tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
):
    """Write the tensors that a function returns, holding one at a time.

    Args:
        path: The file. It appears under its name only when it is complete.
        shapes: Shape of every tensor, in the order of the file.
        dtypes: Type of every tensor.
        get_tensor: Returns the values of a tensor; it is called in the order of the file.
        metadata: Text metadata.

    Raises:
        CheckpointError: If values are not finite, or too large for their type.
        OutputError: If the file cannot be written, for instance because the disk is full.
    """
    write_safetensors_stream(
        path, shapes, dtypes, ((key, get_tensor(key)) for key in shapes), metadata
    )


def write_safetensors_stream(
    path: str | Path,
    shapes: TensorShapes,
    dtypes: Mapping[str, np.dtype],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
):
    """Write tensors as an iterator yields them; see `write_safetensors`.

    Args:
        path: The file. It appears under its name only when it is complete.
        shapes: Shape of every tensor, in the order of the file.
        dtypes: Type of every tensor.
        tensors: Names and values of all tensors, in the order of `shapes`.
        metadata: Text metadata.
    """
    header, data_size = _make_header(shapes, dtypes, metadata)
    path = Path(path)
    require_space(path.parent, len(header) + data_size)
    with replace_atomically(path) as temp_path, temp_path.open("wb") as file:
        file.write(header)
        stream = iter(tensors)
        for key, shape in shapes.items():
            name, values = next(stream)
            if name != key:
                raise AssertionError(f"Expected the tensor {key}, not {name}.")
            values = np.ascontiguousarray(cast_array(values, dtypes[key], key)).reshape(shape)
            # tofile() would not report a disk that becomes full with its last bytes.
            file.write(values.reshape(-1).view(np.uint8).data)


def _make_header(
    shapes: TensorShapes, dtypes: Mapping[str, np.dtype], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """Return the header with its length before it, and the number of bytes that follow it."""
    entries: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, shape in shapes.items():
        size = math.prod(shape) * dtypes[key].itemsize
        entries[key] = {
            "dtype": DTYPE_CODES[dtypes[key]],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header, offset
