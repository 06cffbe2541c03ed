"""Networks that compute the shift, scale and gate vectors of all blocks, with one interface.

`approximator` is Chroma's replacement of `per_block`, FLUX's own layers; `shared` and `none` are
other designs of the field. Each is called with (time, guidance, pooled) and returns
`ModulationVectors`. All start at zero (adaLN-Zero, arXiv 2212.09748): at step 0 every block is the
identity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Float32

from radiance import config
from radiance.distributed.sharding import BATCH_AXES, constrain_sharding
from radiance.model.keys import make_rngs
from radiance.model.paths import (
    OUTPUT_VECTORS,
    SHARED_VECTORS,
    VECTORS_PER_SINGLE_BLOCK,
    VECTORS_PER_STREAM,
)
from radiance.model.pixel_head import HEADS
from radiance.model.precision import exact_in_float32

MAX_PERIOD = 10_000.0
TIME_FACTOR = 1000.0
TIME_EMBEDDING_DIM = 256  # width of the sinusoids that FLUX's time and guidance embedders read
SINGLE_VECTOR_NAMES = ("shift", "scale", "gate")  # vectors of a single block
DOUBLE_VECTOR_NAMES = tuple(  # vectors of one stream of a double block
    f"{part} {name}" for part in ("attention", "MLP") for name in SINGLE_VECTOR_NAMES
)


class ModulationVectors(NamedTuple):
    """Modulation of the whole network, float32; blocks on axis 0. b may be 1 for a shared row.

    Three vectors are (shift, scale, gate); six are those of the attention, then those of the MLP;
    two are (shift, scale).
    """

    double_image: Float32[Array, "doubles b 6 d"]
    double_text: Float32[Array, "doubles b 6 d"]
    single: Float32[Array, "singles b 3 d"]
    output: Float32[Array, "b 2 d"]


# --- sinusoidal embeddings ------------------------------------------------------------------------


def sinusoid_frequencies(count: int) -> Float32[np.ndarray, " {count}"]:
    """Compute frequencies from 1 down to almost 1/10000, rounded as in the published models' code.

    They multiply 1000 · index, up to 343,000. At such angles one unit in the last place of a
    frequency changes a cosine by 0.008, so every rounding to float32 is repeated.
    """
    log_period = np.float32(-np.log(MAX_PERIOD))
    exponents = (log_period * np.arange(count, dtype=np.float32)) / np.float32(count)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def sinusoidal_embedding(x: Float[Array, "*b"], width: int) -> Float32[Array, "*b {width}"]:
    """Compute the cosines, then the sines, of 1000·x at width/2 frequencies."""
    angles = (TIME_FACTOR * x.astype(jnp.float32))[..., None] * sinusoid_frequencies(width // 2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def index_embeddings(count: int, width: int) -> Float32[np.ndarray, "{count} {width}"]:
    """Compute `sinusoidal_embedding` of the integers 0 … count − 1.

    It is computed on the host: cosines of such large angles are inexact on accelerators.
    """
    scaled_indices = np.float32(TIME_FACTOR) * np.arange(count, dtype=np.float32)
    angles = (scaled_indices[:, None] * sinusoid_frequencies(width // 2)).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


# --- Chroma ---------------------------------------------------------------------------------------


class Approximator(nnx.Module):
    """Chroma's approximator: one small network from (time, guidance, vector index) to a vector."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), model.approximator_depth)
        hidden = model.approximator_hidden
        self.dim, self.num_vectors = model.approximator_dim, model.num_modulation_vectors
        self.block_counts = model.double_blocks, model.single_blocks
        self.dtype = dtype
        self.proj_in = nnx.Linear(model.approximator_dim, hidden, dtype=dtype, rngs=rngs)
        self.layers = jax.vmap(lambda key: ApproximatorLayer(hidden, dtype, make_rngs(key)))(keys)
        zeros = nnx.initializers.zeros
        self.proj_out = nnx.Linear(hidden, model.hidden, dtype=dtype, kernel_init=zeros, rngs=rngs)

    @exact_in_float32
    def __call__(
        self,
        time: Float32[Array, " b"],
        guidance: Float32[Array, " b"] | None,
        pooled: None = None,
    ) -> ModulationVectors:
        """Compute the modulation vectors of all blocks."""
        guidance = jnp.zeros_like(time) if guidance is None else guidance
        quarter, half = self.dim // 4, self.dim // 2
        condition = jnp.concatenate(
            [sinusoidal_embedding(time, quarter), sinusoidal_embedding(guidance, quarter)], axis=-1
        )
        indices = index_embeddings(self.num_vectors, half)
        shape = (len(time), self.num_vectors, half)
        x = jnp.concatenate(
            [jnp.broadcast_to(condition[:, None], shape), jnp.broadcast_to(indices, shape)], axis=-1
        )
        x, _ = jax.lax.scan(
            lambda x, layer: (constrain_sharding(layer(x), BATCH_AXES), None),
            constrain_sharding(self.proj_in(x), BATCH_AXES),
            self.layers,
        )
        vectors = constrain_sharding(self.proj_out(x), BATCH_AXES).astype(jnp.float32)
        return split_vectors(vectors, *self.block_counts)


class ApproximatorLayer(nnx.Module):
    """A residual MLP behind an RMS norm."""

    def __init__(self, hidden: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(hidden, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.linear_in = nnx.Linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.linear_out = nnx.Linear(hidden, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b m a"]) -> Float[Array, "b m a"]:
        """Update the vectors' hidden states."""
        return x + self.linear_out(nnx.silu(self.linear_in(self.norm(x))))


def split_vectors(
    x: Float32[Array, "b m d"], num_double_blocks: int, num_single_blocks: int
) -> ModulationVectors:
    """Split one row of vectors by blocks.

    Args:
        x: Vectors in Chroma's order: single blocks (3 each), image streams of the double blocks
            (6 each), their text streams (6 each), output (2).
        num_double_blocks: Number of double blocks.
        num_single_blocks: Number of single blocks.

    Returns:
        The vectors by kind of block.
    """
    num_single = VECTORS_PER_SINGLE_BLOCK * num_single_blocks
    num_stream = VECTORS_PER_STREAM * num_double_blocks
    single, image, text, output = jnp.split(
        x, np.cumsum([num_single, num_stream, num_stream]), axis=1
    )

    def split_by_block(x, vectors_per_block):
        return rearrange(x, "b (blocks vectors) d -> blocks b vectors d", vectors=vectors_per_block)

    return ModulationVectors(
        split_by_block(image, VECTORS_PER_STREAM),
        split_by_block(text, VECTORS_PER_STREAM),
        split_by_block(single, VECTORS_PER_SINGLE_BLOCK),
        output,
    )


def join_vectors(vectors: ModulationVectors) -> Float32[Array, "b m d"]:
    """Join the vectors to one row in Chroma's order, the inverse of `split_vectors`."""

    def join_blocks(x):
        return rearrange(x, "blocks b vectors d -> b (blocks vectors) d")

    block_vectors = (vectors.single, vectors.double_image, vectors.double_text)
    return jnp.concatenate([*map(join_blocks, block_vectors), vectors.output], axis=1)


def vector_names(model: config.Model) -> list[tuple[str, int, str]]:
    """Return (layer, block, name) of each vector, in the order of `join_vectors`.

    The layer is "single", "image", "text" or "output".
    """
    layer_groups = (
        ("single", model.single_blocks, SINGLE_VECTOR_NAMES),
        ("image", model.double_blocks, DOUBLE_VECTOR_NAMES),
        ("text", model.double_blocks, DOUBLE_VECTOR_NAMES),
        ("output", 1, SINGLE_VECTOR_NAMES[:2]),
    )
    return [
        (layer, block, name)
        for layer, num_blocks, names in layer_groups
        for block in range(num_blocks)
        for name in names
    ]


# --- other designs --------------------------------------------------------------------------------


class MLPEmbedder(nnx.Module):
    """FLUX's embedder of a sinusoid or a pooled text vector: two linear layers around a SiLU."""

    def __init__(self, width: int, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear_in = nnx.Linear(width, model.hidden, dtype=dtype, rngs=rngs)
        self.linear_out = nnx.Linear(model.hidden, model.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b w"]) -> Float[Array, "b d"]:
        """Embed a sinusoid or a pooled text vector."""
        return self.linear_out(nnx.silu(self.linear_in(x)))


class ConditionEmbedder(nnx.Module):
    """FLUX's conditioning vector: the sum of embedded time, guidance (dev only) and pooled text."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.time = MLPEmbedder(TIME_EMBEDDING_DIM, model, dtype, rngs)
        if model.guidance_embed:
            self.guidance = MLPEmbedder(TIME_EMBEDDING_DIM, model, dtype, rngs)
        if model.pooled_dim:
            self.pooled = MLPEmbedder(model.pooled_dim, model, dtype, rngs)

    def __call__(
        self,
        time: Float32[Array, " b"],
        guidance: Float32[Array, " b"] | None,
        pooled: Float[Array, "b p"] | None,
    ) -> Float[Array, "b d"]:
        """Embed time, guidance and pooled text.

        Raises:
            ValueError: If the model reads a pooled text vector and none is given.
        """
        x = self.time(sinusoidal_embedding(time, TIME_EMBEDDING_DIM))
        if hasattr(self, "guidance"):
            guidance = jnp.zeros_like(time) if guidance is None else guidance
            x += self.guidance(sinusoidal_embedding(guidance, TIME_EMBEDDING_DIM))
        if hasattr(self, "pooled"):
            if pooled is None:
                raise ValueError(
                    "This model reads a pooled text vector (model.pooled_dim): "
                    "pass pooled=[b, pooled_dim]."
                )
            x += self.pooled(pooled)
        return x


class PerBlockModulation(nnx.Module):
    """FLUX's modulation: every block has a linear layer on SiLU of the conditioning vector."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros

        def make_layer(num_vectors: int, rngs: nnx.Rngs) -> nnx.Linear:
            d = model.hidden
            return nnx.Linear(d, num_vectors * d, kernel_init=zeros, dtype=dtype, rngs=rngs)

        def stack_layers(num_blocks: int, vectors_per_block: int) -> nnx.Linear | None:
            if num_blocks == 0:
                return None
            return jax.vmap(lambda key: make_layer(vectors_per_block, make_rngs(key)))(
                jax.random.split(rngs.params(), num_blocks)
            )

        self.dtype, self.condition = dtype, ConditionEmbedder(model, dtype, rngs)
        self.double_image = stack_layers(model.double_blocks, VECTORS_PER_STREAM)
        self.double_text = stack_layers(model.double_blocks, VECTORS_PER_STREAM)
        self.single = stack_layers(model.single_blocks, VECTORS_PER_SINGLE_BLOCK)
        if HEADS[model.head].reads_output_vectors:
            self.output = make_layer(OUTPUT_VECTORS, rngs)

    @exact_in_float32
    def __call__(
        self,
        time: Float32[Array, " b"],
        guidance: Float32[Array, " b"] | None = None,
        pooled: Float[Array, "b p"] | None = None,
    ) -> ModulationVectors:
        """Compute the modulation vectors of all blocks."""
        x = nnx.silu(self.condition(time, guidance, pooled))
        b, d = x.shape

        def compute_vectors(layers: nnx.Linear | None, vectors_per_block: int):
            if layers is None:
                return jnp.zeros((0, b, vectors_per_block, d))
            # One layer at a time: of sharded weights only one block's are gathered at once.
            y = jax.lax.map(lambda layer: layer(x).astype(jnp.float32), layers)
            return rearrange(y, "blocks b (vectors d) -> blocks b vectors d", d=d)

        if hasattr(self, "output"):
            output = self.output(x).astype(jnp.float32)
        else:
            output = jnp.zeros((b, OUTPUT_VECTORS * d))
        return ModulationVectors(
            compute_vectors(self.double_image, VECTORS_PER_STREAM),
            compute_vectors(self.double_text, VECTORS_PER_STREAM),
            compute_vectors(self.single, VECTORS_PER_SINGLE_BLOCK),
            rearrange(output, "b (vectors d) -> b vectors d", d=d),
        )


class SharedModulation(nnx.Module):
    """PixArt-α's adaLN-single (arXiv 2310.00426): one layer for all blocks, an offset per block."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, zeros = model.hidden, nnx.initializers.zeros
        self.dtype, self.condition = dtype, ConditionEmbedder(model, dtype, rngs)
        self.linear = nnx.Linear(d, SHARED_VECTORS * d, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.double_image, self.double_text, self.single = _make_learned_vectors(model)

    @exact_in_float32
    def __call__(
        self,
        time: Float32[Array, " b"],
        guidance: Float32[Array, " b"] | None = None,
        pooled: Float[Array, "b p"] | None = None,
    ) -> ModulationVectors:
        """Compute the modulation vectors of all blocks."""
        x = self.linear(nnx.silu(self.condition(time, guidance, pooled))).astype(jnp.float32)
        x = rearrange(x, "b (vectors d) -> b vectors d", vectors=SHARED_VECTORS)
        # One double block, one single block, and the output share the 17 vectors.
        sizes = (VECTORS_PER_STREAM, VECTORS_PER_STREAM, VECTORS_PER_SINGLE_BLOCK)
        image, text, single, output = jnp.split(x, np.cumsum(sizes), axis=1)

        def add_offsets(shared: jax.Array, offsets: nnx.Param | None) -> jax.Array:
            if offsets is None:
                return jnp.zeros((0, *shared.shape))
            return shared[None] + offsets[...][:, None]

        return ModulationVectors(
            add_offsets(image, self.double_image),
            add_offsets(text, self.double_text),
            add_offsets(single, self.single),
            output,
        )


class StaticModulation(nnx.Module):
    """Learned vectors without time input (as in MiniT2I, whose network sees the noise level)."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.double_image, self.double_text, self.single = _make_learned_vectors(model)
        self.output = nnx.Param(jnp.zeros((OUTPUT_VECTORS, model.hidden)))

    def __call__(
        self,
        time: Float32[Array, " b"],
        guidance: Float32[Array, " b"] | None = None,
        pooled: None = None,
    ) -> ModulationVectors:
        """Return the learned vectors of all blocks."""
        d = self.output.shape[-1]

        def add_batch_axis(vectors: nnx.Param | None, vectors_per_block: int) -> jax.Array:
            if vectors is None:
                return jnp.zeros((0, 1, vectors_per_block, d))
            return vectors[...][:, None]

        return ModulationVectors(
            add_batch_axis(self.double_image, VECTORS_PER_STREAM),
            add_batch_axis(self.double_text, VECTORS_PER_STREAM),
            add_batch_axis(self.single, VECTORS_PER_SINGLE_BLOCK),
            self.output[...][None],
        )


def _make_learned_vectors(model: config.Model) -> list[nnx.Param | None]:
    """Make vectors of the double blocks' image and text streams, and of the single blocks.

    Without blocks of a kind it is None, as no checkpoint can store an empty array.
    """
    counts = (
        (model.double_blocks, VECTORS_PER_STREAM),
        (model.double_blocks, VECTORS_PER_STREAM),
        (model.single_blocks, VECTORS_PER_SINGLE_BLOCK),
    )
    return [
        nnx.Param(jnp.zeros((num_blocks, vectors_per_block, model.hidden))) if num_blocks else None
        for num_blocks, vectors_per_block in counts
    ]


MODULATIONS = {
    "approximator": Approximator,
    "per_block": PerBlockModulation,
    "shared": SharedModulation,
    "none": StaticModulation,
}


def make_modulation(model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    """Make the network of `model.modulation`."""
    return MODULATIONS[model.modulation](model, dtype, rngs)
