"""Native tensors of the pixel heads: one entry for each value of `model.head`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from radiance import config
from radiance.weights.native_rules import NativeRule, count_blocks, leaf_rule, linear_rules
from radiance.weights.tensors import TensorShapes


class HeadFormat(NamedTuple):
    """The native tensors of a head."""

    rules: list[NativeRule]
    signature: tuple[str, ...]  # a file has the first head whose signature it contains
    infer_fields: Callable[[TensorShapes], dict[str, Any]]  # shapes → settings of the head


def _infer_nerf_fields(shapes: TensorShapes) -> dict[str, Any]:
    """Return the settings of a NeRF head."""
    nerf_hidden, num_features = shapes["nerf_image_embedder.embedder.0.weight"]
    num_generated = shapes["nerf_blocks.0.param_generator.weight"][0]
    channels = (shapes.get("img_in_bottleneck.in_layer.weight") or shapes["img_in_patch.weight"])[1]
    return {
        "nerf_hidden": nerf_hidden,
        "nerf_freqs": math.isqrt(num_features - channels),
        "nerf_depth": count_blocks(shapes, "nerf_blocks.{i}.param_generator.weight"),
        "nerf_mlp_ratio": num_generated // (3 * nerf_hidden**2),
    }


NERF_RULES = [
    *linear_rules("nerf_image_embedder.embedder.0", "head/embedder"),
    *linear_rules("nerf_blocks.{i}.param_generator", "head/blocks/param_generator"),
    leaf_rule("nerf_blocks.{i}.norm.scale", "head/blocks/norm/scale"),
]

HEAD_FORMATS = {
    "nerf_conv": HeadFormat(
        rules=[
            *NERF_RULES,
            leaf_rule("nerf_final_layer_conv.norm.scale", "head/norm/scale"),
            *linear_rules("nerf_final_layer_conv.conv", "head/conv", "conv"),
        ],
        signature=("nerf_image_embedder.embedder.0.weight", "nerf_final_layer_conv.norm.scale"),
        infer_fields=_infer_nerf_fields,
    ),
    "nerf_linear": HeadFormat(
        rules=[
            *NERF_RULES,
            leaf_rule("nerf_final_layer.norm.scale", "head/norm/scale"),
            *linear_rules("nerf_final_layer.linear", "head/linear"),
        ],
        signature=("nerf_image_embedder.embedder.0.weight",),
        infer_fields=_infer_nerf_fields,
    ),
    "linear": HeadFormat(
        rules=linear_rules("final_layer.linear", "head/linear"),
        signature=(),
        infer_fields=lambda shapes: {},
    ),
}


def head_rules() -> list[NativeRule]:
    """Return the rules of all heads, each for the models that have the head."""

    def has_head(head: str) -> Callable[[config.Model], bool]:
        return lambda model: model.head == head

    return [
        rule._replace(applies_to=has_head(head))
        for head, head_format in HEAD_FORMATS.items()
        for rule in head_format.rules
    ]


def infer_head(shapes: TensorShapes) -> dict[str, Any]:
    """Return `head` and its settings from the native tensors of a pixel model.

    Args:
        shapes: Shapes by native name.

    Raises:
        KeyError: If a tensor of the head is missing.
    """
    for head, head_format in HEAD_FORMATS.items():
        if all(name in shapes for name in head_format.signature):
            return {"head": head, **head_format.infer_fields(shapes)}
    raise AssertionError("The last head's signature is empty.")
