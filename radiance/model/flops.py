"""Floating-point operations of the network: two for each multiplication of a matrix product.

Operations that are recomputed in the backward pass do not count: these are the operations that the
model needs, by which the utilization of a device is measured.
"""

from radiance import config
from radiance.model.modulation import TIME_EMBEDDING_DIM
from radiance.model.paths import OUTPUT_VECTORS, SHARED_VECTORS
from radiance.model.pixel_head import HEADS


def forward_flops(model: config.Model, height: int, width: int, num_text_tokens: int) -> int:
    """Count the operations of one forward pass for one image.

    Args:
        model: Sizes of the network.
        height: Height of the image, in pixels, or in tokens of a latent.
        width: Width of the image, in the same unit.
        num_text_tokens: Number of text tokens, padding included.

    Returns:
        Floating-point operations; a multiplication and its addition are two.
    """
    d, num_image_tokens = model.hidden, (height // model.patch) * (width // model.patch)
    text_length = model.registers + num_text_tokens

    # Embeddings of image and text
    patch_size = model.patch // 2 if model.patch_embed == "conv_half" else model.patch
    patch_dim = patch_size**2 * model.channels
    if model.patch_embed == "bottleneck":
        patch_macs = (patch_dim + d) * model.bottleneck
    else:
        patch_macs = patch_dim * d
    embedding_macs = num_image_tokens * patch_macs + num_text_tokens * model.text_dim * d

    # Blocks
    def block_macs(length: int) -> int:
        linear_macs = 4 * d**2 + 2 * d * model.mlp_hidden  # q, k, v and output; the MLP
        attention_macs = 2 * length * d  # logits and weighted values of one token
        return length * (linear_macs + attention_macs)

    num_joint_blocks = model.double_blocks + model.single_blocks
    total_block_macs = model.text_refiner_blocks * block_macs(text_length)
    total_block_macs += num_joint_blocks * block_macs(num_image_tokens + text_length)

    head_macs = HEADS[model.head].count_macs(model, num_image_tokens)
    return 2 * (embedding_macs + total_block_macs + _count_modulation_macs(model) + head_macs)


def training_flops(
    model: config.Model, height: int, width: int, num_text_tokens: int, frozen_base: bool = False
) -> int:
    """Count the operations of a forward and a backward pass for one image.

    Args:
        model: Sizes of the network.
        height: Height of the image, in pixels, or in tokens of a latent.
        width: Width of the image, in the same unit.
        num_text_tokens: Number of text tokens, padding included.
        frozen_base: Whether the weights get no gradient, as under a LoRA.

    Returns:
        Three times the operations of the forward pass, or twice for a frozen base.
    """
    return (2 if frozen_base else 3) * forward_flops(model, height, width, num_text_tokens)


def _count_modulation_macs(model: config.Model) -> int:
    """Count the multiplications of the modulation network."""
    d, hidden = model.hidden, model.approximator_hidden
    if model.modulation == "none":
        return 0
    if model.modulation == "approximator":
        layer_macs = 2 * model.approximator_depth * hidden**2
        return model.num_modulation_vectors * (
            model.approximator_dim * hidden + layer_macs + hidden * d
        )
    num_sinusoids = 1 + model.guidance_embed
    condition_macs = num_sinusoids * (TIME_EMBEDDING_DIM * d + d**2)
    if model.pooled_dim:
        condition_macs += model.pooled_dim * d + d**2
    num_vectors = model.num_modulation_vectors
    if model.modulation == "shared":
        num_vectors = SHARED_VECTORS
    elif not HEADS[model.head].reads_output_vectors:
        num_vectors -= OUTPUT_VECTORS
    return condition_macs + num_vectors * d**2
