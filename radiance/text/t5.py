"""The encoder of T5 v1.1 (arXiv 1910.10683, 2002.05202): token ids in, vectors out. Sizes come from the file.

Axis letters: b batch, l tokens, d hidden, h heads, k head size, v vocabulary. The parameters live outside the module, in a plain
nested dict with the blocks stacked on axis 0, as those of `model/transformer.py`; they are read, never trained or written.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from radiance.model.precision import exact_in_float32
from radiance.sections import Section, require
from radiance.weights.detect import check_shapes
from radiance.weights.files import CheckpointError, Shapes, Tensors, cast, open_tensors

Params = dict[str, Any]  # nested; leaves are arrays

MAX_DISTANCE = 128  # tokens; from here on all distances share a bucket. The same in every T5, and in no file
FLOAT32 = jnp.dtype("float32")


@dataclass(frozen=True)
class T5(Section):
    """Sizes of the encoder. Defaults are T5 v1.1 XXL."""

    vocabulary: int = 32128
    hidden: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_hidden: int = 10240
    buckets: int = 32  # of relative positions; half of them for tokens that come later

    def check(self):
        for name in ("vocabulary", "hidden", "layers", "heads", "head_dim", "mlp_hidden"):
            require(getattr(self, name) >= 1, f"t5.{name} is {getattr(self, name)}: it must be at least 1.")
        require(self.buckets >= 4 and self.buckets % 4 == 0, f"t5.buckets={self.buckets} must be a positive multiple of 4.")


# --- the network ------------------------------------------------------------------------------------------------------
# Matrix products are computed in `dtype` with float32 sums. The stream between the blocks is float32, and so are what they add to
# it, the norms, the softmax and the position bias. The feed-forward of the large T5s gives more than float16 can hold, so float16
# is not offered; bfloat16 can hold it, but would round the whole stream to less than three digits twice a block.


class Attention(nnx.Module):
    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = partial(nnx.LinearGeneral, use_bias=False, dtype=dtype, rngs=rngs)
        heads = (t5.heads, t5.head_dim)
        self.norm = nnx.RMSNorm(t5.hidden, epsilon=1e-6, dtype=FLOAT32, rngs=rngs)
        self.q, self.k, self.v = (linear(t5.hidden, heads) for _ in range(3))
        self.proj = linear(heads, t5.hidden, axis=(-2, -1), preferred_element_type=FLOAT32)

    def __call__(self, x: Float32[Array, "b l d"], bias: Float32[Array, "1 h l l"], lengths: Int[Array, " b"]) -> Float32[Array, "b l d"]:
        y = self.norm(x)
        # T5 does not scale the products; its initialisation is scaled instead.
        y = jax.nn.dot_product_attention(self.q(y), self.k(y), self.v(y), bias, scale=1.0, key_value_seq_lengths=lengths)
        return x + self.proj(y)


class MLP(nnx.Module):
    """GEGLU (arXiv 2002.05202), with the tanh form of GELU."""

    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = nnx.RMSNorm(t5.hidden, epsilon=1e-6, dtype=FLOAT32, rngs=rngs)
        self.gate = linear(t5.hidden, t5.mlp_hidden)
        self.linear_in = linear(t5.hidden, t5.mlp_hidden)
        self.linear_out = linear(t5.mlp_hidden, t5.hidden, preferred_element_type=FLOAT32)

    def __call__(self, x: Float32[Array, "b l d"]) -> Float32[Array, "b l d"]:
        y = self.norm(x)
        return x + self.linear_out(nnx.gelu(self.gate(y), approximate=True) * self.linear_in(y))


class Block(nnx.Module):
    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = Attention(t5, dtype, rngs)
        self.mlp = MLP(t5, dtype, rngs)

    def __call__(self, x: Float32[Array, "b l d"], bias: Float32[Array, "1 h l l"], lengths: Int[Array, " b"]) -> Float32[Array, "b l d"]:
        return self.mlp(self.attention(x, bias, lengths))


class Network(nnx.Module):
    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.embedding = nnx.Param(jnp.zeros((t5.vocabulary, t5.hidden)))
        self.position_bias = nnx.Param(jnp.zeros((t5.buckets, t5.heads)))
        self.blocks = jax.vmap(lambda key: Block(t5, dtype, nnx.Rngs(key)))(jax.random.split(rngs.params(), t5.layers))
        self.norm = nnx.RMSNorm(t5.hidden, epsilon=1e-6, dtype=FLOAT32, rngs=rngs)

    @exact_in_float32
    def __call__(self, ids: Int[Array, "b l"], lengths: Int[Array, " b"]) -> Float32[Array, "b l d"]:
        """Vectors of all tokens. Every token attends to the first `lengths` (at least 1) of its text, the padding too, so that a
        row of padding depends on the real tokens and its own position, and not on how much padding there is."""
        x = self.embedding[...][ids].astype(FLOAT32)
        table = position_buckets(ids.shape[1], self.position_bias.shape[0])
        bias = jnp.moveaxis(self.position_bias[...][table].astype(FLOAT32), -1, 0)[None]
        x, _ = jax.lax.scan(lambda x, block: (block(x, bias, lengths), None), x, self.blocks)
        return self.norm(x)


def position_buckets(length: int, buckets: int) -> Int[np.ndarray, "l l"]:
    """Which of the biases a query (row) adds for a key (column).

    Of each half, the first half are single distances, and the others grow by equal factors up to MAX_DISTANCE.
    """
    half = buckets // 2
    near = half // 2
    edges = near * (MAX_DISTANCE / near) ** (np.arange(half - near) / (half - near))  # where each of the wider buckets begins
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    wide = near - 1 + np.searchsorted(edges, np.abs(distance), side="right")
    return np.where(distance > 0, half, 0) + np.where(np.abs(distance) < near, np.abs(distance), wide)


# --- parameters as a plain tree ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _skeleton(t5: T5, dtype: str):
    return nnx.split(jax.eval_shape(lambda key: Network(t5, jnp.dtype(dtype), nnx.Rngs(key)), jax.random.key(0)))


def abstract(t5: T5, dtype: str = "float32") -> Params:
    """The parameter tree with shapes and types in place of arrays. Norms and position biases are float32 whatever `dtype`."""

    def typed(path, leaf):
        large = path[-1].key in ("kernel", "embedding")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if large else FLOAT32)

    return jax.tree_util.tree_map_with_path(typed, nnx.to_pure_dict(_skeleton(t5, "float32")[1]))


def bind(t5: T5, dtype: str, params: Params) -> Network:
    """The module that computes with `params` in `dtype`; inside `jax.jit` this is free."""
    return nnx.merge(_skeleton(t5, dtype)[0], params)


@partial(jax.jit, static_argnames=("t5", "dtype"))
def encode(t5: T5, dtype: str, params: Params, ids: Int[Array, "b l"], lengths: Int[Array, " b"]) -> Float[Array, "b l d"]:
    """Vectors of texts in `dtype`: those of the tokens, and beyond `lengths` T5's own for padding."""
    return bind(t5, dtype, params)(ids, lengths).astype(dtype)


# --- reading ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    path: str  # in our tree
    layout: str
    torch: str  # the name in Hugging Face's files
    gguf: str  # the name in llama.cpp's files


BLOCK = "encoder.block.{i}.layer"
TABLE = (
    Row("embedding", "same", "shared.weight", "token_embd.weight"),
    Row("position_bias", "same", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "enc.blk.0.attn_rel_b.weight"),
    Row("blocks/attention/norm/scale", "same", f"{BLOCK}.0.layer_norm.weight", "enc.blk.{i}.attn_norm.weight"),
    Row("blocks/attention/q/kernel", "matrix", f"{BLOCK}.0.SelfAttention.q.weight", "enc.blk.{i}.attn_q.weight"),
    Row("blocks/attention/k/kernel", "matrix", f"{BLOCK}.0.SelfAttention.k.weight", "enc.blk.{i}.attn_k.weight"),
    Row("blocks/attention/v/kernel", "matrix", f"{BLOCK}.0.SelfAttention.v.weight", "enc.blk.{i}.attn_v.weight"),
    Row("blocks/attention/proj/kernel", "heads", f"{BLOCK}.0.SelfAttention.o.weight", "enc.blk.{i}.attn_o.weight"),
    Row("blocks/mlp/norm/scale", "same", f"{BLOCK}.1.layer_norm.weight", "enc.blk.{i}.ffn_norm.weight"),
    Row("blocks/mlp/gate/kernel", "matrix", f"{BLOCK}.1.DenseReluDense.wi_0.weight", "enc.blk.{i}.ffn_gate.weight"),
    Row("blocks/mlp/linear_in/kernel", "matrix", f"{BLOCK}.1.DenseReluDense.wi_1.weight", "enc.blk.{i}.ffn_up.weight"),
    Row("blocks/mlp/linear_out/kernel", "matrix", f"{BLOCK}.1.DenseReluDense.wo.weight", "enc.blk.{i}.ffn_down.weight"),
    Row("norm/scale", "same", "encoder.final_layer_norm.weight", "enc.output_norm.weight"),
)
ROWS = {row.path: row for row in TABLE}
# Other names of the embedding, which T5 shares between encoder and decoder; a file may hold it under several.
TWINS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = re.compile(r"decoder\.|lm_head\.|dec\.|output\.weight$")  # what a whole T5 has besides its encoder
FIRST, GATE = ROWS["blocks/attention/q/kernel"], ROWS["blocks/mlp/gate/kernel"].torch.format(i=0)


class Weights:
    """T5's weights in a file or folder: names and shapes are checked when it is opened, values when they are loaded.

    Raises CheckpointError that names every tensor that is missing, left over or of another shape, and for T5 v1.0.
    """

    def __init__(self, path: str | Path):
        self.file = open_tensors(path)
        self.keys = _names(self.file)
        shapes = {name: self.file.shapes[key] for name, key in self.keys.items()}
        self.t5 = _sizes(shapes, self.file.path)
        expected = {}
        for row in TABLE:
            leaf = _leaf(abstract(self.t5), row.path)
            stacked = "{i}" in row.torch
            shape = _stored_shape(row.layout, leaf.shape[1:] if stacked else leaf.shape)
            expected |= {row.torch.format(i=i): shape for i in range(self.t5.layers if stacked else 1)}
        check_shapes(expected, shapes, self.file.path)

    def load(self, dtype: str, shardings: Callable[[Params], Params] | None = None) -> Params:
        """The parameters, leaf by leaf: no more than one of them is held on the host besides what is loaded.

        shardings: gives the places of a tree of shapes; one device when None.
        """
        tree = abstract(self.t5, dtype)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = shardings(tree) if shardings else jax.tree.map(lambda _: device, tree)

        def read(path, leaf, place):
            row = ROWS["/".join(k.key for k in path)]
            out = np.empty(leaf.shape, leaf.dtype)
            for i, block in enumerate(out if "{i}" in row.torch else out[None]):
                key = self.keys[row.torch.format(i=i)]
                values = cast(self.file[key], leaf.dtype, f"{self.file.path}: {key}")
                block[...] = (values if row.layout == "same" else values.T).reshape(block.shape)
            return jax.make_array_from_callback(out.shape, place, lambda part: out[part])

        return jax.tree_util.tree_map_with_path(read, tree, places)

    def fingerprint(self) -> str:
        """A hash of the weights, whatever container they come in."""
        return self.file.fingerprint(self.keys)


def _names(file: Tensors) -> dict[str, str]:
    """Hugging Face's name → key in the file, of the encoder alone."""
    keys, first = file.shapes, FIRST.torch.format(i=0)
    if FIRST.gguf.format(i=0) in keys:
        names = {row.gguf.format(i=i): row.torch.format(i=i) for row in TABLE for i in range(len(keys))}
        found = {names.get(key, key): key for key in keys}
        old = GATE not in found and "enc.blk.0.ffn_up.weight" in keys
    else:
        prefixes = [key.removesuffix(first) for key in keys if key.endswith(first)]
        if len(prefixes) != 1:
            what = f"more than one T5 ({', '.join(prefixes)})" if prefixes else f"no T5 encoder (it has no {first})"
            raise CheckpointError(f"{file.path} holds {what}: give a file of T5 v1.1, such as the text encoder of Chroma or FLUX.")
        found = {key.removeprefix(prefixes[0]): key for key in keys if key.startswith(prefixes[0])}
        old = "encoder.block.0.layer.1.DenseReluDense.wi.weight" in found
    if old:
        raise CheckpointError(f"{file.path} is T5 v1.0, whose feed-forward has no gate: give T5 v1.1 (or Flan-T5, which is one).")
    twins = [found.pop(name) for name in TWINS if name in found]
    if twins:
        found.setdefault("shared.weight", twins[0])
    return {name: key for name, key in found.items() if not UNUSED.match(name)}


def _sizes(shapes: Shapes, origin: object) -> T5:
    try:
        vocabulary, hidden = shapes["shared.weight"]
        buckets, heads = shapes[ROWS["position_bias"].torch]
        inner, _ = shapes[FIRST.torch.format(i=0)]
        mlp_hidden, _ = shapes[GATE]
        layers = next(i for i in range(len(shapes) + 1) if FIRST.torch.format(i=i) not in shapes)
        return T5(vocabulary, hidden, layers, heads, inner // max(heads, 1), mlp_hidden, buckets)
    except KeyError as error:
        raise CheckpointError(f"{origin} looks like a T5 encoder, but has no {error.args[0]}: the file is not whole.") from None
    except ValueError:  # a tensor with more or fewer axes than it should have, or sizes that make no T5
        raise CheckpointError(f"{origin} has the names of a T5 encoder, but its tensors are of other kinds.") from None


def _stored_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the matrix [out, in] that a kernel [*in, *out] is kept as; `heads` has two axes in, `matrix` one."""
    inputs = {"same": 0, "matrix": 1, "heads": 2}[layout]
    return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))) if inputs else shape


def _leaf(tree: Params, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree
