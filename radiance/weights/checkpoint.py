"""A checkpoint of a model, whatever its format: native tensors that are read when they are asked for.

Formats, casts, LoRAs and surgery are functions between checkpoints, so that a 19 GB file passes through one tensor at a time.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from radiance import config
from radiance.model.stored import BLOCK, Quantised, quantise
from radiance.model.transformer import Params, abstract
from radiance.weights import diffusers, native
from radiance.weights.detect import MARKERS, METADATA_KEY, canonical_names, check_shapes, detect, markers, recognise
from radiance.weights.files import DTYPES, CheckpointError, Packed, Shapes, Tensors, open_tensors, write_safetensors
from radiance.weights.gguf import GgufTensors


@dataclass(frozen=True)
class FileTensors:
    """The native tensors of a file. What a changed checkpoint has in its place gives values alone: those are nowhere stored small."""

    file: Tensors
    keys: Mapping[str, tuple[str, ...]]  # native name → the file's: one, or parts that lie one below the other

    def __call__(self, name: str) -> np.ndarray:
        return diffusers.join([self.file[key] for key in self.keys[name]]) if name not in MARKERS else np.zeros(0, np.float32)

    def store(self, name: str) -> str | None:
        found = {self.file.store(key) for key in self.keys.get(name, ())}
        return found.pop() if len(found) == 1 else None

    def packed(self, name: str) -> Packed:
        return Packed(*(diffusers.join([*parts]) for parts in zip(*(self.file.packed(key) for key in self.keys[name]))))


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of `model` under their native names."""

    model: config.Model
    shapes: Shapes  # markers included
    tensor: Callable[[str], np.ndarray]
    dtypes: Mapping[str, str]  # as stored: F32, BF16, Q8_0, …
    origin: str
    format: str = "native"  # native, diffusers, GGUF, run
    metadata: Mapping[str, str] = field(default_factory=dict)

    def params(self, dtype: str = "float32", store: str | None = None, shardings: Params | None = None) -> Params:
        """The parameter tree, made leaf by leaf.

        dtype: of the leaves. store: q8_0, int8 or float8_e4m3fn keeps the blocks' matrices so, and they are expanded inside the
        loop over the blocks; "file" keeps those that the file has in such a type. What the file has in the type that is asked for is
        taken as it is. shardings: a tree like the parameters, to which they are placed; one device when None.
        """
        places = native.flatten(shardings) if shardings is not None else {}
        stores, sources = self._stores(store), native.layout(self.model)[1]

        def tensor(name: str) -> np.ndarray | Packed:
            small = self.store(name)
            if small and all(stores.get(part.path) == small for part in sources[name].row.parts):
                return self.tensor.packed(name)
            return self.tensor(name)

        def put(x: np.ndarray, place: jax.sharding.Sharding | None) -> jax.Array:
            """Each device gets its part alone, on whichever host."""
            return jnp.asarray(x) if place is None else jax.make_array_from_callback(x.shape, place, lambda part: x[part])

        def leaf(path: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray | Packed]) -> jax.Array | Quantised:
            if path in stores:
                small = _quantised(path, shape, blocks, stores[path])
                return jax.tree.map(lambda x: put(x, by_output(places[path], x) if path in places else None), small)
            return put(native.stacked(shape, blocks, DTYPES["float32" if path.startswith(PRECISE) else dtype]), places.get(path))

        return native.from_native(self.model, self.shapes, tensor, self.origin, leaf)

    def store(self, name: str) -> str | None:
        """As what a tensor stays in memory just as the file has it; None for other types, and when it was changed since."""
        return self.tensor.store(name) if isinstance(self.tensor, FileTensors) else None

    def _stores(self, store: str | None) -> dict[str, str]:
        """The leaves that are kept small, and as what. Raises CheckpointError when one was asked for that cannot be."""
        leaves = native.flatten(abstract(self.model))
        if store != "file":
            found = {path: store for path in leaves if store and is_block_matrix(path)}
        else:
            sources = native.layout(self.model)[1].items()
            parts = ((part.path, self.store(name)) for name, source in sources for part in source.row.parts)
            found = {path: small for path, small in parts if small and is_block_matrix(path)}
        odd = [path for path, small in found.items() if small == "q8_0" and inputs_of(path, leaves[path].shape) % BLOCK]
        if odd and store != "file":
            inputs = inputs_of(odd[0], leaves[odd[0]].shape)
            raise CheckpointError(f"{odd[0]} has {inputs} inputs, which do not divide into the blocks of {BLOCK} of q8_0: use int8.")
        return {path: small for path, small in found.items() if path not in odd}


def by_output(place: NamedSharding, x: np.ndarray) -> NamedSharding:
    """Quantised matrices are flat: their outputs are spread over the devices that hold parts of the whole one, if they divide."""
    axes = [axis for axis in place.spec if axis]
    parts = math.prod(place.mesh.shape[axis] for axis in axes)
    return NamedSharding(place.mesh, PartitionSpec(*[None] * (x.ndim - 1), tuple(axes) if axes and x.shape[-1] % parts == 0 else None))


PRECISE = "head/embedder"  # float32 in the published files too
LOSS_KEY = "radiance.validation_loss"  # in the metadata of our exports


def is_block_matrix(path: str) -> bool:
    """Whether a leaf is one of the matrices of the blocks: nine tenths of the weights, and what may be quantised."""
    return path.startswith(("preamble/", "double/", "single/")) and path.endswith("/kernel")


def noted_loss(file: Tensors) -> float | None:
    """The validation loss that one of our exports carries. Raises CheckpointError when that is no such number."""
    told = file.metadata.get(LOSS_KEY)
    if told is None:
        return None
    try:
        loss = float(told)
    except ValueError:
        loss = math.nan
    if not 0 < loss < math.inf:
        raise CheckpointError(f"{file.path} says {LOSS_KEY}={told!r} in its metadata, which is no loss: export it again.")
    return loss


def without_loss(metadata: Mapping[str, str]) -> dict[str, str]:
    """What still holds of metadata when the weights are no longer those that were validated."""
    return {key: value for key, value in metadata.items() if key != LOSS_KEY}


def inputs_of(path: str, shape: tuple[int, ...]) -> int:
    """Inputs of one block's kernel of a stacked leaf: an attention's way back reads heads × channels."""
    return int(np.prod(shape[1:3])) if path.endswith("attention/proj/kernel") else shape[1]


def _quantised(path: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray | Packed], store: str) -> Quantised:
    inputs = inputs_of(path, shape)
    outputs = int(np.prod(shape[1:])) // inputs
    groups = inputs // BLOCK if store == "q8_0" else 1
    values = np.empty((shape[0], inputs, outputs), np.int8 if store in ("q8_0", "int8") else DTYPES[store])
    scales = np.empty((shape[0], groups, outputs), np.float16 if store == "q8_0" else np.float32)
    for i, block in enumerate(blocks):
        if isinstance(block, Packed):
            values[i], scales[i] = block.values.T, block.scales.T
        else:
            values[i], scales[i] = quantise(block.reshape(inputs, outputs), store)
    return Quantised(values, scales, shape[1:])


# --- opening ----------------------------------------------------------------------------------------------------------


def open_checkpoint(path: str | Path, model: config.Model | None = None, **known) -> Checkpoint:
    """A checkpoint file (or folder) of any format: native safetensors, diffusers, GGUF; one file or several with an index.

    model: what it must hold; found from metadata, names and shapes when None. known: fields of the model that the file does not
    tell, such as text_ids="sequential". Raises CheckpointError, in which every tensor is named that is missing, not expected or
    of another shape.
    """
    file = open_tensors(path)
    if any(name.endswith(diffusers.SIGN) for name in file.shapes):
        form, keys = "diffusers", diffusers.to_native(file.shapes)
        known = _beside(file.path) | known
    else:
        form = "GGUF" if isinstance(file, GgufTensors) else "native"
        keys = {name: (key,) for name, key in canonical_names(file.shapes).items()}
    shapes = {name: diffusers.joined([file.shapes[key] for key in theirs]) for name, theirs in keys.items()}
    if model is None:
        model = detect(shapes, file.metadata, file.path, **known)
    else:
        recognise(shapes, file.path)
        _check_model(model, shapes, file)
    expected = native.layout(model)[0]
    check_shapes(expected, shapes, file.path)
    return Checkpoint(
        model,
        expected,  # with the markers that the model asks for
        FileTensors(file, keys),
        {name: file.dtypes[keys[name][0]] if name in keys else "F32" for name in expected},
        str(file.path),
        form,
        file.metadata,
    )


def _beside(path: Path) -> dict[str, Any]:
    """What diffusers' config.json beside the weights tells."""
    file = path.parent / "config.json"
    try:
        return diffusers.known(json.loads(file.read_text())) if file.is_file() else {}
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not JSON: copy or download it again.") from None


def _check_model(model: config.Model, shapes: Shapes, file: Tensors):
    """Raises CheckpointError when metadata or markers say that the file holds another model."""
    if METADATA_KEY in file.metadata:
        theirs = detect(shapes, file.metadata, file.path)
        if changed := config.differences(theirs, model, "model."):
            told = ", ".join(f"{key} is {old!r} there, {new!r} here" for key, (old, new) in changed.items())
            raise CheckpointError(f"{file.path} holds another model ({told}): make the models equal.")
    for marker, setting in MARKERS.items():
        if marker in shapes and marker not in markers(model):
            raise CheckpointError(f"{file.path} is marked {marker}, but a model without that was asked for: set model.{setting}.")


def of_params(model: config.Model, params: Params, origin: str, metadata: Mapping[str, str] | None = None) -> Checkpoint:
    """A checkpoint of parameters that are in memory."""
    shapes, tensor = native.to_native(model, params)
    return Checkpoint(model, shapes, tensor, dict.fromkeys(shapes, "F32"), origin, "run", metadata or {})


def read(path: str | Path, model: config.Model | None = None, shardings: Params | None = None) -> tuple[config.Model, Params]:
    """Model and float32 parameters of a checkpoint, which must hold `model` when one is given. Raises CheckpointError."""
    found = open_checkpoint(path, model)
    return found.model, found.params(shardings=shardings)


# --- writing ----------------------------------------------------------------------------------------------------------


def write(path: str | Path, model: config.Model, params: Params, dtype: str = "float32", metadata: Mapping[str, str] | None = None):
    """Writes `params` under native names, markers first, tensor by tensor.

    dtype: float32, bfloat16 or float16. As in the published files, the pixel embedder and the markers stay float32.
    """
    shapes, tensor = native.to_native(model, params)
    dtypes = {n: DTYPES["float32" if n in MARKERS or n.startswith("nerf_image_embedder.") else dtype] for n in shapes}
    write_safetensors(path, shapes, dtypes, tensor, {METADATA_KEY: json.dumps(config.to_dict(model)), **(metadata or {})})
