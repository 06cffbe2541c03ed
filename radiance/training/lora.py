"""LoRA training (arXiv 2106.09685): low-rank additions to the blocks' matrices are the weights of the run, and what they are added to
stays as `init` has it, quantized if the config says so.

Checkpoints hold the additions alone; `weights/lora.py` exports them.
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
    """For every adapted matrix of the tree {"down": [blocks, in, rank], "up": [blocks, rank, out]}, float32.

    `up` is 0, so that the first step starts from the weights as they are; `down` has variance 1/in, so that x · down is as large as x.
    Raises ConfigError for one of `lora.target_modules` that no matrix has, but for a kind of block that this model does without.
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
            f"lora.target_modules: none of the model's matrices is in {', '.join(unused)}; they are {', '.join(matrix_shapes)}."
        )
    target_shapes = {
        path: shape
        for path, shape in matrix_shapes.items()
        if any(is_under(path, module) for module in lora.target_modules)
    }
    adapters: Params = {}
    for (path, shape), matrix_key in zip(
        target_shapes.items(), jax.random.split(key, len(target_shapes))
    ):
        num_blocks, in_features = shape[0], count_inputs(path, shape)
        out_features = math.prod(shape[1:]) // in_features
        node = adapters
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node["down"] = jax.random.normal(
            matrix_key, (num_blocks, in_features, lora.rank)
        ) / jnp.sqrt(in_features)
        node["up"] = jnp.zeros((num_blocks, lora.rank, out_features))
    return adapters


def attach_adapters(base: Params, adapters: Params, lora: config.Lora) -> Params:
    """The weights to compute with: `base`, and beside its matrices the additions."""

    def visit(base: Any, adapters: Mapping) -> Any:
        if "down" in adapters:
            return LoraKernel(base, adapters["down"], lora.scale * adapters["up"])
        return {
            name: visit(value, adapters[name]) if name in adapters else value
            for name, value in base.items()
        }

    return visit(base, adapters)


def to_lora_weights(run: config.Config, adapters: Params, origin: str) -> LoraWeights:
    """What a run has trained, as files hold it."""
    return adapters_to_lora(run.model, adapters, run.lora.scale, origin)
