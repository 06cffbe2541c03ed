"""From image tokens to pixels: the NeRF head, whose weights each token generates, and the plain linear head."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from radiance import config
from radiance.model.blocks import modulate
from radiance.model.precision import EXACT_PRECISION


def patchify(
    image: Float[Array, "b height width c"], patch_size: int
) -> Float[Array, "b n pixels c"]:
    """Patches row-major over the image, pixels row-major inside a patch."""
    b, height, width, c = image.shape
    x = image.reshape(
        b, height // patch_size, patch_size, width // patch_size, patch_size, c
    ).swapaxes(2, 3)
    return x.reshape(b, -1, patch_size * patch_size, c)


def unpatchify(
    patches: Float[Array, "b n pixels c"], height: int, width: int, patch_size: int
) -> Float[Array, "b height width c"]:
    """The inverse of `unfold` for an image of that size."""
    b, c = patches.shape[0], patches.shape[-1]
    x = patches.reshape(
        b, height // patch_size, width // patch_size, patch_size, patch_size, c
    ).swapaxes(2, 3)
    return x.reshape(b, height, width, c)


def cosine_features(patch_size: int, num_freqs: int) -> Float32[np.ndarray, "pixels features"]:
    """cos(π·fx·x)·cos(π·fy·y) / (1 + fx·fy) at the pixels of a patch, x (the column) and y (the row) over [0, 1].

    Pixels are row-major, features have fx major and fy minor.
    """
    positions, frequencies = np.linspace(0, 1, patch_size), np.arange(num_freqs)
    cosines = np.cos(np.pi * np.outer(positions, frequencies))  # [position, frequency]
    features = np.einsum(
        "xf,yg,fg->yxfg", cosines, cosines, 1 / (1 + np.outer(frequencies, frequencies))
    )
    return features.reshape(patch_size * patch_size, num_freqs * num_freqs).astype(np.float32)


class NerfHead(nnx.Module):
    """Radiance's head (after PixNerd, arXiv 2507.23268): a small network over the pixels of a patch of the noisy image.

    `nerf_linear` ends in a linear layer per pixel, `nerf_conv` in a 3×3 convolution over the folded image. Tokens are
    processed `tile` at a time in every image, and recomputed in the backward pass: the weights that a token generates are
    far larger than the token.
    """

    def __init__(self, model: config.Model, chunk_size: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.patch_size, self.num_freqs, self.chunk_size, self.dtype = (
            model.patch,
            model.nerf_freqs,
            chunk_size,
            dtype,
        )
        hidden, zeros = model.nerf_hidden, nnx.initializers.zeros
        # The embedder and the last layer work in float32: bfloat16 pixels are coarser than 8 bits.
        self.embedder = nnx.Linear(
            model.channels + model.nerf_freqs**2, hidden, precision=EXACT_PRECISION, rngs=rngs
        )
        keys = jax.random.split(rngs.params(), model.nerf_depth)
        self.blocks = jax.vmap(lambda key: NerfBlock(model, dtype, nnx.Rngs(key)))(keys)
        self.norm = nnx.RMSNorm(hidden, epsilon=1e-6, rngs=rngs)
        if model.head == "nerf_conv":
            self.conv = nnx.Conv(
                hidden,
                model.channels,
                (3, 3),
                padding=1,
                kernel_init=zeros,
                precision=EXACT_PRECISION,
                rngs=rngs,
            )
        else:
            self.linear = nnx.Linear(
                hidden, model.channels, kernel_init=zeros, precision=EXACT_PRECISION, rngs=rngs
            )

    def __call__(
        self, tokens: Float[Array, "b n d"], image: Float32[Array, "b height width c"]
    ) -> Float32[Array, "b height width c"]:
        height, width = image.shape[1:3]
        patch_features = self.apply_in_chunks(
            tokens, patchify(image.astype(jnp.float32), self.patch_size)
        )
        x = unpatchify(patch_features, height, width, self.patch_size)
        return self.conv(x) if hasattr(self, "conv") else self.linear(x)

    def apply_in_chunks(
        self, tokens: Float[Array, "b n d"], pixels: Float32[Array, "b n pixels c"]
    ) -> Float32[Array, "b n pixels f"]:
        n, chunk_size = tokens.shape[1], self.chunk_size or tokens.shape[1]
        apply_chunk = jax.checkpoint(self.compute_features)
        if chunk_size >= n:
            return apply_chunk(tokens, pixels)
        num_chunks = -(-n // chunk_size)

        def split_chunks(
            x,
        ):  # along the tokens of each image, so that a batch in parts over devices stays so
            x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk_size - n)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk_size, *x.shape[2:]), 1, 0)

        features = jnp.moveaxis(
            jax.lax.map(lambda xs: apply_chunk(*xs), (split_chunks(tokens), split_chunks(pixels))),
            0,
            1,
        )
        return features.reshape(features.shape[0], num_chunks * chunk_size, *features.shape[3:])[
            :, :n
        ]

    def compute_features(
        self, tokens: Float[Array, "b m d"], pixels: Float32[Array, "b m pixels c"]
    ) -> Float32[Array, "b m pixels f"]:
        position_features = jnp.broadcast_to(
            cosine_features(self.patch_size, self.num_freqs), (*pixels.shape[:3], self.num_freqs**2)
        )
        x = self.embedder(jnp.concatenate([pixels, position_features], axis=-1)).astype(self.dtype)
        x, _ = jax.lax.scan(lambda x, block: (block(x, tokens), None), x, self.blocks)
        return self.norm(x.astype(jnp.float32))


class NerfBlock(nnx.Module):
    """A gated MLP over pixels with weights generated by the patch's token, each normalized along its input."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mlp_hidden = model.nerf_hidden * model.nerf_mlp_ratio
        self.norm = nnx.RMSNorm(model.nerf_hidden, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.param_generator = nnx.Linear(
            model.hidden, 3 * model.nerf_hidden * self.mlp_hidden, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "b m pixels f"], tokens: Float[Array, "b m d"]
    ) -> Float[Array, "b m pixels f"]:
        f = x.shape[-1]
        gate, value, out = jnp.split(self.param_generator(tokens), 3, axis=-1)
        gate = normalize_columns(gate.reshape(*gate.shape[:2], f, self.mlp_hidden))
        value = normalize_columns(value.reshape(*value.shape[:2], f, self.mlp_hidden))
        out = normalize_columns(out.reshape(*out.shape[:2], self.mlp_hidden, f))
        y = self.norm(x)
        y = nnx.silu(jnp.einsum("bmpf,bmfr->bmpr", y, gate)) * jnp.einsum(
            "bmpf,bmfr->bmpr", y, value
        )
        return x + jnp.einsum("bmpr,bmrf->bmpf", y, out)


def normalize_columns(w: Float[Array, "*b i o"]) -> Float[Array, "*b i o"]:
    """L2-normalized along the input axis with floor 1e-12; the gradient is finite at 0 too."""
    squared_norms = jnp.square(w.astype(jnp.float32)).sum(axis=-2, keepdims=True)
    return (w * jax.lax.rsqrt(jnp.maximum(squared_norms, 1e-24))).astype(w.dtype)


class LinearHead(nnx.Module):
    """Modulated layer norm and one linear layer to the values of a patch: FLUX's output layer, and JiT's."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        self.patch_size = model.patch
        # float32, as the NeRF head's last layer
        zeros = nnx.initializers.zeros
        self.linear = nnx.Linear(
            model.hidden,
            model.patch**2 * model.channels,
            kernel_init=zeros,
            precision=EXACT_PRECISION,
            rngs=rngs,
        )

    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        output_vectors: Float32[Array, "#b 2 d"],
        height: int,
        width: int,
    ) -> Float32[Array, "b height width c"]:
        x = self.linear(
            modulate(tokens.astype(jnp.float32), output_vectors[:, 0], output_vectors[:, 1])
        )
        return unpatchify(
            x.reshape(*x.shape[:2], self.patch_size**2, -1), height, width, self.patch_size
        )
