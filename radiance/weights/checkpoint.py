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
from radiance.base.errors import CheckpointError
from radiance.base.trees import flatten_tree
from radiance.model.paths import count_inputs, is_always_float32, is_block_matrix
from radiance.model.quantized import Q8_0_BLOCK, QuantizedKernel, quantize
from radiance.model.transformer import Params, make_abstract_params
from radiance.weights import diffusers, native
from radiance.weights.detect import (
    MARKERS,
    MODEL_KEY,
    canonical_names,
    check_architecture,
    check_shapes,
    detect_model,
    model_markers,
)
from radiance.weights.gguf import GgufTensors
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors
from radiance.weights.tensors import (
    DTYPES,
    QuantizedTensor,
    Tensors,
    TensorShapes,
    concatenate_arrays,
    concatenated_shape,
)


@dataclass(frozen=True)
class FileTensors:
    """The native tensors of a file. What a changed checkpoint has in its place gives values alone: those are nowhere stored small."""

    file: Tensors
    keys: Mapping[
        str, tuple[str, ...]
    ]  # native name → the file's: one, or parts that lie one below the other

    def __call__(self, name: str) -> np.ndarray:
        return (
            concatenate_arrays([self.file[key] for key in self.keys[name]])
            if name not in MARKERS
            else np.zeros(0, np.float32)
        )

    def weight_format(self, name: str) -> str | None:
        formats = {self.file.weight_format(key) for key in self.keys.get(name, ())}
        return formats.pop() if len(formats) == 1 else None

    def read_quantized(self, name: str) -> QuantizedTensor:
        return QuantizedTensor(
            *(
                concatenate_arrays([*arrays])
                for arrays in zip(*(self.file.read_quantized(key) for key in self.keys[name]))
            )
        )


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of `model` under their native names."""

    model: config.Model
    shapes: TensorShapes  # markers included
    get_tensor: Callable[[str], np.ndarray]
    dtypes: Mapping[str, str]  # as stored: F32, BF16, Q8_0, …
    origin: str
    format: str = "native"  # native, diffusers, GGUF, run
    metadata: Mapping[str, str] = field(default_factory=dict)

    def load_params(
        self,
        dtype: str = "float32",
        weight_format: str | None = None,
        shardings: Params | None = None,
    ) -> Params:
        """The parameter tree, made leaf by leaf.

        dtype: of the leaves. store: q8_0, int8 or float8_e4m3fn keeps the blocks' matrices so, and they are expanded inside the
        loop over the blocks; "file" keeps those that the file has in such a type. What the file has in the type that is asked for is
        taken as it is. shardings: a tree like the parameters, to which they are placed; one device when None.
        """
        shardings_by_path = flatten_tree(shardings) if shardings is not None else {}
        formats, sources = self._leaf_formats(weight_format), native.native_layout(self.model)[1]

        def get_tensor(name: str) -> np.ndarray | QuantizedTensor:
            quantized = self.weight_format(name)
            if quantized and all(
                formats.get(tensor_slice.path) == quantized
                for tensor_slice in sources[name].rule.slices
            ):
                return self.get_tensor.read_quantized(name)
            return self.get_tensor(name)

        def put_array(x: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
            """Each device gets its part alone, on whichever host."""
            return (
                jnp.asarray(x)
                if sharding is None
                else jax.make_array_from_callback(
                    x.shape, sharding, lambda tensor_slice: x[tensor_slice]
                )
            )

        def make_leaf(
            path: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray | QuantizedTensor]
        ) -> jax.Array | QuantizedKernel:
            if path in formats:
                quantized = _quantize_blocks(path, shape, blocks, formats[path])
                return jax.tree.map(
                    lambda x: put_array(
                        x,
                        output_sharding(shardings_by_path[path], x)
                        if path in shardings_by_path
                        else None,
                    ),
                    quantized,
                )
            return put_array(
                native.stack_blocks(
                    shape, blocks, DTYPES["float32" if is_always_float32(path) else dtype]
                ),
                shardings_by_path.get(path),
            )

        return native.params_from_native(
            self.model, self.shapes, get_tensor, self.origin, make_leaf
        )

    def weight_format(self, name: str) -> str | None:
        """As what a tensor stays in memory just as the file has it; None for other types, and when it was changed since."""
        return (
            self.get_tensor.weight_format(name)
            if isinstance(self.get_tensor, FileTensors)
            else None
        )

    def _leaf_formats(self, weight_format: str | None) -> dict[str, str]:
        """The leaves that are kept small, and as what. Raises CheckpointError when one was asked for that cannot be."""
        leaves = flatten_tree(make_abstract_params(self.model))
        if weight_format != "file":
            formats = {
                path: weight_format for path in leaves if weight_format and is_block_matrix(path)
            }
        else:
            sources = native.native_layout(self.model)[1].items()
            path_formats = (
                (tensor_slice.path, self.weight_format(name))
                for name, source in sources
                for tensor_slice in source.rule.slices
            )
            formats = {
                path: leaf_format
                for path, leaf_format in path_formats
                if leaf_format and is_block_matrix(path)
            }
        indivisible_paths = [
            path
            for path, leaf_format in formats.items()
            if leaf_format == "q8_0" and count_inputs(path, leaves[path].shape) % Q8_0_BLOCK
        ]
        if indivisible_paths and weight_format != "file":
            num_inputs = count_inputs(indivisible_paths[0], leaves[indivisible_paths[0]].shape)
            raise CheckpointError(
                f"{indivisible_paths[0]} has {num_inputs} inputs, which do not divide into the blocks of {Q8_0_BLOCK} of q8_0: use int8."
            )
        return {
            path: leaf_format
            for path, leaf_format in formats.items()
            if path not in indivisible_paths
        }


def output_sharding(sharding: NamedSharding, x: np.ndarray) -> NamedSharding:
    """Quantized matrices are flat: their outputs are spread over the devices that hold parts of the whole one, if they divide."""
    axes = [axis for axis in sharding.spec if axis]
    num_shards = math.prod(sharding.mesh.shape[axis] for axis in axes)
    return NamedSharding(
        sharding.mesh,
        PartitionSpec(
            *[None] * (x.ndim - 1), tuple(axes) if axes and x.shape[-1] % num_shards == 0 else None
        ),
    )


LOSS_KEY = "radiance.validation_loss"  # in the metadata of our exports


def read_validation_loss(file: Tensors) -> float | None:
    """The validation loss that one of our exports carries. Raises CheckpointError when that is no such number."""
    value = file.metadata.get(LOSS_KEY)
    if value is None:
        return None
    try:
        loss = float(value)
    except ValueError:
        loss = math.nan
    if not 0 < loss < math.inf:
        raise CheckpointError(
            f"{file.path} says {LOSS_KEY}={value!r} in its metadata, which is no loss: export it again."
        )
    return loss


def drop_validation_loss(metadata: Mapping[str, str]) -> dict[str, str]:
    """What still holds of metadata when the weights are no longer those that were validated."""
    return {key: value for key, value in metadata.items() if key != LOSS_KEY}


def _quantize_blocks(
    path: str,
    shape: tuple[int, ...],
    blocks: Iterator[np.ndarray | QuantizedTensor],
    weight_format: str,
) -> QuantizedKernel:
    num_inputs = count_inputs(path, shape)
    num_outputs = int(np.prod(shape[1:])) // num_inputs
    num_groups = num_inputs // Q8_0_BLOCK if weight_format == "q8_0" else 1
    values = np.empty(
        (shape[0], num_inputs, num_outputs),
        np.int8 if weight_format in ("q8_0", "int8") else DTYPES[weight_format],
    )
    scales = np.empty(
        (shape[0], num_groups, num_outputs), np.float16 if weight_format == "q8_0" else np.float32
    )
    for i, block in enumerate(blocks):
        if isinstance(block, QuantizedTensor):
            values[i], scales[i] = block.values.T, block.scales.T
        else:
            values[i], scales[i] = quantize(block.reshape(num_inputs, num_outputs), weight_format)
    return QuantizedKernel(values, scales, shape[1:])


# --- opening ----------------------------------------------------------------------------------------------------------


def open_checkpoint(
    path: str | Path, model: config.Model | None = None, **known_fields
) -> Checkpoint:
    """A checkpoint file (or folder) of any format: native safetensors, diffusers, GGUF; one file or several with an index.

    model: what it must hold; found from metadata, names and shapes when None. known: fields of the model that the file does not
    tell, such as text_ids="sequential". Raises CheckpointError, in which every tensor is named that is missing, not expected or
    of another shape.
    """
    file = open_tensors(path)
    if any(name.endswith(diffusers.SIGNATURE_TENSOR) for name in file.shapes):
        file_format, keys = "diffusers", diffusers.map_to_native(file.shapes)
        known_fields = _read_diffusers_config(file.path) | known_fields
    else:
        file_format = "GGUF" if isinstance(file, GgufTensors) else "native"
        keys = {name: (key,) for name, key in canonical_names(file.shapes).items()}
    shapes = {
        name: concatenated_shape([file.shapes[key] for key in file_keys])
        for name, file_keys in keys.items()
    }
    if model is None:
        model = detect_model(shapes, file.metadata, file.path, **known_fields)
    else:
        check_architecture(shapes, file.path)
        _check_model(model, shapes, file)
    expected_shapes = native.native_layout(model)[0]
    check_shapes(expected_shapes, shapes, file.path)
    return Checkpoint(
        model,
        expected_shapes,  # with the markers that the model asks for
        FileTensors(file, keys),
        {name: file.dtypes[keys[name][0]] if name in keys else "F32" for name in expected_shapes},
        str(file.path),
        file_format,
        file.metadata,
    )


def _read_diffusers_config(path: Path) -> dict[str, Any]:
    """What diffusers' config.json beside the weights tells."""
    config_path = path.parent / "config.json"
    try:
        return (
            diffusers.parse_transformer_config(json.loads(config_path.read_text()))
            if config_path.is_file()
            else {}
        )
    except (ValueError, RecursionError):
        raise CheckpointError(f"{config_path} is not JSON: copy or download it again.") from None


def _check_model(model: config.Model, shapes: TensorShapes, file: Tensors):
    """Raises CheckpointError when metadata or markers say that the file holds another model."""
    if MODEL_KEY in file.metadata:
        file_model = detect_model(shapes, file.metadata, file.path)
        if changes := config.differences(file_model, model, "model."):
            description = ", ".join(
                f"{key} is {old!r} there, {new!r} here" for key, (old, new) in changes.items()
            )
            raise CheckpointError(
                f"{file.path} holds another model ({description}): make the models equal."
            )
    for marker, setting in MARKERS.items():
        if marker in shapes and marker not in model_markers(model):
            raise CheckpointError(
                f"{file.path} is marked {marker}, but a model without that was asked for: set model.{setting}."
            )


def checkpoint_from_params(
    model: config.Model, params: Params, origin: str, metadata: Mapping[str, str] | None = None
) -> Checkpoint:
    """A checkpoint of parameters that are in memory."""
    shapes, get_tensor = native.params_to_native(model, params)
    return Checkpoint(
        model, shapes, get_tensor, dict.fromkeys(shapes, "F32"), origin, "run", metadata or {}
    )


def read_checkpoint(
    path: str | Path, model: config.Model | None = None, shardings: Params | None = None
) -> tuple[config.Model, Params]:
    """Model and float32 parameters of a checkpoint, which must hold `model` when one is given. Raises CheckpointError."""
    checkpoint = open_checkpoint(path, model)
    return checkpoint.model, checkpoint.load_params(shardings=shardings)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_checkpoint(
    path: str | Path,
    model: config.Model,
    params: Params,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
):
    """Writes `params` under native names, markers first, tensor by tensor.

    dtype: float32, bfloat16 or float16. As in the published files, the pixel embedder and the markers stay float32.
    """
    shapes, get_tensor = native.params_to_native(model, params)
    dtypes = {
        n: DTYPES["float32" if n in MARKERS or n.startswith("nerf_image_embedder.") else dtype]
        for n in shapes
    }
    write_safetensors(
        path,
        shapes,
        dtypes,
        get_tensor,
        {MODEL_KEY: json.dumps(config.to_dict(model)), **(metadata or {})},
    )
