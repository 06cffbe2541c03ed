"""Where the shift, scale and gate vectors of all blocks come from: four answers with one interface.

`approximator` is Chroma's replacement of `per_block`, FLUX's own layers; `shared` and `none` are the field's other answers.
Each is called with (time, guidance, pooled) and returns `Vectors`; all start at zero (adaLN-Zero, arXiv 2212.09748), so that
at step 0 every block is the identity whichever is used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from radiance import config
from radiance.model.precision import exact_in_float32
from radiance.sharding import ROWS, constrained

MAX_PERIOD = 10_000.0
TIME_FACTOR = 1000.0
TIME_EMBEDDING = 256  # width of the sinusoid read by FLUX's time and guidance embedders
THREE = ("shift", "scale", "gate")  # vectors of a single block
SIX = tuple(f"{part} {name}" for part in ("attention", "MLP") for name in THREE)  # of one side of a double block


class Vectors(NamedTuple):
    """Modulation of the whole network, float32; blocks on axis 0. b may be 1 when all samples share it.

    Three vectors are (shift, scale, gate); six are those of the attention, then those of the MLP; two are (shift, scale).
    """

    double_image: Float32[Array, "doubles b 6 d"]
    double_text: Float32[Array, "doubles b 6 d"]
    single: Float32[Array, "singles b 3 d"]
    output: Float32[Array, "b 2 d"]


def frequencies(count: int) -> Float32[np.ndarray, " {count}"]:
    """From 1 down towards 1/10000, with each float32 rounding of the published models' code.

    They multiply 1000·index, up to 343,000: there one unit in the last place of a frequency moves a cosine by 0.008.
    """
    exponents = (np.float32(-np.log(MAX_PERIOD)) * np.arange(count, dtype=np.float32)) / np.float32(count)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def sinusoid(x: Float[Array, "*b"], width: int) -> Float32[Array, "*b {width}"]:
    """Cosines, then sines, of 1000·x at width/2 frequencies."""
    angles = (TIME_FACTOR * x.astype(jnp.float32))[..., None] * frequencies(width // 2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def index_table(count: int, width: int) -> Float32[np.ndarray, "{count} {width}"]:
    """`sinusoid` of the integers 0 … count − 1, made on the host: accelerators' cosines are not made for such angles."""
    angles = (np.float32(TIME_FACTOR) * np.arange(count, dtype=np.float32))[:, None] * frequencies(width // 2)
    return np.concatenate([np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))], axis=-1).astype(np.float32)


def make_modulation(model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    return {"approximator": Approximator, "per_block": PerBlock, "shared": Shared, "none": Static}[model.modulation](model, dtype, rngs)


class Approximator(nnx.Module):
    """Chroma's one small network: (time, guidance, index of the vector) → the vector."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), model.approximator_depth)
        self.dim, self.count, self.blocks = model.approximator_dim, model.vectors, (model.double_blocks, model.single_blocks)
        self.dtype = dtype
        self.proj_in = nnx.Linear(model.approximator_dim, model.approximator_hidden, dtype=dtype, rngs=rngs)
        self.layers = jax.vmap(lambda key: ApproximatorLayer(model.approximator_hidden, dtype, nnx.Rngs(key)))(keys)
        self.proj_out = nnx.Linear(model.approximator_hidden, model.hidden, dtype=dtype, kernel_init=nnx.initializers.zeros, rngs=rngs)

    @exact_in_float32
    def __call__(self, time: Float32[Array, " b"], guidance: Float32[Array, " b"] | None, pooled: None = None) -> Vectors:
        count = self.count
        guidance = jnp.zeros_like(time) if guidance is None else guidance
        scalars = jnp.concatenate([sinusoid(time, self.dim // 4), sinusoid(guidance, self.dim // 4)], axis=-1)
        index = jnp.broadcast_to(index_table(count, self.dim // 2), (len(time), count, self.dim // 2))
        x = jnp.concatenate([jnp.broadcast_to(scalars[:, None], (len(time), count, self.dim // 2)), index], axis=-1)
        x, _ = jax.lax.scan(lambda x, layer: (constrained(layer(x), ROWS), None), constrained(self.proj_in(x), ROWS), self.layers)
        return split_vectors(constrained(self.proj_out(x), ROWS).astype(jnp.float32), *self.blocks)


class ApproximatorLayer(nnx.Module):
    def __init__(self, hidden: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(hidden, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.linear_in = nnx.Linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.linear_out = nnx.Linear(hidden, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b m a"]) -> Float[Array, "b m a"]:
        return x + self.linear_out(nnx.silu(self.linear_in(self.norm(x))))


def split_vectors(x: Float32[Array, "b m d"], doubles: int, singles: int) -> Vectors:
    """Chroma's order: singles (3 each), image side of the doubles (6 each), text side (6 each), output (2)."""
    bounds = np.cumsum([3 * singles, 6 * doubles, 6 * doubles])
    single, image, text, output = jnp.split(x, bounds, axis=1)

    def by_block(x, blocks, each):
        return x.reshape(x.shape[0], blocks, each, x.shape[-1]).swapaxes(0, 1)

    return Vectors(by_block(image, doubles, 6), by_block(text, doubles, 6), by_block(single, singles, 3), output)


def join_vectors(vectors: Vectors) -> Float32[Array, "b m d"]:
    """The vectors in one row, of which `split_vectors` makes the blocks'."""

    def in_a_row(x):
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])

    blocks = (vectors.single, vectors.double_image, vectors.double_text)
    return jnp.concatenate([*map(in_a_row, blocks), vectors.output], axis=1)


def vector_names(model: config.Model) -> list[tuple[str, int, str]]:
    """Layers (single, image, text, output), block and name of each vector, in the order of `join_vectors`."""
    parts = (
        ("single", model.single_blocks, THREE),
        ("image", model.double_blocks, SIX),
        ("text", model.double_blocks, SIX),
        ("output", 1, THREE[:2]),
    )
    return [(layers, block, name) for layers, blocks, names in parts for block in range(blocks) for name in names]


class Embedder(nnx.Module):
    """FLUX's embedder of a number or a pooled vector: two linear layers with SiLU between."""

    def __init__(self, width: int, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear_in = nnx.Linear(width, model.hidden, dtype=dtype, rngs=rngs)
        self.linear_out = nnx.Linear(model.hidden, model.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b w"]) -> Float[Array, "b d"]:
        return self.linear_out(nnx.silu(self.linear_in(x)))


class Condition(nnx.Module):
    """FLUX's conditioning vector: embeddings of time, of guidance (dev only) and of the pooled text, added up."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.time = Embedder(TIME_EMBEDDING, model, dtype, rngs)
        if model.guidance_embed:
            self.guidance = Embedder(TIME_EMBEDDING, model, dtype, rngs)
        if model.pooled_dim:
            self.pooled = Embedder(model.pooled_dim, model, dtype, rngs)

    def __call__(
        self, time: Float32[Array, " b"], guidance: Float32[Array, " b"] | None, pooled: Float[Array, "b p"] | None
    ) -> Float[Array, "b d"]:
        x = self.time(sinusoid(time, TIME_EMBEDDING))
        if hasattr(self, "guidance"):
            x += self.guidance(sinusoid(jnp.zeros_like(time) if guidance is None else guidance, TIME_EMBEDDING))
        if hasattr(self, "pooled"):
            if pooled is None:
                raise ValueError("This model reads a pooled text vector (model.pooled_dim): pass pooled=[b, pooled_dim].")
            x += self.pooled(pooled)
        return x


class PerBlock(nnx.Module):
    """FLUX: every block has its own linear layer on SiLU of the conditioning vector."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        def stack(blocks: int, count: int) -> nnx.Linear | None:
            if blocks == 0:
                return None

            def make(key):
                zeros = nnx.initializers.zeros
                return nnx.Linear(model.hidden, count * model.hidden, kernel_init=zeros, dtype=dtype, rngs=nnx.Rngs(key))

            return jax.vmap(make)(jax.random.split(rngs.params(), blocks))

        self.dtype, self.condition = dtype, Condition(model, dtype, rngs)
        self.double_image = stack(model.double_blocks, 6)
        self.double_text = stack(model.double_blocks, 6)
        self.single = stack(model.single_blocks, 3)
        if model.head == "linear":
            self.output = nnx.Linear(model.hidden, 2 * model.hidden, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)

    @exact_in_float32
    def __call__(
        self, time: Float32[Array, " b"], guidance: Float32[Array, " b"] | None = None, pooled: Float[Array, "b p"] | None = None
    ) -> Vectors:
        x = nnx.silu(self.condition(time, guidance, pooled))

        def vectors(layers: nnx.Linear | None, count: int):
            if layers is None:
                return jnp.zeros((0, len(x), count, x.shape[-1]))
            # One layer at a time: with sharded weights only one block's are gathered at once.
            y = jax.lax.map(lambda layer: layer(x).astype(jnp.float32), layers)
            return y.reshape(y.shape[0], len(x), count, x.shape[-1])

        output = self.output(x).astype(jnp.float32) if hasattr(self, "output") else jnp.zeros((len(x), 2 * x.shape[-1]))
        return Vectors(vectors(self.double_image, 6), vectors(self.double_text, 6), vectors(self.single, 3), output.reshape(len(x), 2, -1))


class Shared(nnx.Module):
    """PixArt-α's adaLN-single (arXiv 2310.00426): one layer for all blocks, and a learned offset per block."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        d = model.hidden
        self.dtype, self.condition = dtype, Condition(model, dtype, rngs)
        self.linear = nnx.Linear(d, (6 + 6 + 3 + 2) * d, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)
        self.double_image, self.double_text, self.single = _learned(model)

    @exact_in_float32
    def __call__(
        self, time: Float32[Array, " b"], guidance: Float32[Array, " b"] | None = None, pooled: Float[Array, "b p"] | None = None
    ) -> Vectors:
        x = self.linear(nnx.silu(self.condition(time, guidance, pooled))).astype(jnp.float32)
        image, text, single, output = jnp.split(x.reshape(len(x), 17, -1), [6, 12, 15], axis=1)
        return Vectors(
            *(
                jnp.zeros((0, *s.shape)) if offset is None else s[None] + offset[...][:, None]
                for s, offset in zip((image, text, single), (self.double_image, self.double_text, self.single))
            ),
            output,
        )


class Static(nnx.Module):
    """No time input: learned vectors (as in MiniT2I, whose network reads the noise level off the picture)."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.double_image, self.double_text, self.single = _learned(model)
        self.output = nnx.Param(jnp.zeros((2, model.hidden)))

    def __call__(self, time: Float32[Array, " b"], guidance: Float32[Array, " b"] | None = None, pooled: None = None) -> Vectors:
        d = self.output.shape[-1]
        image, text, single = (
            jnp.zeros((0, 1, count, d)) if learned is None else learned[...][:, None]
            for learned, count in ((self.double_image, 6), (self.double_text, 6), (self.single, 3))
        )
        return Vectors(image, text, single, self.output[...][None])


def _learned(model: config.Model) -> list[nnx.Param | None]:
    """Vectors of the double blocks' image and text, and of the single blocks; None for blocks that are not there, as nothing can save an
    empty array."""
    counts = ((model.double_blocks, 6), (model.double_blocks, 6), (model.single_blocks, 3))
    return [nnx.Param(jnp.zeros((blocks, count, model.hidden))) if blocks else None for blocks, count in counts]
