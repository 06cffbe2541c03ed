"""Read, write and merge LoRA files (arXiv 2106.09685): W + strength · alpha / rank · up · down.

Files of all common naming schemes are read; two schemes are written.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.weights import diffusers, native
from radiance.weights.checkpoint import Checkpoint, drop_validation_loss
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors
from radiance.weights.tensors import (
    DTYPES,
    DTYPES_BY_CODE,
    Tensors,
    TensorShapes,
    cast_array,
    is_finite,
)

# This key differs from detect.MODEL_KEY, because a file with MODEL_KEY is read as a complete model.
BASE_MODEL_KEY = "radiance.base"
# prefix, separator, name of the down matrix, name of the up matrix
NAMING_SCHEMES = {
    "peft": ("diffusion_model.", ".", "lora_A", "lora_B"),
    "kohya": ("lora_unet_", "_", "lora_down", "lora_up"),
}
MODULE_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
# PEFT: X.lora_A.weight, X.lora_A.default.weight; kohya: X.lora_down.weight;
# lodestone: X.lora.lora_A, X.lora_A.
KEY_PATTERN = re.compile(
    r"(.+?)\.(?:(?:lora\.)?(lora_A|lora_B|lora_down|lora_up)(?:\.default)?(?:\.weight)?|(alpha))"
)
TENSOR_ROLES = {
    "lora_A": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "alpha": "alpha",
}
MERGE_ADVICE = (
    "merge it with the tool that trained it, and extract the difference if you need a LoRA"
)
UNSUPPORTED_TENSORS = (
    (
        r"^(lora_te|text_encoder|te\d?\.)",
        "is for a text encoder, and LoRAs of text encoders are not applied: "
        "remove such tensors from the file.",
    ),
    (
        r"dora_scale|magnitude",
        f"makes this file a DoRA, which is not supported: {MERGE_ADVICE}.",
    ),
    (
        r"hada_|lokr_|oft_|lora_mid",
        f"belongs to another kind of adapter (LoHa, LoKr, OFT, LoCon): {MERGE_ADVICE}.",
    ),
)


class LoraPair(NamedTuple):
    """Two factors of the change of one module's weight.

    The weight of a convolution is flattened to [out, in · height · width].
    """

    down: Float32[np.ndarray, "rank in"]
    up: Float32[np.ndarray, "out rank"]
    scale: float = 1.0  # alpha / rank

    def compute_delta(self, strength: float = 1.0) -> Float32[np.ndarray, "out in"]:
        """Return the change of the weight at a strength."""
        return np.float32(strength * self.scale) * (self.up @ self.down)


@dataclass(frozen=True)
class LoraWeights:
    """Pairs for modules of `model`, by native module name, such as double_blocks.0.img_attn.qkv."""

    model: config.Model
    pairs: Mapping[str, LoraPair]
    origin: str = "The LoRA"  # for messages


# --- reading and writing --------------------------------------------------------------------------


def read_lora(path: str | Path, model: config.Model) -> LoraWeights:
    """Read a LoRA file for `model`.

    The names may be those of PEFT, ai-toolkit, diffusion-pipe, kohya, OneTrainer, lodestone or
    diffusers. The scale is 1 if the file has no alpha. diffusers trains queries, keys, values and
    MLP of one native matrix as separate parts; they become one pair with a block-diagonal `up`.

    Args:
        path: A safetensors file, or the folder that holds it.
        model: The model that the LoRA must fit.

    Returns:
        The pairs in float32, by native module name.

    Raises:
        CheckpointError: The file cannot be read, or a tensor is unknown, belongs to another model,
            lacks the other matrix of its pair, has a wrong shape, or is not finite. The message
            names the first such tensor.
    """
    file = open_tensors(path)
    shapes = native.native_layout(model)[0]
    pairs = {}
    for module, keys_by_part in _group_keys(file, shapes).items():
        name = f"{module}.weight"
        if "" not in keys_by_part:
            part_slices = diffusers.locate_diffusers_slices(name, shapes[name], model)
            parts = {
                part: _read_pair(file, keys, part_slices[part][1])
                for part, keys in keys_by_part.items()
            }
            pairs[module] = _combine_parts(parts, part_slices)
        elif len(keys_by_part) == 1:
            pairs[module] = _read_pair(file, keys_by_part[""], shapes[name])
        else:
            raise CheckpointError(
                f"{file.path} changes {module} both as a whole and in parts, so it holds more than "
                "one LoRA: use a file with one LoRA."
            )
    return LoraWeights(model, pairs, str(file.path))


def _group_keys(file: Tensors, shapes: TensorShapes) -> dict[str, dict[str, dict[str, str]]]:
    """Return the keys of a file by native module, part of it, and role (down, up, alpha)."""
    module_spellings = _list_spellings(shapes)
    keys_by_module: dict[str, dict[str, dict[str, str]]] = {}
    for key in file.shapes:
        spelling, role = _parse_key(key, file)
        if spelling not in module_spellings:
            raise CheckpointError(
                f"{file.path}: {key} is for a module that this model does not have: "
                "choose the model that the LoRA was trained for."
            )
        module, part = module_spellings[spelling]
        first_key = keys_by_module.setdefault(module, {}).setdefault(part, {}).setdefault(role, key)
        if first_key != key:
            raise CheckpointError(
                f"{file.path}: {first_key} and {key} are the same matrix of one pair, so the file "
                "holds more than one LoRA: use a file with one LoRA."
            )
    if not keys_by_module:
        raise CheckpointError(f"{file.path} holds no tensors: copy or download it again.")
    return keys_by_module


def _list_spellings(shapes: TensorShapes) -> dict[str, tuple[str, str]]:
    """Return the native module and its part ("" is all of it) for each name that files may use.

    The names are native names and those of diffusers, with _ in place of ., as kohya writes them.
    """
    spellings = {}
    for name, shape in shapes.items():
        if not name.endswith(".weight") or len(shape) < 2:
            continue
        module = name.removesuffix(".weight")
        try:
            diffusers_names = diffusers.to_diffusers_names(name)
        except KeyError:  # diffusers has no such module
            diffusers_names = ()
        for diffusers_name in diffusers_names:
            spelling = diffusers_name.removesuffix(".weight").replace(".", "_")
            spellings[spelling] = (module, diffusers_name if len(diffusers_names) > 1 else "")
        spellings[module.replace(".", "_")] = (module, "")
    return spellings


def _parse_key(key: str, file: Tensors) -> tuple[str, str]:
    """Return the module of a key, without prefix and with _ in place of ., and its role."""
    match = KEY_PATTERN.fullmatch(key)
    for pattern, reason in UNSUPPORTED_TENSORS:
        if re.search(pattern, key):
            raise CheckpointError(f"{file.path}: {key} {reason}")
    if match is None:
        raise CheckpointError(
            f"{file.path}: {key} is not part of a LoRA, which holds pairs of matrices and their "
            "alpha: remove it from the file."
        )
    module = match[1]
    for prefix in MODULE_PREFIXES:
        module = module.removeprefix(prefix)
    return module.replace(".", "_"), TENSOR_ROLES[match[2] or match[3]]


def _read_pair(file: Tensors, keys_by_role: Mapping[str, str], shape: tuple[int, ...]) -> LoraPair:
    """Read the pair for a weight (or a part of one) of `shape`."""
    for role in ("down", "up"):
        if role not in keys_by_role:
            raise CheckpointError(
                f"{file.path} has {' and '.join(keys_by_role.values())} without the {role} matrix "
                "of the pair: download the file again."
            )
    values = {role: file[key] for role, key in keys_by_role.items()}
    for role, key in keys_by_role.items():
        if not is_finite(values[role]):
            raise CheckpointError(
                f"{file.path}: {key} holds values that are not finite, so its training failed: "
                "use another LoRA."
            )
    rank = values["down"].shape[0] if values["down"].ndim else 0
    expected_shapes = {"down": (rank, math.prod(shape[1:])), "up": (shape[0], rank)}
    for role, expected_shape in expected_shapes.items():
        actual_shape = values[role].shape
        if rank < 1 or (*actual_shape[:1], math.prod(actual_shape[1:])) != expected_shape:
            raise CheckpointError(
                f"{file.path}: {keys_by_role[role]} has shape {list(actual_shape)}, but a LoRA of "
                f"rank {rank} for weights of {list(shape)} needs {list(expected_shape)}: choose "
                "the model that the LoRA was trained for."
            )
    scale = 1.0
    if "alpha" in values:
        if values["alpha"].size != 1:
            raise CheckpointError(
                f"{file.path}: {keys_by_role['alpha']} has shape {list(values['alpha'].shape)} and "
                "must be one number: download the file again."
            )
        scale = float(values["alpha"].reshape(())) / rank
    down, up = (
        values[role].astype(np.float32).reshape(expected_shapes[role]) for role in ("down", "up")
    )
    return LoraPair(down, up, scale)


def _combine_parts(
    parts: Mapping[str, LoraPair], part_slices: Mapping[str, tuple[slice, tuple[int, ...]]]
) -> LoraPair:
    """Return one pair for parts stacked along the outputs; missing parts change nothing."""
    num_rows = max(part_rows.stop for part_rows, _ in part_slices.values())
    ups = []
    for name, pair in parts.items():
        up = np.zeros((num_rows, len(pair.down)), np.float32)
        up[part_slices[name][0]] = np.float32(pair.scale) * pair.up
        ups.append(up)
    downs = [pair.down for pair in parts.values()]
    return LoraPair(np.concatenate(downs), np.concatenate(ups, axis=1))


def write_lora(
    path: str | Path, lora: LoraWeights, naming: str = "peft", dtype: str = "bfloat16"
) -> None:
    """Write a LoRA file atomically.

    Each pair gets alpha = scale · rank, so that every reader applies the same strength.

    Args:
        path: The safetensors file to write.
        lora: The pairs to write.
        naming: "peft" (`diffusion_model.X.lora_A.weight`, for ComfyUI, ai-toolkit and
            diffusion-pipe) or "kohya" (`lora_unet_X.lora_down.weight`).
        dtype: float32, bfloat16 or float16, for the matrices; alpha is always float32.

    Raises:
        CheckpointError: The naming scheme is unknown, or `dtype` cannot hold a value.
        OutputError: The file cannot be written.
    """
    if naming not in NAMING_SCHEMES:
        raise CheckpointError(
            f"There is no LoRA naming scheme {naming!r}: choose one of {', '.join(NAMING_SCHEMES)}."
        )
    prefix, separator, *matrix_names = NAMING_SCHEMES[naming]
    shapes = native.native_layout(lora.model)[0]
    tensors: dict[str, np.ndarray] = {}
    for module, (down, up, scale) in lora.pairs.items():
        module_name = prefix + module.replace(".", separator)
        kernel_size = shapes[f"{module}.weight"][2:]  # of a convolution; empty for a matrix
        matrices = (
            down.reshape(len(down), -1, *kernel_size),
            up.reshape(*up.shape, *[1] * len(kernel_size)),
        )
        for matrix_name, values in zip(matrix_names, matrices):
            tensors[f"{module_name}.{matrix_name}.weight"] = values
        tensors[f"{module_name}.alpha"] = np.asarray(scale * len(down), np.float32)
    ranks = sorted({len(pair.down) for pair in lora.pairs.values()})
    metadata = {
        "format": "pt",
        "rank": ", ".join(map(str, ranks)),
        BASE_MODEL_KEY: json.dumps(config.to_dict(lora.model)),
    }
    write_safetensors(
        path,
        {key: values.shape for key, values in tensors.items()},
        {key: DTYPES["float32" if key.endswith(".alpha") else dtype] for key in tensors},
        tensors.__getitem__,
        metadata,
    )


# --- merging --------------------------------------------------------------------------------------


def merge_lora(checkpoint: Checkpoint, lora: LoraWeights, strength: float = 1.0) -> Checkpoint:
    """Return `checkpoint` with `strength` times the LoRA added to its weights.

    A merge with −strength undoes it, except for rounding. Each sum is computed in float32 when its
    tensor is read, and then rounded to the tensor's stored type. Quantized tensors (fp8, int8,
    Q8_0, …) become BF16, because so few bits would round most of a LoRA away.

    Args:
        checkpoint: The checkpoint to change.
        lora: The LoRA to add.
        strength: Factor of the LoRA; may be negative.

    Returns:
        A checkpoint without a validation loss. Reading one of its tensors raises CheckpointError
        if the tensor's type cannot hold the sum.

    Raises:
        CheckpointError: The LoRA does not fit the model.
    """
    check_lora_fits(lora, checkpoint.model)
    dtypes = dict(checkpoint.dtypes)
    for module in lora.pairs:
        name = f"{module}.weight"
        dtypes[name] = dtypes[name] if dtypes[name] in ("F64", "F32", "F16") else "BF16"

    def read_merged(name: str) -> np.ndarray:
        values = checkpoint.get_tensor(name)
        pair = lora.pairs.get(name.removesuffix(".weight"))
        if pair is None:
            return values
        total = values.astype(np.float32) + pair.compute_delta(strength).reshape(values.shape)
        return cast_array(total, DTYPES_BY_CODE[dtypes[name]], name)

    return replace(
        checkpoint,
        get_tensor=read_merged,
        dtypes=dtypes,
        origin=f"{checkpoint.origin} + {strength:g} · {lora.origin}",
        metadata=drop_validation_loss(checkpoint.metadata),
    )


def check_lora_fits(lora: LoraWeights, model: config.Model) -> None:
    """Check that `model` has all modules of a LoRA, in the same sizes.

    Args:
        lora: The LoRA to check.
        model: The model to which the LoRA will be applied.

    Raises:
        CheckpointError: A module is missing or has another size. The message names it.
    """
    shapes = native.native_layout(model)[0]
    for module, pair in lora.pairs.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None or (len(pair.up), pair.down.shape[1]) != (shape[0], math.prod(shape[1:])):
            raise CheckpointError(
                f"{lora.origin} changes {module} of {len(pair.up)} × {pair.down.shape[1]} weights, "
                "which this model does not have: choose the model that the LoRA was trained for."
            )
