"""Change the architecture of a checkpoint: each function returns a checkpoint that reads lazily."""

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

# Settings that `graft` takes from the pixel model; all others are the trunk's.
PIXEL_FIELDS = (
    "channels",
    "patch",
    "patch_embed",
    "bottleneck",
    "head",
    "nerf_hidden",
    "nerf_mlp_ratio",
    "nerf_depth",
    "nerf_freqs",
    "prediction",
)
PIXEL_SUBTREES = ("patch_embed", "head")  # of the parameter tree


def _rebuild(
    checkpoint: Checkpoint,
    model: config.Model,
    replacements: Mapping[str, Callable[[], np.ndarray]],
    change: str,
    dtypes: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Return the checkpoint as `model`, with the tensors of `replacements` in place of its own."""
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
    """Return a pixel model with the trunk of another model, as Radiance started from Chroma.

    Blocks, modulation and text projection come from `trunk`. Patch embedding and pixel head are
    initialized, and the head predicts zeros.

    Args:
        trunk: The checkpoint that gives the blocks, such as Chroma.
        pixel_model: The model that gives the sizes of the new parts and the prediction.
        seed: Seed of the initialization.

    Returns:
        The grafted checkpoint.

    Raises:
        CheckpointError: `pixel_model` is a latent model.
    """
    if pixel_model.patch == 1:
        raise CheckpointError(
            "The model that gives the pixel head reads latents: choose a pixel model, such as "
            "chroma1-radiance-x0."
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
        f"grafted onto a new {pixel_model.head} head",
        dict.fromkeys(replacements, "F32"),
    )


def _is_in_subtrees(source: native.NativeSource, *subtrees: str) -> bool:
    """Return True if a native tensor belongs to one of these subtrees of the parameters."""
    return source.rule.slices[0].path.startswith(subtrees)


def _bind_name(read_tensor: Callable[[str], np.ndarray], name: str) -> Callable[[], np.ndarray]:
    """Return a function that reads the tensor `name`."""
    return lambda: read_tensor(name)


def _init_pixel_tensors(model: config.Model, seed: int) -> Callable[[str], np.ndarray]:
    """Return a reader of initialized native tensors of the pixel parts.

    XLA removes unused results, so the parameters of the trunk are never computed.
    """

    def init_pixel_params(key: jax.Array) -> Params:
        params = init_params(model, key)
        return {name: params[name] for name in params if name in PIXEL_SUBTREES}

    pixel_params = jax.jit(init_pixel_params)(jax.random.key(seed))
    return native.params_to_native(model, pixel_params)[1]


def dilate_patches(checkpoint: Checkpoint, patch_embed: str = "conv") -> Checkpoint:
    """Return the model with patches of twice the size, which have a quarter of the tokens.

    The weights of the NeRF head do not depend on the patch size.

    Args:
        checkpoint: A pixel model with a NeRF head and patch_embed=conv.
        patch_embed: "conv" doubles the convolution's kernel: every weight covers 2×2 pixels and is
            divided by 4, so an image without detail gives the same tokens. "conv_half" keeps the
            kernel and reads every second pixel.

    Returns:
        The dilated checkpoint.

    Raises:
        CheckpointError: The model has no patches, no NeRF head, or another patch embedding.
    """
    model = checkpoint.model
    if model.patch == 1 or model.patch_embed != "conv" or model.head == "linear":
        raise CheckpointError(
            f"{checkpoint.origin} cannot be dilated: dilation needs a pixel model with a NeRF head "
            f"and patch_embed=conv, and this one has patch={model.patch}, "
            f"patch_embed={model.patch_embed}, head={model.head}."
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
    """Return the model with the linear last layer of its NeRF head as a 3×3 convolution.

    The linear weights become the center of the kernel, so the model samples the same images.

    Args:
        checkpoint: A model with head=nerf_linear.

    Returns:
        The checkpoint with head=nerf_conv.

    Raises:
        CheckpointError: The model has another head.
    """
    model = checkpoint.model
    if model.head != "nerf_linear":
        raise CheckpointError(
            f"{checkpoint.origin} has the head {model.head}: only nerf_linear can become nerf_conv."
        )

    def make_kernel() -> np.ndarray:
        weight = checkpoint.get_tensor(old_names["nerf_final_layer_conv.conv.weight"])
        kernel = np.zeros((*weight.shape, 3, 3), weight.dtype)
        kernel[:, :, 1, 1] = weight
        return kernel

    old_names = {
        f"nerf_final_layer_conv.{new_name}": f"nerf_final_layer.{old_name}"
        for new_name, old_name in (
            ("norm.scale", "norm.scale"),
            ("conv.weight", "linear.weight"),
            ("conv.bias", "linear.bias"),
        )
    }
    replacements: dict[str, Callable[[], np.ndarray]] = {
        new_name: _bind_name(checkpoint.get_tensor, old_name)
        for new_name, old_name in old_names.items()
    }
    replacements["nerf_final_layer_conv.conv.weight"] = make_kernel
    return _rebuild(
        checkpoint,
        replace(model, head="nerf_conv"),
        replacements,
        "with a convolution as its last layer",
        {new_name: checkpoint.dtypes[old_name] for new_name, old_name in old_names.items()},
    )


def fix_pooled_vector(
    checkpoint: Checkpoint, pooled: Float[np.ndarray, " w"], description: str
) -> Checkpoint:
    """Return the model with a constant pooled text vector, so that it no longer reads one.

    The term that the vector adds to the time embedding is added to a bias there.

    Args:
        checkpoint: A model that reads a pooled text vector.
        pooled: The constant vector.
        description: A noun phrase for the vector, such as "zero", for the checkpoint's origin.

    Returns:
        The checkpoint with pooled_dim=0.

    Raises:
        CheckpointError: The model does not read a pooled text vector.
    """
    model = checkpoint.model
    if not model.pooled_dim:
        raise CheckpointError(
            f"{checkpoint.origin} reads no pooled text vector, so none can be fixed: "
            "convert it without --pooled."
        )

    def apply_layer(layer: str, x: np.ndarray) -> np.ndarray:
        weight, bias = (
            checkpoint.get_tensor(f"vector_in.{layer}.{kind}").astype(np.float32)
            for kind in ("weight", "bias")
        )
        return weight @ x + bias

    def make_bias() -> np.ndarray:
        hidden = apply_layer("in_layer", pooled.astype(np.float32))
        pooled_embedding = apply_layer("out_layer", hidden * expit(hidden))
        return checkpoint.get_tensor(bias_name).astype(np.float32) + pooled_embedding

    bias_name = "time_in.out_layer.bias"
    return _rebuild(
        checkpoint,
        replace(model, pooled_dim=0),
        {bias_name: make_bias},
        f"with {description} as its pooled vector",
        {bias_name: "F32"},
    )


def make_approximator_model(checkpoint: Checkpoint) -> config.Model:
    """Return the model with Chroma's approximator in place of its modulation layers.

    Args:
        checkpoint: A model with modulation=per_block that reads no pooled text vector.

    Returns:
        The settings of the new model.

    Raises:
        CheckpointError: The model has other modulation, or reads a pooled text vector.
    """
    model = checkpoint.model
    if model.modulation == "approximator":
        raise CheckpointError(
            f"{checkpoint.origin} has an approximator already: only the layers of FLUX "
            "(model.modulation=per_block) can be replaced."
        )
    if model.modulation != "per_block":
        raise CheckpointError(
            f"{checkpoint.origin} has model.modulation={model.modulation}, without modulation "
            "layers in the blocks: only per_block can be replaced by an approximator."
        )
    if model.pooled_dim:
        raise CheckpointError(
            f"{checkpoint.origin} reads a pooled text vector, and an approximator cannot: "
            "make the vector constant first (`fix_pooled_vector`)."
        )
    return replace(model, modulation="approximator", guidance_embed=False)


def replace_modulation(checkpoint: Checkpoint, modulation: Params) -> Checkpoint:
    """Return the checkpoint with an approximator in place of its modulation layers.

    Args:
        checkpoint: A model for which `make_approximator_model` succeeds.
        modulation: The parameters of the approximator.

    Returns:
        The new checkpoint; the approximator is float32.

    Raises:
        CheckpointError: As `make_approximator_model`.
    """
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
    """Return the weighted mean (1 − ratio) · first + ratio · second, computed in float32.

    Args:
        first: The checkpoint that gives the stored types of the result.
        second: A checkpoint of the same model.
        ratio: Weight of `second`; values outside [0, 1] extrapolate.

    Returns:
        The merged checkpoint.

    Raises:
        CheckpointError: The models differ.
    """
    if differing_settings := config.differences(first.model, second.model, "model."):
        description = ", ".join(
            f"{key} is {first_value!r} and {second_value!r}"
            for key, (first_value, second_value) in differing_settings.items()
        )
        raise CheckpointError(
            f"{first.origin} and {second.origin} are different models ({description}): "
            "merge two checkpoints of one model."
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
