"""LoRA training (arXiv 2106.09685): the run trains low-rank adapters of the blocks' matrices.

The base weights are those of `init` and do not change; they are quantized by `lora.weight_format`.
Checkpoints hold the adapters alone; `weights/lora.py` exports them.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from radiance import config
from radiance.base.trees import flatten_tree
from radiance.model.lora import LoraKernel
from radiance.model.paths import count_inputs, is_block_matrix
from radiance.model.transformer import Params, make_abstract_params
from radiance.training.parameter_groups import is_under
from radiance.weights.lora import LoraWeights
from radiance.weights.lora_adapters import adapters_to_lora


def init_adapters(model: config.Model, lora: config.Lora, key: PRNGKeyArray) -> Params:
    """Initialize the adapters.

    `up` is 0, so that training starts from the base weights; `down` has variance 1/in, so that
    x · down is as large as x.

    Args:
        model: Sizes of the network.
        lora: Settings.
        key: Random key.

    Returns:
        A tree with {"down": [blocks, in, rank], "up": [blocks, rank, out]}, float32, in place of
        each adapted matrix.

    Raises:
        ConfigError: If one of `lora.target_modules` matches no matrix. A kind of block that this
            model does not have is allowed unless nothing else matches.
    """
    matrix_shapes = {
        path: leaf.shape
        for path, leaf in flatten_tree(make_abstract_params(model)).items()
        if is_block_matrix(path)
    }
    unused = [
        module
        for module in lora.target_modules
        if not any(is_under(path, module) for path in matrix_shapes)
    ]
    if any("/" in module for module in unused) or len(unused) == len(lora.target_modules):
        raise config.ConfigError(
            f"lora.target_modules: none of the model's matrices is in {', '.join(unused)}: choose "
            f"among {', '.join(matrix_shapes)}."
        )
    target_shapes = {
        path: shape
        for path, shape in matrix_shapes.items()
        if any(is_under(path, module) for module in lora.target_modules)
    }
    adapters: Params = {}
    keys = jax.random.split(key, len(target_shapes))
    for (path, shape), matrix_key in zip(target_shapes.items(), keys):
        num_blocks, in_features = shape[0], count_inputs(path, shape)
        out_features = math.prod(shape[1:]) // in_features
        node = adapters
        for name in path.split("/"):
            node = node.setdefault(name, {})
        noise = jax.random.normal(matrix_key, (num_blocks, in_features, lora.rank))
        node["down"] = noise / jnp.sqrt(in_features)
        node["up"] = jnp.zeros((num_blocks, lora.rank, out_features))
    return adapters


def attach_adapters(base: Params, adapters: Params, lora: config.Lora) -> Params:
    """Combine base weights and adapters to weights that the network computes with.

    Args:
        base: The parameter tree, with arrays or quantized kernels.
        adapters: The tree of `init_adapters`.
        lora: Settings; the scale multiplies `up`.

    Returns:
        The parameter tree with `LoraKernel`s in place of the adapted matrices.
    """

    def visit(base: Any, adapters: Mapping) -> Any:
        if "down" in adapters:
            return LoraKernel(base, adapters["down"], lora.scale * adapters["up"])
        return {
            name: visit(value, adapters[name]) if name in adapters else value
            for name, value in base.items()
        }

    return visit(base, adapters)


def to_lora_weights(run: config.Config, adapters: Params, origin: str) -> LoraWeights:
    """Convert the adapters of a run to the weights that LoRA files hold.

    Args:
        run: The run's settings.
        adapters: The tree of `init_adapters`, trained.
        origin: Where they come from, for messages.

    Returns:
        Pairs of matrices by native module name.
    """
    return adapters_to_lora(run.model, adapters, run.lora.scale, origin)
