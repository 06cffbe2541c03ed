"""Open files of named tensors in any supported format."""

import json
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from radiance.base.errors import CheckpointError
from radiance.weights.gguf import open_gguf
from radiance.weights.quantization import merge_metadata
from radiance.weights.tensors import TensorLocation, Tensors

FILE_PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.gguf")  # in order of preference
PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")


def open_tensors(path: str | Path) -> Tensors:
    """Open the tensors of a file or folder without reading their values.

    Args:
        path: A safetensors or GGUF file, an index of several safetensors files, or a folder that
            contains exactly one of these.

    Raises:
        CheckpointError: If there is no such file, if it is damaged, if its weights are quantized in
            an unsupported way, or if it is a pickle, which is never opened.
    """
    file = open_any_tensors(path)
    file.require_readable()
    return file


def open_any_tensors(path: str | Path) -> Tensors:
    """Open tensors for a description; `Tensors.problem` says if their values cannot be read.

    Args:
        path: As for `open_tensors`.

    Raises:
        CheckpointError: As for `open_tensors`, except that any quantization is accepted.
    """
    path = _find_file(Path(path).expanduser())
    if path.name.endswith(".index.json"):
        return _open_index(path)
    with path.open("rb") as file:
        magic = file.read(9)
    # A safetensors file starts with the length of its header, whose bytes may equal another
    # format's magic number. The header's "{" follows.
    if magic[8:] != b"{":
        if magic[:4] == b"GGUF":
            return open_gguf(path)
        if magic[:2] == b"PK" or magic[:1] == b"\x80":
            raise _pickle_error(path)
    locations, metadata = _read_safetensors_header(path)
    return Tensors(path, locations, metadata)


def _pickle_error(path: Path) -> CheckpointError:
    """Return an error with the command that converts a pickle."""
    safetensors_path = path.with_suffix(".safetensors")
    if safetensors_path.exists():
        safetensors_path = path.with_name(f"{path.stem}-converted.safetensors")
    return CheckpointError(
        f"{path} is a PyTorch pickle, which can run code when it is opened: convert it to "
        f"safetensors where PyTorch is installed, with "
        f'python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.contiguous().clone() for k, v in "
        f"torch.load('{path}', weights_only=True, map_location='cpu').items()}}, "
        f"'{safetensors_path}')\"."
    )


def _find_file(path: Path) -> Path:
    """Return the one file to open in a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"There is no file {path}.")
    for pattern in FILE_PATTERNS:
        matches = sorted(path.glob(pattern))
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(match.name for match in matches)
            raise CheckpointError(f"{path} contains {names}: name one of them.")
    if (path / "transformer").is_dir():  # the folder of a diffusers pipeline
        return _find_file(path / "transformer")
    if pickles := sorted(x for x in path.iterdir() if x.suffix in PICKLE_SUFFIXES and x.is_file()):
        raise _pickle_error(pickles[0])
    raise CheckpointError(f"{path} contains no safetensors or GGUF file.")


def _read_safetensors_header(path: Path) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """Return tensor locations and metadata; the safetensors library checks the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}): copy or download it again."
        ) from None
    with path.open("rb") as file:
        header_size = struct.unpack("<Q", file.read(8))[0]
        header = file.read(header_size)
    locations = {}
    try:
        for key, entry in json.loads(header).items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                locations[key] = TensorLocation(
                    file=path,
                    offset=8 + header_size + begin,
                    nbytes=end - begin,
                    shape=tuple(entry["shape"]),
                    dtype=entry["dtype"],
                )
    # The library accepts some JSON that Python reads differently; no tool writes it.
    except (ValueError, TypeError):
        raise CheckpointError(
            f"{path} is not a complete safetensors file (its header is unusual): "
            f"copy or download it again."
        ) from None
    return locations, metadata


def _open_index(path: Path) -> Tensors:
    """Open the files of an index as one."""
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        files_by_key = {str(key): path.parent / Path(name).name for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path} is not an index of safetensors files: it has no weight_map from tensors to "
            f"files."
        ) from None
    locations: dict[str, TensorLocation] = {}
    metadata: dict[str, str] = {}
    for file in sorted(set(files_by_key.values())):
        if file.suffix in PICKLE_SUFFIXES:
            raise _pickle_error(file)
        if not file.is_file():
            raise CheckpointError(
                f"{path} names {file.name}, which is not beside it: copy or download that file too."
            )
        file_locations, file_metadata = _read_safetensors_header(file)
        locations |= file_locations
        metadata |= merge_metadata(metadata, file_metadata)
    missing_keys = [
        key
        for key, file in files_by_key.items()
        if key not in locations or locations[key].file != file
    ]
    if missing_keys:
        raise CheckpointError(
            f"{path} lists {', '.join(missing_keys[:5])}, which its files do not contain: copy or "
            f"download them again."
        )
    return Tensors(path, {key: locations[key] for key in files_by_key}, metadata)
