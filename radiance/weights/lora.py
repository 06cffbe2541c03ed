"""Low-rank additions to a model's matrices (LoRA, arXiv 2106.09685): W + strength · alpha / rank · up · down.

They are read in the namings of the field and written in two of them, merged into a checkpoint, kept beside the weights when
sampling, and extracted from the difference of two checkpoints.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from scipy.linalg import block_diag

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.model.quantized import LoraKernel
from radiance.model.transformer import Params, make_abstract_params
from radiance.weights import diffusers, native
from radiance.weights.checkpoint import (
    Checkpoint,
    count_inputs,
    drop_validation_loss,
    is_block_matrix,
)
from radiance.weights.detect import MARKERS
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

# Not METADATA_KEY: a file that has that is taken for the whole model.
BASE_MODEL_KEY = "radiance.base"
NAMING_SCHEMES = {
    "peft": ("diffusion_model.", ".", "lora_A", "lora_B"),
    "kohya": ("lora_unet_", "_", "lora_down", "lora_up"),
}
MODULE_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
# PEFT: X.lora_A.weight, X.lora_A.default.weight; kohya: X.lora_down.weight; lodestone: X.lora.lora_A, X.lora_A.
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
    "merge it with the tool that trained it, and extract the difference if a LoRA is needed"
)
UNSUPPORTED_TENSORS = (
    (
        r"^(lora_te|text_encoder|te\d?\.)",
        "is for a text encoder, where LoRAs are not applied: take such tensors out of the file.",
    ),
    (r"dora_scale|magnitude", f"makes this a DoRA, which is more than a LoRA: {MERGE_ADVICE}."),
    (
        r"hada_|lokr_|oft_|lora_mid",
        f"is of another kind of adapter (LoHa, LoKr, OFT, LoCon): {MERGE_ADVICE}.",
    ),
)
# Trained models are harmed by changes of the first; the second works in float32 on single pixels.
EXCLUDED_FROM_EXTRACTION = ("distilled_guidance_layer.", "nerf_image_embedder.")


class LoraPair(NamedTuple):
    """What is added to the weight of one module; a convolution's is flattened to [out, in · height · width]."""

    down: Float32[np.ndarray, "rank in"]
    up: Float32[np.ndarray, "out rank"]
    scale: float = 1.0  # alpha / rank

    def compute_delta(self, strength: float = 1.0) -> Float32[np.ndarray, "out in"]:
        return np.float32(strength * self.scale) * (self.up @ self.down)


@dataclass(frozen=True)
class LoraWeights:
    """Additions to modules of `model`, by their native names, such as double_blocks.0.img_attn.qkv."""

    model: config.Model
    pairs: Mapping[str, LoraPair]
    origin: str = "The LoRA"


# --- reading and writing ----------------------------------------------------------------------------------------------


def read_lora(path: str | Path, model: config.Model) -> LoraWeights:
    """A LoRA file for `model`, named as by PEFT, ai-toolkit and diffusion-pipe, kohya, OneTrainer, lodestone or diffusers.

    The scale is 1 where the file has no alpha. What diffusers trains as parts of one matrix (queries, keys, values, MLP) becomes
    one pair with a block-diagonal `up`. Raises CheckpointError, which names the first tensor that is not understood, is of
    another model, lacks its other half, does not fit or is not finite.
    """
    file = open_tensors(path)
    shapes = native.native_layout(model)[0]
    module_spellings = _list_spellings(shapes)
    keys_by_module: dict[str, dict[str, dict[str, str]]] = {}  # module → part → side → key
    for key in file.shapes:
        spelling, role = _parse_key(key, file)
        if spelling not in module_spellings:
            raise CheckpointError(
                f"{file.path}: {key} is for a module that this model has not: give the model that the LoRA is for."
            )
        module, part = module_spellings[spelling]
        first_key = keys_by_module.setdefault(module, {}).setdefault(part, {}).setdefault(role, key)
        if first_key != key:
            raise CheckpointError(
                f"{file.path}: {first_key} and {key} are the same half of a pair: the file holds more than one LoRA."
            )
    if not keys_by_module:
        raise CheckpointError(f"{file.path} holds no tensors: copy or download it again.")

    pairs = {}
    for module, keys_by_part in keys_by_module.items():
        name = f"{module}.weight"
        if len(keys_by_part) > 1 and "" in keys_by_part:
            raise CheckpointError(
                f"{file.path} changes {module} as a whole and in parts: the file holds more than one LoRA."
            )
        if "" in keys_by_part:
            pairs[module] = _read_pair(file, keys_by_part[""], shapes[name])
        else:
            part_slices = diffusers.locate_diffusers_slices(name, shapes[name], model)
            pairs[module] = _combine_parts(
                {
                    part: _read_pair(file, keys, part_slices[part][1])
                    for part, keys in keys_by_part.items()
                },
                part_slices,
            )
    return LoraWeights(model, pairs, str(file.path))


def _list_spellings(shapes: TensorShapes) -> dict[str, tuple[str, str]]:
    """Our and diffusers' names of modules, with _ for . as kohya has them → native module, and the part of it that is meant ("": all)."""
    spellings = {}
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) > 1:
            module = name.removesuffix(".weight")
            try:
                diffusers_names = diffusers.to_diffusers_names(name)
            except KeyError:  # diffusers has no such module
                diffusers_names = ()
            spellings |= {
                part.removesuffix(".weight").replace(".", "_"): (
                    module,
                    part if len(diffusers_names) > 1 else "",
                )
                for part in diffusers_names
            }
            spellings[module.replace(".", "_")] = (module, "")
    return spellings


def _parse_key(key: str, file: Tensors) -> tuple[str, str]:
    """The module of a tensor, without prefix and with _ for ., and what it is: down, up or alpha."""
    match = KEY_PATTERN.fullmatch(key)
    for pattern, reason in UNSUPPORTED_TENSORS:
        if re.search(pattern, key):
            raise CheckpointError(f"{file.path}: {key} {reason}")
    if match is None:
        raise CheckpointError(
            f"{file.path}: {key} is no part of a LoRA, which has pairs of matrices and their alpha: take it out of the file."
        )
    module = match[1]
    for prefix in MODULE_PREFIXES:
        module = module.removeprefix(prefix)
    return module.replace(".", "_"), TENSOR_ROLES[match[2] or match[3]]


def _read_pair(file: Tensors, keys_by_role: Mapping[str, str], shape: tuple[int, ...]) -> LoraPair:
    """The pair for a weight (or a part of one) of `shape`; `keys` has its tensors."""
    for role in ("down", "up"):
        if role not in keys_by_role:
            raise CheckpointError(
                f"{file.path}: {' and '.join(keys_by_role.values())} without the pair's {role} matrix: download the file again."
            )
    values = {role: file[key] for role, key in keys_by_role.items()}
    for role, key in keys_by_role.items():
        if not is_finite(values[role]):
            raise CheckpointError(
                f"{file.path}: {key} holds values that are not finite: its training failed, so use another LoRA."
            )
    if "alpha" in keys_by_role and values["alpha"].size != 1:
        raise CheckpointError(
            f"{file.path}: {keys_by_role['alpha']} is {list(values['alpha'].shape)}, not one number: download the file again."
        )
    rank = values["down"].shape[0] if values["down"].ndim else 0
    expected_shapes = {"down": (rank, math.prod(shape[1:])), "up": (shape[0], rank)}
    for role, expected_shape in expected_shapes.items():
        actual_shape = values[role].shape
        if rank < 1 or (*actual_shape[:1], math.prod(actual_shape[1:])) != expected_shape:
            raise CheckpointError(
                f"{file.path}: {keys_by_role[role]} is {list(actual_shape)}, where a LoRA of rank {rank} for weights of {list(shape)} has "
                f"{list(expected_shape)}: give the model that the LoRA is for."
            )
    down, up = (
        values[role].astype(np.float32).reshape(expected_shapes[role]) for role in expected_shapes
    )
    return LoraPair(
        down, up, float(values["alpha"].reshape(())) / rank if "alpha" in keys_by_role else 1.0
    )


def _combine_parts(
    parts: Mapping[str, LoraPair], part_slices: Mapping[str, tuple[slice, tuple[int, ...]]]
) -> LoraPair:
    """One pair for parts that lie one below the other; parts that are not there change nothing."""
    num_rows = max(part_rows.stop for part_rows, _ in part_slices.values())
    ups = []
    for name, pair in parts.items():
        ups.append(np.zeros((num_rows, len(pair.down)), np.float32))
        ups[-1][part_slices[name][0]] = np.float32(pair.scale) * pair.up
    return LoraPair(
        np.concatenate([pair.down for pair in parts.values()]), np.concatenate(ups, axis=1)
    )


def write_lora(path: str | Path, lora: LoraWeights, naming: str = "peft", dtype: str = "bfloat16"):
    """Writes a LoRA whole or not at all, with alpha = scale · rank, by which every reader finds the same strength.

    names: peft (`diffusion_model.X.lora_A.weight`: ComfyUI, ai-toolkit, diffusion-pipe) or kohya (`lora_unet_X.lora_down.weight`).
    dtype: float32, bfloat16 or float16; alpha is float32. Raises CheckpointError.
    """
    if naming not in NAMING_SCHEMES:
        raise CheckpointError(
            f"There is no naming {naming!r} of LoRAs: the namings are {', '.join(NAMING_SCHEMES)}."
        )
    prefix, separator, *matrix_names = NAMING_SCHEMES[naming]
    shapes = native.native_layout(lora.model)[0]
    tensors: dict[str, np.ndarray] = {}
    for module, (down, up, scale) in lora.pairs.items():
        module_name, kernel_shape = (
            prefix + module.replace(".", separator),
            shapes[f"{module}.weight"][2:],
        )  # of a convolution
        matrices = (
            down.reshape(len(down), -1, *kernel_shape),
            up.reshape(*up.shape, *[1] * len(kernel_shape)),
        )
        tensors |= {
            f"{module_name}.{matrix_name}.weight": values
            for matrix_name, values in zip(matrix_names, matrices)
        }
        tensors[f"{module_name}.alpha"] = np.asarray(scale * len(down), np.float32)
    dtypes = {key: DTYPES["float32" if key.endswith(".alpha") else dtype] for key in tensors}
    ranks = sorted({len(pair.down) for pair in lora.pairs.values()})
    metadata = {
        "format": "pt",
        "rank": ", ".join(map(str, ranks)),
        BASE_MODEL_KEY: json.dumps(config.to_dict(lora.model)),
    }
    write_safetensors(
        path,
        {key: values.shape for key, values in tensors.items()},
        dtypes,
        tensors.__getitem__,
        metadata,
    )


# --- merging ----------------------------------------------------------------------------------------------------------


def merge_lora(checkpoint: Checkpoint, lora: LoraWeights, strength: float = 1.0) -> Checkpoint:
    """`checkpoint` with `strength` times the LoRA in its weights; the opposite strength takes it out again, but for rounding.

    Computed in float32 when a tensor is asked for, and rounded to the tensor's own type. A tensor whose stored type is quantized
    (fp8, int8, Q8_0, …) becomes BF16, in `dtypes` too: rounded to so few bits, most of a LoRA would be lost. Raises
    CheckpointError when the LoRA is for another model, and, as the tensor is read, for sums that its type cannot hold.
    """
    _check_model(lora, checkpoint.model)
    dtypes = dict(checkpoint.dtypes)
    for module in lora.pairs:
        name = f"{module}.weight"
        dtypes[name] = dtypes[name] if dtypes[name] in ("F64", "F32", "F16") else "BF16"

    def read_merged(name: str) -> np.ndarray:
        values = checkpoint.get_tensor(name)
        pair = lora.pairs.get(name.removesuffix(".weight"))
        if pair is None:
            return values
        return cast_array(
            values.astype(np.float32) + pair.compute_delta(strength).reshape(values.shape),
            DTYPES_BY_CODE[dtypes[name]],
            name,
        )

    origin = f"{checkpoint.origin} + {strength:g} · {lora.origin}"
    return replace(
        checkpoint,
        get_tensor=read_merged,
        dtypes=dtypes,
        origin=origin,
        metadata=drop_validation_loss(checkpoint.metadata),
    )


def _check_model(lora: LoraWeights, model: config.Model):
    """Raises CheckpointError when `model` has not the modules of the LoRA, in the same sizes."""
    shapes = native.native_layout(model)[0]
    for module, pair in lora.pairs.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None or (len(pair.up), pair.down.shape[1]) != (shape[0], math.prod(shape[1:])):
            raise CheckpointError(
                f"{lora.origin} changes {module} of {len(pair.up)} × {pair.down.shape[1]} weights, which this model has not: "
                "give the model that the LoRA is for."
            )


# --- sampling with the weights as they are ----------------------------------------------------------------------------


class LoraTarget(NamedTuple):
    """What is added to one block of a leaf (or to all of it): up · down in the native tensor's layout."""

    source: native.NativeSource
    native_shape: tuple[int, ...]  # of the native tensor
    down: Float32[np.ndarray, "rank in"]
    up: Float32[np.ndarray, "out rank"]  # times strength and scale


def apply_loras(
    params: Params, model: config.Model, loras: Iterable[tuple[LoraWeights, float]]
) -> Params:
    """`params` with LoRAs of given strengths, for sampling.

    The blocks' matrices, arrays or Quantized, stay as they are in memory and become `Adapted`; the few matrices outside of the
    blocks are changed. To change strengths, call this again with the same `params`. Raises CheckpointError when a LoRA is for
    another model, and ValueError when `params` have LoRAs already.
    """
    scaled_pairs: dict[str, list[tuple[LoraPair, float]]] = {}
    for lora, strength in loras:
        _check_model(lora, model)
        for module, pair in lora.pairs.items():
            scaled_pairs.setdefault(f"{module}.weight", []).append((pair, strength))
    shapes, sources = native.native_layout(model)
    targets: dict[str, list[LoraTarget]] = {}
    for name, pairs in scaled_pairs.items():
        down = np.concatenate([pair.down for pair, _ in pairs])
        up = np.concatenate(
            [np.float32(strength * pair.scale) * pair.up for pair, strength in pairs], axis=1
        )
        for tensor_slice in sources[name].rule.slices:
            targets.setdefault(tensor_slice.path, []).append(
                LoraTarget(sources[name], shapes[name], down, up)
            )

    def adapt_leaf(key_path: tuple, expected_leaf: jax.ShapeDtypeStruct, value: Any) -> Any:
        path = "/".join(key.key for key in key_path)
        if path not in targets:
            return value
        if isinstance(value, LoraKernel):
            raise ValueError(
                "These parameters have LoRAs already: apply all of them at once, to the parameters without."
            )
        return (_adapt_blocks if is_block_matrix(path) else _add_delta)(
            value, path, expected_leaf.shape, targets[path]
        )

    return jax.tree_util.tree_map_with_path(adapt_leaf, make_abstract_params(model), params)


def adapters_to_lora(
    model: config.Model, adapters: Params, scale: float, origin: str
) -> LoraWeights:
    """A trained LoRA from {"down": [blocks, in, rank], "up": [blocks, rank, out]} in place of matrices of the parameter tree.

    A fused matrix of the file format has two in the tree: its pair has both ranks.
    """
    matrices: dict[str, dict[str, np.ndarray]] = {}
    for path, values in native.flatten_tree(adapters).items():
        matrix, _, factor_name = path.rpartition("/")
        matrices.setdefault(matrix, {})[factor_name] = np.asarray(values, np.float32)
    leaves = native.flatten_tree(make_abstract_params(model))
    pairs: dict[str, LoraPair] = {}
    for name, (rule, index) in native.native_layout(model)[1].items():
        if rule.native_name.endswith(".weight") and any(
            tensor_slice.path in matrices for tensor_slice in rule.slices
        ):
            factors = [
                (
                    matrices[tensor_slice.path]["down"][index].T,
                    matrices[tensor_slice.path]["up"][index].T,
                )
                if tensor_slice.path in matrices
                else _make_empty_pair(tensor_slice.path, leaves[tensor_slice.path].shape)
                for tensor_slice in rule.slices
            ]
            downs, ups = zip(*factors)
            # What is fused shares its inputs (axis 0) or its outputs (axis 1).
            down, up = (
                (np.concatenate(downs), block_diag(*ups))
                if rule.axis == 0
                else (block_diag(*downs), np.concatenate(ups, axis=1))
            )
            pairs[name.removesuffix(".weight")] = LoraPair(down, up, scale)
    return LoraWeights(model, pairs, origin)


def _make_empty_pair(path: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A pair of rank 0 for a matrix without an addition."""
    num_inputs = count_inputs(path, shape)
    return np.zeros((0, num_inputs), np.float32), np.zeros(
        (math.prod(shape[1:]) // num_inputs, 0), np.float32
    )


def _adapt_blocks(
    base: Any, path: str, shape: tuple[int, ...], targets: Sequence[LoraTarget]
) -> Any:
    """A leaf of block matrices with the additions beside it; blocks without one, and smaller ranks, have zeros."""
    num_blocks, *matrix_shape = shape
    num_inputs = count_inputs(path, shape)
    num_outputs = math.prod(matrix_shape) // num_inputs
    rank = max(len(target.down) for target in targets)
    downs, ups = (
        np.zeros((num_blocks, num_inputs, rank), np.float32),
        np.zeros((num_blocks, rank, num_outputs), np.float32),
    )
    for (rule, index), _, down, up in targets:
        # A fused matrix has two parts: one is its beginning, the other its end.
        size = num_inputs if rule.axis else num_outputs
        part_slice = slice(size) if rule.slices[0].path == path else slice(-size, None)
        downs[index, :, : len(down)] = (down[:, part_slice] if rule.axis else down).T
        ups[index, : len(down)] = (up if rule.axis else up[part_slice]).T
    if not ups.any():  # a LoRA of the other part
        return base
    return LoraKernel(base, jnp.asarray(downs), jnp.asarray(ups))


def _add_delta(
    value: jax.Array, path: str, shape: tuple[int, ...], targets: Sequence[LoraTarget]
) -> jax.Array:
    delta = np.zeros(shape, np.float32)
    for (rule, index), native_shape, down, up in targets:
        target_delta = native.LAYOUT_TO_LEAF[rule.slices[0].layout](
            (up @ down).reshape(native_shape)
        )
        block_index = ... if index is None else index
        delta[block_index] = target_delta.reshape(delta[block_index].shape)
    return (value.astype(jnp.float32) + delta).astype(value.dtype)


# --- extraction -------------------------------------------------------------------------------------------------------


class ExtractionResult(NamedTuple):
    lora: LoraWeights
    explained_fractions: Mapping[
        str, float
    ]  # share of the squared difference that the LoRA has, by module
    total_explained_fraction: float  # of all these modules together
    remaining_changes: Mapping[
        str, float
    ]  # tensors that differ and are not in the LoRA: |b - a| / |a|


def extract_lora(
    base: Checkpoint,
    tuned: Checkpoint,
    rank: int,
    select_module: Callable[[str], bool] | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> ExtractionResult:
    """The LoRA of a rank that comes nearest to b − a (Eckart and Young, 1936), matrix by matrix.

    rank: at least 1; of a smaller matrix its full rank. modules: which native modules; the blocks' matrices when None. The
    approximator and the pixel embedder are never among them. progress: called with the parameters that were compared.
    Raises CheckpointError when the models are not equal, or when there is nothing to extract.
    """
    if differing_settings := config.differences(base.model, tuned.model, "model."):
        description = ", ".join(
            f"{key} is {base_value!r} and {tuned_value!r}"
            for key, (base_value, tuned_value) in differing_settings.items()
        )
        raise CheckpointError(
            f"{base.origin} and {tuned.origin} hold different models ({description}): a LoRA is the difference of two equal ones."
        )
    if rank < 1:
        raise CheckpointError(f"A LoRA of rank {rank} cannot be: give a rank of at least 1.")
    shapes, sources = native.native_layout(base.model)

    def is_selected(name: str) -> bool:
        if (
            not name.endswith(".weight")
            or len(shapes[name]) < 2
            or name.startswith(EXCLUDED_FROM_EXTRACTION)
        ):
            return False
        return (
            is_block_matrix(sources[name].rule.slices[0].path)
            if select_module is None
            else select_module(name.removesuffix(".weight"))
        )

    pairs: dict[str, LoraPair] = {}
    squared_norms: dict[str, tuple[float, float]] = {}
    remaining_changes: dict[str, float] = {}
    for name, shape in shapes.items():
        if name in MARKERS:
            continue
        base_values = base.get_tensor(name).astype(np.float32)
        difference = cast_array(
            tuned.get_tensor(name).astype(np.float32) - base_values, DTYPES["float32"], name
        )
        if difference.any() and is_selected(name):
            module = name.removesuffix(".weight")
            pairs[module], *squared_norms[module] = _approximate_difference(
                difference.reshape(shape[0], -1), rank
            )
        elif difference.any():
            remaining_changes[name] = float(
                np.linalg.norm(difference)
                / max(np.linalg.norm(base_values), np.finfo(np.float32).tiny)
            )
        progress(difference.size)
    if not pairs:
        raise CheckpointError(
            f"{base.origin} and {tuned.origin} do not differ in the matrices asked for: there is nothing to extract."
        )
    total_explained, total_squared = np.sum(list(squared_norms.values()), axis=0)
    explained_fractions = {
        module: explained / squared_norm
        for module, (explained, squared_norm) in squared_norms.items()
    }
    return ExtractionResult(
        LoraWeights(base.model, pairs, f"{tuned.origin} - {base.origin}"),
        explained_fractions,
        float(total_explained / total_squared),
        remaining_changes,
    )


def _approximate_difference(
    difference: Float32[np.ndarray, "out in"], rank: int
) -> tuple[LoraPair, float, float]:
    """The pair of a rank whose product is nearest, the sum of its squares, and that of the difference.

    The singular vectors of the shorter side are the eigenvectors of the Gram matrix, in float64, and the other factor is the
    projection on them. So the product is exact at full rank, and nothing is divided by small singular values.
    """
    if len(difference) < difference.shape[1]:
        (up, down, _), *squared_norms = _approximate_difference(difference.T, rank)
        return LoraPair(down.T, up.T), *squared_norms
    matrix = difference.astype(np.float64)
    singular_vectors = np.linalg.eigh(matrix.T @ matrix)[1][:, : -rank - 1 : -1]
    projection = matrix @ singular_vectors
    squared_norms = np.square(projection).sum(axis=0)
    # Both factors get the root of the singular value, as half precision has few exponents.
    root_singular_values = np.where(squared_norms > 0, squared_norms, 1) ** 0.25
    pair = LoraPair(
        (singular_vectors * root_singular_values).T.astype(np.float32),
        (projection / root_singular_values).astype(np.float32),
    )
    return pair, float(squared_norms.sum()), float(np.square(matrix).sum())
