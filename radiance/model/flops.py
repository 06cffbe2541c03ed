"""Floating-point operations of the network, counted by hand: two for each multiplication of a matrix product.

What is recomputed in the backward pass does not count: this is what the model asks for, by which the use of a device is measured.
"""

from radiance import config


def forward_flops(model: config.Model, height: int, width: int, num_text_tokens: int) -> int:
    """Of one image of `height` × `width` (pixels, or tokens of a latent) with `words` text tokens, padding included."""
    d, num_image_tokens = model.hidden, (height // model.patch) * (width // model.patch)
    text_length = model.registers + num_text_tokens
    patch_size = model.patch // 2 if model.patch_embed == "conv_half" else model.patch
    patch_dim = patch_size**2 * model.channels
    patch_macs = (
        (patch_dim + d) * model.bottleneck if model.patch_embed == "bottleneck" else patch_dim * d
    )
    embedding_macs = num_image_tokens * patch_macs + num_text_tokens * model.text_dim * d

    def block_macs(length: int) -> int:
        # Queries, keys, values and the way back; the MLP; scores and what they weigh.
        return length * (4 * d**2 + 2 * d * model.mlp_hidden) + 2 * length**2 * d

    total_block_macs = model.text_refiner_blocks * block_macs(text_length) + (
        model.double_blocks + model.single_blocks
    ) * block_macs(num_image_tokens + text_length)
    return 2 * (
        embedding_macs
        + total_block_macs
        + _modulation_macs(model)
        + _head_macs(model, num_image_tokens)
    )


def training_flops(
    model: config.Model, height: int, width: int, num_text_tokens: int, frozen_base: bool = False
) -> int:
    """Of one image, forward and backward: three times the forward pass, and two where the weights are frozen, as under a LoRA."""
    return (2 if frozen_base else 3) * forward_flops(model, height, width, num_text_tokens)


def _modulation_macs(model: config.Model) -> int:
    d, hidden = model.hidden, model.approximator_hidden
    if model.modulation == "approximator":
        return model.num_modulation_vectors * (
            model.approximator_dim * hidden + 2 * model.approximator_depth * hidden**2 + hidden * d
        )
    if model.modulation == "none":
        return 0
    condition_macs = (1 + model.guidance_embed) * (256 * d + d**2) + (
        model.pooled_dim * d + d**2 if model.pooled_dim else 0
    )
    num_vectors = (
        6 + 6 + 3 + 2
        if model.modulation == "shared"
        else model.num_modulation_vectors - (2 if model.head != "linear" else 0)
    )
    return condition_macs + num_vectors * d**2


def _head_macs(model: config.Model, num_image_tokens: int) -> int:
    d, f, num_pixels = model.hidden, model.nerf_hidden, num_image_tokens * model.patch**2
    if model.head == "linear":
        return num_pixels * model.channels * d
    generated_weights = 3 * f * f * model.nerf_mlp_ratio  # weights of a block's MLP
    output_weights = f * model.channels * (9 if model.head == "nerf_conv" else 1)
    return model.nerf_depth * generated_weights * (
        num_image_tokens * d + num_pixels
    ) + num_pixels * ((model.channels + model.nerf_freqs**2) * f + output_weights)
