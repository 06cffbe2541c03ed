"""Chroma and Chroma1-Radiance as one self-contained PyTorch module. Apache-2.0.

The module maps an image, a text and a time to a velocity. It is the network that `radiance` trains
in JAX, with the same numbers, in every variant that config.json can name, for pixels and for packed
latents. It needs torch, and safetensors to read weights. Parameters have the names of the published
checkpoints.

    from model import add_lora, load
    model = load("folder")                        # reads config.json and model.safetensors
    velocity = model(image, text, lengths, time)  # an nn.Module, which you can train further
    add_lora(model, "lora.safetensors", 0.8)      # a file that `radiance convert --to peft` wrote

Time 1 is noise and time 0 is the image, whose values are in [-1, 1]:
x_t = (1 − t)·image + t·noise, and velocity = noise − image. Write trained weights for radiance with

    metadata = {"radiance.model": json.dumps(model.config)}
    safetensors.torch.save_file(model.state_dict(), "model.safetensors", metadata)

The module computes in float32, or in bfloat16 under autocast or with bfloat16 weights
(`load(…, dtype=torch.bfloat16)`). Tables, statistics of norms, pixel embedder, last layer and
x_t − x̂ are float32 in all cases.

Axes in shapes: b batch, n tokens, l text tokens, e text width, d hidden, h heads, k head size,
p patch size, c channels, f pixel features.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NUMERIC_SETTINGS = (
    "channels",
    "patch",
    "bottleneck",
    "hidden",
    "heads",
    "double_blocks",
    "single_blocks",
    "mlp_ratio",
    "rope_axes",
    "rope_theta",
    "text_dim",
    "registers",
    "text_refiner_blocks",
    "approximator_dim",
    "approximator_hidden",
    "approximator_depth",
    "pooled_dim",
    "guidance_embed",
    "nerf_hidden",
    "nerf_mlp_ratio",
    "nerf_depth",
    "nerf_freqs",
)
CHOICE_SETTINGS = {
    # conv_half reads every second pixel; bottleneck goes through few channels
    "patch_embed": ("conv", "conv_half", "bottleneck"),
    "text_ids": ("zero", "sequential"),  # rotary indices of text tokens
    "masking": ("one_pad", "strict", "off"),  # visible padding tokens: one, none, all
    "padding": ("encoder", "learned"),  # content of padding tokens
    "modulation": ("approximator", "per_block", "shared", "none"),
    "head": ("nerf_conv", "nerf_linear", "linear"),
    # output of the last layer; the module always returns the velocity
    "prediction": ("velocity", "x0"),
}
HEAD_CHUNK_SIZE = 512  # image tokens that the NeRF head processes at a time
# `load` keeps these tensors in float32.
FLOAT32_PREFIXES = ("__", "nerf_image_embedder.", "nerf_final_layer", "final_layer.linear.")

# A pair of vectors per double block, vectors per single block, vectors of the output or None.
ModulationVectors = tuple[Sequence[tuple[Tensor, Tensor]], Sequence[Tensor], Tensor | None]


def parse_settings(config: Mapping[str, Any]) -> SimpleNamespace:
    """Return the settings of config.json as attributes.

    Raises:
        ValueError: A setting is unknown, missing, or a choice that this file does not have.
    """
    unknown = [key for key in config if key not in NUMERIC_SETTINGS and key not in CHOICE_SETTINGS]
    missing = [key for key in (*NUMERIC_SETTINGS, *CHOICE_SETTINGS) if key not in config]
    if unknown or missing:
        problems = [
            f"{problem} {', '.join(keys)}"
            for problem, keys in (("unknown", unknown), ("missing", missing))
            if keys
        ]
        raise ValueError(
            f"The config does not fit this file ({'; '.join(problems)}): "
            "use config.json and model.py of the same folder."
        )
    for key, choices in CHOICE_SETTINGS.items():
        if config[key] not in choices:
            raise ValueError(
                f"The config has {key}={config[key]!r}, but this file knows only "
                f"{', '.join(choices)}."
            )
    return SimpleNamespace(**config)


# --- tables, computed on the CPU and rounded to float32 once --------------------------------------


def frequencies(count: int) -> Tensor:
    """Return `count` frequencies from 1 down towards 1/10000.

    Every float32 rounding is that of the published code, because the frequencies are multiplied by
    up to 343,000.
    """
    steps = torch.arange(count, dtype=torch.float32, device="cpu")
    return (steps * -math.log(10_000) / steps.new_tensor(count)).double().exp().float()


def sinusoid(x: Tensor, width: int) -> Tensor:
    """Embed x [b] as cosines, then sines, of 1000·x at width/2 frequencies [b, width]."""
    angles = (1000 * x.float())[:, None] * frequencies(width // 2).to(x.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(cfg: SimpleNamespace, rows: int, columns: int, text_length: int) -> Tensor:
    """Return cosines and sines of the rotary angles of all tokens [2, n, k/2].

    Tokens are in the order image (row-major), registers, text.
    """
    text_ids, row_ids, column_ids = (
        torch.arange(count, dtype=torch.float64, device="cpu")
        for count in (text_length, rows, columns)
    )
    text_ids = torch.cat(
        [
            text_ids.new_zeros(rows * columns + cfg.registers),
            text_ids * (cfg.text_ids == "sequential"),
        ]
    )
    position_ids = (
        text_ids,
        *(
            F.pad(ids, (0, cfg.registers + text_length))
            for ids in (row_ids.repeat_interleave(columns), column_ids.repeat(rows))
        ),
    )
    exponents = [
        -torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size
        for size in cfg.rope_axes
    ]
    angles = torch.cat(
        [
            axis_ids[:, None] * cfg.rope_theta**exponent
            for axis_ids, exponent in zip(position_ids, exponents)
        ],
        dim=1,
    )
    return torch.stack([angles.cos(), angles.sin()]).float()


def cosine_features(patch: int, freqs: int) -> Tensor:
    """Return cos(π·fx·x)·cos(π·fy·y) / (1 + fx·fy) for the pixels of a patch [p·p, freqs²].

    x and y cover [0, 1]. Pixels are row-major; fx is the major frequency, fy the minor one.
    """
    position = torch.linspace(0, 1, patch, dtype=torch.float64, device="cpu")
    f = torch.arange(freqs, dtype=torch.float64, device="cpu")
    waves = (math.pi * position[:, None] * f).cos()
    features = waves[None, :, :, None] * waves[:, None, None, :] / (1 + f[:, None] * f)
    return features.reshape(patch * patch, freqs * freqs).float()  # from [y, x, fx, fy]


# --- layers ---------------------------------------------------------------------------------------


def apply_in_float32(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a layer in float32, for weights of any type and also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        x, weight, bias = x.float(), layer.weight.float(), layer.bias.float()
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=layer.padding)


class RMSNorm(nn.Module):
    """RMS norm with a scale; the statistics are float32."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of x."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-6) * self.scale.float()
        return y.to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply layer norm without parameters, in float32, then shift and scale [b or 1, d]."""
    normalized = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return ((1 + scale[:, None]) * normalized + shift[:, None]).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Add an update, scaled by a gate [b or 1, d], to x [b, n, d]."""
    return x + gate[:, None].to(x.dtype) * update


def maybe_checkpoint(recompute: bool, function: Callable, *inputs: Any) -> Any:
    """Call a function; with `recompute`, the backward pass recomputes it to save memory."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


class Embedder(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(width, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the last axis of x."""
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class Approximator(nn.Module):
    """Chroma's single small network for all modulation.

    It maps time, guidance and the index of a modulation vector to the vector.
    """

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        self.dim = cfg.approximator_dim
        width, depth = cfg.approximator_hidden, cfg.approximator_depth
        self.in_proj, self.out_proj = nn.Linear(self.dim, width), nn.Linear(width, cfg.hidden)
        self.layers = nn.ModuleList(Embedder(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(depth))

    def forward(self, time: Tensor, guidance: Tensor, count: int) -> Tensor:
        """Return `count` float32 vectors [b, count, d] at time [b] and guidance [b]."""
        scalar_embedding = torch.cat(
            [sinusoid(time, self.dim // 4), sinusoid(guidance, self.dim // 4)], dim=-1
        )[:, None].expand(-1, count, -1)
        # On the CPU, because cosines on accelerators are inaccurate at such large angles.
        index_embedding = (
            sinusoid(torch.arange(count, device="cpu"), self.dim // 2)
            .to(time.device)
            .expand(len(time), -1, -1)
        )
        x = torch.cat([scalar_embedding, index_embedding], dim=-1)
        x = self.in_proj(x.to(self.in_proj.weight.dtype))
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x))
        return self.out_proj(x).float()


class Modulation(nn.Module):
    """A layer that computes modulation vectors from the conditioning vector.

    FLUX has one per block, PixArt-α one for all blocks.
    """

    def __init__(self, hidden: int, count: int):
        super().__init__()
        self.lin = nn.Linear(hidden, count * hidden)

    def forward(self, condition: Tensor) -> Tensor:
        """Return float32 vectors [b, count, d] for a conditioning vector [b, d]."""
        return self.lin(F.silu(condition)).float().unflatten(-1, (-1, condition.shape[-1]))


# --- blocks ---------------------------------------------------------------------------------------


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs (x0, x1), (x2, x3), … of [b, h, n, k] by the table's angles."""
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, visible: Tensor | None) -> Tensor:
    """Apply attention to [b, h, n, k] and return [b, n, h·k].

    Every token attends to the `visible` [b, n] tokens of its own sample, or to all. Hidden tokens
    attend too: a row without any visible token would be NaN, and nothing reads their result.
    """
    mask = None if visible is None else visible[:, None, None]
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class QKNorm(nn.Module):
    """The split into queries, keys and values, and the norms of queries and keys."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(head_dim), RMSNorm(head_dim)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split [b, n, 3·h·k] into queries, keys and values [b, h, n, k]."""
        q, k, v = qkv.unflatten(-1, (3, -1, len(self.query_norm.scale))).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


def make_stream(cfg: SimpleNamespace) -> tuple[nn.ModuleDict, nn.Sequential]:
    """Return the attention layers and the MLP of the image or the text."""
    d, mlp_width = cfg.hidden, round(cfg.hidden * cfg.mlp_ratio)
    attn = nn.ModuleDict(
        {"qkv": nn.Linear(d, 3 * d), "norm": QKNorm(d // cfg.heads), "proj": nn.Linear(d, d)}
    )
    return attn, nn.Sequential(nn.Linear(d, mlp_width), nn.GELU("tanh"), nn.Linear(mlp_width, d))


class TextBlock(nn.Module):
    """A block of attention and MLP over the text alone."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        self.txt_attn, self.txt_mlp = make_stream(cfg)

    def forward(self, y: Tensor, rope: Tensor, visible: Tensor | None) -> Tensor:
        """Return the updated text tokens [b, l, d]."""
        zeros = rope.new_zeros(1, y.shape[-1])
        qkv = self.txt_attn["norm"](self.txt_attn["qkv"](modulate(y, zeros, zeros)))
        y = y + self.txt_attn["proj"](attention(*qkv, rope, visible))
        return y + self.txt_mlp(modulate(y, zeros, zeros))


class DoubleBlock(nn.Module):
    """A block with separate weights for image and text, which share one attention."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        d = cfg.hidden
        self.img_attn, self.img_mlp = make_stream(cfg)
        self.txt_attn, self.txt_mlp = make_stream(cfg)
        if cfg.modulation == "per_block":
            self.img_mod, self.txt_mod = Modulation(d, 6), Modulation(d, 6)
        elif cfg.modulation != "approximator":
            self.modulation_img = nn.Parameter(torch.zeros(6, d))
            self.modulation_txt = nn.Parameter(torch.zeros(6, d))

    def forward(
        self, x: Tensor, y: Tensor, vectors: Sequence[Tensor], rope: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the updated image tokens and text tokens, from vectors [b or 1, 6, d] of each."""
        streams = ((x, vectors[0], self.img_attn), (y, vectors[1], self.txt_attn))
        projections = [
            attn["norm"](attn["qkv"](modulate(z, m[:, 0], m[:, 1]))) for z, m, attn in streams
        ]
        joint_qkv = (torch.cat(projection, dim=2) for projection in zip(*projections))
        attention_outputs = attention(*joint_qkv, rope, visible).split(
            [x.shape[1], y.shape[1]], dim=1
        )
        x, y = (
            add_gated(z, m[:, 2], attn["proj"](a))
            for (z, m, attn), a in zip(streams, attention_outputs)
        )
        streams = ((x, vectors[0], self.img_mlp), (y, vectors[1], self.txt_mlp))
        x, y = (add_gated(z, m[:, 5], mlp(modulate(z, m[:, 3], m[:, 4]))) for z, m, mlp in streams)
        return x, y


class SingleBlock(nn.Module):
    """A block with parallel attention and MLP on the joint sequence of image and text."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        d, mlp_width = cfg.hidden, round(cfg.hidden * cfg.mlp_ratio)
        self.linear1 = nn.Linear(d, 3 * d + mlp_width)
        self.linear2 = nn.Linear(d + mlp_width, d)
        self.norm = QKNorm(d // cfg.heads)
        if cfg.modulation == "per_block":
            self.modulation = Modulation(d, 3)
        elif cfg.modulation != "approximator":
            self.modulation_offset = nn.Parameter(torch.zeros(3, d))

    def forward(self, x: Tensor, m: Tensor, rope: Tensor, visible: Tensor | None) -> Tensor:
        """Return the updated tokens [b, n, d], from vectors m [b or 1, 3, d]."""
        qkv, mlp_hidden = self.linear1(modulate(x, m[:, 0], m[:, 1])).tensor_split(
            [3 * x.shape[-1]], dim=-1
        )
        attention_output = attention(*self.norm(qkv), rope, visible)
        update = torch.cat([attention_output, F.gelu(mlp_hidden, approximate="tanh")], dim=-1)
        return add_gated(x, m[:, 2], self.linear2(update))


class NerfBlock(nn.Module):
    """A gated MLP over the pixels of a patch, with weights that the patch's token generates.

    The generated weights are normalized along their input.
    """

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        f, mlp_width = cfg.nerf_hidden, cfg.nerf_hidden * cfg.nerf_mlp_ratio
        self.norm = RMSNorm(f)
        self.param_generator = nn.Linear(cfg.hidden, 3 * f * mlp_width)
        self.weight_shapes = ((f, mlp_width), (f, mlp_width), (mlp_width, f))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return updated features [b, n, p·p, f] of pixels, from tokens [b, n, d]."""
        weights = zip(self.param_generator(tokens).chunk(3, dim=-1), self.weight_shapes)
        gate, value, out = (
            F.normalize(w.float().unflatten(-1, shape), dim=-2).to(w.dtype) for w, shape in weights
        )
        y = self.norm(x)
        return x + (F.silu(y @ gate) * (y @ value)) @ out


# --- the network ----------------------------------------------------------------------------------


class Transformer(nn.Module):
    """The network that `config` (the content of config.json) describes.

    `load` fills in the weights; the initial ones are not meant for training. Set `recompute` to
    train with less memory: the backward pass then recomputes the blocks, as it always does with the
    head.

    Args:
        config: The content of config.json.
        head_chunk_size: Image tokens that the NeRF head processes at a time. A smaller number saves
            memory, because the weights that a token generates are far larger than the token.
    """

    def __init__(self, config: Mapping[str, Any], head_chunk_size: int = HEAD_CHUNK_SIZE):
        super().__init__()
        cfg = self.settings = parse_settings(config)
        self.config = dict(config)
        self.head_chunk_size = head_chunk_size
        self.recompute = False
        self._add_embeddings(cfg)
        self.text_blocks = nn.ModuleList(TextBlock(cfg) for _ in range(cfg.text_refiner_blocks))
        self.double_blocks = nn.ModuleList(DoubleBlock(cfg) for _ in range(cfg.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(cfg) for _ in range(cfg.single_blocks))
        self.final_layer = nn.Module()
        self._add_modulation(cfg)
        self._add_head(cfg)

        # Empty tensors that identify the variant for readers of a checkpoint.
        is_half_resolution = cfg.patch == 32 or cfg.patch_embed == "conv_half"
        for marker, is_present in (
            ("__x0__", cfg.prediction == "x0"),
            ("__32x32__", is_half_resolution),
            ("__sequential__", cfg.text_ids == "sequential"),
        ):
            if is_present:
                self.register_buffer(marker, torch.zeros(0))

    def _add_embeddings(self, cfg: SimpleNamespace) -> None:
        """Add the layers that embed image and text."""
        d = cfg.hidden
        kernel_size = cfg.patch // 2 if cfg.patch_embed == "conv_half" else cfg.patch
        if cfg.patch == 1:
            self.img_in = nn.Linear(cfg.channels, d)
        elif cfg.patch_embed == "bottleneck":
            bottleneck = nn.Conv2d(
                cfg.channels, cfg.bottleneck, kernel_size, stride=kernel_size, bias=False
            )
            self.img_in_bottleneck = nn.ModuleDict(
                {"in_layer": bottleneck, "out_layer": nn.Linear(cfg.bottleneck, d)}
            )
        else:
            self.img_in_patch = nn.Conv2d(cfg.channels, d, kernel_size, stride=kernel_size)
        self.txt_in = nn.Linear(cfg.text_dim, d)
        if cfg.padding == "learned":
            self.txt_padding = nn.Parameter(torch.zeros(cfg.text_dim))
        if cfg.registers:
            self.registers = nn.Parameter(torch.zeros(cfg.registers, d))

    def _add_modulation(self, cfg: SimpleNamespace) -> None:
        """Add the layers that compute modulation vectors."""
        d = cfg.hidden
        if cfg.modulation == "approximator":
            self.distilled_guidance_layer = Approximator(cfg)
        elif cfg.modulation == "none":
            self.final_layer.modulation_offset = nn.Parameter(torch.zeros(2, d))
        else:
            self.time_in = Embedder(256, d)
            self.guidance_in = Embedder(256, d) if cfg.guidance_embed else None
            self.vector_in = Embedder(cfg.pooled_dim, d) if cfg.pooled_dim else None
        if cfg.modulation == "shared":
            self.shared_modulation = Modulation(d, 6 + 6 + 3 + 2)
        if cfg.modulation == "per_block" and cfg.head == "linear":
            self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def _add_head(self, cfg: SimpleNamespace) -> None:
        """Add the layers that predict pixels or latents from image tokens."""
        f = cfg.nerf_hidden
        if cfg.head == "linear":
            self.final_layer.linear = nn.Linear(cfg.hidden, cfg.patch**2 * cfg.channels)
        else:
            self.nerf_image_embedder = nn.ModuleDict(
                {"embedder": nn.Sequential(nn.Linear(cfg.channels + cfg.nerf_freqs**2, f))}
            )
            self.nerf_blocks = nn.ModuleList(NerfBlock(cfg) for _ in range(cfg.nerf_depth))
        if cfg.head == "nerf_conv":
            self.nerf_final_layer_conv = nn.ModuleDict(
                {"norm": RMSNorm(f), "conv": nn.Conv2d(f, cfg.channels, 3, padding=1)}
            )
        if cfg.head == "nerf_linear":
            self.nerf_final_layer = nn.ModuleDict(
                {"norm": RMSNorm(f), "linear": nn.Linear(f, cfg.channels)}
            )

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        lengths: Tensor,
        time: Tensor,
        guidance: Tensor | None = None,
        pooled: Tensor | None = None,
        divisor: Tensor | None = None,
    ) -> Tensor:
        """Return the float32 velocity [b, c, height, width] of a mix of image and noise.

        Args:
            image: The mix [b, c, height, width] at `time`; packed latents are images of 64 channels
                with patch 1. Height and width must be divisible by the patch.
            text: Output of the text encoder [b, l, e].
            lengths: Number of text tokens [b], end-of-sequence included; 0: no text at all.
            time: Times [b] in [0, 1]; 1 is noise.
            guidance: Guidance scale [b] that some models embed; None is 0, the value in all
                published training of Chroma.
            pooled: Pooled text vector [b, pooled_dim], for models that read one.
            divisor: Divisor [b] of image − x̂ for x0 models; None is `time`, which must not be 0.

        Raises:
            ValueError: The image cannot be divided into patches, or `pooled` is missing.
        """
        cfg, (height, width) = self.settings, image.shape[2:]
        if height % cfg.patch or width % cfg.patch:
            raise ValueError(
                f"An image of {width}×{height} does not divide into patches of {cfg.patch}: "
                "pad it first."
            )
        rows, columns = height // cfg.patch, width // cfg.patch
        image, lengths = image.float(), lengths.to(image.device)
        double_vectors, single_vectors, output = self.compute_modulation(time, guidance, pooled)

        text, text_visible = self.mask_text(text, lengths)
        visible = (
            None
            if text_visible is None
            else F.pad(text_visible, (rows * columns + cfg.registers, 0), value=True)
        )
        rope = rope_table(cfg, rows, columns, text.shape[1]).to(image.device)
        tokens = self.run_blocks(
            self.embed_image(image),
            self.embed_text(text),
            double_vectors,
            single_vectors,
            rope,
            visible,
        )
        prediction = self.apply_head(tokens, image, output)
        if cfg.prediction == "velocity":
            return prediction
        divisor = time if divisor is None else divisor
        return (image - prediction) / divisor.float()[:, None, None, None]

    def mask_text(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Replace hidden text tokens.

        Hidden tokens are erased as well as masked, because a NaN would survive a product with 0.

        Returns:
            The text, and a mask [b, l] of visible tokens, or None if all are visible.
        """
        cfg = self.settings
        positions = torch.arange(text.shape[1], device=lengths.device)
        visible = positions < (lengths + (cfg.masking == "one_pad"))[:, None]
        if cfg.padding == "learned":
            is_text = positions < lengths[:, None]
            text = torch.where(is_text[..., None], text, self.txt_padding)
        elif cfg.masking != "off":
            text = text.masked_fill(~visible[..., None], 0)
        return text, None if cfg.masking == "off" else visible

    def run_blocks(
        self,
        x: Tensor,
        y: Tensor,
        double_vectors: Sequence[tuple[Tensor, Tensor]],
        single_vectors: Sequence[Tensor],
        rope: Tensor,
        visible: Tensor | None,
    ) -> Tensor:
        """Apply all blocks to image tokens x and text tokens y; return the image tokens."""
        num_image_tokens = x.shape[1]
        text_rope = rope[:, num_image_tokens:]
        text_visible = None if visible is None else visible[:, num_image_tokens:]
        for block in self.text_blocks:
            y = maybe_checkpoint(self.recompute, block, y, text_rope, text_visible)
        for block, vectors in zip(self.double_blocks, double_vectors):
            x, y = maybe_checkpoint(self.recompute, block, x, y, vectors, rope, visible)
        x = torch.cat([x, y], dim=1)
        for block, vectors in zip(self.single_blocks, single_vectors):
            x = maybe_checkpoint(self.recompute, block, x, vectors, rope, visible)
        return x[:, :num_image_tokens]

    def apply_head(self, tokens: Tensor, image: Tensor, output: Tensor | None) -> Tensor:
        """Predict an image [b, c, height, width] from tokens and the noisy image."""
        cfg = self.settings
        if cfg.head == "linear":
            tokens = modulate(tokens.float(), output[:, 0], output[:, 1])
            prediction = apply_in_float32(self.final_layer.linear, tokens)
            prediction = prediction.unflatten(-1, (cfg.patch**2, -1))
        else:
            prediction = self.predict_patches(tokens, image)
        grid = (image.shape[2] // cfg.patch, image.shape[3] // cfg.patch)
        prediction = prediction.permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, grid)
        prediction = F.pixel_shuffle(prediction, cfg.patch)
        if cfg.head == "nerf_conv":
            prediction = apply_in_float32(self.nerf_final_layer_conv["conv"], prediction)
        return prediction

    # --- modulation -------------------------------------------------------------------------------

    def compute_modulation(
        self, time: Tensor, guidance: Tensor | None, pooled: Tensor | None
    ) -> ModulationVectors:
        """Return the float32 modulation vectors of all blocks and of the output.

        Returns:
            For each double block a pair (image, text) of [b or 1, 6, d]: shift, scale and gate of
            the attention, then of the MLP. For each single block [b or 1, 3, d]. For the output
            [b or 1, 2, d]: shift and scale.
        """
        kind = self.settings.modulation
        guidance = torch.zeros_like(time) if guidance is None else guidance
        if kind == "approximator":
            return self._compute_approximated_vectors(time, guidance)
        if kind == "none":
            return self._get_static_vectors()
        condition = self._embed_condition(time, guidance, pooled)
        if kind == "shared":
            return self._compute_shared_vectors(condition)
        return self._compute_block_vectors(condition)

    def _compute_approximated_vectors(self, time: Tensor, guidance: Tensor) -> ModulationVectors:
        """Return the vectors of Chroma's approximator."""
        num_doubles, num_singles = len(self.double_blocks), len(self.single_blocks)
        counts = [3 * num_singles, 6 * num_doubles, 6 * num_doubles, 2]
        vectors = self.distilled_guidance_layer(time, guidance, sum(counts))
        single_vectors, image, text, output = vectors.split(counts, dim=1)
        double_vectors = list(zip(image.split(6, dim=1), text.split(6, dim=1)))
        return double_vectors, single_vectors.split(3, dim=1), output

    def _get_static_vectors(self) -> ModulationVectors:
        """Return learned vectors that do not depend on the time."""
        double_vectors = [
            (block.modulation_img.float()[None], block.modulation_txt.float()[None])
            for block in self.double_blocks
        ]
        single_vectors = [block.modulation_offset.float()[None] for block in self.single_blocks]
        return double_vectors, single_vectors, self.final_layer.modulation_offset.float()[None]

    def _embed_condition(self, time: Tensor, guidance: Tensor, pooled: Tensor | None) -> Tensor:
        """Return the conditioning vector [b, d] of FLUX."""
        condition = self.time_in(sinusoid(time, 256))
        if self.guidance_in is not None:
            condition = condition + self.guidance_in(sinusoid(guidance, 256))
        if self.vector_in is not None:
            if pooled is None:
                raise ValueError(
                    "This model reads a pooled text vector: pass pooled=[b, pooled_dim]."
                )
            condition = condition + self.vector_in(pooled)
        return condition

    def _compute_shared_vectors(self, condition: Tensor) -> ModulationVectors:
        """Return vectors of one layer plus a learned offset for each block."""
        vectors = self.shared_modulation(condition)
        image, text, single_vectors, output = vectors.split([6, 6, 3, 2], dim=1)
        return (
            [
                (image + block.modulation_img, text + block.modulation_txt)
                for block in self.double_blocks
            ],
            [single_vectors + block.modulation_offset for block in self.single_blocks],
            output,
        )

    def _compute_block_vectors(self, condition: Tensor) -> ModulationVectors:
        """Return the vectors of FLUX's layers, one layer for each block."""
        output = None
        if self.settings.head == "linear":
            vectors = self.final_layer.adaLN_modulation(condition)
            output = vectors.float().unflatten(-1, (2, -1))
        return (
            [(block.img_mod(condition), block.txt_mod(condition)) for block in self.double_blocks],
            [block.modulation(condition) for block in self.single_blocks],
            output,
        )

    # --- embeddings and head ----------------------------------------------------------------------

    def embed_image(self, image: Tensor) -> Tensor:
        """Return one token [b, n, d] for each patch of an image."""
        if self.settings.patch == 1:
            return self.img_in(image.flatten(2).transpose(1, 2).to(self.img_in.weight.dtype))
        image = image[:, :, ::2, ::2] if self.settings.patch_embed == "conv_half" else image
        if self.settings.patch_embed == "bottleneck":
            first, second = self.img_in_bottleneck.values()
            return second(first(image.to(first.weight.dtype)).flatten(2).transpose(1, 2))
        tokens = self.img_in_patch(image.to(self.img_in_patch.weight.dtype))
        return tokens.flatten(2).transpose(1, 2)

    def embed_text(self, text: Tensor) -> Tensor:
        """Return registers and text tokens [b, registers + l, d]."""
        y = self.txt_in(text.to(self.txt_in.weight.dtype))
        if not self.settings.registers:
            return y
        return torch.cat([self.registers.to(y.dtype).expand(len(y), -1, -1), y], dim=1)

    def predict_patches(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Apply Radiance's head, after PixNerd (arXiv 2507.23268).

        Returns:
            The pixels of each patch [b, n, p·p, c], or [b, n, p·p, f] before a convolution.
        """
        patch = self.settings.patch
        pixels = (
            F.pixel_unshuffle(image, patch)
            .unflatten(1, (-1, patch * patch))
            .flatten(3)
            .permute(0, 3, 2, 1)
        )
        chunks = zip(
            tokens.split(self.head_chunk_size, dim=1), pixels.split(self.head_chunk_size, dim=1)
        )
        return torch.cat(
            [maybe_checkpoint(True, self.predict_chunk, *chunk) for chunk in chunks], dim=1
        )

    def predict_chunk(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Apply the head to some tokens [b, n, d] and their pixels [b, n, p·p, c]."""
        features = (
            cosine_features(self.settings.patch, self.settings.nerf_freqs)
            .to(pixels.device)
            .expand(*pixels.shape[:2], -1, -1)
        )
        embedder = self.nerf_image_embedder["embedder"][0]
        x = apply_in_float32(embedder, torch.cat([pixels, features], dim=-1)).to(tokens.dtype)
        for block in self.nerf_blocks:
            x = block(x, tokens)
        if self.settings.head == "nerf_conv":
            return self.nerf_final_layer_conv["norm"](x.float())
        x = self.nerf_final_layer["norm"](x.float())
        return apply_in_float32(self.nerf_final_layer["linear"], x)


# --- files ----------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(
            "safetensors is needed to read weights: pip install safetensors."
        ) from None
    return load_file(path)


def load(
    folder: str | Path = ".",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_chunk_size: int = HEAD_CHUNK_SIZE,
) -> Transformer:
    """Load the model of `folder`/config.json with the weights of `folder`/model.safetensors.

    Args:
        folder: The exported folder.
        device: Device of the weights.
        dtype: Type of the weights, except for the few that must be float32.
        head_chunk_size: See `Transformer`.

    Raises:
        ValueError: The config is of another version.
        RuntimeError: Tensors do not fit the config; the message names them.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = Transformer(config, head_chunk_size)
    tensors = read_tensors(Path(folder) / "model.safetensors")
    # Copies, because these tensors map the file, which could not be overwritten while in use.
    tensors = {
        name: tensor.to(
            device, torch.float32 if name.startswith(FLOAT32_PREFIXES) else dtype, copy=True
        )
        for name, tensor in tensors.items()
    }
    model.load_state_dict(tensors, assign=True)
    return model


@torch.no_grad()
def add_lora(model: Transformer, path: str | Path, strength: float = 1.0) -> None:
    """Add `strength` times a LoRA to the weights; −strength removes it, except for rounding.

    Args:
        model: The model to change.
        path: A file that `radiance convert --to peft` wrote.
        strength: Factor of the LoRA.

    Raises:
        ValueError: The file has other names or is for another model; no weight is changed.
    """
    tensors, weights, pairs = read_tensors(Path(path)), dict(model.named_parameters()), {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        down = tensors.pop(key).flatten(1)
        up = tensors.pop(f"{module}.lora_B.weight", torch.empty(0, 0)).flatten(1)
        alpha = tensors.pop(f"{module}.alpha", None)
        weight = weights.get(f"{module.removeprefix('diffusion_model.')}.weight")
        if (
            weight is None
            or (len(weight), weight[0].numel()) != (len(up), down.shape[1])
            or up.shape[1] != len(down)
        ):
            raise ValueError(
                f"{path}: {key} and its lora_B do not fit this model: "
                "the LoRA is for another model, or the file is incomplete."
            )
        if alpha is None:  # it may be in the header, or in another file
            raise ValueError(
                f"{path}: {key} has no alpha beside it, which determines the strength: write the "
                "file with `radiance convert --to peft`."
            )
        pairs[weight] = (down, up, strength * alpha / len(down))
    if tensors or not pairs:
        raise ValueError(
            f"{path} is not a LoRA with PEFT's names ({next(iter(tensors), 'it is empty')}): "
            "rename its tensors with `radiance convert --to peft`."
        )
    for weight, (down, up, scale) in pairs.items():
        delta = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
        weight.copy_(weight + scale.to(weight.device) * delta.reshape(weight.shape))
