"""Making one checkpoint of another: functions from checkpoint to checkpoint that touch a tensor when it is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Float
from scipy.special import expit

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.model.transformer import Params, init_params
from radiance.weights import native
from radiance.weights.checkpoint import Checkpoint, drop_validation_loss

# What a graft takes from the new model; all else is the trunk's.
PIXEL_FIELDS = (
    "channels", "patch", "patch_embed", "bottleneck", "head", "nerf_hidden", "nerf_mlp_ratio", "nerf_depth", "nerf_freqs", "prediction",
)  # fmt: skip
PIXEL_SUBTREES = ("patch_embed", "head")  # of the parameter tree


def _rebuild(
    checkpoint: Checkpoint,
    model: config.Model,
    replacements: Mapping[str, Callable[[], np.ndarray]],
    change: str,
    dtypes: Mapping[str, str] | None = None,
) -> Checkpoint:
    """The checkpoint as `model`, with `made` in place of the tensors of those names."""
    shapes, _ = native.native_layout(model)
    return replace(
        checkpoint,
        model=model,
        shapes=shapes,
        get_tensor=lambda name: (
            replacements[name]() if name in replacements else checkpoint.get_tensor(name)
        ),
        dtypes={
            name: (dtypes or {}).get(name) or checkpoint.dtypes.get(name, "F32") for name in shapes
        },
        origin=f"{checkpoint.origin}, {change}",
        metadata=drop_validation_loss(checkpoint.metadata),
    )


def graft(trunk: Checkpoint, pixel_model: config.Model, seed: int = 0) -> Checkpoint:
    """The blocks, modulation and text projection of `trunk` under a fresh patch embedding and pixel head: how Radiance began.

    pixels: the model that gives the sizes of the fresh parts and what the network predicts. The fresh head puts out zeros.
    """
    if pixel_model.patch == 1:
        raise CheckpointError(
            "A trunk is grafted under a pixel model, such as chroma1-radiance-x0: this one reads latents."
        )
    model = replace(trunk.model, **{name: getattr(pixel_model, name) for name in PIXEL_FIELDS})
    init_tensor = _init_pixel_tensors(model, seed)
    replacements = {
        name: _bind_name(init_tensor, name)
        for name, source in native.native_layout(model)[1].items()
        if _is_in_subtrees(source, *PIXEL_SUBTREES)
    }
    return _rebuild(
        trunk,
        model,
        replacements,
        f"grafted under a fresh {pixel_model.head} head",
        dict.fromkeys(replacements, "F32"),
    )


def _is_in_subtrees(source: native.NativeSource, *subtrees: str) -> bool:
    return source.rule.slices[0].path.startswith(subtrees)


def _bind_name(read_tensor: Callable[[str], np.ndarray], name: str) -> Callable[[], np.ndarray]:
    return lambda: read_tensor(name)


def _init_pixel_tensors(model: config.Model, seed: int) -> Callable[[str], np.ndarray]:
    """Native tensors of the fresh parts; XLA leaves out what is not asked for, so that the trunk is not made."""
    key = jax.random.key(seed)
    pixel_params = jax.jit(
        lambda key: {
            name: value for name, value in init_params(model, key).items() if name in PIXEL_SUBTREES
        }
    )(key)
    return native.params_to_native(model, pixel_params)[1]


def dilate_patches(checkpoint: Checkpoint, patch_embed: str = "conv") -> Checkpoint:
    """A model as one of patches twice as large, such as 32 for 16, with a quarter of the tokens.

    patch_embed: conv doubles the convolution's kernel (every weight on 2×2 pixels, divided by 4: on an image without detail it
    gives the same tokens); conv_half keeps it and reads every second pixel. The NeRF head's weights know no patch size.
    """
    model = checkpoint.model
    if model.patch == 1 or model.patch_embed != "conv" or model.head == "linear":
        raise CheckpointError(
            f"{checkpoint.origin} cannot be dilated: that is for pixel models with a NeRF head that read whole patches, and this one has "
            f"patch={model.patch}, patch_embed={model.patch_embed}, head={model.head}."
        )
    dilated_model = replace(model, patch=2 * model.patch, patch_embed=patch_embed)

    def make_kernel() -> np.ndarray:
        weight = checkpoint.get_tensor("img_in_patch.weight").astype(np.float32)
        return weight.repeat(2, axis=2).repeat(2, axis=3) / 4

    replacements = {"img_in_patch.weight": make_kernel} if patch_embed == "conv" else {}
    return _rebuild(
        checkpoint, dilated_model, replacements, f"dilated to patch {dilated_model.patch}"
    )


def convert_head_to_conv(checkpoint: Checkpoint) -> Checkpoint:
    """A linear NeRF head as a convolution: its weights in the middle of the 3×3 kernel, so that the images are the same."""
    model = checkpoint.model
    if model.head != "nerf_linear":
        raise CheckpointError(
            f"{checkpoint.origin} has the head {model.head}: only nerf_linear can be turned into nerf_conv."
        )

    def make_kernel() -> np.ndarray:
        weight = checkpoint.get_tensor("nerf_final_layer.linear.weight")
        kernel = np.zeros((*weight.shape, 3, 3), weight.dtype)
        kernel[:, :, 1, 1] = weight
        return kernel

    replacements = {
        "nerf_final_layer_conv.norm.scale": lambda: checkpoint.get_tensor(
            "nerf_final_layer.norm.scale"
        ),
        "nerf_final_layer_conv.conv.weight": make_kernel,
        "nerf_final_layer_conv.conv.bias": lambda: checkpoint.get_tensor(
            "nerf_final_layer.linear.bias"
        ),
    }
    dtypes = dict.fromkeys(replacements, checkpoint.dtypes["nerf_final_layer.linear.weight"])
    return _rebuild(
        checkpoint,
        replace(model, head="nerf_conv"),
        replacements,
        "with a convolution as its last layer",
        dtypes,
    )


def fix_pooled_vector(
    checkpoint: Checkpoint, pooled: Float[np.ndarray, " w"], description: str
) -> Checkpoint:
    """A model that reads no pooled text vector and paints as this one does with `pooled`, whatever the prompt: what the vector adds to the
    embedding of time goes into the bias there. told: what the vector is.
    """
    model = checkpoint.model
    if not model.pooled_dim:
        raise CheckpointError(
            f"{checkpoint.origin} reads no pooled text vector: there is none to be held."
        )

    def apply_layer(layer: str, x: np.ndarray) -> np.ndarray:
        weight, make_bias = (
            checkpoint.get_tensor(f"vector_in.{layer}.{kind}").astype(np.float32)
            for kind in ("weight", "bias")
        )
        return weight @ x + make_bias

    def make_bias() -> np.ndarray:
        hidden = apply_layer("in_layer", pooled.astype(np.float32))
        return checkpoint.get_tensor(bias_name).astype(np.float32) + apply_layer(
            "out_layer", hidden * expit(hidden)
        )

    bias_name = "time_in.out_layer.bias"
    return _rebuild(
        checkpoint,
        replace(model, pooled_dim=0),
        {bias_name: make_bias},
        f"with {description} as its pooled vector",
        {bias_name: "F32"},
    )


def make_approximator_model(checkpoint: Checkpoint) -> config.Model:
    """The model with Chroma's approximator in place of its layers of modulation. Raises CheckpointError where that cannot be."""
    model = checkpoint.model
    if model.modulation == "approximator":
        raise CheckpointError(
            f"{checkpoint.origin} has an approximator already: only FLUX's layers (model.modulation=per_block) are replaced."
        )
    if model.modulation != "per_block":
        raise CheckpointError(
            f"{checkpoint.origin} has model.modulation={model.modulation}, which has no layers in the blocks that an approximator could replace: "
            "only per_block has."
        )
    if model.pooled_dim:
        raise CheckpointError(
            f"{checkpoint.origin} reads a pooled text vector, which an approximator cannot: hold it first (`without_pooled`)."
        )
    return replace(model, modulation="approximator", guidance_embed=False)


def replace_modulation(checkpoint: Checkpoint, modulation: Params) -> Checkpoint:
    """The checkpoint with an approximator, whose parameters these are, in place of its layers of modulation."""
    model = make_approximator_model(checkpoint)
    read_tensor = native.params_to_native(model, {"modulation": modulation})[1]
    replacements = {
        name: _bind_name(read_tensor, name)
        for name, source in native.native_layout(model)[1].items()
        if _is_in_subtrees(source, "modulation")
    }
    return _rebuild(
        checkpoint,
        model,
        replacements,
        "its modulation approximated",
        dict.fromkeys(replacements, "F32"),
    )


def merge_checkpoints(first: Checkpoint, second: Checkpoint, ratio: float) -> Checkpoint:
    """(1 − ratio)·a + ratio·b, in float32. The models must be equal."""
    if differing_settings := config.differences(first.model, second.model, "model."):
        description = ", ".join(
            f"{key} is {first_value!r} and {second_value!r}"
            for key, (first_value, second_value) in differing_settings.items()
        )
        raise CheckpointError(
            f"{first.origin} and {second.origin} are different models ({description}): they cannot be merged."
        )

    def make_blend(name: str) -> Callable[[], np.ndarray]:
        return lambda: (
            (1 - ratio) * first.get_tensor(name).astype(np.float32)
            + ratio * second.get_tensor(name).astype(np.float32)
        )

    return _rebuild(
        first,
        first.model,
        {name: make_blend(name) for name in native.native_layout(first.model)[1]},
        f"merged with {ratio:g} of {second.origin}",
    )
