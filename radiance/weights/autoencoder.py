"""Files of FLUX's autoencoder: the published one (`ae.safetensors`, in the names of latent diffusion) and diffusers' `AutoencoderKL`.

One table runs both ways. In it `{i}` is a level, 0 at the picture's resolution, `{k}` the same counted from the other end, as
diffusers numbers the decoder's, and `{j}` a block of the level.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from radiance.model.autoencoder import Autoencoder, abstract
from radiance.model.transformer import Params
from radiance.sections import ConfigError
from radiance.weights.detect import check_shapes
from radiance.weights.files import DTYPES, CheckpointError, Shapes, Tensors, finite, open_tensors, replacing, write_safetensors
from radiance.weights.native import flatten

Layout = Literal["flux", "diffusers"]

METADATA_KEY = "radiance.autoencoder"
PREFIXES = ("first_stage_model.", "vae.")
# By this block a layout is known, and levels and blocks are counted.
BLOCK = {"flux": "encoder.down.{i}.block.{j}", "diffusers": "encoder.down_blocks.{i}.resnets.{j}"}
# What shapes do not tell: its key in diffusers' config.json, which our metadata repeats, and our field.
CONFIG = {"norm_num_groups": "groups", "shift_factor": "shift", "scaling_factor": "scale"}


class Row(NamedTuple):
    path: str  # in our tree
    flux: str
    diffusers: str
    layer: Literal["conv", "norm", "linear"] = "conv"


def block(path: str, flux: str, diffusers: str) -> list[Row]:
    """A residual block; only one that changes the width has a shortcut."""
    return [
        Row(f"{path}/norm1", f"{flux}.norm1", f"{diffusers}.norm1", "norm"),
        Row(f"{path}/conv1", f"{flux}.conv1", f"{diffusers}.conv1"),
        Row(f"{path}/norm2", f"{flux}.norm2", f"{diffusers}.norm2", "norm"),
        Row(f"{path}/conv2", f"{flux}.conv2", f"{diffusers}.conv2"),
        Row(f"{path}/shortcut", f"{flux}.nin_shortcut", f"{diffusers}.conv_shortcut"),
    ]


def half(name: str) -> list[Row]:
    """What encoder and decoder both have."""
    path, flux, diffusers = f"{name}/middle/attention", f"{name}.mid.attn_1", f"{name}.mid_block.attentions.0"
    return [
        Row(f"{name}/conv_in", f"{name}.conv_in", f"{name}.conv_in"),
        *block(f"{name}/middle/block1", f"{name}.mid.block_1", f"{name}.mid_block.resnets.0"),
        Row(f"{path}/norm", f"{flux}.norm", f"{diffusers}.group_norm", "norm"),
        Row(f"{path}/query", f"{flux}.q", f"{diffusers}.to_q", "linear"),
        Row(f"{path}/key", f"{flux}.k", f"{diffusers}.to_k", "linear"),
        Row(f"{path}/value", f"{flux}.v", f"{diffusers}.to_v", "linear"),
        Row(f"{path}/proj", f"{flux}.proj_out", f"{diffusers}.to_out.0", "linear"),
        *block(f"{name}/middle/block2", f"{name}.mid.block_2", f"{name}.mid_block.resnets.1"),
        Row(f"{name}/norm_out", f"{name}.norm_out", f"{name}.conv_norm_out", "norm"),
        Row(f"{name}/conv_out", f"{name}.conv_out", f"{name}.conv_out"),
    ]


TABLE: list[Row] = [
    *half("encoder"),
    *block("encoder/levels/{i}/blocks/{j}", BLOCK["flux"], BLOCK["diffusers"]),
    Row("encoder/levels/{i}/downsample", "encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsamplers.0.conv"),
    *half("decoder"),
    *block("decoder/levels/{i}/blocks/{j}", "decoder.up.{i}.block.{j}", "decoder.up_blocks.{k}.resnets.{j}"),
    Row("decoder/levels/{i}/upsample", "decoder.up.{i}.upsample.conv", "decoder.up_blocks.{k}.upsamplers.0.conv"),
]

# our leaf → a file's tensor, and back
TO_FILE: dict[str, Callable] = {
    "vector": lambda x: x,
    "matrix": lambda x: x.T,  # [in, out] → [out, in]
    "pointwise": lambda x: x.T[:, :, None, None],  # the same as a 1×1 convolution
    "conv": lambda x: x.transpose(3, 2, 0, 1),  # [height, width, in, out] → [out, in, height, width]
}
TO_TREE: dict[str, Callable] = {
    "vector": lambda x: x,
    "matrix": lambda x: x.T,
    "pointwise": lambda x: x[:, :, 0, 0].T,
    "conv": lambda x: x.transpose(2, 3, 1, 0),
}


class Source(NamedTuple):
    path: str  # of the leaf
    kind: str  # of TO_FILE and TO_TREE


def sources(sizes: Autoencoder, layout: Layout) -> dict[str, Source]:
    """The leaf that each tensor of a file holds."""
    leaves, levels = flatten(abstract(sizes)), len(sizes.multipliers)
    kinds = {"conv": "conv", "norm": "vector", "linear": "pointwise" if layout == "flux" else "matrix"}
    found: dict[str, Source] = {}
    for row in TABLE:
        for i in range(levels if "{i}" in row.path else 1):
            for j in range(sizes.blocks + 1 if "{j}" in row.path else 1):
                path, name = (text.format(i=i, j=j, k=levels - 1 - i) for text in (row.path, getattr(row, layout)))
                if f"{path}/bias" in leaves:
                    found[f"{name}.weight"] = Source(f"{path}/{'scale' if row.layer == 'norm' else 'kernel'}", kinds[row.layer])
                    found[f"{name}.bias"] = Source(f"{path}/bias", "vector")
    if missing := set(leaves) - {source.path for source in found.values()}:
        raise AssertionError(f"The table has no row for {sorted(missing)}.")
    return found


def layout_shapes(sizes: Autoencoder, layout: Layout) -> Shapes:
    """Names and shapes of all tensors of a file."""
    leaves, nothing = flatten(abstract(sizes)), np.float32(0)
    return {
        name: TO_FILE[kind](np.broadcast_to(nothing, leaves[path].shape)).shape for name, (path, kind) in sources(sizes, layout).items()
    }


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> tuple[Autoencoder, Params]:
    """Sizes and float32 parameters of an autoencoder's file, or of diffusers' folder of one or of a pipeline.

    What shapes do not tell (groups, shift, scale) stands in our metadata or in diffusers' config.json; without them it is FLUX's.
    Raises CheckpointError that names every tensor that is missing, not expected, or of another shape, and for values that are
    not finite.
    """
    folder = Path(path) / "vae"
    file = open_tensors(folder if folder.is_dir() else path)
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in file.shapes)), "")
    shapes = {key.removeprefix(prefix): shape for key, shape in file.shapes.items() if key.startswith(prefix)}
    sizes, layout = detect(shapes, file)
    check_shapes(layout_shapes(sizes, layout), shapes, file.path)
    by_path = {source.path: (name, source.kind) for name, source in sources(sizes, layout).items()}

    def leaf(name: str, kind: str) -> jax.Array:
        values = file[prefix + name]
        if not finite(values):
            raise CheckpointError(f"{file.path}: {name} holds values that are not finite: the file is damaged.")
        return jnp.asarray(TO_TREE[kind](values).astype(np.float32))

    skeleton = abstract(sizes)
    return sizes, jax.tree.unflatten(jax.tree.structure(skeleton), [leaf(*by_path[path]) for path in flatten(skeleton)])


def detect(shapes: Shapes, file: Tensors) -> tuple[Autoencoder, Layout]:
    """Sizes and layout of a file whose tensors, without their prefix, have these shapes."""
    layout = next((layout for layout, name in BLOCK.items() if f"{name.format(i=0, j=0)}.conv1.weight" in shapes), None)
    if layout is None:
        raise CheckpointError(
            f"{file.path} is not an autoencoder of FLUX's kind: it has no {' or '.join(BLOCK.values()).format(i=0, j=0)}."
        )

    def count(pattern: str) -> int:
        return next(n for n in range(len(shapes) + 1) if pattern.format(n) not in shapes)

    conv = f"{BLOCK[layout]}.conv1.weight"
    try:
        width = shapes["encoder.conv_in.weight"][0]
        widths = [shapes[conv.format(i=i, j=0)][0] for i in range(count(conv.format(i="{}", j=0)))]
        if any(w % width for w in widths):
            raise ConfigError(f"Its levels have {widths} channels, which are not multiples of the first layer's {width}.")
        known = dict(
            latent_channels=shapes["decoder.conv_in.weight"][1],
            width=width,
            multipliers=tuple(w // width for w in widths),
            blocks=count(conv.format(i=0, j="{}")),
        )
        return Autoencoder(**known, **_told(file, layout)), layout
    except KeyError as error:
        raise CheckpointError(f"{file.path} looks like an autoencoder, but has no {error.args[0]}: the file is not whole.") from None
    except ConfigError as error:
        raise CheckpointError(f"{file.path} holds an autoencoder that this version cannot run. {error}") from None
    except (IndexError, ZeroDivisionError):  # a convolution with fewer axes than it should have
        raise CheckpointError(f"{file.path} has the names of an autoencoder, but its tensors are of other kinds.") from None


def _told(file: Tensors, layout: Layout) -> dict[str, Any]:
    """What our metadata or diffusers' config.json beside the weights says."""
    beside, text = file.path.parent / "config.json", file.metadata.get(METADATA_KEY)
    if text is None and (layout != "diffusers" or not beside.is_file()):
        return {}
    try:
        stored = dict(json.loads(beside.read_text() if text is None else text))
    except (ValueError, TypeError):
        raise ConfigError(f"{beside if text is None else 'Its metadata'} is not a config of diffusers.") from None
    return {ours: stored[theirs] or 0.0 for theirs, ours in CONFIG.items() if theirs in stored}  # null is 0 to diffusers


# --- writing ----------------------------------------------------------------------------------------------------------


def write(path: str | Path, sizes: Autoencoder, params: Params, layout: Layout = "flux", dtype: str = "float32"):
    """Writes `params` in that layout, tensor by tensor.

    path: a .safetensors file, or (for diffusers alone) a folder, which `AutoencoderKL.from_pretrained` then opens. dtype: float32,
    bfloat16 or float16. Raises CheckpointError that names every leaf that is missing, not expected, or of another shape.
    """
    path, leaves = Path(path), flatten(params)
    check_shapes({p: x.shape for p, x in flatten(abstract(sizes)).items()}, {p: x.shape for p, x in leaves.items()}, "The tree to write")
    if path.suffix != ".safetensors":
        if layout != "diffusers":
            raise CheckpointError(f"{path} is a folder, which only the layout diffusers has: give a name that ends in .safetensors.")
        with replacing(path / "config.json") as part:
            part.write_text(json.dumps(class_config(sizes), indent=2) + "\n")
        path = path / "diffusion_pytorch_model.safetensors"

    found, shapes = sources(sizes, layout), layout_shapes(sizes, layout)

    def tensor(name: str) -> np.ndarray:
        return TO_FILE[found[name].kind](np.asarray(leaves[found[name].path]))

    metadata = {METADATA_KEY: json.dumps(class_config(sizes)), "format": "pt"}
    write_safetensors(path, shapes, dict.fromkeys(shapes, DTYPES[dtype]), tensor, metadata)


def class_config(sizes: Autoencoder) -> dict[str, Any]:
    """The config.json that `AutoencoderKL.from_pretrained` reads."""
    levels = len(sizes.multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.38.0",
        "act_fn": "silu",
        "block_out_channels": list(sizes.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": sizes.latent_channels,
        "layers_per_block": sizes.blocks,
        "mid_block_add_attention": True,
        "sample_size": 1024,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **{theirs: getattr(sizes, ours) for theirs, ours in CONFIG.items()},
    }
