"""LoRA training (arXiv 2106.09685): low-rank additions to the blocks' matrices are the weights of the run, and what they are added to
stays as `init` has it, quantised if the config says so.

Checkpoints hold the additions alone; `weights/lora.py` exports them.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from radiance import config
from radiance.model.stored import Adapted
from radiance.model.transformer import Params, abstract
from radiance.training.optimizer import starts
from radiance.weights.checkpoint import inputs_of, is_block_matrix
from radiance.weights.lora import Lora, from_adapters
from radiance.weights.native import flatten


def init_adapters(model: config.Model, lora: config.Lora, key: PRNGKeyArray) -> Params:
    """For every adapted matrix of the tree {"down": [blocks, in, rank], "up": [blocks, rank, out]}, float32.

    `up` is 0, so that the first step starts from the weights as they are; `down` has variance 1/in, so that x · down is as large as x.
    Raises ConfigError for one of `lora.parts` that no matrix has, but for a kind of block that this model does without.
    """
    every = {path: leaf.shape for path, leaf in flatten(abstract(model)).items() if is_block_matrix(path)}
    unused = [part for part in lora.parts if not any(starts(path, part) for path in every)]
    if any("/" in part for part in unused) or len(unused) == len(lora.parts):
        raise config.ConfigError(f"lora.parts: none of the model's matrices is in {', '.join(unused)}; they are {', '.join(every)}.")
    matrices = {path: shape for path, shape in every.items() if any(starts(path, part) for part in lora.parts)}
    adapters: Params = {}
    for (path, shape), its_key in zip(matrices.items(), jax.random.split(key, len(matrices))):
        blocks, inputs = shape[0], inputs_of(path, shape)
        outputs = math.prod(shape[1:]) // inputs
        node = adapters
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node["down"] = jax.random.normal(its_key, (blocks, inputs, lora.rank)) / jnp.sqrt(inputs)
        node["up"] = jnp.zeros((blocks, lora.rank, outputs))
    return adapters


def adapted(base: Params, adapters: Params, lora: config.Lora) -> Params:
    """The weights to compute with: `base`, and beside its matrices the additions."""

    def visit(base: Any, adapters: Mapping) -> Any:
        if "down" in adapters:
            return Adapted(base, adapters["down"], lora.scale * adapters["up"])
        return {name: visit(value, adapters[name]) if name in adapters else value for name, value in base.items()}

    return visit(base, adapters)


def as_lora(run: config.Config, adapters: Params, origin: str) -> Lora:
    """What a run has trained, as files hold it."""
    return from_adapters(run.model, adapters, run.lora.scale, origin)
