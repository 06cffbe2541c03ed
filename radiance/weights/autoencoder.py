"""Read and write autoencoder files: FLUX's `ae.safetensors` and diffusers' `AutoencoderKL`.

One table maps names in both directions. Its patterns have three placeholders. `{i}` is a level: 0
is at the image's resolution. `{j}` is a block of the level. `{k}` is the level counted from the
other end, as diffusers numbers the levels of the decoder.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from radiance.base.errors import CheckpointError, ConfigError
from radiance.base.files import replace_atomically
from radiance.base.trees import flatten_tree
from radiance.model.autoencoder import Autoencoder, make_abstract_autoencoder
from radiance.model.transformer import Params
from radiance.weights.detect import check_shapes
from radiance.weights.names import strip_prefix
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors
from radiance.weights.tensors import DTYPES, Tensors, TensorShapes, is_finite

AutoencoderLayout = Literal["flux", "diffusers"]

AUTOENCODER_METADATA_KEY = "radiance.autoencoder"
SIGNATURE_TENSOR = "encoder.conv_in.weight"  # every autoencoder has it
# The names of these blocks identify a layout, and count its levels and blocks.
BLOCK_NAMES = {
    "flux": "encoder.down.{i}.block.{j}",
    "diffusers": "encoder.down_blocks.{i}.resnets.{j}",
}
# Settings that shapes do not give: key in config.json of diffusers and in our metadata → our field.
CONFIG_FIELDS = {"norm_num_groups": "groups", "shift_factor": "shift", "scaling_factor": "scale"}


class AutoencoderRule(NamedTuple):
    """A layer's path in our tree and its names in the two layouts."""

    path: str
    flux: str
    diffusers: str
    layer_type: Literal["conv", "norm", "linear"] = "conv"


class AutoencoderTensor(NamedTuple):
    """The leaf that a tensor of a file holds."""

    path: str
    transform: str  # key of LEAF_TO_TENSOR and TENSOR_TO_LEAF


def residual_block_rules(path: str, flux: str, diffusers: str) -> list[AutoencoderRule]:
    """Return the rules of a residual block.

    The shortcut exists only in blocks that change the number of channels.

    Args:
        path: Path of the block in our tree.
        flux: Name of the block in FLUX's file.
        diffusers: Name of the block in diffusers' file.
    """
    return [
        AutoencoderRule(f"{path}/norm1", f"{flux}.norm1", f"{diffusers}.norm1", "norm"),
        AutoencoderRule(f"{path}/conv1", f"{flux}.conv1", f"{diffusers}.conv1"),
        AutoencoderRule(f"{path}/norm2", f"{flux}.norm2", f"{diffusers}.norm2", "norm"),
        AutoencoderRule(f"{path}/conv2", f"{flux}.conv2", f"{diffusers}.conv2"),
        AutoencoderRule(f"{path}/shortcut", f"{flux}.nin_shortcut", f"{diffusers}.conv_shortcut"),
    ]


def shared_layer_rules(name: Literal["encoder", "decoder"]) -> list[AutoencoderRule]:
    """Return the rules of the layers that encoder and decoder share.

    Args:
        name: Name of the network in both layouts and in our tree.
    """
    path, middle = f"{name}/middle", f"{name}.mid_block"
    attention, flux, diffusers = (
        f"{path}/attention",
        f"{name}.mid.attn_1",
        f"{middle}.attentions.0",
    )
    return [
        AutoencoderRule(f"{name}/conv_in", f"{name}.conv_in", f"{name}.conv_in"),
        *residual_block_rules(f"{path}/block1", f"{name}.mid.block_1", f"{middle}.resnets.0"),
        AutoencoderRule(f"{attention}/norm", f"{flux}.norm", f"{diffusers}.group_norm", "norm"),
        AutoencoderRule(f"{attention}/query", f"{flux}.q", f"{diffusers}.to_q", "linear"),
        AutoencoderRule(f"{attention}/key", f"{flux}.k", f"{diffusers}.to_k", "linear"),
        AutoencoderRule(f"{attention}/value", f"{flux}.v", f"{diffusers}.to_v", "linear"),
        AutoencoderRule(f"{attention}/proj", f"{flux}.proj_out", f"{diffusers}.to_out.0", "linear"),
        *residual_block_rules(f"{path}/block2", f"{name}.mid.block_2", f"{middle}.resnets.1"),
        AutoencoderRule(f"{name}/norm_out", f"{name}.norm_out", f"{name}.conv_norm_out", "norm"),
        AutoencoderRule(f"{name}/conv_out", f"{name}.conv_out", f"{name}.conv_out"),
    ]


AUTOENCODER_TABLE: list[AutoencoderRule] = [
    *shared_layer_rules("encoder"),
    *residual_block_rules(
        "encoder/levels/{i}/blocks/{j}", BLOCK_NAMES["flux"], BLOCK_NAMES["diffusers"]
    ),
    AutoencoderRule(
        "encoder/levels/{i}/downsample",
        "encoder.down.{i}.downsample.conv",
        "encoder.down_blocks.{i}.downsamplers.0.conv",
    ),
    *shared_layer_rules("decoder"),
    *residual_block_rules(
        "decoder/levels/{i}/blocks/{j}",
        "decoder.up.{i}.block.{j}",
        "decoder.up_blocks.{k}.resnets.{j}",
    ),
    AutoencoderRule(
        "decoder/levels/{i}/upsample",
        "decoder.up.{i}.upsample.conv",
        "decoder.up_blocks.{k}.upsamplers.0.conv",
    ),
]

# Transforms from our leaf to a tensor of a file, and back.
LEAF_TO_TENSOR: dict[str, Callable[[Any], Any]] = {
    "vector": lambda x: x,
    "matrix": lambda x: x.T,  # [in, out] → [out, in]
    "pointwise": lambda x: x.T[:, :, None, None],  # the same matrix as a 1×1 convolution
    # [height, width, in, out] → [out, in, height, width]
    "conv": lambda x: x.transpose(3, 2, 0, 1),
}
TENSOR_TO_LEAF: dict[str, Callable[[Any], Any]] = {
    "vector": lambda x: x,
    "matrix": lambda x: x.T,
    "pointwise": lambda x: x[:, :, 0, 0].T,
    "conv": lambda x: x.transpose(2, 3, 1, 0),
}


def locate_tensors(sizes: Autoencoder, layout: AutoencoderLayout) -> dict[str, AutoencoderTensor]:
    """Return the leaf of each tensor of a file, by name.

    Args:
        sizes: Sizes of the autoencoder.
        layout: Layout of the file.
    """
    leaves, num_levels = flatten_tree(make_abstract_autoencoder(sizes)), len(sizes.multipliers)
    transforms = {
        "conv": "conv",
        "norm": "vector",
        "linear": "pointwise" if layout == "flux" else "matrix",
    }
    tensors: dict[str, AutoencoderTensor] = {}
    for rule in AUTOENCODER_TABLE:
        pattern = rule.flux if layout == "flux" else rule.diffusers
        for i in range(num_levels if "{i}" in rule.path else 1):
            for j in range(sizes.blocks + 1 if "{j}" in rule.path else 1):
                path, name = (
                    text.format(i=i, j=j, k=num_levels - 1 - i) for text in (rule.path, pattern)
                )
                if f"{path}/bias" not in leaves:  # a level or a block without this layer
                    continue
                weight_path = f"{path}/{'scale' if rule.layer_type == 'norm' else 'kernel'}"
                tensors[f"{name}.weight"] = AutoencoderTensor(
                    weight_path, transforms[rule.layer_type]
                )
                tensors[f"{name}.bias"] = AutoencoderTensor(f"{path}/bias", "vector")
    if missing := set(leaves) - {tensor.path for tensor in tensors.values()}:
        raise AssertionError(f"The table has no row for {sorted(missing)}.")
    return tensors


def autoencoder_shapes(sizes: Autoencoder, layout: AutoencoderLayout) -> TensorShapes:
    """Return the names and shapes of all tensors of a file.

    Args:
        sizes: Sizes of the autoencoder.
        layout: Layout of the file.
    """
    leaves, zero = flatten_tree(make_abstract_autoencoder(sizes)), np.float32(0)
    return {
        name: LEAF_TO_TENSOR[transform](np.broadcast_to(zero, leaves[path].shape)).shape
        for name, (path, transform) in locate_tensors(sizes, layout).items()
    }


# --- reading --------------------------------------------------------------------------------------


def read_autoencoder(path: str | Path) -> tuple[Autoencoder, Params]:
    """Read an autoencoder.

    Groups, shift and scale come from our metadata or from diffusers' config.json; files without
    them get those of FLUX.

    Args:
        path: A file, or a folder of diffusers that holds the autoencoder or a pipeline.

    Returns:
        Sizes and float32 parameters.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of another shape (the message names
            all), or values are not finite.
    """
    folder = Path(path) / "vae"
    file = open_tensors(folder if folder.is_dir() else path)
    keys = strip_prefix(file.shapes, (SIGNATURE_TENSOR,), file.path)
    shapes = {name: file.shapes[key] for name, key in keys.items()}
    sizes, layout = detect_autoencoder(shapes, file)
    check_shapes(autoencoder_shapes(sizes, layout), shapes, file.path)
    file.require_weights(keys.values())
    names_by_path = {
        tensor.path: (name, tensor.transform)
        for name, tensor in locate_tensors(sizes, layout).items()
    }

    def read_leaf(name: str, transform: str) -> jax.Array:
        values = file[keys[name]]
        if not is_finite(values):
            raise CheckpointError(
                f"{file.path}: {name} holds values that are not finite: copy or download it again."
            )
        return jnp.asarray(TENSOR_TO_LEAF[transform](values).astype(np.float32))

    skeleton = make_abstract_autoencoder(sizes)
    leaves = [read_leaf(*names_by_path[path]) for path in flatten_tree(skeleton)]
    return sizes, jax.tree.unflatten(jax.tree.structure(skeleton), leaves)


def detect_autoencoder(
    shapes: TensorShapes, file: Tensors
) -> tuple[Autoencoder, AutoencoderLayout]:
    """Return the sizes and the layout of a file.

    Args:
        shapes: Names without their prefix, and shapes, of the file's tensors.
        file: The file, for its metadata and for messages.

    Raises:
        CheckpointError: The file holds no autoencoder of this kind, or an incomplete one.
    """
    layout: AutoencoderLayout
    if f"{BLOCK_NAMES['flux'].format(i=0, j=0)}.conv1.weight" in shapes:
        layout = "flux"
    elif f"{BLOCK_NAMES['diffusers'].format(i=0, j=0)}.conv1.weight" in shapes:
        layout = "diffusers"
    else:
        raise CheckpointError(
            f"{file.path} is not an autoencoder like FLUX's: "
            f"it has no {' or '.join(BLOCK_NAMES.values()).format(i=0, j=0)}."
        )
    try:
        return _detect_sizes(shapes, file, layout), layout
    except KeyError as error:
        raise CheckpointError(
            f"{file.path} looks like an autoencoder but has no {error.args[0]}, "
            "so it is incomplete: copy or download it again."
        ) from None
    except ConfigError as error:
        raise CheckpointError(
            f"{file.path} holds an autoencoder that this version cannot run. {error}"
        ) from None
    except (IndexError, ZeroDivisionError):  # a convolution with fewer axes than it should have
        raise CheckpointError(
            f"{file.path} has the tensor names of an autoencoder, but not their shapes: "
            "copy or download it again."
        ) from None


def _detect_sizes(shapes: TensorShapes, file: Tensors, layout: AutoencoderLayout) -> Autoencoder:
    """Return the sizes of a file; KeyError, IndexError and ZeroDivisionError if it is unusual."""
    conv_name = f"{BLOCK_NAMES[layout]}.conv1.weight"

    def count_indices(pattern: str) -> int:
        return next(i for i in range(len(shapes) + 1) if pattern.format(i) not in shapes)

    width = shapes["encoder.conv_in.weight"][0]
    num_levels = count_indices(conv_name.format(i="{}", j=0))
    widths = [shapes[conv_name.format(i=i, j=0)][0] for i in range(num_levels)]
    if any(level_width % width for level_width in widths):
        raise ConfigError(
            f"Its levels have {widths} channels, which are not multiples of the first layer's "
            f"{width}."
        )
    return Autoencoder(
        latent_channels=shapes["decoder.conv_in.weight"][1],
        width=width,
        multipliers=tuple(level_width // width for level_width in widths),
        blocks=count_indices(conv_name.format(i=0, j="{}")),
        **_read_config(file, layout),
    )


def _read_config(file: Tensors, layout: AutoencoderLayout) -> dict[str, Any]:
    """Return the settings of our metadata, or of diffusers' config.json beside the weights."""
    config_path = file.path.parent / "config.json"
    text = file.metadata.get(AUTOENCODER_METADATA_KEY)
    if text is None and (layout != "diffusers" or not config_path.is_file()):
        return {}
    try:
        settings = dict(json.loads(config_path.read_text("utf-8") if text is None else text))
    except (ValueError, TypeError):
        raise ConfigError(
            f"{config_path if text is None else 'Its metadata'} is not a config of diffusers."
        ) from None
    # diffusers reads null as 0.
    return {field: settings[key] or 0.0 for key, field in CONFIG_FIELDS.items() if key in settings}


# --- writing --------------------------------------------------------------------------------------


def write_autoencoder(
    path: str | Path,
    sizes: Autoencoder,
    params: Params,
    layout: AutoencoderLayout = "flux",
    dtype: str = "float32",
) -> None:
    """Write an autoencoder tensor by tensor.

    Args:
        path: A .safetensors file, or, for layout "diffusers" only, a folder that
            `AutoencoderKL.from_pretrained` opens.
        sizes: Sizes of the autoencoder.
        params: The parameter tree.
        layout: Layout of the file.
        dtype: float32, bfloat16 or float16.

    Raises:
        CheckpointError: Leaves are missing, unexpected or of another shape (the message names
            all), `path` does not suit the layout, or `dtype` cannot hold a value.
        OutputError: The file cannot be written.
    """
    path, leaves = Path(path), flatten_tree(params)
    check_shapes(
        {p: x.shape for p, x in flatten_tree(make_abstract_autoencoder(sizes)).items()},
        {p: x.shape for p, x in leaves.items()},
        "The tree to write",
    )
    if path.suffix != ".safetensors":
        if layout != "diffusers":
            raise CheckpointError(
                f"{path} is a folder, which only the layout diffusers supports: "
                "choose a name that ends in .safetensors."
            )
        with replace_atomically(path / "config.json") as temp_path:
            temp_path.write_text(json.dumps(make_autoencoder_config(sizes), indent=2) + "\n")
        path = path / "diffusion_pytorch_model.safetensors"

    tensors, shapes = locate_tensors(sizes, layout), autoencoder_shapes(sizes, layout)

    def convert_leaf(name: str) -> np.ndarray:
        return LEAF_TO_TENSOR[tensors[name].transform](np.asarray(leaves[tensors[name].path]))

    metadata = {
        AUTOENCODER_METADATA_KEY: json.dumps(make_autoencoder_config(sizes)),
        "format": "pt",
    }
    write_safetensors(path, shapes, dict.fromkeys(shapes, DTYPES[dtype]), convert_leaf, metadata)


def make_autoencoder_config(sizes: Autoencoder) -> dict[str, Any]:
    """Return the config.json that `AutoencoderKL.from_pretrained` reads."""
    num_levels = len(sizes.multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.38.0",
        "act_fn": "silu",
        "block_out_channels": list(sizes.widths),
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": sizes.latent_channels,
        "layers_per_block": sizes.blocks,
        "mid_block_add_attention": True,
        "sample_size": 1024,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **{key: getattr(sizes, field) for key, field in CONFIG_FIELDS.items()},
    }
