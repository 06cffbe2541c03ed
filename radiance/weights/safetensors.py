"""Write safetensors files tensor by tensor."""

import json
import math
import struct
from collections.abc import Callable, Mapping
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
    """Writes `tensor(key)` for every key of `shapes`, in order, holding one at a time.

    The file appears under its name only when it is whole. Raises OutputError when the disk has no room for it, and CheckpointError for
    values that are not finite or that the type cannot hold.
    """
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, shape in shapes.items():
        size = math.prod(shape) * dtypes[key].itemsize
        header[key] = {
            "dtype": DTYPE_CODES[dtypes[key]],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    path = Path(path)
    require_space(path.parent, offset + len(header_bytes) + 8)
    with replace_atomically(path) as temp_path, temp_path.open("wb") as file:
        file.write(struct.pack("<Q", len(header_bytes)) + header_bytes)
        for key, shape in shapes.items():
            values = np.ascontiguousarray(cast_array(get_tensor(key), dtypes[key], key)).reshape(
                shape
            )
            file.write(
                values.reshape(-1).view(np.uint8).data
            )  # tofile says nothing of what a full disk loses at its end
