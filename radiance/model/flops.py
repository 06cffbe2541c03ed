"""Floating-point operations of the network, counted by hand: two for each multiplication of a matrix product.

What is recomputed in the backward pass does not count: this is what the model asks for, by which the use of a device is measured.
"""

from radiance import config


def forward_flops(model: config.Model, height: int, width: int, words: int) -> int:
    """Of one picture of `height` × `width` (pixels, or tokens of a latent) with `words` text tokens, padding included."""
    d, tokens = model.hidden, (height // model.patch) * (width // model.patch)
    text = model.registers + words
    side = model.patch // 2 if model.patch_embed == "conv_half" else model.patch
    values = side**2 * model.channels
    patch = (values + d) * model.bottleneck if model.patch_embed == "bottleneck" else values * d
    embed = tokens * patch + words * model.text_dim * d

    def block(sequence: int) -> int:
        # Queries, keys, values and the way back; the MLP; scores and what they weigh.
        return sequence * (4 * d**2 + 2 * d * model.mlp_hidden) + 2 * sequence**2 * d

    blocks = model.text_preamble * block(text) + (model.double_blocks + model.single_blocks) * block(tokens + text)
    return 2 * (embed + blocks + _modulation(model) + _head(model, tokens))


def training_flops(model: config.Model, height: int, width: int, words: int, frozen: bool = False) -> int:
    """Of one picture, forward and backward: three times the forward pass, and two where the weights are frozen, as under a LoRA."""
    return (2 if frozen else 3) * forward_flops(model, height, width, words)


def _modulation(model: config.Model) -> int:
    d, wide = model.hidden, model.approximator_hidden
    if model.modulation == "approximator":
        return model.vectors * (model.approximator_dim * wide + 2 * model.approximator_depth * wide**2 + wide * d)
    if model.modulation == "none":
        return 0
    condition = (1 + model.guidance_embed) * (256 * d + d**2) + (model.pooled_dim * d + d**2 if model.pooled_dim else 0)
    rows = 6 + 6 + 3 + 2 if model.modulation == "shared" else model.vectors - (2 if model.head != "linear" else 0)
    return condition + rows * d**2


def _head(model: config.Model, tokens: int) -> int:
    d, f, pixels = model.hidden, model.nerf_hidden, tokens * model.patch**2
    if model.head == "linear":
        return pixels * model.channels * d
    generated = 3 * f * f * model.nerf_mlp_ratio  # weights of a block's MLP
    last = f * model.channels * (9 if model.head == "nerf_conv" else 1)
    return model.nerf_depth * generated * (tokens * d + pixels) + pixels * ((model.channels + model.nerf_freqs**2) * f + last)
