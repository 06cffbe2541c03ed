"""The network: predicts the velocity of an image from the image, a text and a time.

Axis letters: b batch, n image tokens, l text tokens, w registers and text tokens, d hidden,
h heads, k head size, c channels. The parameters are kept outside the module, in a plain nested
dict with the blocks of a kind stacked on axis 0: `make_abstract_params` gives its shapes,
`init_params` its values, and `bind_model` a module that can be called.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from radiance import config
from radiance.distributed.sharding import BATCH_AXES, constrain_sharding
from radiance.model.attention import attention
from radiance.model.blocks import Attend, DoubleBlock, SingleBlock, TextBlock
from radiance.model.keys import make_rngs
from radiance.model.lora import replace_lora_layers
from radiance.model.modulation import ModulationVectors, make_modulation
from radiance.model.pixel_head import HEADS, patchify
from radiance.model.precision import exact_in_float32
from radiance.model.quantized import dequantize_weights, has_quantized_weights
from radiance.model.rope import make_position_ids, make_rope_table

Params = dict[str, Any]  # nested; leaves are arrays

Modulation = Callable[..., ModulationVectors]  # of (time, guidance, pooled)
M = TypeVar("M", bound=nnx.Module)

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Transformer(nnx.Module):
    """Chroma's transformer with a head that predicts pixels or latents."""

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        self.config, self.compute = model, compute
        dtype = self.dtype = jnp.dtype(compute.dtype)
        self.patch_embed = _make_patch_embed(model, dtype, rngs)
        self.text_embed = nnx.Linear(model.text_dim, model.hidden, dtype=dtype, rngs=rngs)
        if model.padding == "learned":
            self.padding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (model.text_dim,)))
        if model.registers:
            self.registers = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), (model.registers, model.hidden))
            )
        self.refiner = _stack_blocks(TextBlock, model.text_refiner_blocks, model, compute, rngs)
        self.modulation: Any = make_modulation(model, dtype, rngs)
        self.double = _stack_blocks(DoubleBlock, model.double_blocks, model, compute, rngs)
        self.single = _stack_blocks(SingleBlock, model.single_blocks, model, compute, rngs)
        self.head = HEADS[model.head](model, compute, rngs)

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
        """Predict the velocity (noise − image) at an image that is mixed with noise.

        Args:
            image: An image in [-1, 1] mixed with noise; height and width are multiples of the
                patch size.
            text: Output of the text encoder.
            lengths: Number of real text tokens of each row, end-of-sequence included; 0: no text.
            time: Times; 1 is noise, 0 is the image.
            guidance: Guidance scales that some models embed; 0 when None, as in all published
                training of Chroma.
            pooled: Pooled text vectors, for models that read them.
            divisor: Divisor of image − x̂ for x0 models; when None it is `time`, which must then not
                be 0.
            vectors: Output of `modulation(time, guidance, pooled)`, if it is known; its b may be 1.

        Returns:
            The velocity.

        Raises:
            ValueError: If height or width is not a multiple of the patch size.
        """
        model = self.config
        height, width = image.shape[1:3]
        if height % model.patch or width % model.patch:
            raise ValueError(
                f"An image of {width}×{height} does not divide into patches of {model.patch}: "
                "pad it first."
            )
        image = image.astype(jnp.float32)
        if vectors is None:
            modulation: Modulation = self.modulation
            vectors = modulation(time.astype(jnp.float32), guidance, pooled)
        x, y, rope, kv_len = self.embed_inputs(image, text, lengths)
        x, _ = self.apply_blocks(x, y, vectors, rope, kv_len)
        prediction = self.head(x, image, vectors.output)
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
        """Compute the inputs of the blocks.

        Args:
            image: As in `__call__`.
            text: As in `__call__`.
            lengths: As in `__call__`.

        Returns:
            Image tokens; registers and text tokens, refined; their joint rotary table; and the
            number of visible tokens of [image, registers, text], None for all.
        """
        model, (height, width) = self.config, image.shape[1:3]
        x = constrain_sharding(self.embed_image(image), BATCH_AXES)
        y, num_visible = self.embed_text(text, lengths)
        y = constrain_sharding(y, BATCH_AXES)
        n = x.shape[1]
        token_positions = make_position_ids(
            height // model.patch,
            width // model.patch,
            model.registers,
            text.shape[1],
            model.text_ids == "sequential",
        )
        rope = jnp.asarray(make_rope_table(token_positions, model.rope_axes, model.rope_theta))
        num_text_visible = None if model.masking == "off" else model.registers + num_visible
        if model.text_refiner_blocks:
            y = self.refine_text(y, rope[:, n:], num_text_visible)
        return x, y, rope, None if num_text_visible is None else n + num_text_visible

    def embed_image(self, image: Float32[Array, "b height width c"]) -> Float[Array, "b n d"]:
        """Compute image tokens from the pixels of the patches."""
        patch_size = self.config.patch
        if self.config.patch_embed == "conv_half":
            image, patch_size = image[:, ::2, ::2], patch_size // 2
        patches = patchify(image, patch_size)
        return self.patch_embed(einops.rearrange(patches, "b n pixels c -> b n (pixels c)"))

    def embed_text(
        self, text: Float[Array, "b l e"], lengths: Int[Array, " b"]
    ) -> tuple[Float[Array, "b w d"], Int[Array, " b"]]:
        """Compute registers and text tokens, and the number of visible text tokens."""
        num_visible = visible_lengths(lengths, text.shape[1], self.config.masking)
        # Hidden tokens are also erased: a NaN there would pass through a product with 0.
        if self.config.padding == "learned":
            num_real, padding = lengths, self.padding[...].astype(text.dtype)
        else:
            num_real, padding = num_visible, 0
        text = jnp.where((jnp.arange(text.shape[1]) < num_real[:, None])[..., None], text, padding)
        y = self.text_embed(text)
        if self.config.registers:
            registers = self.registers[...].astype(y.dtype)
            registers = jnp.broadcast_to(registers, (y.shape[0], *registers.shape))
            y = jnp.concatenate([registers, y], axis=1)
        return y, num_visible

    def refine_text(
        self,
        y: Float[Array, "b w d"],
        rope: Float32[Array, "2 w 1 half"],
        kv_len: Int[Array, " b"] | None,
    ) -> Float[Array, "b w d"]:
        """Apply the text refiner blocks."""
        attend = partial(attention, kv_len=kv_len, backend=self.compute.attention)

        def apply_text_block(y, block):
            return constrain_sharding(expand_weights(block)(y, rope, attend), BATCH_AXES), None

        return jax.lax.scan(self.apply_remat(apply_text_block, self.refiner), y, self.refiner)[0]

    def apply_blocks(
        self,
        x: Float[Array, "b n d"],
        y: Float[Array, "b w d"],
        vectors: ModulationVectors,
        rope: Float32[Array, "2 joint 1 half"],
        kv_len: Int[Array, " b"] | None,
        attend: Callable[..., tuple[jax.Array, Any]] | None = None,
    ) -> tuple[Float[Array, "b n d"], Any]:
        """Apply the double and the single blocks.

        Args:
            x: Image tokens.
            y: Registers and text tokens.
            vectors: Modulation vectors.
            rope: Rotary table of [image, registers, text].
            kv_len: Number of visible tokens of [image, registers, text]; None for all.
            attend: Function of (q, k, v, kv_len) that returns the attention's output and a record,
                a tree of arrays; `attention` without a record when None.

        Returns:
            Image tokens, and the records of all blocks, stacked on axis 0, double blocks first.
        """
        model, n, records = self.config, x.shape[1], []
        attend = partial(attend or self._attend, kv_len=kv_len)

        def apply_double_block(carry, scan_inputs):
            block, image_vectors, text_vectors = scan_inputs
            attend_and_record = _record_attention(attend, block_records := [])
            x, y = expand_weights(block)(
                *carry, image_vectors, text_vectors, rope, attend_and_record
            )
            carry = constrain_sharding(x, BATCH_AXES), constrain_sharding(y, BATCH_AXES)
            return carry, block_records[0]

        def apply_single_block(x, scan_inputs):
            block, vectors = scan_inputs
            attend_and_record = _record_attention(attend, block_records := [])
            x = expand_weights(block)(x, vectors, rope, attend_and_record)
            return constrain_sharding(x, BATCH_AXES), block_records[0]

        if model.double_blocks:
            (x, y), double_records = jax.lax.scan(
                self.apply_remat(apply_double_block, self.double),
                (x, y),
                (self.double, vectors.double_image, vectors.double_text),
            )
            records.append(double_records)
        if model.single_blocks:
            joint_tokens, single_records = jax.lax.scan(
                self.apply_remat(apply_single_block, self.single),
                jnp.concatenate([x, y], axis=1),
                (self.single, vectors.single),
            )
            x = joint_tokens[:, :n]
            records.append(single_records)
        return x, jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *records)

    def _attend(self, q, k, v, kv_len):
        """Compute the attention without a record."""
        return attention(q, k, v, kv_len, backend=self.compute.attention), None

    def apply_remat(self, apply_block: Callable, blocks: nnx.Module | None) -> Callable:
        """Apply the rematerialization policy `compute.remat` to the function of one block.

        Blocks with quantized weights are always rematerialized: otherwise the dequantized weights
        of all blocks would be saved for the backward pass.

        Args:
            apply_block: The body of the scan over blocks.
            blocks: The stacked blocks.

        Returns:
            The body, wrapped by `jax.checkpoint` unless everything is saved.
        """
        policy = REMAT_POLICIES.get(self.compute.remat)
        if policy is None:
            if blocks is None or not has_quantized_weights(blocks):
                return apply_block
            policy = jax.checkpoint_policies.dots_saveable
        return jax.checkpoint(apply_block, policy=policy, prevent_cse=False)


class BottleneckEmbed(nnx.Module):
    """Two linear layers with few channels and no activation between (JiT, arXiv 2511.13720)."""

    def __init__(self, patch_dim: int, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear_in = nnx.Linear(
            patch_dim, model.bottleneck, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.linear_out = nnx.Linear(model.bottleneck, model.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array, "b n v"]) -> Float[Array, "b n d"]:
        """Embed the values of each patch."""
        return self.linear_out(self.linear_in(patches))


def visible_lengths(lengths: Int[Array | np.ndarray, " b"], max_length: int, masking: str) -> Any:
    """Compute how many text tokens take part in the attention.

    Args:
        lengths: Number of real tokens of each row.
        max_length: Number of tokens of each row, padding included.
        masking: "one_pad" adds one padding token to the real ones (Chroma), "strict" none, and
            "off" all.

    Returns:
        Number of visible text tokens [b] of each row; a NumPy array for a NumPy array.
    """
    return {
        "one_pad": (lengths + 1).clip(max=max_length),
        "strict": lengths,
        "off": 0 * lengths + max_length,
    }[masking]


def expand_weights(module: M) -> M:
    """Return a copy of the module that can compute: dequantized, with layers for LoRA kernels."""
    return replace_lora_layers(dequantize_weights(module))


def _record_attention(attend: Callable[..., tuple[jax.Array, Any]], records: list[Any]) -> Attend:
    """Append the record of each call to a list, so that blocks see the output alone."""

    def attend_and_record(q, k, v):
        output, record = attend(q, k, v)
        records.append(record)
        return output

    return attend_and_record


def _make_patch_embed(model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    """Make the layer from the pixels of a patch to its token."""
    patch_size = model.patch // 2 if model.patch_embed == "conv_half" else model.patch
    patch_dim = patch_size * patch_size * model.channels
    if model.patch_embed == "bottleneck":
        return BottleneckEmbed(patch_dim, model, dtype, rngs)
    return nnx.Linear(patch_dim, model.hidden, dtype=dtype, rngs=rngs)


def _stack_blocks(
    block_class: type,
    num_blocks: int,
    model: config.Model,
    compute: config.Compute,
    rngs: nnx.Rngs,
) -> nnx.Module | None:
    """Make blocks as one module whose arrays have a leading axis; None for no blocks."""
    if num_blocks == 0:
        return None
    return jax.vmap(lambda key: block_class(model, compute, make_rngs(key)))(
        jax.random.split(rngs.params(), num_blocks)
    )


# --- parameters as a plain tree -------------------------------------------------------------------


@lru_cache(maxsize=64)
def _split_abstract_model(
    model: config.Model, compute: config.Compute, with_modulation: bool = True
):
    """Split a network without arrays into its graph and its parameters' shapes."""
    module = jax.eval_shape(
        lambda key: Transformer(model, compute, make_rngs(key)), jax.random.key(0)
    )
    if not with_modulation:
        module.modulation = None
    return nnx.split(module)


def make_abstract_params(model: config.Model) -> Params:
    """Make the parameter tree with shapes and types in place of arrays; it takes no memory."""
    return nnx.to_pure_dict(_split_abstract_model(model, config.Compute())[1])


@partial(jax.jit, static_argnames="model")
def init_params(model: config.Model, key: PRNGKeyArray) -> Params:
    """Initialize the parameters, in float32."""
    return nnx.to_pure_dict(nnx.state(Transformer(model, config.Compute(), make_rngs(key))))


def bind_model(model: config.Model, compute: config.Compute, params: Params) -> Transformer:
    """Bind parameters to a module that can be called; inside `jax.jit` this costs nothing.

    Args:
        model: Sizes of the network.
        compute: Types and backends.
        params: The parameter tree. Without the key "modulation" each call needs `vectors`.

    Returns:
        The network.
    """
    return nnx.merge(_split_abstract_model(model, compute, "modulation" in params)[0], params)


def bind_modulation(model: config.Model, compute: config.Compute, params: Params) -> Any:
    """Bind the parameters of the modulation alone to its module.

    Args:
        model: Sizes of the network.
        compute: Types and backends.
        params: The subtree "modulation" of the parameters.

    Returns:
        The module, a function of (time, guidance, pooled) that returns `ModulationVectors`.
    """
    module = jax.eval_shape(
        lambda key: make_modulation(model, jnp.dtype(compute.dtype), make_rngs(key)),
        jax.random.key(0),
    )
    return nnx.merge(nnx.split(module)[0], params)
