"""The native format: the published checkpoints' own tensor names and layouts, and their place in our tree.

One table runs both ways. A row names a native tensor and the leaves that make it up; most have one, the fused matrices of
single blocks have two. `{i}` is the index of a block, which in our tree is axis 0 of a stacked leaf.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from radiance import config
from radiance.model.transformer import Params, abstract
from radiance.weights.files import DTYPES, CheckpointError, Tensors, write_safetensors

Shapes = Mapping[str, tuple[int, ...]]

METADATA_KEY = "radiance.model"
# Empty tensors by which readers know the variant, and the setting that each stands for.
MARKERS = {"__x0__": "prediction", "__32x32__": "patch", "__sequential__": "text_ids"}
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "params.")


class Part(NamedTuple):
    path: str  # in our tree
    layout: str = "same"


class Row(NamedTuple):
    native: str
    parts: tuple[Part, ...]
    axis: int = 0  # along which the parts lie in the native tensor
    when: Callable[[config.Model], bool] = lambda model: True


# layout: our leaf → native tensor. The way back is a reshape to the leaf's shape, after the transposition below.
TO_NATIVE = {
    "same": lambda x: x,
    "flat": lambda x: x.reshape(-1),
    "matrix": lambda x: x.reshape(x.shape[0], -1).T,  # [in, *out] → [out, in]
    "heads": lambda x: x.reshape(-1, x.shape[-1]).T,  # [*in, out] → [out, in]
    "patch": lambda x, side: x.reshape(side, side, -1, x.shape[-1]).transpose(3, 2, 0, 1),  # [p·p·c, d] → [d, c, p, p]
    "conv": lambda x: x.transpose(3, 2, 0, 1),  # [height, width, in, out] → [out, in, height, width]
}
TO_TREE = {
    "same": lambda x: x,
    "flat": lambda x: x,
    "matrix": lambda x: x.T,
    "heads": lambda x: x.T,
    "patch": lambda x: x.transpose(2, 3, 1, 0),
    "conv": lambda x: x.transpose(2, 3, 1, 0),
}


def linear(native: str, path: str, layout: str = "matrix", when: Callable[[config.Model], bool] = lambda model: True) -> list[Row]:
    """Weight and bias of a linear layer or convolution."""
    return [
        Row(f"{native}.weight", (Part(f"{path}/kernel", layout),), when=when),
        Row(f"{native}.bias", (Part(f"{path}/bias", "flat"),), when=when),
    ]


def stream(native: str, path: str) -> list[Row]:
    """One side of the double blocks."""
    block = f"double_blocks.{{i}}.{native}"
    return [
        *linear(f"{block}_attn.qkv", f"double/{path}/attention/qkv"),
        Row(f"{block}_attn.norm.query_norm.scale", (Part(f"double/{path}/attention/query_norm/scale"),)),
        Row(f"{block}_attn.norm.key_norm.scale", (Part(f"double/{path}/attention/key_norm/scale"),)),
        *linear(f"{block}_attn.proj", f"double/{path}/attention/proj", "heads"),
        *linear(f"{block}_mlp.0", f"double/{path}/mlp/linear_in"),
        *linear(f"{block}_mlp.2", f"double/{path}/mlp/linear_out"),
    ]


def embedder(native: str, path: str) -> list[Row]:
    return linear(f"{native}.in_layer", f"modulation/condition/{path}/linear_in") + linear(
        f"{native}.out_layer", f"modulation/condition/{path}/linear_out"
    )


def modulated_by(kind: str) -> Callable[[config.Model], bool]:
    return lambda model: model.modulation == kind


def ends_in(head: str) -> Callable[[config.Model], bool]:
    return lambda model: model.head == head


def offsets(kind: str) -> list[Row]:
    """Learned vectors, which only our own models have."""
    return [
        Row(f"{where}.modulation_{name}", (Part(f"modulation/{path}"),), when=modulated_by(kind))
        for where, name, path in (
            ("double_blocks.{i}", "img", "double_image"),
            ("double_blocks.{i}", "txt", "double_text"),
            ("single_blocks.{i}", "offset", "single"),
            ("final_layer", "offset", "output"),
        )
    ]


TABLE: list[Row] = [
    *linear("img_in_patch", "patch_embed", "patch", when=lambda model: model.patch > 1),
    *linear("img_in", "patch_embed", when=lambda model: model.patch == 1),
    *linear("txt_in", "text_embed"),
    Row("registers", (Part("registers"),)),
    *linear("distilled_guidance_layer.in_proj", "modulation/proj_in"),
    *linear("distilled_guidance_layer.layers.{i}.in_layer", "modulation/layers/linear_in"),
    *linear("distilled_guidance_layer.layers.{i}.out_layer", "modulation/layers/linear_out"),
    Row("distilled_guidance_layer.norms.{i}.scale", (Part("modulation/layers/norm/scale"),)),
    *linear("distilled_guidance_layer.out_proj", "modulation/proj_out"),
    *embedder("time_in", "time"),
    *embedder("guidance_in", "guidance"),
    *embedder("vector_in", "pooled"),
    *linear("double_blocks.{i}.img_mod.lin", "modulation/double_image", when=modulated_by("per_block")),
    *linear("double_blocks.{i}.txt_mod.lin", "modulation/double_text", when=modulated_by("per_block")),
    *linear("single_blocks.{i}.modulation.lin", "modulation/single", when=modulated_by("per_block")),
    *linear("final_layer.adaLN_modulation.1", "modulation/output", when=modulated_by("per_block")),
    *linear("shared_modulation.lin", "modulation/linear", when=modulated_by("shared")),
    *offsets("shared"),
    *offsets("none"),
    *stream("img", "image"),
    *stream("txt", "text"),
    Row("single_blocks.{i}.linear1.weight", (Part("single/attention/qkv/kernel", "matrix"), Part("single/mlp/linear_in/kernel", "matrix"))),
    Row("single_blocks.{i}.linear1.bias", (Part("single/attention/qkv/bias", "flat"), Part("single/mlp/linear_in/bias"))),
    Row("single_blocks.{i}.linear2.weight", (Part("single/attention/proj/kernel", "heads"), Part("single/mlp/linear_out/kernel", "matrix")), axis=1),
    Row("single_blocks.{i}.linear2.bias", (Part("single/mlp/linear_out/bias"),)),
    Row("single_blocks.{i}.norm.query_norm.scale", (Part("single/attention/query_norm/scale"),)),
    Row("single_blocks.{i}.norm.key_norm.scale", (Part("single/attention/key_norm/scale"),)),
    *linear("nerf_image_embedder.embedder.0", "head/embedder"),
    *linear("nerf_blocks.{i}.param_generator", "head/blocks/param_generator"),
    Row("nerf_blocks.{i}.norm.scale", (Part("head/blocks/norm/scale"),)),
    Row("nerf_final_layer_conv.norm.scale", (Part("head/norm/scale"),), when=ends_in("nerf_conv")),
    *linear("nerf_final_layer_conv.conv", "head/conv", "conv"),
    Row("nerf_final_layer.norm.scale", (Part("head/norm/scale"),), when=ends_in("nerf_linear")),
    *linear("nerf_final_layer.linear", "head/linear", when=ends_in("nerf_linear")),
    *linear("final_layer.linear", "head/linear", when=ends_in("linear")),
]  # fmt: skip


# --- the table, for one model -----------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where a native tensor's values lie in our tree."""

    row: Row
    index: int | None  # of the block; None for a tensor that stands alone


def markers(model: config.Model) -> list[str]:
    """The markers of a model."""
    there = (model.prediction == "x0", model.patch == 32 or model.patch_embed == "conv_half", model.text_ids == "sequential")
    return [name for name, yes in zip(MARKERS, there) if yes]


def layout(model: config.Model) -> tuple[dict[str, tuple[int, ...]], dict[str, Source]]:
    """Shapes and sources of all native tensors of `model`, in the published order of names; markers have no source."""
    leaves = flatten(abstract(model))
    shapes: dict[str, tuple[int, ...]] = {name: (0,) for name in markers(model)}
    sources: dict[str, Source] = {}
    covered: set[str] = set()
    for row in TABLE:
        paths = [part.path for part in row.parts]
        if not row.when(model) or any(path not in leaves for path in paths):
            continue
        covered.update(paths)
        stacked = "{i}" in row.native
        if stacked and leaves[paths[0]].shape[0] == 0:
            continue  # a model without blocks of this kind
        join = partial(_join, row, 0 if stacked else None, model=model)
        shape = jax.eval_shape(join, {path: leaves[path] for path in paths}).shape
        for i in range(leaves[paths[0]].shape[0]) if stacked else [None]:
            name = row.native.format(i=i)
            shapes[name], sources[name] = shape, Source(row, i)
    if missing := set(leaves) - covered:
        raise AssertionError(f"The table has no row for {sorted(missing)}.")
    return shapes, sources


def _join(row: Row, index: int | None, leaves: Mapping, *, model: config.Model):
    """The native tensor from our leaves; works on NumPy and (abstract) JAX arrays."""
    xs = []
    for path, kind in row.parts:
        x = leaves[path] if index is None else leaves[path][index]
        xs.append(TO_NATIVE[kind](x, _patch_side(model)) if kind == "patch" else TO_NATIVE[kind](x))
    if len(xs) == 1:
        return xs[0]
    return (np if isinstance(xs[0], np.ndarray) else jax.numpy).concatenate(xs, axis=row.axis)


def _patch_side(model: config.Model) -> int:
    return model.patch // 2 if model.patch_embed == "conv_half" else model.patch


def flatten(tree: Params) -> dict[str, jax.Array]:
    """Leaves by slash-separated path."""
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


# --- reading and writing ----------------------------------------------------------------------------------------------


def read(path: str | Path, model: config.Model | None = None, shardings: Params | None = None) -> tuple[config.Model, Params]:
    """Model and float32 parameters of a native checkpoint, tensor by tensor.

    model: what the file must hold; found from names, shapes and metadata when None. shardings: a tree like the parameters,
    to which they are placed; one device when None. Raises CheckpointError that names every tensor that is missing, not
    expected, or of another shape.
    """
    file = Tensors(path)
    names = canonical_names(file.shapes)
    shapes = {name: file.shapes[key] for name, key in names.items()}
    model = detect(shapes, file.metadata, file.path) if model is None else model
    if METADATA_KEY in file.metadata:
        theirs = detect(shapes, file.metadata, file.path)
        if changed := config.differences(theirs, model, "model."):
            told = ", ".join(f"{key} is {old!r} there, {new!r} here" for key, (old, new) in changed.items())
            raise CheckpointError(f"{path} holds another model ({told}): make the models equal.")
    for marker, setting in MARKERS.items():
        if marker in shapes and marker not in markers(model):
            raise CheckpointError(f"{path} is marked {marker}, but a model without that was asked for: set model.{setting}.")
    return model, from_native(model, shapes, lambda name: file[names[name]], file.path, shardings)


def from_native(
    model: config.Model, shapes: Shapes, tensor: Callable[[str], np.ndarray], origin: object, shardings: Params | None = None
) -> Params:
    """Our tree from native tensors; `tensor(name)` reads one."""
    expected, sources = layout(model)
    check_shapes(expected, shapes, origin)
    skeleton = abstract(model)
    leaves = flatten(skeleton)
    placed = flatten(shardings) if shardings is not None else dict.fromkeys(leaves)

    by_path: dict[str, list[tuple[str, Source]]] = {path: [] for path in leaves}
    for name, source in sources.items():
        for part in source.row.parts:
            by_path[part.path].append((name, source))

    def leaf(path: str) -> jax.Array:
        out = np.empty(leaves[path].shape, np.float32)
        for name, (row, index) in by_path[path]:
            value = _split(row, path, tensor(name), expected[name], leaves)
            out[... if index is None else index] = value.reshape(out.shape if index is None else out.shape[1:])
        if not np.isfinite(out).all():
            raise CheckpointError(
                f"{origin}: {by_path[path][0][0]} (or one of its stack) holds values that are not finite: the file is damaged."
            )
        if placed[path] is None:
            return jax.numpy.asarray(out)
        return jax.make_array_from_callback(out.shape, placed[path], lambda part: out[part])

    values = {path: leaf(path) for path in leaves}
    return jax.tree_util.tree_unflatten(jax.tree.structure(skeleton), list(values.values()))


def _split(row: Row, path: str, tensor: np.ndarray, shape: tuple[int, ...], leaves: Mapping) -> np.ndarray:
    """The part of a native tensor that belongs to `path`, in our order of axes."""
    sizes = [
        math.prod(leaves[p].shape[1:] if "{i}" in row.native else leaves[p].shape) * shape[row.axis] // math.prod(shape)
        for p, _ in row.parts
    ]
    at = [p for p, _ in row.parts].index(path)
    if len(row.parts) > 1:
        tensor = np.take(tensor, range(sum(sizes[:at]), sum(sizes[: at + 1])), axis=row.axis)
    return TO_TREE[row.parts[at].layout](tensor)


def write(path: str | Path, model: config.Model, params: Params, dtype: str = "float32", metadata: Mapping[str, str] | None = None):
    """Writes `params` under native names, markers first, tensor by tensor.

    dtype: float32, bfloat16 or float16. As in the published files, the pixel embedder and the markers stay float32.
    """
    shapes, sources = layout(model)
    leaves = flatten(params)

    def tensor(name: str) -> np.ndarray:
        if name not in sources:
            return np.zeros(0, np.float32)
        row, index = sources[name]
        parts = {p: np.asarray(leaves[p] if index is None else leaves[p][index]) for p, _ in row.parts}
        return _join(row, None, parts, model=model)

    dtypes = {n: DTYPES["float32" if n not in sources or n.startswith("nerf_image_embedder.") else dtype] for n in shapes}
    write_safetensors(path, shapes, dtypes, tensor, {METADATA_KEY: json.dumps(config.to_dict(model)), **(metadata or {})})


def check_shapes(expected: Shapes, found: Shapes, origin: object):
    """Raises one CheckpointError that names every difference; markers may be there or not."""
    expected, found = ({n: s for n, s in shapes.items() if n not in MARKERS} for shapes in (expected, found))
    problems = []
    if missing := [n for n in expected if n not in found]:
        problems.append(f"missing {', '.join(missing)}")
    if extra := [n for n in found if n not in expected]:
        problems.append(f"not expected {', '.join(extra)}")
    if wrong := [f"{n} is {list(found[n])}, not {list(expected[n])}" for n in expected if n in found and found[n] != expected[n]]:
        problems.append(f"of another shape: {'; '.join(wrong)}")
    if problems:
        raise CheckpointError(f"{origin} does not hold this model: {'. '.join(problems)}.")


def canonical_names(keys: Mapping[str, object]) -> dict[str, str]:
    """Native name → key in the file: known prefixes are taken off, and norms that newer tools call `.weight` are `.scale`."""
    prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in keys)), "")
    names = {}
    for key in keys:
        if not key.startswith(prefix) and key not in MARKERS:
            continue
        name = key.removeprefix(prefix)
        parts = name.split(".")
        if len(parts) > 1 and parts[-1] == "weight" and (parts[-2].endswith("norm") or parts[-3:-2] == ["norms"]):
            name = name.removesuffix("weight") + "scale"
        if name in names:
            raise CheckpointError(f"The tensors {names[name]} and {key} are both {name}: the file holds more than one model.")
        names[name] = key
    return names


# --- which model a file holds -----------------------------------------------------------------------------------------


def detect(shapes: Shapes, metadata: Mapping[str, str] | None = None, origin: object = "The checkpoint", **known) -> config.Model:
    """The model whose native tensors have these names and shapes.

    Our own exports say it in their metadata. `known` gives fields that shapes cannot tell (rope_axes, rope_theta, patch, …).
    Raises CheckpointError when the tensors are not those of a Chroma, Radiance or FLUX model.
    """
    if METADATA_KEY in (metadata or {}):
        try:
            return replace(config.from_json(config.Model, metadata[METADATA_KEY]), **known)
        except config.ConfigError as error:
            raise CheckpointError(f"{origin} describes its model in a way this version does not know. {error}") from None
    if "txt_in.weight" not in shapes or not any(n.startswith(("double_blocks.0.", "single_blocks.0.")) for n in shapes):
        raise CheckpointError(f"{origin} is not a Chroma, Radiance or FLUX checkpoint: it has no txt_in.weight or no blocks.")
    try:
        return _detect(shapes, known)
    except KeyError as error:
        raise CheckpointError(f"{origin} looks like a Chroma checkpoint, but has no {error.args[0]}: the file is not whole.") from None
    except config.ConfigError as error:
        raise CheckpointError(f"{origin}: the sizes of its tensors do not make a model. {error}") from None
    except (ValueError, IndexError):  # a tensor with more or fewer axes than it should have
        raise CheckpointError(f"{origin} has the names of a Chroma checkpoint, but its tensors are of other kinds (quantised?).") from None


def _detect(shapes: Shapes, known: Mapping) -> config.Model:
    def count(pattern: str) -> int:
        return next(i for i in range(len(shapes) + 1) if pattern.format(i=i) not in shapes)

    doubles, singles = count("double_blocks.{i}.img_attn.qkv.weight"), count("single_blocks.{i}.linear1.weight")
    hidden, text_dim = shapes["txt_in.weight"]
    norm = "double_blocks.0.img_attn.norm" if doubles else "single_blocks.0.norm"
    head_dim = shapes[f"{norm}.query_norm.scale"][0]
    mlp = shapes["double_blocks.0.img_mlp.0.weight"][0] if doubles else shapes["single_blocks.0.linear1.weight"][0] - 3 * hidden
    if head_dim != 128 and "rope_axes" not in known:
        raise config.ConfigError(f"Heads of {head_dim} channels are in no published model, and the file does not say how they are rotated.")
    fields = dict(
        hidden=hidden, text_dim=text_dim, heads=hidden // head_dim, double_blocks=doubles, single_blocks=singles,
        mlp_ratio=mlp / hidden, rope_axes=(16, 56, 56), text_ids="sequential" if "__sequential__" in shapes else "zero",
        prediction="x0" if "__x0__" in shapes else "velocity", registers=shapes.get("registers", (0,))[0],
    )  # fmt: skip

    if "distilled_guidance_layer.in_proj.weight" in shapes:
        approximator_hidden, approximator_dim = shapes["distilled_guidance_layer.in_proj.weight"]
        depth = count("distilled_guidance_layer.layers.{i}.in_layer.weight")
        fields |= dict(approximator_hidden=approximator_hidden, approximator_dim=approximator_dim, approximator_depth=depth)
    else:
        fields |= dict(
            modulation="per_block", masking="off", guidance_embed="guidance_in.in_layer.weight" in shapes,
            pooled_dim=shapes.get("vector_in.in_layer.weight", (0, 0))[1],
        )  # fmt: skip

    if "img_in.weight" in shapes:
        return config.Model(**(fields | dict(patch=1, head="linear", channels=shapes["img_in.weight"][1]) | known))
    _, channels, kernel, _ = shapes["img_in_patch.weight"]
    patch = known.get("patch", 32 if "__32x32__" in shapes and kernel == 16 else kernel)
    fields |= dict(channels=channels, patch=patch, patch_embed="conv" if patch == kernel else "conv_half")
    if "nerf_image_embedder.embedder.0.weight" in shapes:
        nerf_hidden, features = shapes["nerf_image_embedder.embedder.0.weight"]
        generated = shapes["nerf_blocks.0.param_generator.weight"][0]
        fields |= dict(
            head="nerf_conv" if "nerf_final_layer_conv.norm.scale" in shapes else "nerf_linear",
            nerf_hidden=nerf_hidden, nerf_freqs=math.isqrt(features - channels), nerf_depth=count("nerf_blocks.{i}.param_generator.weight"),
            nerf_mlp_ratio=generated // (3 * nerf_hidden**2),
        )  # fmt: skip
    else:
        fields["head"] = "linear"
    return config.Model(**(fields | known))
