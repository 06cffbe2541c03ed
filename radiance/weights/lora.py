"""Write and merge LoRA files (arXiv 2106.09685): W + strength · alpha / rank · up · down.

`lora_reading` reads files of all common naming schemes; three schemes are written.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.weights import diffusers, native
from radiance.weights.checkpoint import Checkpoint, drop_validation_loss
from radiance.weights.lora_changes import LoraPair, WeightChange
from radiance.weights.safetensors import write_safetensors
from radiance.weights.tensors import DTYPES, is_finite

# This key differs from detect.MODEL_KEY, because a file with MODEL_KEY is read as a complete model.
BASE_MODEL_KEY = "radiance.base"


class NamingScheme(NamedTuple):
    """How a scheme names the tensors of a module."""

    prefix: str
    separator: str
    down: str
    up: str


NAMING_SCHEMES = {
    "peft": NamingScheme("diffusion_model.", ".", "lora_A", "lora_B"),
    "kohya": NamingScheme("lora_unet_", "_", "lora_down", "lora_up"),
    "diffusers": NamingScheme("transformer.", ".", "lora_A", "lora_B"),
}


@dataclass(frozen=True)
class LoraWeights:
    """Changes of the weights of `model`."""

    model: config.Model
    pairs: Mapping[str, LoraPair]  # by native module name, such as double_blocks.0.img_attn.qkv
    origin: str = "The LoRA"  # for messages
    # All other changes (LoHa, LoKr, DoRA, biases, full values), by native tensor name.
    changes: Mapping[str, WeightChange] = field(default_factory=dict)
    notes: Sequence[str] = ()  # sentences about the file, for the user


# --- writing --------------------------------------------------------------------------------------


def write_lora(
    path: str | Path, lora: LoraWeights, naming: str = "peft", dtype: str = "bfloat16"
) -> None:
    """Write a LoRA file atomically.

    Each pair gets alpha = scale · rank, so that every reader applies the same strength.

    Args:
        path: The safetensors file to write.
        lora: The pairs to write.
        naming: "peft" (`diffusion_model.X.lora_A.weight`, for ComfyUI, ai-toolkit and
            diffusion-pipe), "kohya" (`lora_unet_X.lora_down.weight`, also for diffusers), or
            "diffusers" (`transformer.X.lora_A.weight` with its names of Chroma's modules).
        dtype: float32, bfloat16 or float16, for the matrices; alpha is always float32.

    Raises:
        CheckpointError: The naming scheme is unknown or does not have the model's modules, the
            LoRA has changes other than pairs of matrices, or `dtype` cannot hold a value.
        OutputError: The file cannot be written.
    """
    if naming not in NAMING_SCHEMES:
        raise CheckpointError(
            f"There is no LoRA naming scheme {naming!r}: choose one of {', '.join(NAMING_SCHEMES)}."
        )
    if lora.changes:
        raise CheckpointError(
            f"{lora.origin} changes {next(iter(lora.changes))} by more than a pair of matrices "
            "(LoHa, LoKr, DoRA, a bias or complete values), which can only be merged: merge it, "
            "and extract the difference if you need a LoRA."
        )
    scheme = NAMING_SCHEMES[naming]
    name_pairs = _name_diffusers_pairs if naming == "diffusers" else _name_native_pairs
    shapes = native.native_layout(lora.model)[0]
    tensors: dict[str, np.ndarray] = {}
    for name, module, (down, up, scale) in name_pairs(lora):
        module_name = scheme.prefix + name.replace(".", scheme.separator)
        kernel_size = shapes[f"{module}.weight"][2:]  # of a convolution; empty for a matrix
        down_shape, up_shape = (len(down), -1, *kernel_size), (*up.shape, *[1] * len(kernel_size))
        tensors[f"{module_name}.{scheme.down}.weight"] = down.reshape(down_shape)
        tensors[f"{module_name}.{scheme.up}.weight"] = up.reshape(up_shape)
        tensors[f"{module_name}.alpha"] = np.asarray(scale * len(down), np.float32)
    ranks = sorted({len(pair.down) for _, _, pair in name_pairs(lora)})
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


def _name_native_pairs(lora: LoraWeights) -> Iterator[tuple[str, str, LoraPair]]:
    """Yield the written name of each pair, its native module, and the pair."""
    for module, pair in lora.pairs.items():
        yield module, module, pair


def _name_diffusers_pairs(lora: LoraWeights) -> Iterator[tuple[str, str, LoraPair]]:
    """Yield the pairs of diffusers' modules; queries, keys and values get one pair each."""
    diffusers.check_diffusers_support(lora.model)
    shapes = native.native_layout(lora.model)[0]
    for module, pair in lora.pairs.items():
        weight = f"{module}.weight"
        slices = diffusers.locate_diffusers_slices(weight, shapes[weight], lora.model)
        for name, (rows, _) in slices.items():
            up = pair.up[rows]
            # A pair that was combined from parts has ranks that are zero in the other parts.
            is_used = up.any(axis=0) if len(slices) > 1 else np.ones(len(pair.down), bool)
            if is_used.any():
                part = LoraPair(pair.down[is_used], up[:, is_used], pair.scale)
                yield name.removesuffix(".weight"), module, part


# --- merging --------------------------------------------------------------------------------------


def merge_lora(checkpoint: Checkpoint, lora: LoraWeights, strength: float = 1.0) -> Checkpoint:
    """Return `checkpoint` with `strength` times the LoRA added to its weights.

    A merge with −strength undoes it, except for rounding, replaced values and DoRA. Each sum is
    computed in float32 when its tensor is read, and is rounded only where it is written or loaded.
    Without a requested type it is written in the tensor's stored type; quantized tensors (fp8,
    int8, Q8_0, …) become BF16, because so few bits would round most of a LoRA away.

    Args:
        checkpoint: The checkpoint to change.
        lora: The LoRA to add.
        strength: Factor of the LoRA; may be negative.

    Returns:
        A checkpoint without a validation loss. Reading one of its tensors raises CheckpointError
        if the sum is not finite.

    Raises:
        CheckpointError: The LoRA does not fit the model.
    """
    check_lora_fits(lora, checkpoint.model)
    changes: dict[str, WeightChange] = {
        **{f"{module}.weight": pair for module, pair in lora.pairs.items()},
        **lora.changes,
    }
    dtypes = dict(checkpoint.dtypes)
    for name in changes:
        dtypes[name] = dtypes[name] if dtypes[name] in ("F64", "F32", "F16") else "BF16"

    def read_merged(name: str) -> np.ndarray:
        values = checkpoint.get_tensor(name)
        if name not in changes:
            return values
        values = values.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            result = changes[name].apply(values, strength)
        if is_finite(values) and not is_finite(result):
            raise CheckpointError(
                f"{lora.origin} at strength {strength:g} gives {name} values that are not finite: "
                "use a smaller strength, or another LoRA."
            )
        return result

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
    own_shapes = native.native_layout(lora.model)[0]
    for name in lora.changes:
        if shapes.get(name) != own_shapes[name]:
            raise CheckpointError(
                f"{lora.origin} changes {name} of {list(own_shapes[name])} weights, which this "
                "model does not have: choose the model that the LoRA was trained for."
            )
