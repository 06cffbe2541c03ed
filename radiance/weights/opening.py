"""Open files of named tensors, whatever their format."""

import json
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from radiance.base.errors import CheckpointError
from radiance.weights.tensors import TensorLocation, Tensors

PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")


def open_tensors(path: str | Path) -> Tensors:
    """The tensors of a safetensors or GGUF file, of an index over several safetensors files, or of the folder that holds one of them.

    Raises CheckpointError when there is none, when it is damaged, and for pickles, which are never opened.
    """
    path = _find_file(Path(path).expanduser())
    if path.name.endswith(".index.json"):
        return _open_index(path)
    with path.open("rb") as file:
        magic = file.read(9)
    # A safetensors file starts with the length of its header, which may look like anything, and then the header's "{".
    if magic[8:] != b"{" and magic[:4] == b"GGUF":
        from radiance.weights.gguf import open_gguf

        return open_gguf(path)
    if magic[8:] != b"{" and (magic[:2] == b"PK" or magic[:1] == b"\x80"):
        raise _pickle_error(path)
    locations, metadata = _read_header(path)
    return Tensors(path, locations, metadata)


def _pickle_error(path: Path) -> CheckpointError:
    safetensors_path = path.with_suffix(".safetensors")
    if safetensors_path.exists():
        safetensors_path = path.with_name(f"{path.stem}-converted.safetensors")
    return CheckpointError(
        f"{path} is a PyTorch pickle, which can run code when it is opened: turn it into safetensors where PyTorch is installed, with "
        f'python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.contiguous().clone() for k, v in torch.load('{path}', weights_only=True, map_location='cpu').items()}}, "
        f"'{safetensors_path}')\"."
    )


def _find_file(path: Path) -> Path:
    """The one file that a folder is about."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"There is no file {path}.")
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.gguf"):
        matches = sorted(path.glob(pattern))
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise CheckpointError(
                f"{path} holds {', '.join(p.name for p in matches)}: name one of them."
            )
    if (path / "transformer").is_dir():  # a pipeline's folder of diffusers
        return _find_file(path / "transformer")
    if pickles := sorted(x for x in path.iterdir() if x.suffix in PICKLE_SUFFIXES and x.is_file()):
        raise _pickle_error(pickles[0])
    raise CheckpointError(f"{path} holds no safetensors or GGUF file.")


def _read_header(path: Path) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """Places and metadata of a safetensors file, checked by the safetensors library."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again."
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
                    path,
                    8 + header_size + begin,
                    end - begin,
                    tuple(entry["shape"]),
                    entry["dtype"],
                )
    except (
        ValueError,
        TypeError,
    ):  # JSON that the library reads in ways of its own, which no tool writes
        raise CheckpointError(
            f"{path} is not a whole safetensors file (its header is unusual): copy or download it again."
        ) from None
    return locations, metadata


def _open_index(path: Path) -> Tensors:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files_by_key = {str(key): path.parent / Path(name).name for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path} is not an index of safetensors files: it has no weight_map from tensors to files."
        ) from None
    locations, metadata = {}, {}
    for file in sorted(set(files_by_key.values())):
        if file.suffix in PICKLE_SUFFIXES:
            raise _pickle_error(file)
        if not file.is_file():
            raise CheckpointError(
                f"{path} names {file.name}, which is not beside it: copy or download that too."
            )
        file_locations, file_metadata = _read_header(file)
        locations |= file_locations
        metadata |= file_metadata
    if missing_keys := [
        key
        for key in files_by_key
        if key not in locations or locations[key].file != files_by_key[key]
    ]:
        raise CheckpointError(
            f"{path} promises {', '.join(missing_keys[:5])}, which the files do not hold: copy or download them again."
        )
    return Tensors(path, {key: locations[key] for key in files_by_key}, metadata)
