"""Chroma and Chroma1-Radiance as one plain PyTorch module: an image, a text and a time in, a velocity out. Apache-2.0.

It comes from `radiance`, which trains such models in JAX: the same network with the same numbers, in every variant that config.json
can name, for pixels and for packed latents. It needs torch, and safetensors to read weights. Parameters have the published
checkpoints' names.

    from model import add_lora, load
    model = load("folder")                          # its config.json and model.safetensors
    velocity = model(image, text, lengths, time)    # an nn.Module like any other, to be trained further
    add_lora(model, "lora.safetensors", 0.8)        # one that `radiance convert --to peft` wrote

Time 1 is noise, 0 the image in [-1, 1]: x_t = (1 − t)·image + t·noise, velocity = noise − image. What is trained here goes back with
    safetensors.torch.save_file(model.state_dict(), "model.safetensors", {"radiance.model": json.dumps(model.config)})

Computes in float32; in bfloat16 under autocast, or with bfloat16 weights (`load(…, dtype=torch.bfloat16)`). Tables, the statistics of
norms, the pixel embedder, the last layer and x_t − x̂ are computed in float32 in all of them.
Axes: b batch, n tokens, l text tokens, e text width, d hidden, h heads, k head size, p patch side, c channels, f pixel features.
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
    "channels", "patch", "bottleneck", "hidden", "heads", "double_blocks", "single_blocks", "mlp_ratio", "rope_axes", "rope_theta",
    "text_dim", "registers", "text_refiner_blocks", "approximator_dim", "approximator_hidden", "approximator_depth", "pooled_dim", "guidance_embed",
    "nerf_hidden", "nerf_mlp_ratio", "nerf_depth", "nerf_freqs",
)  # fmt: skip
CHOICE_SETTINGS = {
    "patch_embed": (
        "conv",
        "conv_half",
        "bottleneck",
    ),  # conv_half reads every second pixel, bottleneck goes through few channels
    "text_ids": ("zero", "sequential"),  # rotary ids of text tokens
    "masking": ("one_pad", "strict", "off"),  # padding tokens that are attended: one, none, all
    "padding": ("encoder", "learned"),  # what stands at padded text
    "modulation": ("approximator", "per_block", "shared", "none"),
    "head": ("nerf_conv", "nerf_linear", "linear"),
    "prediction": (
        "velocity",
        "x0",
    ),  # what the last layer puts out; the model always returns velocity
}


def parse_settings(config: Mapping[str, Any]) -> SimpleNamespace:
    """Raises ValueError when a setting is unknown, missing, or a choice that this file does not have."""
    unknown = [key for key in config if key not in NUMERIC_SETTINGS and key not in CHOICE_SETTINGS]
    missing = [key for key in (*NUMERIC_SETTINGS, *CHOICE_SETTINGS) if key not in config]
    if unknown or missing:
        problems = [
            f"{problem} {', '.join(keys)}"
            for problem, keys in (("unknown", unknown), ("missing", missing))
            if keys
        ]
        raise ValueError(
            f"The config does not fit this file ({'; '.join(problems)}): use the config.json and the model.py of one folder."
        )
    for key, choices in CHOICE_SETTINGS.items():
        if config[key] not in choices:
            raise ValueError(
                f"The config has {key}={config[key]!r}, and this file knows {', '.join(choices)}."
            )
    return SimpleNamespace(**config)


# --- tables, made on the host and rounded to float32 once -------------------------------------------------------------


def frequencies(count: int) -> Tensor:
    """From 1 down towards 1/10000, with each float32 rounding of the published code, for they are multiplied by up to 343,000."""
    steps = torch.arange(count, dtype=torch.float32, device="cpu")
    return (steps * -math.log(10_000) / steps.new_tensor(count)).double().exp().float()


def sinusoid(x: Tensor, width: int) -> Tensor:
    """[b] → [b, width]: cosines, then sines, of 1000·x at width/2 frequencies."""
    angles = (1000 * x.float())[:, None] * frequencies(width // 2).to(x.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(cfg: SimpleNamespace, rows: int, columns: int, text_length: int) -> Tensor:
    """[2, n, k/2]: cosines and sines of the angles of image tokens (row-major), registers and text tokens."""
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
    """[p·p, freqs²]: cos(π·fx·x)·cos(π·fy·y) / (1 + fx·fy), x and y over [0, 1]; pixels row-major, fx major and fy minor."""
    position = torch.linspace(0, 1, patch, dtype=torch.float64, device="cpu")
    f = torch.arange(freqs, dtype=torch.float64, device="cpu")
    waves = (math.pi * position[:, None] * f).cos()
    features = (
        waves[None, :, :, None] * waves[:, None, None, :] / (1 + f[:, None] * f)
    )  # [y, x, fx, fy]
    return features.reshape(patch * patch, freqs * freqs).float()


# --- layers -----------------------------------------------------------------------------------------------------------


def apply_in_float32(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """The layer in float32, whatever its weights are stored in and under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        x, weight, bias = x.float(), layer.weight.float(), layer.bias.float()
        return (
            F.linear(x, weight, bias)
            if weight.ndim == 2
            else F.conv2d(x, weight, bias, padding=layer.padding)
        )


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (
            y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-6) * self.scale.float()
        ).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, in float32, then shift and scale [b or 1, d]."""
    return (
        (1 + scale[:, None]) * F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) + shift[:, None]
    ).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    return x + gate[:, None].to(x.dtype) * update


def maybe_checkpoint(recompute: bool, function: Callable, *inputs: Any) -> Any:
    """f(*inputs), which with `recompute` is run again in the backward pass rather than kept."""
    return (
        checkpoint(function, *inputs, use_reentrant=False)
        if recompute and torch.is_grad_enabled()
        else function(*inputs)
    )


class Embedder(nn.Module):
    """Two linear layers with SiLU between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(width, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class Approximator(nn.Module):
    """Chroma's one small network for all modulation: (time, guidance, index of the vector) → the vector."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        self.dim, width, depth = (
            cfg.approximator_dim,
            cfg.approximator_hidden,
            cfg.approximator_depth,
        )
        self.in_proj, self.out_proj = nn.Linear(self.dim, width), nn.Linear(width, cfg.hidden)
        self.layers = nn.ModuleList(Embedder(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(depth))

    def forward(self, time: Tensor, guidance: Tensor, count: int) -> Tensor:
        """Float32 [b, count, d]."""
        scalar_embedding = torch.cat(
            [sinusoid(time, self.dim // 4), sinusoid(guidance, self.dim // 4)], dim=-1
        )[:, None].expand(-1, count, -1)
        # On the host, for accelerators' cosines are not made for such large angles.
        index_embedding = (
            sinusoid(torch.arange(count, device="cpu"), self.dim // 2)
            .to(time.device)
            .expand(len(time), -1, -1)
        )
        x = self.in_proj(
            torch.cat([scalar_embedding, index_embedding], dim=-1).to(self.in_proj.weight.dtype)
        )
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x))
        return self.out_proj(x).float()


class Modulation(nn.Module):
    """Float32 vectors [b, count, d] from the conditioning vector: FLUX's layer of a block, or PixArt-α's one for all."""

    def __init__(self, hidden: int, count: int):
        super().__init__()
        self.lin = nn.Linear(hidden, count * hidden)

    def forward(self, condition: Tensor) -> Tensor:
        return self.lin(F.silu(condition)).float().unflatten(-1, (-1, condition.shape[-1]))


# --- blocks -----------------------------------------------------------------------------------------------------------


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Turns the adjacent pairs (x0, x1), (x2, x3), … of [b, h, n, k] by the table's angles, in float32."""
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (
        torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        .flatten(-2)
        .to(x.dtype)
    )


def attention(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, visible: Tensor | None) -> Tensor:
    """[b, n, h·k]: every token attends to the `visible` [b, n] tokens of its own sample, or to all.

    So do the hidden ones: no row is empty, which would make it NaN, and nobody reads what they find.
    """
    mask = None if visible is None else visible[:, None, None]
    return (
        F.scaled_dot_product_attention(apply_rope(q, rope), apply_rope(k, rope), v, attn_mask=mask)
        .transpose(1, 2)
        .flatten(2)
    )


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(head_dim), RMSNorm(head_dim)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[b, n, 3·h·k] → queries, keys and values [b, h, n, k]."""
        q, k, v = qkv.unflatten(-1, (3, -1, len(self.query_norm.scale))).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


def make_stream(cfg: SimpleNamespace) -> tuple[nn.ModuleDict, nn.Sequential]:
    """Attention and MLP of image or text."""
    d, mlp_width = cfg.hidden, round(cfg.hidden * cfg.mlp_ratio)
    attn = nn.ModuleDict(
        {"qkv": nn.Linear(d, 3 * d), "norm": QKNorm(d // cfg.heads), "proj": nn.Linear(d, d)}
    )
    return attn, nn.Sequential(nn.Linear(d, mlp_width), nn.GELU("tanh"), nn.Linear(mlp_width, d))


class TextBlock(nn.Module):
    """Attention, then MLP, of the text alone."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        self.txt_attn, self.txt_mlp = make_stream(cfg)

    def forward(self, y: Tensor, rope: Tensor, visible: Tensor | None) -> Tensor:
        zeros = rope.new_zeros(1, y.shape[-1])
        qkv = self.txt_attn["norm"](self.txt_attn["qkv"](modulate(y, zeros, zeros)))
        y = y + self.txt_attn["proj"](attention(*qkv, rope, visible))
        return y + self.txt_mlp(modulate(y, zeros, zeros))


class DoubleBlock(nn.Module):
    """Image and text keep their own weights and meet in the attention."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        d = cfg.hidden
        (self.img_attn, self.img_mlp), (self.txt_attn, self.txt_mlp) = (
            make_stream(cfg),
            make_stream(cfg),
        )
        if cfg.modulation == "per_block":
            self.img_mod, self.txt_mod = Modulation(d, 6), Modulation(d, 6)
        elif cfg.modulation != "approximator":
            self.modulation_img, self.modulation_txt = (
                nn.Parameter(torch.zeros(6, d)) for _ in range(2)
            )

    def forward(
        self, x: Tensor, y: Tensor, vectors: Sequence[Tensor], rope: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        streams = ((x, vectors[0], self.img_attn), (y, vectors[1], self.txt_attn))
        projections = [
            attn["norm"](attn["qkv"](modulate(z, m[:, 0], m[:, 1]))) for z, m, attn in streams
        ]
        attention_outputs = attention(
            *(torch.cat(projection, dim=2) for projection in zip(*projections)), rope, visible
        )
        x, y = (
            add_gated(z, m[:, 2], attn["proj"](a))
            for (z, m, attn), a in zip(
                streams, attention_outputs.split([x.shape[1], y.shape[1]], dim=1)
            )
        )
        streams = ((x, vectors[0], self.img_mlp), (y, vectors[1], self.txt_mlp))
        x, y = (add_gated(z, m[:, 5], mlp(modulate(z, m[:, 3], m[:, 4]))) for z, m, mlp in streams)
        return x, y


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        d, mlp_width = cfg.hidden, round(cfg.hidden * cfg.mlp_ratio)
        self.linear1, self.linear2, self.norm = (
            nn.Linear(d, 3 * d + mlp_width),
            nn.Linear(d + mlp_width, d),
            QKNorm(d // cfg.heads),
        )
        if cfg.modulation == "per_block":
            self.modulation = Modulation(d, 3)
        elif cfg.modulation != "approximator":
            self.modulation_offset = nn.Parameter(torch.zeros(3, d))

    def forward(self, x: Tensor, m: Tensor, rope: Tensor, visible: Tensor | None) -> Tensor:
        qkv, mlp_hidden = self.linear1(modulate(x, m[:, 0], m[:, 1])).tensor_split(
            [3 * x.shape[-1]], dim=-1
        )
        attention_output = attention(*self.norm(qkv), rope, visible)
        return add_gated(
            x,
            m[:, 2],
            self.linear2(
                torch.cat([attention_output, F.gelu(mlp_hidden, approximate="tanh")], dim=-1)
            ),
        )


class NerfBlock(nn.Module):
    """A gated MLP over the pixels of a patch, with weights generated by its token and normalized along their input."""

    def __init__(self, cfg: SimpleNamespace):
        super().__init__()
        f, mlp_width = cfg.nerf_hidden, cfg.nerf_hidden * cfg.nerf_mlp_ratio
        self.norm, self.param_generator, self.weight_shapes = (
            RMSNorm(f),
            nn.Linear(cfg.hidden, 3 * f * mlp_width),
            ((f, mlp_width), (f, mlp_width), (mlp_width, f)),
        )

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[b, n, p·p, f] and [b, n, d] → [b, n, p·p, f]."""
        weights = zip(self.param_generator(tokens).chunk(3, dim=-1), self.weight_shapes)
        gate, value, out = (
            F.normalize(w.float().unflatten(-1, shape), dim=-2).to(w.dtype) for w, shape in weights
        )
        y = self.norm(x)
        return x + (F.silu(y @ gate) * (y @ value)) @ out


class Transformer(nn.Module):
    """The network that `config` (the dict of config.json) describes. Its fresh weights are meant to be loaded over.

    head_tile: tokens of an image that the NeRF head paints at a time; the weights that a token generates are far larger than it.
    Set `recompute` to train with less memory: blocks then run again in the backward pass, as the head always does.
    """

    def __init__(self, config: Mapping[str, Any], head_chunk_size: int = 512):
        super().__init__()
        cfg = self.settings = parse_settings(config)
        self.config, self.head_chunk_size, self.recompute, d, f = (
            dict(config),
            head_chunk_size,
            False,
            cfg.hidden,
            cfg.nerf_hidden,
        )
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
        self.text_blocks = nn.ModuleList(TextBlock(cfg) for _ in range(cfg.text_refiner_blocks))
        self.double_blocks = nn.ModuleList(DoubleBlock(cfg) for _ in range(cfg.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(cfg) for _ in range(cfg.single_blocks))

        self.final_layer = nn.Module()
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

        if cfg.head == "linear":
            self.final_layer.linear = nn.Linear(d, cfg.patch**2 * cfg.channels)
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

        # Empty tensors by which readers of a checkpoint know the variant.
        is_half_resolution = cfg.patch == 32 or cfg.patch_embed == "conv_half"
        for marker, is_present in (
            ("__x0__", cfg.prediction == "x0"),
            ("__32x32__", is_half_resolution),
            ("__sequential__", cfg.text_ids == "sequential"),
        ):
            if is_present:
                self.register_buffer(marker, torch.zeros(0))

    def forward(
        self, image: Tensor, text: Tensor, lengths: Tensor, time: Tensor, guidance: Tensor | None = None,
        pooled: Tensor | None = None, divisor: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Float32 velocity [b, c, height, width] at `image` [b, c, height, width], an image mixed with noise at `time` [b].

        Height and width must divide by the patch (ValueError); packed latents are images of 64 channels with patch 1.
        text [b, l, e], lengths [b]: the encoder's output and the number of real tokens, end-of-sequence included; 0 is no text at all.
        guidance [b]: the guidance number that some models embed; 0 when None, as in all published Chroma training.
        pooled [b, pooled_dim]: for models that read a pooled text vector.
        divisor [b]: for x0 models, by what image − x̂ is divided; `time` when None, which must then not be 0.
        """
        cfg, (height, width), text_length = self.settings, image.shape[2:], text.shape[1]
        if height % cfg.patch or width % cfg.patch:
            raise ValueError(
                f"An image of {width}×{height} does not divide into patches of {cfg.patch}: pad it first."
            )
        rows, columns = height // cfg.patch, width // cfg.patch
        image, lengths = image.float(), lengths.to(image.device)
        double_vectors, single_vectors, output = self.compute_modulation(time, guidance, pooled)

        text_positions, visible_lengths = (
            torch.arange(text_length, device=image.device),
            lengths + (cfg.masking == "one_pad"),
        )
        visible = (
            None
            if cfg.masking == "off"
            else F.pad(
                text_positions < visible_lengths[:, None],
                (rows * columns + cfg.registers, 0),
                value=True,
            )
        )
        rope = rope_table(cfg, rows, columns, text_length).to(image.device)
        # What is hidden is also erased: even a NaN there must not pass through a product with 0.
        if cfg.padding == "learned":
            text = torch.where(
                (text_positions < lengths[:, None])[..., None], text, self.txt_padding
            )
        elif cfg.masking != "off":
            text = text.masked_fill((text_positions >= visible_lengths[:, None])[..., None], 0)
        x, y = self.embed_image(image), self.embed_text(text)

        num_image_tokens = x.shape[1]
        text_visible = None if visible is None else visible[:, num_image_tokens:]
        for block in self.text_blocks:
            y = maybe_checkpoint(self.recompute, block, y, rope[:, num_image_tokens:], text_visible)
        for block, vectors in zip(self.double_blocks, double_vectors):
            x, y = maybe_checkpoint(self.recompute, block, x, y, vectors, rope, visible)
        x = torch.cat([x, y], dim=1)
        for block, vectors in zip(self.single_blocks, single_vectors):
            x = maybe_checkpoint(self.recompute, block, x, vectors, rope, visible)
        tokens = x[:, :num_image_tokens]

        if cfg.head == "linear":
            tokens = modulate(tokens.float(), output[:, 0], output[:, 1])
            prediction = apply_in_float32(self.final_layer.linear, tokens).unflatten(
                -1, (cfg.patch**2, -1)
            )
        else:
            prediction = self.predict_patches(tokens, image)
        prediction = F.pixel_shuffle(
            prediction.permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, (rows, columns)), cfg.patch
        )
        if cfg.head == "nerf_conv":
            prediction = apply_in_float32(self.nerf_final_layer_conv["conv"], prediction)
        if cfg.prediction == "velocity":
            return prediction
        return (image - prediction) / (time if divisor is None else divisor).float()[
            :, None, None, None
        ]

    def compute_modulation(
        self, time: Tensor, guidance: Tensor | None, pooled: Tensor | None
    ) -> tuple[Sequence, Sequence[Tensor], Tensor | None]:
        """Float32 vectors: a pair for each double block (image and text, [b or 1, 6, d]: shift, scale and gate of the attention,
        then of the MLP), those of each single block ([b or 1, 3, d]), and of the output ([b or 1, 2, d]: shift, scale).
        """
        doubles, singles, kind = self.double_blocks, self.single_blocks, self.settings.modulation
        guidance = torch.zeros_like(time) if guidance is None else guidance
        if kind == "approximator":
            counts = [3 * len(singles), 6 * len(doubles), 6 * len(doubles), 2]
            single_vectors, image, text, output = self.distilled_guidance_layer(
                time, guidance, sum(counts)
            ).split(counts, dim=1)
            return (
                list(zip(image.split(6, dim=1), text.split(6, dim=1))),
                single_vectors.split(3, dim=1),
                output,
            )
        if kind == "none":
            double_vectors = [
                (block.modulation_img.float()[None], block.modulation_txt.float()[None])
                for block in doubles
            ]
            return (
                double_vectors,
                [block.modulation_offset.float()[None] for block in singles],
                self.final_layer.modulation_offset.float()[None],
            )

        condition = self.time_in(sinusoid(time, 256))
        if self.guidance_in is not None:
            condition = condition + self.guidance_in(sinusoid(guidance, 256))
        if self.vector_in is not None:
            if pooled is None:
                raise ValueError(
                    "This model reads a pooled text vector: pass pooled=[b, pooled_dim]."
                )
            condition = condition + self.vector_in(pooled)
        if kind == "shared":
            image, text, single_vectors, output = self.shared_modulation(condition).split(
                [6, 6, 3, 2], dim=1
            )
            double_vectors = [
                (image + block.modulation_img, text + block.modulation_txt) for block in doubles
            ]
            return (
                double_vectors,
                [single_vectors + block.modulation_offset for block in singles],
                output,
            )
        output = (
            self.final_layer.adaLN_modulation(condition).float().unflatten(-1, (2, -1))
            if self.settings.head == "linear"
            else None
        )
        return (
            [(block.img_mod(condition), block.txt_mod(condition)) for block in doubles],
            [block.modulation(condition) for block in singles],
            output,
        )

    def embed_image(self, image: Tensor) -> Tensor:
        if self.settings.patch == 1:
            return self.img_in(image.flatten(2).transpose(1, 2).to(self.img_in.weight.dtype))
        image = image[:, :, ::2, ::2] if self.settings.patch_embed == "conv_half" else image
        if self.settings.patch_embed == "bottleneck":
            first, second = self.img_in_bottleneck.values()
            return second(first(image.to(first.weight.dtype)).flatten(2).transpose(1, 2))
        return (
            self.img_in_patch(image.to(self.img_in_patch.weight.dtype)).flatten(2).transpose(1, 2)
        )

    def embed_text(self, text: Tensor) -> Tensor:
        """Registers and text tokens."""
        y = self.txt_in(text.to(self.txt_in.weight.dtype))
        return (
            torch.cat([self.registers.to(y.dtype).expand(len(y), -1, -1), y], dim=1)
            if self.settings.registers
            else y
        )

    def predict_patches(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Radiance's head, after PixNerd (arXiv 2507.23268): [b, n, p·p, c or f]. A convolution may follow."""
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
        features = (
            cosine_features(self.settings.patch, self.settings.nerf_freqs)
            .to(pixels.device)
            .expand(*pixels.shape[:2], -1, -1)
        )
        x = apply_in_float32(
            self.nerf_image_embedder["embedder"][0], torch.cat([pixels, features], dim=-1)
        ).to(tokens.dtype)
        for block in self.nerf_blocks:
            x = block(x, tokens)
        if self.settings.head == "nerf_conv":
            return self.nerf_final_layer_conv["norm"](x.float())
        return apply_in_float32(
            self.nerf_final_layer["linear"], self.nerf_final_layer["norm"](x.float())
        )


FLOAT32_PREFIXES = (
    "__",
    "nerf_image_embedder.",
    "nerf_final_layer",
    "final_layer.linear.",
)  # what `load` keeps in float32


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file. Raises ImportError, with what to install."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("Weights are read with safetensors: pip install safetensors.") from None
    return load_file(path)


def load(
    folder: str | Path = ".",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_chunk_size: int = 512,
) -> Transformer:
    """The model of `folder`/config.json with the weights of `folder`/model.safetensors.

    Raises ValueError for a config of another version, and RuntimeError that names every tensor that does not fit.
    """
    with torch.device("meta"):
        model = Transformer(
            json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")), head_chunk_size
        )
    tensors = read_tensors(Path(folder) / "model.safetensors")
    # Copies, for these tensors are the file itself, which could not be written again while they are in use.
    tensors = {
        name: tensor.to(
            device, torch.float32 if name.startswith(FLOAT32_PREFIXES) else dtype, copy=True
        )
        for name, tensor in tensors.items()
    }
    model.load_state_dict(tensors, assign=True)
    return model


@torch.no_grad()
def add_lora(model: Transformer, path: str | Path, strength: float = 1.0):
    """Adds `strength` times a LoRA to the weights; the opposite strength takes it away again, but for rounding.

    path: what `radiance convert --to peft` writes. Raises ValueError, and adds nothing, where the file has other names or is for another model.
    """
    tensors, weights, pairs = read_tensors(Path(path)), dict(model.named_parameters()), {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        down, up = (
            tensors.pop(key).flatten(1),
            tensors.pop(f"{module}.lora_B.weight", torch.empty(0, 0)).flatten(1),
        )
        scale = tensors.pop(f"{module}.alpha", torch.tensor(float(len(down)))) / len(down)
        weight = weights.get(f"{module.removeprefix('diffusion_model.')}.weight")
        if (
            weight is None
            or (len(weight), weight[0].numel()) != (len(up), down.shape[1])
            or up.shape[1] != len(down)
        ):
            raise ValueError(
                f"{path}: {key} and its other half do not fit this model: the LoRA is for another, or is not whole."
            )
        pairs[weight] = (down, up, strength * scale)
    if tensors or not pairs:
        raise ValueError(
            f"{path} is not a LoRA with PEFT's names ({next(iter(tensors), 'it is empty')}): rename it with `radiance convert --to peft`."
        )
    for weight, (down, up, scale) in pairs.items():
        delta = (
            up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
        ).reshape(weight.shape)
        weight.copy_(weight + scale.to(weight.device) * delta)
