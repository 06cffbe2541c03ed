"""Checkpoints of any format as native tensors that are read on demand.

Formats, casts, LoRAs and surgery are functions between checkpoints. A file of 19 GB passes through
them one tensor at a time.
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
from radiance.model.quantized import Q8_0_BLOCK, QuantizedKernel, quantize_matrix
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

LOSS_KEY = "radiance.validation_loss"  # of the metadata of our exports


@dataclass(frozen=True)
class FileTensors:
    """The native tensors of a file.

    Only these can be quantized: a checkpoint that was changed since has a plain function of values
    instead.
    """

    file: Tensors
    keys: Mapping[str, tuple[str, ...]]  # native name → keys of the file, concatenated as rows

    def __call__(self, name: str) -> np.ndarray:
        """Return the values of a native tensor."""
        if name in MARKERS:
            return np.zeros(0, np.float32)
        return concatenate_arrays([self.file[key] for key in self.keys[name]])

    def weight_format(self, name: str) -> str | None:
        """Return the format in which a tensor can stay in memory exactly as stored, if any."""
        formats = {self.file.weight_format(key) for key in self.keys.get(name, ())}
        return formats.pop() if len(formats) == 1 else None

    def read_quantized(self, name: str) -> QuantizedTensor:
        """Return a tensor that has a weight format, as stored."""
        tensors = [self.file.read_quantized(key) for key in self.keys[name]]
        return QuantizedTensor(
            values=concatenate_arrays([tensor.values for tensor in tensors]),
            scales=concatenate_arrays([tensor.scales for tensor in tensors]),
        )


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model under their native names."""

    model: config.Model
    shapes: TensorShapes  # with markers
    get_tensor: Callable[[str], np.ndarray]  # FileTensors as long as the values are a file's own
    dtypes: Mapping[str, str]  # as stored: F32, BF16, Q8_0, …
    origin: str  # the file or run that errors name
    format: str = "native"  # native, diffusers, GGUF, run
    metadata: Mapping[str, str] = field(default_factory=dict)

    def load_params(
        self,
        dtype: str = "float32",
        weight_format: str | None = None,
        shardings: Params | None = None,
    ) -> Params:
        """Return the parameter tree, made leaf by leaf.

        Tensors that the file already has in the wanted weight format are not rounded again.

        Args:
            dtype: Type of the leaves that are not quantized.
            weight_format: One of config.WEIGHT_FORMATS quantizes the matrices of the blocks, which
                are dequantized inside the loop over the blocks. "file" keeps those that are
                quantized in the file as they are.
            shardings: A tree of shardings like the parameters; by default one device.

        Raises:
            CheckpointError: If a matrix cannot have the weight format, or values are not finite.
        """
        formats = self._leaf_formats(weight_format)
        shardings_by_path = {} if shardings is None else flatten_tree(shardings)

        def make_leaf(
            path: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray | QuantizedTensor]
        ) -> jax.Array | QuantizedKernel:
            sharding = shardings_by_path.get(path)
            if path in formats:
                return _put_kernel(_quantize_blocks(path, shape, blocks, formats[path]), sharding)
            leaf_dtype = DTYPES["float32" if is_always_float32(path) else dtype]
            return _put_array(native.stack_blocks(shape, blocks, leaf_dtype), sharding)

        return native.params_from_native(
            self.model, self.shapes, self._tensor_reader(formats), self.origin, make_leaf
        )

    def weight_format(self, name: str) -> str | None:
        """Return the format in which a tensor can stay in memory exactly as stored, if any."""
        tensors = self.file_tensors
        return None if tensors is None else tensors.weight_format(name)

    @property
    def file_tensors(self) -> FileTensors | None:
        """The tensors of the file, or None if they were changed since or come from no file."""
        return self.get_tensor if isinstance(self.get_tensor, FileTensors) else None

    def _tensor_reader(self, formats: Mapping[str, str]) -> native.TensorGetter:
        """Return a reader that leaves a tensor quantized if all its leaves keep its format."""
        sources = native.native_layout(self.model)[1]

        def read_tensor(name: str) -> np.ndarray | QuantizedTensor:
            stored_format = self.weight_format(name)
            if self.file_tensors and stored_format:
                leaf_formats = {formats.get(path) for path, _ in sources[name].rule.slices}
                if leaf_formats == {stored_format}:
                    return self.file_tensors.read_quantized(name)
            return self.get_tensor(name)

        return read_tensor

    def _leaf_formats(self, weight_format: str | None) -> dict[str, str]:
        """Return the weight formats of the leaves that are quantized."""
        leaves = flatten_tree(make_abstract_params(self.model))
        if weight_format == "file":
            formats = self._stored_leaf_formats()
        elif weight_format is None:
            formats = {}
        else:
            formats = {path: weight_format for path in leaves if is_block_matrix(path)}
        # A matrix that is fused in the file may divide into blocks of Q8_0 when its parts do not.
        indivisible_paths = [
            path
            for path, leaf_format in formats.items()
            if leaf_format == "q8_0" and count_inputs(path, leaves[path].shape) % Q8_0_BLOCK
        ]
        if indivisible_paths and weight_format != "file":
            path = indivisible_paths[0]
            raise CheckpointError(
                f"{path} has {count_inputs(path, leaves[path].shape)} inputs, which the blocks of "
                f"q8_0 ({Q8_0_BLOCK} inputs) do not divide: use int8."
            )
        return {path: x for path, x in formats.items() if path not in indivisible_paths}

    def _stored_leaf_formats(self) -> dict[str, str]:
        """Return the weight formats of the matrices that are quantized in the file."""
        return {
            tensor_slice.path: stored_format
            for name, source in native.native_layout(self.model)[1].items()
            if (stored_format := self.weight_format(name))
            for tensor_slice in source.rule.slices
            if is_block_matrix(tensor_slice.path)
        }


def _quantize_blocks(
    path: str,
    shape: tuple[int, ...],
    blocks: Iterator[np.ndarray | QuantizedTensor],
    weight_format: str,
) -> QuantizedKernel:
    """Return a stacked kernel on the host; blocks that are quantized already are copied."""
    num_inputs = count_inputs(path, shape)
    num_outputs = math.prod(shape[1:]) // num_inputs
    is_q8_0 = weight_format == "q8_0"
    num_groups = num_inputs // Q8_0_BLOCK if is_q8_0 else 1
    value_dtype = np.int8 if weight_format in ("q8_0", "int8") else DTYPES[weight_format]
    scale_dtype = np.float16 if is_q8_0 else np.float32
    values = np.empty((shape[0], num_inputs, num_outputs), value_dtype)
    scales = np.empty((shape[0], num_groups, num_outputs), scale_dtype)
    for i, block in enumerate(blocks):
        if isinstance(block, QuantizedTensor):
            values[i], scales[i] = block.values.T, block.scales.T
        else:
            values[i], scales[i] = quantize_matrix(
                block.reshape(num_inputs, num_outputs), weight_format
            )
    return QuantizedKernel(values, scales, shape[1:])


def _put_array(x: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Move an array to devices; each gets only its own part, on every host."""
    if sharding is None:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _put_kernel(kernel: QuantizedKernel, sharding: NamedSharding | None) -> QuantizedKernel:
    """Move values and scales of a quantized kernel to devices."""
    return jax.tree.map(
        lambda x: _put_array(x, None if sharding is None else output_sharding(sharding, x)), kernel
    )


def output_sharding(sharding: NamedSharding, x: np.ndarray) -> NamedSharding:
    """Return the sharding of the values or scales of a quantized kernel.

    They have no axes of heads and channels; their outputs are sharded over all devices that share
    the kernel, if the number of devices divides them.

    Args:
        sharding: Sharding of the kernel.
        x: Values or scales, with outputs as the last axis.
    """
    axes = tuple(axis for axis in sharding.spec if axis)
    num_shards = math.prod(sharding.mesh.shape[axis] for axis in axes)
    is_divisible = axes and x.shape[-1] % num_shards == 0
    leading_axes = [None] * (x.ndim - 1)
    return NamedSharding(
        sharding.mesh, PartitionSpec(*leading_axes, axes if is_divisible else None)
    )


# --- the validation loss in the metadata ----------------------------------------------------------


def read_validation_loss(file: Tensors) -> float | None:
    """Return the validation loss that one of our exports carries, or None without one.

    Raises:
        CheckpointError: If it is not a positive, finite number.
    """
    value = file.metadata.get(LOSS_KEY)
    if value is None:
        return None
    try:
        loss = float(value)
    except ValueError:
        loss = math.nan
    if not 0 < loss < math.inf:
        raise CheckpointError(
            f"{file.path} has {LOSS_KEY}={value!r} in its metadata, which is not a loss: export it "
            f"again."
        )
    return loss


def drop_validation_loss(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without the validation loss, which is not that of changed weights."""
    return {key: value for key, value in metadata.items() if key != LOSS_KEY}


# --- opening --------------------------------------------------------------------------------------


def open_checkpoint(
    path: str | Path, model: config.Model | None = None, **known_fields
) -> Checkpoint:
    """Open a checkpoint without reading its values.

    Args:
        path: A file or folder of any format: native safetensors, diffusers or GGUF, as one file or
            several with an index.
        model: The model that it must contain; by default detected from metadata, names and shapes.
        **known_fields: Fields of the model that the file does not determine, such as
            text_ids="sequential".

    Raises:
        CheckpointError: If the file is damaged or contains another model. Every tensor that is
            missing, unexpected or of another shape is named.
    """
    file = open_tensors(path)
    if diffusers.has_diffusers_names(file.shapes):
        file_format, keys = "diffusers", diffusers.map_to_native(file.shapes, file.path)
        known_fields = _read_diffusers_config(file.path) | known_fields
    else:
        file_format = "GGUF" if isinstance(file, GgufTensors) else "native"
        keys = {name: (key,) for name, key in canonical_names(file.shapes, file.path).items()}
    shapes = {
        name: concatenated_shape([file.shapes[key] for key in file_keys])
        for name, file_keys in keys.items()
    }
    if model is None:
        model = detect_model(shapes, file.metadata, file.path, **known_fields)
    else:
        check_architecture(shapes, file.path)
        _check_model(model, shapes, file)
    expected_shapes = native.native_layout(model)[0]  # with the markers of the model
    check_shapes(expected_shapes, shapes, file.path)
    file.require_weights(
        key for name, file_keys in keys.items() if name not in MARKERS for key in file_keys
    )
    return Checkpoint(
        model=model,
        shapes=expected_shapes,
        get_tensor=FileTensors(file, keys),
        dtypes={
            name: file.dtypes[keys[name][0]] if name in keys else "F32" for name in expected_shapes
        },
        origin=str(file.path),
        format=file_format,
        metadata=file.metadata,
    )


def _read_diffusers_config(path: Path) -> dict[str, Any]:
    """Return the settings that diffusers' config.json beside the weights has."""
    config_path = path.parent / "config.json"
    if not config_path.is_file():
        return {}
    try:
        settings = json.loads(config_path.read_bytes())
    except (ValueError, RecursionError):
        raise CheckpointError(f"{config_path} is not JSON: copy or download it again.") from None
    if isinstance(settings, dict) and settings.get("quantization_config"):
        raise CheckpointError(
            f"{config_path} has a quantization_config, which is not supported: use the original."
        )
    return diffusers.parse_transformer_config(settings)


def _check_model(model: config.Model, shapes: TensorShapes, file: Tensors):
    """Raise CheckpointError if metadata or markers show that a file contains another model."""
    if MODEL_KEY in file.metadata:
        file_model = detect_model(shapes, file.metadata, file.path)
        if changes := config.differences(file_model, model, "model."):
            description = ", ".join(
                f"{key} is {old!r} in the file and {new!r} here"
                for key, (old, new) in changes.items()
            )
            raise CheckpointError(
                f"{file.path} contains another model ({description}): use the same settings."
            )
    for marker, setting in MARKERS.items():
        if marker in shapes and marker not in model_markers(model):
            raise CheckpointError(
                f"{file.path} has the marker {marker}, but the requested model does not: set "
                f"model.{setting}."
            )


def checkpoint_from_params(
    model: config.Model, params: Params, origin: str, metadata: Mapping[str, str] | None = None
) -> Checkpoint:
    """Return a checkpoint of parameters in memory.

    Args:
        model: The model.
        params: Its parameter tree.
        origin: The run that errors name.
        metadata: Text metadata for exports.
    """
    shapes, get_tensor = native.params_to_native(model, params)
    return Checkpoint(
        model, shapes, get_tensor, dict.fromkeys(shapes, "F32"), origin, "run", metadata or {}
    )


def read_checkpoint(
    path: str | Path, model: config.Model | None = None, shardings: Params | None = None
) -> tuple[config.Model, Params]:
    """Return model and float32 parameters of a checkpoint; see `open_checkpoint`.

    Args:
        path: A file or folder of any format.
        model: The model that it must contain; by default detected.
        shardings: A tree of shardings like the parameters; by default one device.

    Raises:
        CheckpointError: If the file is damaged or contains another model.
    """
    checkpoint = open_checkpoint(path, model)
    return checkpoint.model, checkpoint.load_params(shardings=shardings)


# --- writing --------------------------------------------------------------------------------------


def write_checkpoint(
    path: str | Path,
    model: config.Model,
    params: Params,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
):
    """Write parameters as a native safetensors file, tensor by tensor, markers first.

    Args:
        path: The file.
        model: The model.
        params: Its parameter tree.
        dtype: float32, bfloat16 or float16. The pixel embedder and the markers stay float32, as in
            the published files.
        metadata: Text metadata to add to the description of the model.

    Raises:
        CheckpointError: If values are not finite, or too large for the type.
        OutputError: If the file cannot be written.
    """
    shapes, get_tensor = native.params_to_native(model, params)
    dtypes = {
        name: DTYPES["float32" if native.is_float32_tensor(name) else dtype] for name in shapes
    }
    metadata = {MODEL_KEY: json.dumps(config.to_dict(model)), **(metadata or {})}
    write_safetensors(path, shapes, dtypes, get_tensor, metadata)
