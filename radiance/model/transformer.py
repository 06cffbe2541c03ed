"""The network: an image, a text and a time in, a velocity out.

Axis letters: b batch, n image tokens, l text tokens, d hidden, h heads, k head size, p patch side, c channels.
The parameters live outside the module, in a plain nested dict with the blocks of a kind stacked on axis 0:
`abstract` shows it, `init` makes it, and `bind` puts it into a module that can be called.
"""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from radiance import config
from radiance.distributed.sharding import BATCH_AXES, constrain_sharding
from radiance.model.attention import attention
from radiance.model.blocks import DoubleBlock, SingleBlock, TextBlock
from radiance.model.modulation import ModulationVectors, make_modulation
from radiance.model.pixel_head import LinearHead, NerfHead, patchify
from radiance.model.precision import exact_in_float32
from radiance.model.quantized import expand_weights, has_quantized_weights
from radiance.model.rope import position_ids, rope_table

Params = dict[str, Any]  # nested; leaves are arrays

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Transformer(nnx.Module):
    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        self.config, self.compute = model, compute
        dtype = self.dtype = jnp.dtype(compute.dtype)
        patch_size = model.patch // 2 if model.patch_embed == "conv_half" else model.patch
        if model.patch_embed == "bottleneck":
            self.patch_embed = BottleneckEmbed(
                patch_size * patch_size * model.channels, model, dtype, rngs
            )
        else:
            self.patch_embed = nnx.Linear(
                patch_size * patch_size * model.channels, model.hidden, dtype=dtype, rngs=rngs
            )
        self.text_embed = nnx.Linear(model.text_dim, model.hidden, dtype=dtype, rngs=rngs)
        if model.padding == "learned":
            self.padding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (model.text_dim,)))
        if model.registers:
            self.registers = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), (model.registers, model.hidden))
            )
        self.refiner = _stack_blocks(TextBlock, model.text_refiner_blocks, model, dtype, rngs)
        self.modulation = make_modulation(model, dtype, rngs)
        self.double = _stack_blocks(DoubleBlock, model.double_blocks, model, dtype, rngs)
        self.single = _stack_blocks(SingleBlock, model.single_blocks, model, dtype, rngs)
        self.head = (
            LinearHead(model, rngs)
            if model.head == "linear"
            else NerfHead(model, compute.head_chunk_size, dtype, rngs)
        )

    @exact_in_float32
    def __call__(
        self,
        image: Float[Array, "b height width c"],
        text: Float[Array, "b l e"],
        lengths: Int[Array, " b"],
        time: Float32[Array, " b"],
        guidance: Float32[Array, " b"] | None = None,
        pooled: Float[Array, "b f"] | None = None,
        *,
        divisor: Float32[Array, " b"] | None = None,
        vectors: ModulationVectors | None = None,
    ) -> Float32[Array, "b height width c"]:
        """Velocity (noise − image) at `image`, an image mixed with noise at `time` (1 is noise, 0 the image).

        image: in [-1, 1] at time 0; height and width must divide by the patch (ValueError otherwise).
        text, lengths: the encoder's output and the number of real tokens of each row, end-of-sequence included; 0 is no text at all.
        guidance: the guidance number that some models embed; 0 when None, as in all published Chroma training.
        divisor: for x0 models, by what image − x̂ is divided; `time` when None, which must then not be 0.
        vectors: what `modulation(time, guidance, pooled)` gave, if it is at hand; its b may be 1.
        """
        model = self.config
        height, width = image.shape[1:3]
        if height % model.patch or width % model.patch:
            raise ValueError(
                f"An image of {width}×{height} does not divide into patches of {model.patch}: pad it first."
            )
        image = image.astype(jnp.float32)
        if vectors is None:
            vectors = self.modulation(time.astype(jnp.float32), guidance, pooled)

        x, y, rope, kv_len = self.embed_inputs(image, text, lengths)
        n = x.shape[1]
        attend = partial(attention, kv_len=kv_len, backend=self.compute.attention)

        def apply_double_block(carry, scan_inputs):
            block, image_vectors, text_vectors = scan_inputs
            x, y = expand_weights(block)(*carry, image_vectors, text_vectors, rope, attend)
            return (constrain_sharding(x, BATCH_AXES), constrain_sharding(y, BATCH_AXES)), None

        def apply_single_block(x, scan_inputs):
            block, vectors = scan_inputs
            return constrain_sharding(
                expand_weights(block)(x, vectors, rope, attend), BATCH_AXES
            ), None

        if model.double_blocks:
            (x, y), _ = jax.lax.scan(
                self.apply_remat(apply_double_block, self.double),
                (x, y),
                (self.double, vectors.double_image, vectors.double_text),
            )
        if model.single_blocks:
            joint_tokens, _ = jax.lax.scan(
                self.apply_remat(apply_single_block, self.single),
                jnp.concatenate([x, y], axis=1),
                (self.single, vectors.single),
            )
            x = joint_tokens[:, :n]

        prediction = (
            self.head(x, vectors.output, height, width)
            if model.head == "linear"
            else self.head(x, image)
        )
        if model.prediction == "velocity":
            return prediction
        divisor = time if divisor is None else divisor
        return (image - prediction) / divisor.astype(jnp.float32)[:, None, None, None]

    def embed_inputs(
        self,
        image: Float32[Array, "b height width c"],
        text: Float[Array, "b l e"],
        lengths: Int[Array, " b"],
    ) -> tuple[
        Float[Array, "b n d"],
        Float[Array, "b w d"],
        Float32[Array, "2 joint 1 half"],
        Int[Array, " b"] | None,
    ]:
        """What the blocks begin with: the image's tokens, registers and text, their rotary table, and how many of [image, registers, text]
        are attended (None: all).
        """
        model, (height, width) = self.config, image.shape[1:3]
        x = constrain_sharding(self.embed_image(image), BATCH_AXES)
        y, num_visible = self.embed_text(text, lengths)
        y = constrain_sharding(y, BATCH_AXES)
        n = x.shape[1]
        token_positions = position_ids(
            height // model.patch,
            width // model.patch,
            model.registers,
            text.shape[1],
            model.text_ids == "sequential",
        )
        rope = jnp.asarray(rope_table(token_positions, model.rope_axes, model.rope_theta))
        num_text_visible = None if model.masking == "off" else model.registers + num_visible
        if model.text_refiner_blocks:
            y = self.refine_text(y, rope[:, n:], num_text_visible)
        return x, y, rope, None if num_text_visible is None else n + num_text_visible

    def embed_image(self, image: Float32[Array, "b height width c"]) -> Float[Array, "b n d"]:
        patch_size = self.config.patch
        if self.config.patch_embed == "conv_half":
            image, patch_size = image[:, ::2, ::2], patch_size // 2
        patches = patchify(image, patch_size)
        return self.patch_embed(patches.reshape(*patches.shape[:2], -1))

    def embed_text(
        self, text: Float[Array, "b l e"], lengths: Int[Array, " b"]
    ) -> tuple[Float[Array, "b w d"], Int[Array, " b"]]:
        """Registers and text tokens, and how many of the text tokens are visible."""
        num_visible = visible_lengths(lengths, text.shape[1], self.config.masking)
        # What is hidden is also erased: even a NaN there must not pass through a product with 0.
        num_real, padding = (
            (lengths, self.padding[...].astype(text.dtype))
            if self.config.padding == "learned"
            else (num_visible, 0)
        )
        text = jnp.where((jnp.arange(text.shape[1]) < num_real[:, None])[..., None], text, padding)
        y = self.text_embed(text)
        if self.config.registers:
            registers = jnp.broadcast_to(
                self.registers[...].astype(y.dtype), (y.shape[0], *self.registers.shape)
            )
            y = jnp.concatenate([registers, y], axis=1)
        return y, num_visible

    def refine_text(
        self,
        y: Float[Array, "b w d"],
        rope: Float32[Array, "2 w 1 half"],
        kv_len: Int[Array, " b"] | None,
    ) -> Float[Array, "b w d"]:
        """The text after the blocks of its own."""
        attend = partial(attention, kv_len=kv_len, backend=self.compute.attention)

        def apply_text_block(y, block):
            return constrain_sharding(expand_weights(block)(y, rope, attend), BATCH_AXES), None

        return jax.lax.scan(self.apply_remat(apply_text_block, self.refiner), y, self.refiner)[0]

    def apply_remat(self, apply_block, blocks: nnx.Module):
        """One block's work, of which the backward pass recomputes what the config says, and always what was stored small: all blocks' matrices
        would be kept expanded until then.
        """
        policy = REMAT_POLICIES.get(
            self.compute.remat,
            jax.checkpoint_policies.dots_saveable if has_quantized_weights(blocks) else None,
        )
        return (
            apply_block
            if policy is None
            else jax.checkpoint(apply_block, policy=policy, prevent_cse=False)
        )


class BottleneckEmbed(nnx.Module):
    """A patch's values to few numbers, and those to the width of the network, with nothing in between (JiT, arXiv 2511.13720)."""

    def __init__(self, patch_dim: int, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear_in = nnx.Linear(
            patch_dim, model.bottleneck, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.linear_out = nnx.Linear(model.bottleneck, model.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array, "b n v"]) -> Float[Array, "b n d"]:
        return self.linear_out(self.linear_in(patches))


def visible_lengths(
    lengths: Int[Array | np.ndarray, " b"], max_length: int, masking: str
) -> Int[Array | np.ndarray, " b"]:
    """Text tokens that take part in the attention: the real ones and one padding token (Chroma), the real ones, or all. Of NumPy's arrays too."""
    return {
        "one_pad": (lengths + 1).clip(max=max_length),
        "strict": lengths,
        "off": 0 * lengths + max_length,
    }[masking]


def _stack_blocks(
    block_class: type, num_blocks: int, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Module | None:
    """`count` blocks as one module whose arrays have a leading axis; None for no blocks."""
    if num_blocks == 0:
        return None
    return jax.vmap(lambda key: block_class(model, dtype, nnx.Rngs(key)))(
        jax.random.split(rngs.params(), num_blocks)
    )


# --- parameters as a plain tree ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _split_abstract_model(
    model: config.Model, compute: config.Compute, with_modulation: bool = True
):
    module = jax.eval_shape(
        lambda key: Transformer(model, compute, nnx.Rngs(key)), jax.random.key(0)
    )
    if not with_modulation:
        module.modulation = None
    return nnx.split(module)


def make_abstract_params(model: config.Model) -> Params:
    """The parameter tree with shapes and types in place of arrays; costs no memory."""
    return nnx.to_pure_dict(_split_abstract_model(model, config.Compute())[1])


@partial(jax.jit, static_argnames="model")
def init_params(model: config.Model, key: PRNGKeyArray) -> Params:
    """Fresh float32 parameters."""
    return nnx.to_pure_dict(nnx.state(Transformer(model, config.Compute(), nnx.Rngs(key))))


def bind_model(model: config.Model, compute: config.Compute, params: Params) -> Transformer:
    """The module that computes with `params`; inside `jax.jit` this is free. Without `modulation` among them it must be given `vectors`."""
    return nnx.merge(_split_abstract_model(model, compute, "modulation" in params)[0], params)


def bind_modulation(model: config.Model, compute: config.Compute, params: Params) -> nnx.Module:
    """The part of the network that makes the modulation, with its parameters alone."""
    module = jax.eval_shape(
        lambda key: make_modulation(model, jnp.dtype(compute.dtype), nnx.Rngs(key)),
        jax.random.key(0),
    )
    return nnx.merge(nnx.split(module)[0], params)
