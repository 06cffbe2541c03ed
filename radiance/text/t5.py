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

from radiance.base.errors import CheckpointError
from radiance.base.settings import Section, require
from radiance.base.trees import leaf_path
from radiance.model.precision import exact_in_float32
from radiance.weights.detect import check_shapes
from radiance.weights.opening import open_tensors
from radiance.weights.tensors import Tensors, TensorShapes, cast_array

Params = dict[str, Any]  # nested; leaves are arrays

MAX_DISTANCE = (
    128  # tokens; from here on all distances share a bucket. The same in every T5, and in no file
)
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
            require(
                getattr(self, name) >= 1,
                f"t5.{name} is {getattr(self, name)}: it must be at least 1.",
            )
        require(
            self.buckets >= 4 and self.buckets % 4 == 0,
            f"t5.buckets={self.buckets} must be a positive multiple of 4.",
        )


# --- the network ------------------------------------------------------------------------------------------------------
# Matrix products are computed in `dtype` with float32 sums. The stream between the blocks is float32, and so are what they add to
# it, the norms, the softmax and the position bias. The feed-forward of the large T5s gives more than float16 can hold, so float16
# is not offered; bfloat16 can hold it, but would round the whole stream to less than three digits twice a block.


class T5Attention(nnx.Module):
    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = partial(nnx.LinearGeneral, use_bias=False, dtype=dtype, rngs=rngs)
        heads = (t5.heads, t5.head_dim)
        self.norm = nnx.RMSNorm(t5.hidden, epsilon=1e-6, dtype=FLOAT32, rngs=rngs)
        self.q, self.k, self.v = (linear(t5.hidden, heads) for _ in range(3))
        self.proj = linear(heads, t5.hidden, axis=(-2, -1), preferred_element_type=FLOAT32)

    def __call__(
        self, x: Float32[Array, "b l d"], bias: Float32[Array, "1 h l l"], lengths: Int[Array, " b"]
    ) -> Float32[Array, "b l d"]:
        y = self.norm(x)
        # T5 does not scale the products; its initialisation is scaled instead.
        y = jax.nn.dot_product_attention(
            self.q(y), self.k(y), self.v(y), bias, scale=1.0, key_value_seq_lengths=lengths
        )
        return x + self.proj(y)


class T5MLP(nnx.Module):
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


class T5Block(nnx.Module):
    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = T5Attention(t5, dtype, rngs)
        self.mlp = T5MLP(t5, dtype, rngs)

    def __call__(
        self, x: Float32[Array, "b l d"], bias: Float32[Array, "1 h l l"], lengths: Int[Array, " b"]
    ) -> Float32[Array, "b l d"]:
        return self.mlp(self.attention(x, bias, lengths))


class T5Network(nnx.Module):
    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.embedding = nnx.Param(jnp.zeros((t5.vocabulary, t5.hidden)))
        self.position_bias = nnx.Param(jnp.zeros((t5.buckets, t5.heads)))
        self.blocks = jax.vmap(lambda key: T5Block(t5, dtype, nnx.Rngs(key)))(
            jax.random.split(rngs.params(), t5.layers)
        )
        self.norm = nnx.RMSNorm(t5.hidden, epsilon=1e-6, dtype=FLOAT32, rngs=rngs)

    @exact_in_float32
    def __call__(
        self, ids: Int[Array, "b l"], lengths: Int[Array, " b"]
    ) -> Float32[Array, "b l d"]:
        """Vectors of all tokens. Every token attends to the first `lengths` (at least 1) of its text, the padding too, so that a
        row of padding depends on the real tokens and its own position, and not on how much padding there is.
        """
        x = self.embedding[...][ids].astype(FLOAT32)
        bias_buckets = position_buckets(ids.shape[1], self.position_bias.shape[0])
        bias = jnp.moveaxis(self.position_bias[...][bias_buckets].astype(FLOAT32), -1, 0)[None]
        x, _ = jax.lax.scan(lambda x, block: (block(x, bias, lengths), None), x, self.blocks)
        return self.norm(x)


def position_buckets(length: int, num_buckets: int) -> Int[np.ndarray, "l l"]:
    """Which of the biases a query (row) adds for a key (column).

    Of each half, the first half are single distances, and the others grow by equal factors up to MAX_DISTANCE.
    """
    num_half = num_buckets // 2
    num_near = num_half // 2
    far_edges = num_near * (MAX_DISTANCE / num_near) ** (
        np.arange(num_half - num_near) / (num_half - num_near)
    )  # where each of the wider buckets begins
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    far_buckets = num_near - 1 + np.searchsorted(far_edges, np.abs(distance), side="right")
    return np.where(distance > 0, num_half, 0) + np.where(
        np.abs(distance) < num_near, np.abs(distance), far_buckets
    )


# --- parameters as a plain tree ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _split_abstract_network(t5: T5, dtype: str):
    return nnx.split(
        jax.eval_shape(
            lambda key: T5Network(t5, jnp.dtype(dtype), nnx.Rngs(key)), jax.random.key(0)
        )
    )


def make_abstract_t5(t5: T5, dtype: str = "float32") -> Params:
    """The parameter tree with shapes and types in place of arrays. Norms and position biases are float32 whatever `dtype`."""

    def make_leaf(path, leaf):
        is_matrix = path[-1].key in ("kernel", "embedding")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if is_matrix else FLOAT32)

    return jax.tree_util.tree_map_with_path(
        make_leaf, nnx.to_pure_dict(_split_abstract_network(t5, "float32")[1])
    )


def bind_t5(t5: T5, dtype: str, params: Params) -> T5Network:
    """The module that computes with `params` in `dtype`; inside `jax.jit` this is free."""
    return nnx.merge(_split_abstract_network(t5, dtype)[0], params)


@partial(jax.jit, static_argnames=("t5", "dtype"))
def encode_ids(
    t5: T5, dtype: str, params: Params, ids: Int[Array, "b l"], lengths: Int[Array, " b"]
) -> Float[Array, "b l d"]:
    """Vectors of texts in `dtype`: those of the tokens, and beyond `lengths` T5's own for padding."""
    return bind_t5(t5, dtype, params)(ids, lengths).astype(dtype)


# --- reading ----------------------------------------------------------------------------------------------------------


class T5Rule(NamedTuple):
    path: str  # in our tree
    layout: str
    torch_name: str  # the name in Hugging Face's files
    gguf_name: str  # the name in llama.cpp's files


TORCH_BLOCK = "encoder.block.{i}.layer"
T5_RULES = (
    T5Rule("embedding", "same", "shared.weight", "token_embd.weight"),
    T5Rule(
        "position_bias",
        "same",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "enc.blk.0.attn_rel_b.weight",
    ),
    T5Rule(
        "blocks/attention/norm/scale",
        "same",
        f"{TORCH_BLOCK}.0.layer_norm.weight",
        "enc.blk.{i}.attn_norm.weight",
    ),
    T5Rule(
        "blocks/attention/q/kernel",
        "matrix",
        f"{TORCH_BLOCK}.0.SelfAttention.q.weight",
        "enc.blk.{i}.attn_q.weight",
    ),
    T5Rule(
        "blocks/attention/k/kernel",
        "matrix",
        f"{TORCH_BLOCK}.0.SelfAttention.k.weight",
        "enc.blk.{i}.attn_k.weight",
    ),
    T5Rule(
        "blocks/attention/v/kernel",
        "matrix",
        f"{TORCH_BLOCK}.0.SelfAttention.v.weight",
        "enc.blk.{i}.attn_v.weight",
    ),
    T5Rule(
        "blocks/attention/proj/kernel",
        "heads",
        f"{TORCH_BLOCK}.0.SelfAttention.o.weight",
        "enc.blk.{i}.attn_o.weight",
    ),
    T5Rule(
        "blocks/mlp/norm/scale",
        "same",
        f"{TORCH_BLOCK}.1.layer_norm.weight",
        "enc.blk.{i}.ffn_norm.weight",
    ),
    T5Rule(
        "blocks/mlp/gate/kernel",
        "matrix",
        f"{TORCH_BLOCK}.1.DenseReluDense.wi_0.weight",
        "enc.blk.{i}.ffn_gate.weight",
    ),
    T5Rule(
        "blocks/mlp/linear_in/kernel",
        "matrix",
        f"{TORCH_BLOCK}.1.DenseReluDense.wi_1.weight",
        "enc.blk.{i}.ffn_up.weight",
    ),
    T5Rule(
        "blocks/mlp/linear_out/kernel",
        "matrix",
        f"{TORCH_BLOCK}.1.DenseReluDense.wo.weight",
        "enc.blk.{i}.ffn_down.weight",
    ),
    T5Rule("norm/scale", "same", "encoder.final_layer_norm.weight", "enc.output_norm.weight"),
)
RULES_BY_PATH = {row.path: row for row in T5_RULES}
# Other names of the embedding, which T5 shares between encoder and decoder; a file may hold it under several.
EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED_NAMES = re.compile(
    r"decoder\.|lm_head\.|dec\.|output\.weight$"
)  # what a whole T5 has besides its encoder
QUERY_RULE, GATE_NAME = (
    RULES_BY_PATH["blocks/attention/q/kernel"],
    RULES_BY_PATH["blocks/mlp/gate/kernel"].torch_name.format(i=0),
)


class T5Weights:
    """T5's weights in a file or folder: names and shapes are checked when it is opened, values when they are loaded.

    Raises CheckpointError that names every tensor that is missing, left over or of another shape, and for T5 v1.0.
    """

    def __init__(self, path: str | Path):
        self.file = open_tensors(path)
        self.file_keys = _find_keys(self.file)
        shapes = {name: self.file.shapes[key] for name, key in self.file_keys.items()}
        self.sizes = _infer_sizes(shapes, self.file.path)
        expected_shapes = {}
        for rule in T5_RULES:
            leaf = _get_leaf(make_abstract_t5(self.sizes), rule.path)
            is_stacked = "{i}" in rule.torch_name
            shape = _torch_shape(rule.layout, leaf.shape[1:] if is_stacked else leaf.shape)
            expected_shapes |= {
                rule.torch_name.format(i=i): shape
                for i in range(self.sizes.layers if is_stacked else 1)
            }
        check_shapes(expected_shapes, shapes, self.file.path)

    def load_params(
        self, dtype: str, shardings: Callable[[Params], Params] | None = None
    ) -> Params:
        """The parameters, leaf by leaf: no more than one of them is held on the host besides what is loaded.

        shardings: gives the places of a tree of shapes; one device when None.
        """
        tree = make_abstract_t5(self.sizes, dtype)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        leaf_shardings = shardings(tree) if shardings else jax.tree.map(lambda _: device, tree)

        def read_leaf(path, leaf, sharding):
            rule = RULES_BY_PATH[leaf_path(path)]
            out = np.empty(leaf.shape, leaf.dtype)
            for i, block in enumerate(out if "{i}" in rule.torch_name else out[None]):
                key = self.file_keys[rule.torch_name.format(i=i)]
                values = cast_array(self.file[key], leaf.dtype, f"{self.file.path}: {key}")
                block[...] = (values if rule.layout == "same" else values.T).reshape(block.shape)
            return jax.make_array_from_callback(out.shape, sharding, lambda index: out[index])

        return jax.tree_util.tree_map_with_path(read_leaf, tree, leaf_shardings)

    def fingerprint(self) -> str:
        """A hash of the weights, whatever container they come in."""
        return self.file.fingerprint(self.file_keys)


def _find_keys(file: Tensors) -> dict[str, str]:
    """Hugging Face's name → key in the file, of the encoder alone."""
    shapes, query_name = file.shapes, QUERY_RULE.torch_name.format(i=0)
    if QUERY_RULE.gguf_name.format(i=0) in shapes:
        torch_names = {
            rule.gguf_name.format(i=i): rule.torch_name.format(i=i)
            for rule in T5_RULES
            for i in range(len(shapes))
        }
        keys_by_name = {torch_names.get(key, key): key for key in shapes}
        is_version_1_0 = GATE_NAME not in keys_by_name and "enc.blk.0.ffn_up.weight" in shapes
    else:
        prefixes = [key.removesuffix(query_name) for key in shapes if key.endswith(query_name)]
        if len(prefixes) != 1:
            contents = (
                f"more than one T5 ({', '.join(prefixes)})"
                if prefixes
                else f"no T5 encoder (it has no {query_name})"
            )
            raise CheckpointError(
                f"{file.path} holds {contents}: give a file of T5 v1.1, such as the text encoder of Chroma or FLUX."
            )
        keys_by_name = {
            key.removeprefix(prefixes[0]): key for key in shapes if key.startswith(prefixes[0])
        }
        is_version_1_0 = "encoder.block.0.layer.1.DenseReluDense.wi.weight" in keys_by_name
    if is_version_1_0:
        raise CheckpointError(
            f"{file.path} is T5 v1.0, whose feed-forward has no gate: give T5 v1.1 (or Flan-T5, which is one)."
        )
    alias_keys = [keys_by_name.pop(name) for name in EMBEDDING_ALIASES if name in keys_by_name]
    if alias_keys:
        keys_by_name.setdefault("shared.weight", alias_keys[0])
    return {name: key for name, key in keys_by_name.items() if not UNUSED_NAMES.match(name)}


def _infer_sizes(shapes: TensorShapes, origin: object) -> T5:
    try:
        vocabulary, hidden = shapes["shared.weight"]
        buckets, heads = shapes[RULES_BY_PATH["position_bias"].torch_name]
        attention_dim, _ = shapes[QUERY_RULE.torch_name.format(i=0)]
        mlp_hidden, _ = shapes[GATE_NAME]
        layers = next(
            i for i in range(len(shapes) + 1) if QUERY_RULE.torch_name.format(i=i) not in shapes
        )
        return T5(
            vocabulary, hidden, layers, heads, attention_dim // max(heads, 1), mlp_hidden, buckets
        )
    except KeyError as error:
        raise CheckpointError(
            f"{origin} looks like a T5 encoder, but has no {error.args[0]}: the file is not whole."
        ) from None
    except (
        ValueError
    ):  # a tensor with more or fewer axes than it should have, or sizes that make no T5
        raise CheckpointError(
            f"{origin} has the names of a T5 encoder, but its tensors are of other kinds."
        ) from None


def _torch_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the matrix [out, in] that a kernel [*in, *out] is kept as; `heads` has two axes in, `matrix` one."""
    num_input_axes = {"same": 0, "matrix": 1, "heads": 2}[layout]
    return (
        (int(np.prod(shape[num_input_axes:])), int(np.prod(shape[:num_input_axes])))
        if num_input_axes
        else shape
    )


def _get_leaf(tree: Params, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree
