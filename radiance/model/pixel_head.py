"""Heads: from image tokens to pixels. A new head is a class here and an entry of `HEADS`.

Besides this module a head needs its name in `config.Model.head`, its tensors' names in
`weights/native.py`, and its class in the PyTorch export.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Float32

from radiance import config
from radiance.model.blocks import modulate
from radiance.model.keys import make_rngs
from radiance.model.precision import EXACT_PRECISION

NUM_GENERATED_MATRICES = 3  # gate, value and output matrix of a NeRF block's MLP


def patchify(
    image: Float[Array, "b height width c"], patch_size: int
) -> Float[Array, "b n pixels c"]:
    """Split images into patches, row-major, with the pixels of a patch row-major."""
    return rearrange(
        image,
        "b (rows p) (columns q) c -> b (rows columns) (p q) c",
        p=patch_size,
        q=patch_size,
    )


def unpatchify(
    patches: Float[Array, "b n pixels c"], height: int, width: int, patch_size: int
) -> Float[Array, "b height width c"]:
    """Join the patches of `patchify` to images of `height` × `width` pixels."""
    return rearrange(
        patches,
        "b (rows columns) (p q) c -> b (rows p) (columns q) c",
        rows=height // patch_size,
        columns=width // patch_size,
        p=patch_size,
    )


def cosine_features(patch_size: int, num_freqs: int) -> Float32[np.ndarray, "pixels features"]:
    """Tabulate cos(π·fx·x)·cos(π·fy·y) / (1 + fx·fy) at the pixels of a patch.

    Args:
        patch_size: Height and width of a patch, in pixels; x (column) and y (row) span [0, 1].
        num_freqs: Number of frequencies fx and of frequencies fy: 0, 1, 2, …

    Returns:
        Features of the pixels in row-major order; fx is the slower index of the features.
    """
    positions, frequencies = np.linspace(0, 1, patch_size), np.arange(num_freqs)
    cosines = np.cos(np.pi * np.outer(positions, frequencies))  # [position, frequency]
    features = np.einsum(
        "xf,yg,fg->yxfg", cosines, cosines, 1 / (1 + np.outer(frequencies, frequencies))
    )
    return rearrange(features, "y x f g -> (y x) (f g)").astype(np.float32)


class Head(nnx.Module):
    """Interface of heads. A subclass is built from (model, compute, rngs)."""

    reads_output_vectors: ClassVar[bool]  # whether it is modulated by the two output vectors

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        raise NotImplementedError

    @classmethod
    def count_macs(cls, model: config.Model, num_image_tokens: int) -> int:
        """Count the multiplications for one image."""
        raise NotImplementedError

    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        image: Float32[Array, "b height width c"],
        output_vectors: Float32[Array, "#b 2 d"],
    ) -> Float32[Array, "b height width c"]:
        """Predict the values of all pixels.

        Args:
            tokens: Image tokens after the last block.
            image: The network's input, an image mixed with noise.
            output_vectors: Shift and scale of the output; read if `reads_output_vectors`.

        Returns:
            The network's prediction, velocity or x0.
        """
        raise NotImplementedError


class NerfHead(Head):
    """Radiance's head (after PixNerd, arXiv 2507.23268), without its last layer.

    A small network processes the pixels of each patch of the noisy image; its weights are generated
    from the patch's token. Tokens are processed `compute.head_chunk_size` at a time in every image,
    and recomputed in the backward pass: generated weights are far larger than the tokens.
    """

    reads_output_vectors = False
    pixels_per_output: ClassVar[int]  # pixels that the last layer reads for each pixel

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        self.patch_size, self.num_freqs = model.patch, model.nerf_freqs
        self.chunk_size, dtype = compute.head_chunk_size, jnp.dtype(compute.dtype)
        self.dtype = dtype
        # The embedder and the last layer use float32: above 1, bfloat16 is coarser than 8 bits.
        self.embedder = nnx.Linear(
            model.channels + model.nerf_freqs**2,
            model.nerf_hidden,
            precision=EXACT_PRECISION,
            rngs=rngs,
        )
        keys = jax.random.split(rngs.params(), model.nerf_depth)
        self.blocks = jax.vmap(lambda key: NerfBlock(model, dtype, make_rngs(key)))(keys)
        self.norm = nnx.RMSNorm(model.nerf_hidden, epsilon=1e-6, rngs=rngs)

    @classmethod
    def count_macs(cls, model: config.Model, num_image_tokens: int) -> int:
        """Count the multiplications for one image."""
        features, num_pixels = model.nerf_hidden, num_image_tokens * model.patch**2
        generated_weights = NUM_GENERATED_MATRICES * features**2 * model.nerf_mlp_ratio
        block_macs = generated_weights * (num_image_tokens * model.hidden + num_pixels)
        embedder_macs = (model.channels + model.nerf_freqs**2) * features
        output_macs = cls.pixels_per_output * features * model.channels
        return model.nerf_depth * block_macs + num_pixels * (embedder_macs + output_macs)

    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        image: Float32[Array, "b height width c"],
        output_vectors: Float32[Array, "#b 2 d"] | None = None,
    ) -> Float32[Array, "b height width c"]:
        """Predict the values of all pixels; see `Head`."""
        height, width = image.shape[1:3]
        features = self.apply_in_chunks(
            tokens, patchify(image.astype(jnp.float32), self.patch_size)
        )
        return self.project(unpatchify(features, height, width, self.patch_size))

    def project(
        self, features: Float32[Array, "b height width f"]
    ) -> Float32[Array, "b height width c"]:
        """Apply the last layer to the features of all pixels."""
        raise NotImplementedError

    def apply_in_chunks(
        self, tokens: Float[Array, "b n d"], pixels: Float32[Array, "b n pixels c"]
    ) -> Float32[Array, "b n pixels f"]:
        """Compute the pixels' features for `chunk_size` tokens at a time; 0 for all tokens."""
        n, chunk_size = tokens.shape[1], self.chunk_size or tokens.shape[1]
        apply_chunk = jax.checkpoint(self.compute_features)
        if chunk_size >= n:
            return apply_chunk(tokens, pixels)
        num_padding = -n % chunk_size

        # Chunks split the tokens of each image, so that a batch that is sharded stays sharded.
        def split_chunks(x):
            x = jnp.pad(x, [(0, 0), (0, num_padding)] + [(0, 0)] * (x.ndim - 2))
            return rearrange(x, "b (chunks n) ... -> chunks b n ...", n=chunk_size)

        chunks = (split_chunks(tokens), split_chunks(pixels))
        features = jax.lax.map(lambda chunk: apply_chunk(*chunk), chunks)
        return rearrange(features, "chunks b n pixels f -> b (chunks n) pixels f")[:, :n]

    def compute_features(
        self, tokens: Float[Array, "b m d"], pixels: Float32[Array, "b m pixels c"]
    ) -> Float32[Array, "b m pixels f"]:
        """Compute the features of the pixels of some patches."""
        position_features = jnp.broadcast_to(
            cosine_features(self.patch_size, self.num_freqs), (*pixels.shape[:3], self.num_freqs**2)
        )
        x = self.embedder(jnp.concatenate([pixels, position_features], axis=-1)).astype(self.dtype)
        x, _ = jax.lax.scan(lambda x, block: (block(x, tokens), None), x, self.blocks)
        return self.norm(x.astype(jnp.float32))


class NerfConvHead(NerfHead):
    """The NeRF head that ends in a 3×3 convolution over the image."""

    pixels_per_output = 9

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        super().__init__(model, compute, rngs)
        self.conv = nnx.Conv(
            model.nerf_hidden,
            model.channels,
            (3, 3),
            padding=1,
            kernel_init=nnx.initializers.zeros,
            precision=EXACT_PRECISION,
            rngs=rngs,
        )

    def project(
        self, features: Float32[Array, "b height width f"]
    ) -> Float32[Array, "b height width c"]:
        """Apply the last layer to the features of all pixels."""
        return self.conv(features)


class NerfLinearHead(NerfHead):
    """The NeRF head that ends in a linear layer for each pixel."""

    pixels_per_output = 1

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        super().__init__(model, compute, rngs)
        self.linear = nnx.Linear(
            model.nerf_hidden,
            model.channels,
            kernel_init=nnx.initializers.zeros,
            precision=EXACT_PRECISION,
            rngs=rngs,
        )

    def project(
        self, features: Float32[Array, "b height width f"]
    ) -> Float32[Array, "b height width c"]:
        """Apply the last layer to the features of all pixels."""
        return self.linear(features)


class NerfBlock(nnx.Module):
    """A gated MLP over pixels, with weights generated from the patch's token.

    Each generated matrix is normalized along its input axis.
    """

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mlp_hidden = model.nerf_hidden * model.nerf_mlp_ratio
        self.norm = nnx.RMSNorm(model.nerf_hidden, epsilon=1e-6, dtype=dtype, rngs=rngs)
        num_weights = NUM_GENERATED_MATRICES * model.nerf_hidden * self.mlp_hidden
        self.param_generator = nnx.Linear(model.hidden, num_weights, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b m pixels f"], tokens: Float[Array, "b m d"]
    ) -> Float[Array, "b m pixels f"]:
        """Update the features of the patches' pixels."""
        f = x.shape[-1]
        gate, value, out = jnp.split(self.param_generator(tokens), NUM_GENERATED_MATRICES, axis=-1)
        gate = normalize_columns(rearrange(gate, "b m (f r) -> b m f r", f=f))
        value = normalize_columns(rearrange(value, "b m (f r) -> b m f r", f=f))
        out = normalize_columns(rearrange(out, "b m (r f) -> b m r f", f=f))
        y = self.norm(x)
        gates = nnx.silu(jnp.einsum("bmpf,bmfr->bmpr", y, gate))
        y = gates * jnp.einsum("bmpf,bmfr->bmpr", y, value)
        return x + jnp.einsum("bmpr,bmrf->bmpf", y, out)


def normalize_columns(w: Float[Array, "*b i o"]) -> Float[Array, "*b i o"]:
    """Divide matrices by their L2 norms along the input axis, at least 1e-12.

    The gradient is finite at 0 too.
    """
    squared_norms = jnp.square(w.astype(jnp.float32)).sum(axis=-2, keepdims=True)
    return (w * jax.lax.rsqrt(jnp.maximum(squared_norms, 1e-24))).astype(w.dtype)


class LinearHead(Head):
    """Modulated layer norm and one linear layer to the values of a patch, as in FLUX and JiT."""

    reads_output_vectors = True

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        self.patch_size = model.patch
        self.linear = nnx.Linear(  # in float32, as the last layer of the NeRF heads
            model.hidden,
            model.patch**2 * model.channels,
            kernel_init=nnx.initializers.zeros,
            precision=EXACT_PRECISION,
            rngs=rngs,
        )

    @classmethod
    def count_macs(cls, model: config.Model, num_image_tokens: int) -> int:
        """Count the multiplications for one image."""
        return num_image_tokens * model.patch**2 * model.channels * model.hidden

    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        image: Float32[Array, "b height width c"],
        output_vectors: Float32[Array, "#b 2 d"],
    ) -> Float32[Array, "b height width c"]:
        """Predict the values of all pixels; see `Head`."""
        height, width = image.shape[1:3]
        shift, scale = output_vectors[:, 0], output_vectors[:, 1]
        values = self.linear(modulate(tokens.astype(jnp.float32), shift, scale))
        patches = rearrange(values, "b n (pixels c) -> b n pixels c", c=image.shape[-1])
        return unpatchify(patches, height, width, self.patch_size)


HEADS: dict[str, type[Head]] = {
    "nerf_conv": NerfConvHead,
    "nerf_linear": NerfLinearHead,
    "linear": LinearHead,
}
