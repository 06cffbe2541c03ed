"""Read the weights of a T5 encoder from Hugging Face's or llama.cpp's files."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from radiance.base.errors import CheckpointError
from radiance.base.trees import leaf_path
from radiance.text.t5 import T5, Params, make_abstract_t5
from radiance.weights.detect import check_shapes
from radiance.weights.names import strip_prefix
from radiance.weights.opening import open_tensors
from radiance.weights.tensors import Tensors, TensorShapes, cast_array


class T5Rule(NamedTuple):
    """Names and layout of a parameter.

    Attributes:
        path: Path in our tree.
        layout: "same", or "matrix" and "heads" for matrices [out, in] in files (`_torch_shape`).
        torch_name: Name in Hugging Face's files.
        gguf_name: Name in llama.cpp's files.
    """

    path: str
    layout: str
    torch_name: str
    gguf_name: str


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
# Other names of the embedding, which encoder and decoder share; a file may hold several of them.
EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
ENCODER_PREFIXES = ("encoder.", "shared.", "enc.", "token_embd.")  # others are not of the encoder
SENTENCEPIECE_NAME = "spiece_model"  # ComfyUI's files contain the tokenizer under this name
MAX_SENTENCEPIECE_BYTES = 64_000_000
QUERY_RULE = RULES_BY_PATH["blocks/attention/q/kernel"]
GATE_NAME = RULES_BY_PATH["blocks/mlp/gate/kernel"].torch_name.format(i=0)


class T5Weights:
    """T5's weights in a file or folder.

    Names and shapes are checked when it is opened, values when they are loaded.

    Args:
        path: A file or a folder.

    Raises:
        CheckpointError: If tensors are missing, left over or of another shape (the message names
            them), or if it is T5 v1.0.
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
        self.file.require_weights(self.file_keys.values())

    def load_params(
        self, dtype: str, shardings: Callable[[Params], Params] | None = None
    ) -> Params:
        """Load the parameters leaf by leaf, so that the host holds one of them at a time.

        Args:
            dtype: Type of the matrices.
            shardings: Function from a tree of shapes to their shardings; one device when None.

        Returns:
            The parameter tree.

        Raises:
            CheckpointError: If a value is not finite in its type.
        """
        tree = make_abstract_t5(self.sizes, dtype)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        leaf_shardings = shardings(tree) if shardings else jax.tree.map(lambda _: device, tree)

        def read_leaf(path, leaf, sharding):
            rule = RULES_BY_PATH[leaf_path(path)]
            out = np.empty(leaf.shape, leaf.dtype)
            blocks: Any = out if "{i}" in rule.torch_name else out[None]
            for i, block in enumerate(blocks):
                key = self.file_keys[rule.torch_name.format(i=i)]
                values = cast_array(self.file[key], leaf.dtype, f"{self.file.path}: {key}")
                block[...] = (values if rule.layout == "same" else values.T).reshape(block.shape)
            return jax.make_array_from_callback(out.shape, sharding, lambda index: out[index])

        return jax.tree_util.tree_map_with_path(read_leaf, tree, leaf_shardings)

    def read_sentencepiece(self) -> bytes | None:
        """Return the SentencePiece model that the file contains beside the weights, if any.

        Raises:
            CheckpointError: If the file contains several.
        """
        locations = [
            location
            for key, location in self.file.locations.items()
            if key.split(".")[-1] == SENTENCEPIECE_NAME
        ]
        if len(locations) > 1 or any(x.nbytes > MAX_SENTENCEPIECE_BYTES for x in locations):
            raise CheckpointError(
                f"{self.file.path} contains several tokenizers, or one that is too large: set "
                f"text.tokenizer."
            )
        return self.file.read_raw(locations[0]).tobytes() if locations else None

    def fingerprint(self) -> str:
        """Compute a hash of the weights, which does not depend on the container."""
        return self.file.fingerprint(self.file_keys)


def _find_keys(file: Tensors) -> dict[str, str]:
    """Map Hugging Face's names of the encoder's tensors to keys of the file."""
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
        keys_by_name = strip_prefix(shapes, (query_name,), file.path)
        if query_name not in keys_by_name:
            raise CheckpointError(
                f"{file.path} holds no T5 encoder (it has no {query_name}): use a file of T5 v1.1, "
                "such as the text encoder of Chroma or FLUX."
            )
        is_version_1_0 = "encoder.block.0.layer.1.DenseReluDense.wi.weight" in keys_by_name
    if is_version_1_0:
        raise CheckpointError(
            f"{file.path} is T5 v1.0, whose MLP has no gate: use T5 v1.1 (Flan-T5 is one)."
        )
    alias_keys = [keys_by_name.pop(name) for name in EMBEDDING_ALIASES if name in keys_by_name]
    if alias_keys:
        keys_by_name.setdefault("shared.weight", alias_keys[0])
    return {name: key for name, key in keys_by_name.items() if name.startswith(ENCODER_PREFIXES)}


def _infer_sizes(shapes: TensorShapes, origin: object) -> T5:
    """Infer the network's sizes from the shapes of its tensors."""
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
            f"{origin} looks like a T5 encoder, but has no {error.args[0]}: download it again."
        ) from None
    except ValueError:  # a tensor has the wrong number of axes, or the sizes do not fit together
        raise CheckpointError(
            f"{origin} has the names of a T5 encoder, but its tensors have other shapes: use a "
            "file of T5 v1.1."
        ) from None


def _torch_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Compute the shape [out, in] of the file's matrix of a kernel [*in, *out].

    The kernel of "heads" has two input axes, that of "matrix" one.
    """
    num_input_axes = {"same": 0, "matrix": 1, "heads": 2}[layout]
    if num_input_axes == 0:
        return shape
    return math.prod(shape[num_input_axes:]), math.prod(shape[:num_input_axes])


def _get_leaf(tree: Params, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree
