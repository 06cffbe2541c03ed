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
from radiance.model.stored import Adapted
from radiance.model.transformer import Params, abstract
from radiance.weights import diffusers, native
from radiance.weights.checkpoint import Checkpoint, inputs_of, is_block_matrix, without_loss
from radiance.weights.detect import MARKERS
from radiance.weights.files import CODES, DTYPES, CheckpointError, Shapes, Tensors, cast, finite, open_tensors, write_safetensors

# Not METADATA_KEY: a file that has that is taken for the whole model.
BASE_KEY = "radiance.base"
NAMINGS = {"peft": ("diffusion_model.", ".", "lora_A", "lora_B"), "kohya": ("lora_unet_", "_", "lora_down", "lora_up")}
PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
# PEFT: X.lora_A.weight, X.lora_A.default.weight; kohya: X.lora_down.weight; lodestone: X.lora.lora_A, X.lora_A.
KEY = re.compile(r"(.+?)\.(?:(?:lora\.)?(lora_A|lora_B|lora_down|lora_up)(?:\.default)?(?:\.weight)?|(alpha))")
SIDES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
MERGE = "merge it with the tool that trained it, and extract the difference if a LoRA is needed"
FOREIGN = (
    (r"^(lora_te|text_encoder|te\d?\.)", "is for a text encoder, where LoRAs are not applied: take such tensors out of the file."),
    (r"dora_scale|magnitude", f"makes this a DoRA, which is more than a LoRA: {MERGE}."),
    (r"hada_|lokr_|oft_|lora_mid", f"is of another kind of adapter (LoHa, LoKr, OFT, LoCon): {MERGE}."),
)
# Trained models are harmed by changes of the first; the second works in float32 on single pixels.
NEVER_EXTRACTED = ("distilled_guidance_layer.", "nerf_image_embedder.")


class Pair(NamedTuple):
    """What is added to the weight of one module; a convolution's is flattened to [out, in · height · width]."""

    down: Float32[np.ndarray, "rank in"]
    up: Float32[np.ndarray, "out rank"]
    scale: float = 1.0  # alpha / rank

    def matrix(self, strength: float = 1.0) -> Float32[np.ndarray, "out in"]:
        return np.float32(strength * self.scale) * (self.up @ self.down)


@dataclass(frozen=True)
class Lora:
    """Additions to modules of `model`, by their native names, such as double_blocks.0.img_attn.qkv."""

    model: config.Model
    pairs: Mapping[str, Pair]
    origin: str = "The LoRA"


# --- reading and writing ----------------------------------------------------------------------------------------------


def read(path: str | Path, model: config.Model) -> Lora:
    """A LoRA file for `model`, named as by PEFT, ai-toolkit and diffusion-pipe, kohya, OneTrainer, lodestone or diffusers.

    The scale is 1 where the file has no alpha. What diffusers trains as parts of one matrix (queries, keys, values, MLP) becomes
    one pair with a block-diagonal `up`. Raises CheckpointError, which names the first tensor that is not understood, is of
    another model, lacks its other half, does not fit or is not finite.
    """
    file = open_tensors(path)
    shapes = native.layout(model)[0]
    modules = _spellings(shapes)
    found: dict[str, dict[str, dict[str, str]]] = {}  # module → part → side → key
    for key in file.shapes:
        spelt, side = _parsed(key, file)
        if spelt not in modules:
            raise CheckpointError(f"{file.path}: {key} is for a module that this model has not: give the model that the LoRA is for.")
        module, part = modules[spelt]
        first = found.setdefault(module, {}).setdefault(part, {}).setdefault(side, key)
        if first != key:
            raise CheckpointError(f"{file.path}: {first} and {key} are the same half of a pair: the file holds more than one LoRA.")
    if not found:
        raise CheckpointError(f"{file.path} holds no tensors: copy or download it again.")

    pairs = {}
    for module, parts in found.items():
        name = f"{module}.weight"
        if len(parts) > 1 and "" in parts:
            raise CheckpointError(f"{file.path} changes {module} as a whole and in parts: the file holds more than one LoRA.")
        if "" in parts:
            pairs[module] = _read_pair(file, parts[""], shapes[name])
        else:
            places = diffusers.parts(name, shapes[name], model)
            pairs[module] = _block_diagonal({part: _read_pair(file, keys, places[part][1]) for part, keys in parts.items()}, places)
    return Lora(model, pairs, str(file.path))


def _spellings(shapes: Shapes) -> dict[str, tuple[str, str]]:
    """Our and diffusers' names of modules, with _ for . as kohya has them → native module, and the part of it that is meant ("": all)."""
    found = {}
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) > 1:
            module = name.removesuffix(".weight")
            try:
                theirs = diffusers.theirs(name)
            except KeyError:  # diffusers has no such module
                theirs = ()
            found |= {part.removesuffix(".weight").replace(".", "_"): (module, part if len(theirs) > 1 else "") for part in theirs}
            found[module.replace(".", "_")] = (module, "")
    return found


def _parsed(key: str, file: Tensors) -> tuple[str, str]:
    """The module of a tensor, without prefix and with _ for ., and what it is: down, up or alpha."""
    match = KEY.fullmatch(key)
    for pattern, told in FOREIGN:
        if re.search(pattern, key):
            raise CheckpointError(f"{file.path}: {key} {told}")
    if match is None:
        raise CheckpointError(
            f"{file.path}: {key} is no part of a LoRA, which has pairs of matrices and their alpha: take it out of the file."
        )
    module = match[1]
    for prefix in PREFIXES:
        module = module.removeprefix(prefix)
    return module.replace(".", "_"), SIDES[match[2] or match[3]]


def _read_pair(file: Tensors, keys: Mapping[str, str], shape: tuple[int, ...]) -> Pair:
    """The pair for a weight (or a part of one) of `shape`; `keys` has its tensors."""
    for side in ("down", "up"):
        if side not in keys:
            raise CheckpointError(f"{file.path}: {' and '.join(keys.values())} without the pair's {side} matrix: download the file again.")
    values = {side: file[key] for side, key in keys.items()}
    for side, key in keys.items():
        if not finite(values[side]):
            raise CheckpointError(f"{file.path}: {key} holds values that are not finite: its training failed, so use another LoRA.")
    if "alpha" in keys and values["alpha"].size != 1:
        raise CheckpointError(f"{file.path}: {keys['alpha']} is {list(values['alpha'].shape)}, not one number: download the file again.")
    rank = values["down"].shape[0] if values["down"].ndim else 0
    flat = {"down": (rank, math.prod(shape[1:])), "up": (shape[0], rank)}
    for side, expected in flat.items():
        given = values[side].shape
        if rank < 1 or (*given[:1], math.prod(given[1:])) != expected:
            raise CheckpointError(
                f"{file.path}: {keys[side]} is {list(given)}, where a LoRA of rank {rank} for weights of {list(shape)} has "
                f"{list(expected)}: give the model that the LoRA is for."
            )
    down, up = (values[side].astype(np.float32).reshape(flat[side]) for side in flat)
    return Pair(down, up, float(values["alpha"].reshape(())) / rank if "alpha" in keys else 1.0)


def _block_diagonal(parts: Mapping[str, Pair], places: Mapping[str, tuple[slice, tuple[int, ...]]]) -> Pair:
    """One pair for parts that lie one below the other; parts that are not there change nothing."""
    rows = max(place.stop for place, _ in places.values())
    ups = []
    for name, pair in parts.items():
        ups.append(np.zeros((rows, len(pair.down)), np.float32))
        ups[-1][places[name][0]] = np.float32(pair.scale) * pair.up
    return Pair(np.concatenate([pair.down for pair in parts.values()]), np.concatenate(ups, axis=1))


def write(path: str | Path, lora: Lora, names: str = "peft", dtype: str = "bfloat16"):
    """Writes a LoRA whole or not at all, with alpha = scale · rank, by which every reader finds the same strength.

    names: peft (`diffusion_model.X.lora_A.weight`: ComfyUI, ai-toolkit, diffusion-pipe) or kohya (`lora_unet_X.lora_down.weight`).
    dtype: float32, bfloat16 or float16; alpha is float32. Raises CheckpointError.
    """
    if names not in NAMINGS:
        raise CheckpointError(f"There is no naming {names!r} of LoRAs: the namings are {', '.join(NAMINGS)}.")
    prefix, dot, *sides = NAMINGS[names]
    shapes = native.layout(lora.model)[0]
    tensors: dict[str, np.ndarray] = {}
    for module, (down, up, scale) in lora.pairs.items():
        theirs, kernel = prefix + module.replace(".", dot), shapes[f"{module}.weight"][2:]  # of a convolution
        shaped = down.reshape(len(down), -1, *kernel), up.reshape(*up.shape, *[1] * len(kernel))
        tensors |= {f"{theirs}.{side}.weight": values for side, values in zip(sides, shaped)}
        tensors[f"{theirs}.alpha"] = np.asarray(scale * len(down), np.float32)
    dtypes = {key: DTYPES["float32" if key.endswith(".alpha") else dtype] for key in tensors}
    ranks = sorted({len(pair.down) for pair in lora.pairs.values()})
    metadata = {"format": "pt", "rank": ", ".join(map(str, ranks)), BASE_KEY: json.dumps(config.to_dict(lora.model))}
    write_safetensors(path, {key: values.shape for key, values in tensors.items()}, dtypes, tensors.__getitem__, metadata)


# --- merging ----------------------------------------------------------------------------------------------------------


def merged(checkpoint: Checkpoint, lora: Lora, strength: float = 1.0) -> Checkpoint:
    """`checkpoint` with `strength` times the LoRA in its weights; the opposite strength takes it out again, but for rounding.

    Computed in float32 when a tensor is asked for, and rounded to the tensor's own type. A tensor whose stored type is quantised
    (fp8, int8, Q8_0, …) becomes BF16, in `dtypes` too: rounded to so few bits, most of a LoRA would be lost. Raises
    CheckpointError when the LoRA is for another model, and, as the tensor is read, for sums that its type cannot hold.
    """
    _check(lora, checkpoint.model)
    dtypes = dict(checkpoint.dtypes)
    for module in lora.pairs:
        name = f"{module}.weight"
        dtypes[name] = dtypes[name] if dtypes[name] in ("F64", "F32", "F16") else "BF16"

    def tensor(name: str) -> np.ndarray:
        values = checkpoint.tensor(name)
        pair = lora.pairs.get(name.removesuffix(".weight"))
        if pair is None:
            return values
        return cast(values.astype(np.float32) + pair.matrix(strength).reshape(values.shape), CODES[dtypes[name]], name)

    origin = f"{checkpoint.origin} + {strength:g} · {lora.origin}"
    return replace(checkpoint, tensor=tensor, dtypes=dtypes, origin=origin, metadata=without_loss(checkpoint.metadata))


def _check(lora: Lora, model: config.Model):
    """Raises CheckpointError when `model` has not the modules of the LoRA, in the same sizes."""
    shapes = native.layout(model)[0]
    for module, pair in lora.pairs.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None or (len(pair.up), pair.down.shape[1]) != (shape[0], math.prod(shape[1:])):
            raise CheckpointError(
                f"{lora.origin} changes {module} of {len(pair.up)} × {pair.down.shape[1]} weights, which this model has not: "
                "give the model that the LoRA is for."
            )


# --- sampling with the weights as they are ----------------------------------------------------------------------------


class Place(NamedTuple):
    """What is added to one block of a leaf (or to all of it): up · down in the native tensor's layout."""

    source: native.Source
    shape: tuple[int, ...]  # of the native tensor
    down: Float32[np.ndarray, "rank in"]
    up: Float32[np.ndarray, "out rank"]  # times strength and scale


def applied(params: Params, model: config.Model, loras: Iterable[tuple[Lora, float]]) -> Params:
    """`params` with LoRAs of given strengths, for sampling.

    The blocks' matrices, arrays or Quantised, stay as they are in memory and become `Adapted`; the few matrices outside of the
    blocks are changed. To change strengths, call this again with the same `params`. Raises CheckpointError when a LoRA is for
    another model, and ValueError when `params` have LoRAs already.
    """
    parts: dict[str, list[tuple[Pair, float]]] = {}
    for lora, strength in loras:
        _check(lora, model)
        for module, pair in lora.pairs.items():
            parts.setdefault(f"{module}.weight", []).append((pair, strength))
    shapes, sources = native.layout(model)
    places: dict[str, list[Place]] = {}
    for name, pairs in parts.items():
        down = np.concatenate([pair.down for pair, _ in pairs])
        up = np.concatenate([np.float32(strength * pair.scale) * pair.up for pair, strength in pairs], axis=1)
        for part in sources[name].row.parts:
            places.setdefault(part.path, []).append(Place(sources[name], shapes[name], down, up))

    def leaf(keys: tuple, expected: jax.ShapeDtypeStruct, value: Any) -> Any:
        path = "/".join(key.key for key in keys)
        if path not in places:
            return value
        if isinstance(value, Adapted):
            raise ValueError("These parameters have LoRAs already: apply all of them at once, to the parameters without.")
        return (_adapted if is_block_matrix(path) else _added)(value, path, expected.shape, places[path])

    return jax.tree_util.tree_map_with_path(leaf, abstract(model), params)


def from_adapters(model: config.Model, adapters: Params, scale: float, origin: str) -> Lora:
    """A trained LoRA from {"down": [blocks, in, rank], "up": [blocks, rank, out]} in place of matrices of the parameter tree.

    A fused matrix of the file format has two in the tree: its pair has both ranks.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, values in native.flatten(adapters).items():
        matrix, _, side = path.rpartition("/")
        found.setdefault(matrix, {})[side] = np.asarray(values, np.float32)
    leaves = native.flatten(abstract(model))
    pairs: dict[str, Pair] = {}
    for name, (row, index) in native.layout(model)[1].items():
        if row.native.endswith(".weight") and any(part.path in found for part in row.parts):
            sides = [
                (found[part.path]["down"][index].T, found[part.path]["up"][index].T)
                if part.path in found
                else _nothing(part.path, leaves[part.path].shape)
                for part in row.parts
            ]
            downs, ups = zip(*sides)
            # What is fused shares its inputs (axis 0) or its outputs (axis 1).
            down, up = (np.concatenate(downs), block_diag(*ups)) if row.axis == 0 else (block_diag(*downs), np.concatenate(ups, axis=1))
            pairs[name.removesuffix(".weight")] = Pair(down, up, scale)
    return Lora(model, pairs, origin)


def _nothing(path: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A pair of rank 0 for a matrix without an addition."""
    inputs = inputs_of(path, shape)
    return np.zeros((0, inputs), np.float32), np.zeros((math.prod(shape[1:]) // inputs, 0), np.float32)


def _adapted(base: Any, path: str, shape: tuple[int, ...], places: Sequence[Place]) -> Any:
    """A leaf of block matrices with the additions beside it; blocks without one, and smaller ranks, have zeros."""
    blocks, *kernel = shape
    inputs = inputs_of(path, shape)
    outputs = math.prod(kernel) // inputs
    rank = max(len(place.down) for place in places)
    downs, ups = np.zeros((blocks, inputs, rank), np.float32), np.zeros((blocks, rank, outputs), np.float32)
    for (row, index), _, down, up in places:
        # A fused matrix has two parts: one is its beginning, the other its end.
        size = inputs if row.axis else outputs
        part = slice(size) if row.parts[0].path == path else slice(-size, None)
        downs[index, :, : len(down)] = (down[:, part] if row.axis else down).T
        ups[index, : len(down)] = (up if row.axis else up[part]).T
    if not ups.any():  # a LoRA of the other part
        return base
    return Adapted(base, jnp.asarray(downs), jnp.asarray(ups))


def _added(value: jax.Array, path: str, shape: tuple[int, ...], places: Sequence[Place]) -> jax.Array:
    total = np.zeros(shape, np.float32)
    for (row, index), native_shape, down, up in places:
        addition = native.TO_TREE[row.parts[0].layout]((up @ down).reshape(native_shape))
        where = ... if index is None else index
        total[where] = addition.reshape(total[where].shape)
    return (value.astype(jnp.float32) + total).astype(value.dtype)


# --- extraction -------------------------------------------------------------------------------------------------------


class Extracted(NamedTuple):
    lora: Lora
    kept: Mapping[str, float]  # share of the squared difference that the LoRA has, by module
    kept_in_all: float  # of all these modules together
    left: Mapping[str, float]  # tensors that differ and are not in the LoRA: |b - a| / |a|


def extract(
    a: Checkpoint,
    b: Checkpoint,
    rank: int,
    modules: Callable[[str], bool] | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Extracted:
    """The LoRA of a rank that comes nearest to b − a (Eckart and Young, 1936), matrix by matrix.

    rank: at least 1; of a smaller matrix its full rank. modules: which native modules; the blocks' matrices when None. The
    approximator and the pixel embedder are never among them. progress: called with the parameters that were compared.
    Raises CheckpointError when the models are not equal, or when there is nothing to extract.
    """
    if changed := config.differences(a.model, b.model, "model."):
        told = ", ".join(f"{key} is {old!r} and {new!r}" for key, (old, new) in changed.items())
        raise CheckpointError(f"{a.origin} and {b.origin} hold different models ({told}): a LoRA is the difference of two equal ones.")
    if rank < 1:
        raise CheckpointError(f"A LoRA of rank {rank} cannot be: give a rank of at least 1.")
    shapes, sources = native.layout(a.model)

    def chosen(name: str) -> bool:
        if not name.endswith(".weight") or len(shapes[name]) < 2 or name.startswith(NEVER_EXTRACTED):
            return False
        return is_block_matrix(sources[name].row.parts[0].path) if modules is None else modules(name.removesuffix(".weight"))

    pairs: dict[str, Pair] = {}
    squares: dict[str, tuple[float, float]] = {}
    left: dict[str, float] = {}
    for name, shape in shapes.items():
        if name in MARKERS:
            continue
        before = a.tensor(name).astype(np.float32)
        difference = cast(b.tensor(name).astype(np.float32) - before, DTYPES["float32"], name)
        if difference.any() and chosen(name):
            module = name.removesuffix(".weight")
            pairs[module], *squares[module] = _nearest(difference.reshape(shape[0], -1), rank)
        elif difference.any():
            left[name] = float(np.linalg.norm(difference) / max(np.linalg.norm(before), np.finfo(np.float32).tiny))
        progress(difference.size)
    if not pairs:
        raise CheckpointError(f"{a.origin} and {b.origin} do not differ in the matrices asked for: there is nothing to extract.")
    kept, everything = np.sum(list(squares.values()), axis=0)
    shares = {module: part / whole for module, (part, whole) in squares.items()}
    return Extracted(Lora(a.model, pairs, f"{b.origin} - {a.origin}"), shares, float(kept / everything), left)


def _nearest(difference: Float32[np.ndarray, "out in"], rank: int) -> tuple[Pair, float, float]:
    """The pair of a rank whose product is nearest, the sum of its squares, and that of the difference.

    The singular vectors of the shorter side are the eigenvectors of the Gram matrix, in float64, and the other factor is the
    projection on them. So the product is exact at full rank, and nothing is divided by small singular values.
    """
    if len(difference) < difference.shape[1]:
        (up, down, _), *squares = _nearest(difference.T, rank)
        return Pair(down.T, up.T), *squares
    matrix = difference.astype(np.float64)
    vectors = np.linalg.eigh(matrix.T @ matrix)[1][:, : -rank - 1 : -1]
    projected = matrix @ vectors
    squares = np.square(projected).sum(axis=0)
    # Both factors get the root of the singular value, as half precision has few exponents.
    roots = np.where(squares > 0, squares, 1) ** 0.25
    pair = Pair((vectors * roots).T.astype(np.float32), (projected / roots).astype(np.float32))
    return pair, float(squares.sum()), float(np.square(matrix).sum())
