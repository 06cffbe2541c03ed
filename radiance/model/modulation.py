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
from radiance.distributed.sharding import BATCH_AXES, constrain_sharding
from radiance.model.precision import exact_in_float32

MAX_PERIOD = 10_000.0
TIME_FACTOR = 1000.0
TIME_EMBEDDING_DIM = 256  # width of the sinusoid read by FLUX's time and guidance embedders
SINGLE_VECTOR_NAMES = ("shift", "scale", "gate")  # vectors of a single block
DOUBLE_VECTOR_NAMES = tuple(
    f"{part} {name}" for part in ("attention", "MLP") for name in SINGLE_VECTOR_NAMES
)  # of one side of a double block


class ModulationVectors(NamedTuple):
    """Modulation of the whole network, float32; blocks on axis 0. b may be 1 when all samples share it.

    Three vectors are (shift, scale, gate); six are those of the attention, then those of the MLP; two are (shift, scale).
    """

    double_image: Float32[Array, "doubles b 6 d"]
    double_text: Float32[Array, "doubles b 6 d"]
    single: Float32[Array, "singles b 3 d"]
    output: Float32[Array, "b 2 d"]


def sinusoid_frequencies(count: int) -> Float32[np.ndarray, " {count}"]:
    """From 1 down towards 1/10000, with each float32 rounding of the published models' code.

    They multiply 1000·index, up to 343,000: there one unit in the last place of a frequency moves a cosine by 0.008.
    """
    exponents = (np.float32(-np.log(MAX_PERIOD)) * np.arange(count, dtype=np.float32)) / np.float32(
        count
    )
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def sinusoidal_embedding(x: Float[Array, "*b"], width: int) -> Float32[Array, "*b {width}"]:
    """Cosines, then sines, of 1000·x at width/2 frequencies."""
    angles = (TIME_FACTOR * x.astype(jnp.float32))[..., None] * sinusoid_frequencies(width // 2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def index_embeddings(count: int, width: int) -> Float32[np.ndarray, "{count} {width}"]:
    """`sinusoid` of the integers 0 … count − 1, made on the host: accelerators' cosines are not made for such angles."""
    angles = (np.float32(TIME_FACTOR) * np.arange(count, dtype=np.float32))[
        :, None
    ] * sinusoid_frequencies(width // 2)
    return np.concatenate(
        [np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))], axis=-1
    ).astype(np.float32)


def make_modulation(model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    return {
        "approximator": Approximator,
        "per_block": PerBlockModulation,
        "shared": SharedModulation,
        "none": StaticModulation,
    }[model.modulation](model, dtype, rngs)


class Approximator(nnx.Module):
    """Chroma's one small network: (time, guidance, index of the vector) → the vector."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), model.approximator_depth)
        self.dim, self.num_vectors, self.block_counts = (
            model.approximator_dim,
            model.num_modulation_vectors,
            (model.double_blocks, model.single_blocks),
        )
        self.dtype = dtype
        self.proj_in = nnx.Linear(
            model.approximator_dim, model.approximator_hidden, dtype=dtype, rngs=rngs
        )
        self.layers = jax.vmap(
            lambda key: ApproximatorLayer(model.approximator_hidden, dtype, nnx.Rngs(key))
        )(keys)
        self.proj_out = nnx.Linear(
            model.approximator_hidden,
            model.hidden,
            dtype=dtype,
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )

    @exact_in_float32
    def __call__(
        self, time: Float32[Array, " b"], guidance: Float32[Array, " b"] | None, pooled: None = None
    ) -> ModulationVectors:
        num_vectors = self.num_vectors
        guidance = jnp.zeros_like(time) if guidance is None else guidance
        condition = jnp.concatenate(
            [
                sinusoidal_embedding(time, self.dim // 4),
                sinusoidal_embedding(guidance, self.dim // 4),
            ],
            axis=-1,
        )
        vector_index = jnp.broadcast_to(
            index_embeddings(num_vectors, self.dim // 2), (len(time), num_vectors, self.dim // 2)
        )
        x = jnp.concatenate(
            [
                jnp.broadcast_to(condition[:, None], (len(time), num_vectors, self.dim // 2)),
                vector_index,
            ],
            axis=-1,
        )
        x, _ = jax.lax.scan(
            lambda x, layer: (constrain_sharding(layer(x), BATCH_AXES), None),
            constrain_sharding(self.proj_in(x), BATCH_AXES),
            self.layers,
        )
        return split_vectors(
            constrain_sharding(self.proj_out(x), BATCH_AXES).astype(jnp.float32), *self.block_counts
        )


class ApproximatorLayer(nnx.Module):
    def __init__(self, hidden: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(hidden, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.linear_in = nnx.Linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.linear_out = nnx.Linear(hidden, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b m a"]) -> Float[Array, "b m a"]:
        return x + self.linear_out(nnx.silu(self.linear_in(self.norm(x))))


def split_vectors(
    x: Float32[Array, "b m d"], num_double_blocks: int, num_single_blocks: int
) -> ModulationVectors:
    """Chroma's order: singles (3 each), image side of the doubles (6 each), text side (6 each), output (2)."""
    bounds = np.cumsum([3 * num_single_blocks, 6 * num_double_blocks, 6 * num_double_blocks])
    single, image, text, output = jnp.split(x, bounds, axis=1)

    def split_by_block(x, num_blocks, vectors_per_block):
        return x.reshape(x.shape[0], num_blocks, vectors_per_block, x.shape[-1]).swapaxes(0, 1)

    return ModulationVectors(
        split_by_block(image, num_double_blocks, 6),
        split_by_block(text, num_double_blocks, 6),
        split_by_block(single, num_single_blocks, 3),
        output,
    )


def join_vectors(vectors: ModulationVectors) -> Float32[Array, "b m d"]:
    """The vectors in one row, of which `split_vectors` makes the blocks'."""

    def flatten_blocks(x):
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])

    block_vectors = (vectors.single, vectors.double_image, vectors.double_text)
    return jnp.concatenate([*map(flatten_blocks, block_vectors), vectors.output], axis=1)


def vector_names(model: config.Model) -> list[tuple[str, int, str]]:
    """Layers (single, image, text, output), block and name of each vector, in the order of `join_vectors`."""
    layer_groups = (
        ("single", model.single_blocks, SINGLE_VECTOR_NAMES),
        ("image", model.double_blocks, DOUBLE_VECTOR_NAMES),
        ("text", model.double_blocks, DOUBLE_VECTOR_NAMES),
        ("output", 1, SINGLE_VECTOR_NAMES[:2]),
    )
    return [
        (layer_group, block, name)
        for layer_group, num_blocks, names in layer_groups
        for block in range(num_blocks)
        for name in names
    ]


class MLPEmbedder(nnx.Module):
    """FLUX's embedder of a number or a pooled vector: two linear layers with SiLU between."""

    def __init__(self, width: int, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear_in = nnx.Linear(width, model.hidden, dtype=dtype, rngs=rngs)
        self.linear_out = nnx.Linear(model.hidden, model.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b w"]) -> Float[Array, "b d"]:
        return self.linear_out(nnx.silu(self.linear_in(x)))


class ConditionEmbedder(nnx.Module):
    """FLUX's conditioning vector: embeddings of time, of guidance (dev only) and of the pooled text, added up."""

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
        x = self.time(sinusoidal_embedding(time, TIME_EMBEDDING_DIM))
        if hasattr(self, "guidance"):
            x += self.guidance(
                sinusoidal_embedding(
                    jnp.zeros_like(time) if guidance is None else guidance, TIME_EMBEDDING_DIM
                )
            )
        if hasattr(self, "pooled"):
            if pooled is None:
                raise ValueError(
                    "This model reads a pooled text vector (model.pooled_dim): pass pooled=[b, pooled_dim]."
                )
            x += self.pooled(pooled)
        return x


class PerBlockModulation(nnx.Module):
    """FLUX: every block has its own linear layer on SiLU of the conditioning vector."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        def stack_layers(num_blocks: int, vectors_per_block: int) -> nnx.Linear | None:
            if num_blocks == 0:
                return None

            def make_layer(key):
                zeros = nnx.initializers.zeros
                return nnx.Linear(
                    model.hidden,
                    vectors_per_block * model.hidden,
                    kernel_init=zeros,
                    dtype=dtype,
                    rngs=nnx.Rngs(key),
                )

            return jax.vmap(make_layer)(jax.random.split(rngs.params(), num_blocks))

        self.dtype, self.condition = dtype, ConditionEmbedder(model, dtype, rngs)
        self.double_image = stack_layers(model.double_blocks, 6)
        self.double_text = stack_layers(model.double_blocks, 6)
        self.single = stack_layers(model.single_blocks, 3)
        if model.head == "linear":
            self.output = nnx.Linear(
                model.hidden,
                2 * model.hidden,
                kernel_init=nnx.initializers.zeros,
                dtype=dtype,
                rngs=rngs,
            )

    @exact_in_float32
    def __call__(
        self,
        time: Float32[Array, " b"],
        guidance: Float32[Array, " b"] | None = None,
        pooled: Float[Array, "b p"] | None = None,
    ) -> ModulationVectors:
        x = nnx.silu(self.condition(time, guidance, pooled))

        def compute_vectors(layers: nnx.Linear | None, vectors_per_block: int):
            if layers is None:
                return jnp.zeros((0, len(x), vectors_per_block, x.shape[-1]))
            # One layer at a time: with sharded weights only one block's are gathered at once.
            y = jax.lax.map(lambda layer: layer(x).astype(jnp.float32), layers)
            return y.reshape(y.shape[0], len(x), vectors_per_block, x.shape[-1])

        output = (
            self.output(x).astype(jnp.float32)
            if hasattr(self, "output")
            else jnp.zeros((len(x), 2 * x.shape[-1]))
        )
        return ModulationVectors(
            compute_vectors(self.double_image, 6),
            compute_vectors(self.double_text, 6),
            compute_vectors(self.single, 3),
            output.reshape(len(x), 2, -1),
        )


class SharedModulation(nnx.Module):
    """PixArt-α's adaLN-single (arXiv 2310.00426): one layer for all blocks, and a learned offset per block."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        d = model.hidden
        self.dtype, self.condition = dtype, ConditionEmbedder(model, dtype, rngs)
        self.linear = nnx.Linear(
            d, (6 + 6 + 3 + 2) * d, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs
        )
        self.double_image, self.double_text, self.single = _make_learned_vectors(model)

    @exact_in_float32
    def __call__(
        self,
        time: Float32[Array, " b"],
        guidance: Float32[Array, " b"] | None = None,
        pooled: Float[Array, "b p"] | None = None,
    ) -> ModulationVectors:
        x = self.linear(nnx.silu(self.condition(time, guidance, pooled))).astype(jnp.float32)
        image, text, single, output = jnp.split(x.reshape(len(x), 17, -1), [6, 12, 15], axis=1)
        return ModulationVectors(
            *(
                jnp.zeros((0, *s.shape)) if offset is None else s[None] + offset[...][:, None]
                for s, offset in zip(
                    (image, text, single), (self.double_image, self.double_text, self.single)
                )
            ),
            output,
        )


class StaticModulation(nnx.Module):
    """No time input: learned vectors (as in MiniT2I, whose network reads the noise level off the image)."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.double_image, self.double_text, self.single = _make_learned_vectors(model)
        self.output = nnx.Param(jnp.zeros((2, model.hidden)))

    def __call__(
        self,
        time: Float32[Array, " b"],
        guidance: Float32[Array, " b"] | None = None,
        pooled: None = None,
    ) -> ModulationVectors:
        d = self.output.shape[-1]
        image, text, single = (
            jnp.zeros((0, 1, vectors_per_block, d)) if param is None else param[...][:, None]
            for param, vectors_per_block in (
                (self.double_image, 6),
                (self.double_text, 6),
                (self.single, 3),
            )
        )
        return ModulationVectors(image, text, single, self.output[...][None])


def _make_learned_vectors(model: config.Model) -> list[nnx.Param | None]:
    """Vectors of the double blocks' image and text, and of the single blocks; None for blocks that are not there, as nothing can save an
    empty array.
    """
    counts = ((model.double_blocks, 6), (model.double_blocks, 6), (model.single_blocks, 3))
    return [
        nnx.Param(jnp.zeros((num_blocks, vectors_per_block, model.hidden))) if num_blocks else None
        for num_blocks, vectors_per_block in counts
    ]
