"""Making one checkpoint of another: functions from checkpoint to checkpoint that touch a tensor when it is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Float
from scipy.special import expit

from radiance import config
from radiance.model.transformer import Params, init
from radiance.weights import native
from radiance.weights.checkpoint import Checkpoint, without_loss
from radiance.weights.files import CheckpointError

# What a graft takes from the new model; all else is the trunk's.
PIXEL_FIELDS = (
    "channels", "patch", "patch_embed", "bottleneck", "head", "nerf_hidden", "nerf_mlp_ratio", "nerf_depth", "nerf_freqs", "prediction",
)  # fmt: skip
PIXEL_PARTS = ("patch_embed", "head")  # of the parameter tree


def _rebuilt(
    checkpoint: Checkpoint,
    model: config.Model,
    made: Mapping[str, Callable[[], np.ndarray]],
    what: str,
    dtypes: Mapping[str, str] | None = None,
) -> Checkpoint:
    """The checkpoint as `model`, with `made` in place of the tensors of those names."""
    shapes, _ = native.layout(model)
    return replace(
        checkpoint,
        model=model,
        shapes=shapes,
        tensor=lambda name: made[name]() if name in made else checkpoint.tensor(name),
        dtypes={name: (dtypes or {}).get(name) or checkpoint.dtypes.get(name, "F32") for name in shapes},
        origin=f"{checkpoint.origin}, {what}",
        metadata=without_loss(checkpoint.metadata),
    )


def graft(trunk: Checkpoint, pixels: config.Model, seed: int = 0) -> Checkpoint:
    """The blocks, modulation and text projection of `trunk` under a fresh patch embedding and pixel head: how Radiance began.

    pixels: the model that gives the sizes of the fresh parts and what the network predicts. The fresh head puts out zeros.
    """
    if pixels.patch == 1:
        raise CheckpointError("A trunk is grafted under a pixel model, such as chroma1-radiance-x0: this one reads latents.")
    model = replace(trunk.model, **{name: getattr(pixels, name) for name in PIXEL_FIELDS})
    fresh = _fresh(model, seed)
    made = {name: _named(fresh, name) for name, source in native.layout(model)[1].items() if _is_of(source, *PIXEL_PARTS)}
    return _rebuilt(trunk, model, made, f"grafted under a fresh {pixels.head} head", dict.fromkeys(made, "F32"))


def _is_of(source: native.Source, *parts: str) -> bool:
    return source.row.parts[0].path.startswith(parts)


def _named(tensor: Callable[[str], np.ndarray], name: str) -> Callable[[], np.ndarray]:
    return lambda: tensor(name)


def _fresh(model: config.Model, seed: int) -> Callable[[str], np.ndarray]:
    """Native tensors of the fresh parts; XLA leaves out what is not asked for, so that the trunk is not made."""
    key = jax.random.key(seed)
    parts = jax.jit(lambda key: {name: value for name, value in init(model, key).items() if name in PIXEL_PARTS})(key)
    return native.to_native(model, parts)[1]


def dilate(checkpoint: Checkpoint, patch_embed: str = "conv") -> Checkpoint:
    """A model as one of patches twice as large, such as 32 for 16, with a quarter of the tokens.

    patch_embed: conv doubles the convolution's kernel (every weight on 2×2 pixels, divided by 4: on a picture without detail it
    gives the same tokens); conv_half keeps it and reads every second pixel. The NeRF head's weights know no patch size.
    """
    model = checkpoint.model
    if model.patch == 1 or model.patch_embed != "conv" or model.head == "linear":
        raise CheckpointError(
            f"{checkpoint.origin} cannot be dilated: that is for pixel models with a NeRF head that read whole patches, and this one has "
            f"patch={model.patch}, patch_embed={model.patch_embed}, head={model.head}."
        )
    larger = replace(model, patch=2 * model.patch, patch_embed=patch_embed)

    def kernel() -> np.ndarray:
        small = checkpoint.tensor("img_in_patch.weight").astype(np.float32)
        return small.repeat(2, axis=2).repeat(2, axis=3) / 4

    made = {"img_in_patch.weight": kernel} if patch_embed == "conv" else {}
    return _rebuilt(checkpoint, larger, made, f"dilated to patch {larger.patch}")


def conv_head(checkpoint: Checkpoint) -> Checkpoint:
    """A linear NeRF head as a convolution: its weights in the middle of the 3×3 kernel, so that the pictures are the same."""
    model = checkpoint.model
    if model.head != "nerf_linear":
        raise CheckpointError(f"{checkpoint.origin} has the head {model.head}: only nerf_linear can be turned into nerf_conv.")

    def kernel() -> np.ndarray:
        weight = checkpoint.tensor("nerf_final_layer.linear.weight")
        out = np.zeros((*weight.shape, 3, 3), weight.dtype)
        out[:, :, 1, 1] = weight
        return out

    made = {
        "nerf_final_layer_conv.norm.scale": lambda: checkpoint.tensor("nerf_final_layer.norm.scale"),
        "nerf_final_layer_conv.conv.weight": kernel,
        "nerf_final_layer_conv.conv.bias": lambda: checkpoint.tensor("nerf_final_layer.linear.bias"),
    }
    stored = dict.fromkeys(made, checkpoint.dtypes["nerf_final_layer.linear.weight"])
    return _rebuilt(checkpoint, replace(model, head="nerf_conv"), made, "with a convolution as its last layer", stored)


def without_pooled(checkpoint: Checkpoint, pooled: Float[np.ndarray, " w"], told: str) -> Checkpoint:
    """A model that reads no pooled text vector and paints as this one does with `pooled`, whatever the prompt: what the vector adds to the
    embedding of time goes into the bias there. told: what the vector is."""
    model = checkpoint.model
    if not model.pooled_dim:
        raise CheckpointError(f"{checkpoint.origin} reads no pooled text vector: there is none to be held.")

    def through(layer: str, x: np.ndarray) -> np.ndarray:
        weight, bias = (checkpoint.tensor(f"vector_in.{layer}.{kind}").astype(np.float32) for kind in ("weight", "bias"))
        return weight @ x + bias

    def bias() -> np.ndarray:
        inner = through("in_layer", pooled.astype(np.float32))
        return checkpoint.tensor(name).astype(np.float32) + through("out_layer", inner * expit(inner))

    name = "time_in.out_layer.bias"
    return _rebuilt(checkpoint, replace(model, pooled_dim=0), {name: bias}, f"with {told} as its pooled vector", {name: "F32"})


def approximated(checkpoint: Checkpoint) -> config.Model:
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


def with_approximator(checkpoint: Checkpoint, modulation: Params) -> Checkpoint:
    """The checkpoint with an approximator, whose parameters these are, in place of its layers of modulation."""
    model = approximated(checkpoint)
    tensor = native.to_native(model, {"modulation": modulation})[1]
    made = {name: _named(tensor, name) for name, source in native.layout(model)[1].items() if _is_of(source, "modulation")}
    return _rebuilt(checkpoint, model, made, "its modulation approximated", dict.fromkeys(made, "F32"))


def merge(a: Checkpoint, b: Checkpoint, ratio: float) -> Checkpoint:
    """(1 − ratio)·a + ratio·b, in float32. The models must be equal."""
    if changed := config.differences(a.model, b.model, "model."):
        told = ", ".join(f"{key} is {x!r} and {y!r}" for key, (x, y) in changed.items())
        raise CheckpointError(f"{a.origin} and {b.origin} are different models ({told}): they cannot be merged.")

    def blend(name: str) -> Callable[[], np.ndarray]:
        return lambda: (1 - ratio) * a.tensor(name).astype(np.float32) + ratio * b.tensor(name).astype(np.float32)

    return _rebuilt(a, a.model, {name: blend(name) for name in native.layout(a.model)[1]}, f"merged with {ratio:g} of {b.origin}")
