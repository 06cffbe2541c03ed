"""FLUX's autoencoder: images to packed latents and back.

It is that of arXiv 2112.10752 with 16 channels and without quantization layers. Axis letters: b
batch, c channels of a latent. A packed latent is a token of the latent models: a square of 2×2
latents, channel-major. The parameters are a plain nested dict with "encoder" and "decoder", of
which one may be missing. Blocks are not stacked, because hardly two have the same shape.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from radiance.base.settings import Section, require
from radiance.model.keys import make_rngs
from radiance.model.precision import EXACT_PRECISION, exact_in_float32
from radiance.model.tiling import apply_in_tiles
from radiance.model.transformer import Params


@dataclass(frozen=True)
class Autoencoder(Section):
    """Sizes, and the scale of the latents; the defaults are those of FLUX.1."""

    latent_channels: int = 16
    width: int = 128  # channels at the image's resolution
    # Factors of the width, one per level; each level except the last halves the image.
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    groups: int = 32  # groups of the group norms
    shift: float = 0.1159  # a latent is (mean − shift) · scale
    scale: float = 0.3611

    def check(self):
        """Raise ConfigError for sizes that are too small or do not divide."""
        for name in ("latent_channels", "width", "blocks", "groups"):
            require(
                getattr(self, name) >= 1,
                f"autoencoder.{name} is {getattr(self, name)}: it must be at least 1.",
            )
        require(
            self.multipliers[:1] == (1,) and all(m >= 1 for m in self.multipliers),
            f"autoencoder.multipliers={self.multipliers}: use positive whole numbers that begin "
            "with 1.",
        )
        require(
            self.width % self.groups == 0,
            f"autoencoder.width={self.width} does not divide into "
            f"autoencoder.groups={self.groups} groups: change one of them.",
        )
        require(self.scale > 0, f"autoencoder.scale={self.scale} must be positive.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of channels of the levels."""
        return tuple(self.width * m for m in self.multipliers)

    @property
    def patch_size(self) -> int:
        """Height and width, in pixels, that a packed latent stands for; 16 for FLUX."""
        return 2 * 2 ** (len(self.multipliers) - 1)


# --- images and latents ---------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("sizes", "dtype", "tile"))
def encode_images(
    sizes: Autoencoder,
    params: Params,
    images: Float[Array, "b height width 3"],
    key: PRNGKeyArray | None = None,
    *,
    dtype: str = "bfloat16",
    tile: int = 0,
) -> Float32[Array, "b rows columns packed"]:
    """Encode images to packed latents.

    Args:
        sizes: Sizes of the autoencoder.
        params: Parameters with "encoder".
        images: Images in [-1, 1]; height and width are multiples of `sizes.patch_size`.
        key: Random key to sample the posterior; its mean when None.
        dtype: Type of activations and products. Statistics of norms and the first and last
            convolution of each network are float32.
        tile: Height and width of tiles, in pixels; see `decode_latents`.

    Returns:
        Packed latents.

    Raises:
        ValueError: If height, width or tile size do not fit.
    """
    height, width = images.shape[1:3]
    if height % sizes.patch_size or width % sizes.patch_size:
        raise ValueError(
            f"An image of {width}×{height} does not divide into squares of {sizes.patch_size} "
            "pixels: pad or crop it first."
        )
    encoder = nnx.merge(_split_abstract_network(ImageEncoder, sizes, dtype)[0], params["encoder"])
    # Tiles are blended before sampling: the mean of two samples would have too little variance.
    moments = apply_in_tiles(
        encoder,
        images,
        sizes.patch_size,
        2,
        2 * sizes.latent_channels,
        _tile_size_in_tokens(sizes, tile),
    )
    latents, log_variance = jnp.split(moments, 2, axis=-1)
    if key is not None:
        latents += jnp.exp(0.5 * jnp.clip(log_variance, -30, 20)) * jax.random.normal(
            key, latents.shape
        )
    return pack_latents((latents - sizes.shift) * sizes.scale)


@partial(jax.jit, static_argnames=("sizes", "dtype", "tile"))
def decode_latents(
    sizes: Autoencoder,
    params: Params,
    latents: Float[Array, "b rows columns packed"],
    *,
    dtype: str = "bfloat16",
    tile: int = 0,
) -> Float32[Array, "b height width 3"]:
    """Decode packed latents to images.

    Tiles bound the memory, which otherwise grows with the square of the area in the middle
    attention. They overlap by at least a quarter and are blended linearly. An image that fits into
    one tile is decoded at once. For larger ones the result differs, as each tile has its own
    group-norm statistics, attention and zero padding. With random weights and tiles of 512 in
    640 × 768 pixels the relative error (root mean square) was 2 % for latents of noise, and 14 %
    where regions differ strongly; with tiles of 256 it was 5 % and 34 %.

    Args:
        sizes: Sizes of the autoencoder.
        params: Parameters with "decoder".
        latents: Packed latents.
        dtype: Type of activations and products; see `encode_images`.
        tile: Height and width of tiles, in pixels: a multiple of `sizes.patch_size` and at least
            four times it; 0 for the whole image at once.

    Returns:
        Images, about in [-1, 1].

    Raises:
        ValueError: If the number of channels or the tile size does not fit.
    """
    if latents.shape[-1] != 4 * sizes.latent_channels:
        raise ValueError(
            f"The packed latents have {latents.shape[-1]} channels, and this autoencoder has "
            f"{4 * sizes.latent_channels}: use the model's own autoencoder."
        )
    decoder = nnx.merge(_split_abstract_network(ImageDecoder, sizes, dtype)[0], params["decoder"])
    latents = unpack_latents(latents.astype(jnp.float32) / sizes.scale + sizes.shift)
    return apply_in_tiles(
        decoder, latents, 2, sizes.patch_size, 3, _tile_size_in_tokens(sizes, tile)
    )


def pack_latents(
    latents: Float[Array, "b height width c"],
) -> Float[Array, "b rows columns packed"]:
    """Pack squares of 2×2 latents to tokens; channel-major, then row, then column."""
    return rearrange(latents, "b (rows p) (columns q) c -> b rows columns (c p q)", p=2, q=2)


def unpack_latents(
    latents: Float[Array, "b rows columns packed"],
) -> Float[Array, "b height width c"]:
    """Unpack tokens to squares of 2×2 latents, the inverse of `pack_latents`."""
    return rearrange(latents, "b rows columns (c p q) -> b (rows p) (columns q) c", p=2, q=2)


def _tile_size_in_tokens(sizes: Autoencoder, tile: int) -> int:
    """Check the height and width of a tile, and convert them from pixels to packed latents."""
    if tile and (tile % sizes.patch_size or tile < 4 * sizes.patch_size):
        raise ValueError(
            f"tile={tile} must be a multiple of {sizes.patch_size} pixels and at least "
            f"{4 * sizes.patch_size}, or 0 for no tiles."
        )
    return tile // sizes.patch_size


# --- the networks ---------------------------------------------------------------------------------


class ImageEncoder(nnx.Module):
    """Convolutional encoder from images to the moments of latents."""

    def __init__(self, sizes: Autoencoder, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths, last_level = sizes.widths, len(sizes.widths) - 1
        self.conv_in = _make_exact_conv(3, sizes.width, rngs)
        self.levels = nnx.List(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                sizes.blocks,
                sizes.groups,
                "none" if i == last_level else "down",
                dtype,
                rngs,
            )
            for i in range(last_level + 1)
        )
        self.middle = MiddleBlocks(widths[-1], sizes.groups, dtype, rngs)
        self.norm_out = make_group_norm(widths[-1], sizes.groups, dtype, rngs)
        self.conv_out = _make_exact_conv(widths[-1], 2 * sizes.latent_channels, rngs)
        self.dtype = dtype

    @exact_in_float32
    def __call__(self, images: Float[Array, "b height width 3"]) -> Float32[Array, "b h w moments"]:
        """Compute the means and log-variances of the latents, concatenated."""
        x = self.conv_in(images).astype(self.dtype)
        for level in self.levels:
            x = level(x)
        return self.conv_out(nnx.silu(self.norm_out(self.middle(x))))


class ImageDecoder(nnx.Module):
    """Convolutional decoder from latents to images.

    Level i has the width and resolution of the encoder's level i; the last level is applied first.
    """

    def __init__(self, sizes: Autoencoder, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths, last_level = sizes.widths, len(sizes.widths) - 1
        self.conv_in = _make_exact_conv(sizes.latent_channels, widths[-1], rngs)
        self.middle = MiddleBlocks(widths[-1], sizes.groups, dtype, rngs)
        self.levels = nnx.List(
            Level(
                widths[min(i + 1, last_level)],
                widths[i],
                sizes.blocks + 1,
                sizes.groups,
                "none" if i == 0 else "up",
                dtype,
                rngs,
            )
            for i in range(last_level + 1)
        )
        self.norm_out = make_group_norm(sizes.width, sizes.groups, dtype, rngs)
        self.conv_out = _make_exact_conv(sizes.width, 3, rngs)
        self.dtype = dtype

    @exact_in_float32
    def __call__(self, latents: Float[Array, "b h w c"]) -> Float32[Array, "b height width 3"]:
        """Compute images from unpacked latents."""
        x = self.middle(self.conv_in(latents).astype(self.dtype))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class Level(nnx.Module):
    """Residual blocks at one resolution, followed by a convolution to the next resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        num_groups: int,
        resample: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        widths = (in_channels, *[out_channels] * num_blocks)
        self.blocks = nnx.List(
            ResidualBlock(*channels, num_groups, dtype, rngs) for channels in pairwise(widths)
        )
        if resample == "down":
            self.downsample = nnx.Conv(
                out_channels,
                out_channels,
                (3, 3),
                strides=2,
                padding=((0, 1), (0, 1)),
                dtype=dtype,
                rngs=rngs,
            )
        if resample == "up":
            self.upsample = nnx.Conv(
                out_channels, out_channels, (3, 3), padding=1, dtype=dtype, rngs=rngs
            )

    def __call__(self, x: Float[Array, "b h w inner"]) -> Float[Array, "b h_out w_out outer"]:
        """Apply the blocks and change the resolution."""
        for block in self.blocks:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x.repeat(2, axis=1).repeat(2, axis=2))
        return x


class ResidualBlock(nnx.Module):
    """Two convolutions behind group norms, with a residual connection."""

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.norm1 = make_group_norm(in_channels, num_groups, dtype, rngs)
        self.conv1 = nnx.Conv(in_channels, out_channels, (3, 3), padding=1, dtype=dtype, rngs=rngs)
        self.norm2 = make_group_norm(out_channels, num_groups, dtype, rngs)
        self.conv2 = nnx.Conv(out_channels, out_channels, (3, 3), padding=1, dtype=dtype, rngs=rngs)
        if in_channels != out_channels:
            self.shortcut = nnx.Conv(in_channels, out_channels, (1, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w inner"]) -> Float[Array, "b h w outer"]:
        """Update the activations."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class MiddleBlocks(nnx.Module):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, width: int, num_groups: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.block1 = ResidualBlock(width, width, num_groups, dtype, rngs)
        self.attention = SpatialAttention(width, num_groups, dtype, rngs)
        self.block2 = ResidualBlock(width, width, num_groups, dtype, rngs)

    def __call__(self, x: Float[Array, "b h w f"]) -> Float[Array, "b h w f"]:
        """Update the activations."""
        return self.block2(self.attention(self.block1(x)))


class SpatialAttention(nnx.Module):
    """Self-attention over all pixels with one head, too wide for fused kernels; float32 softmax."""

    def __init__(self, width: int, num_groups: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = make_group_norm(width, num_groups, dtype, rngs)
        self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w f"]) -> Float[Array, "b h w f"]:
        """Update the activations."""
        y = rearrange(self.norm(x), "b h w f -> b (h w) 1 f")
        attention_output = jax.nn.dot_product_attention(
            self.query(y), self.key(y), self.value(y), implementation="xla"
        )
        return x + self.proj(attention_output).reshape(x.shape)


def _make_exact_conv(in_channels: int, out_channels: int, rngs: nnx.Rngs) -> nnx.Conv:
    """Make a 3×3 convolution that computes in float32."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (3, 3),
        padding=1,
        dtype=jnp.float32,
        precision=EXACT_PRECISION,
        rngs=rngs,
    )


def make_group_norm(width: int, num_groups: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Make a group norm with eps 1e-6 and an exact variance."""
    return nnx.GroupNorm(
        width, num_groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, rngs=rngs
    )


# --- parameters as a plain tree -------------------------------------------------------------------


NETWORKS = {"encoder": ImageEncoder, "decoder": ImageDecoder}


@lru_cache(maxsize=16)
def _split_abstract_network(network_class: type, sizes: Autoencoder, dtype: str):
    """Return the graph of a network without arrays, and the shapes of its parameters."""
    return nnx.split(
        jax.eval_shape(
            lambda key: network_class(sizes, jnp.dtype(dtype), make_rngs(key)), jax.random.key(0)
        )
    )


def make_abstract_autoencoder(sizes: Autoencoder) -> Params:
    """Make the parameter tree with shapes and types in place of arrays; it takes no memory."""
    return {
        name: nnx.to_pure_dict(_split_abstract_network(network_class, sizes, "float32")[1])
        for name, network_class in NETWORKS.items()
    }


@partial(jax.jit, static_argnames="sizes")
def init_autoencoder_params(sizes: Autoencoder, key: PRNGKeyArray) -> Params:
    """Initialize float32 parameters: normal kernels of variance 1 / inputs, norms 1, biases 0."""
    # One call for all noise, not fused with the rest: a call per kernel takes 20 s to compile.
    leaves, treedef = jax.tree_util.tree_flatten_with_path(make_abstract_autoencoder(sizes))
    leaf_ends = np.cumsum([shape.size for _, shape in leaves])
    leaf_noises = jnp.split(
        jax.lax.optimization_barrier(jax.random.normal(key, (leaf_ends[-1],))), leaf_ends[:-1]
    )

    def init_leaf(leaf_name: str, shape: tuple[int, ...], leaf_noise: jax.Array) -> jax.Array:
        if leaf_name == "kernel":
            return leaf_noise.reshape(shape) / math.sqrt(math.prod(shape[:-1]))
        return jnp.full(shape, leaf_name == "scale", jnp.float32)

    return treedef.unflatten(
        init_leaf(path[-1].key, x.shape, leaf_noise)
        for (path, x), leaf_noise in zip(leaves, leaf_noises)
    )
