"""Lower the training step and the sampling program over abstract inputs with shardings.

No weight is ever allocated, so a model of any size can be lowered on any machine.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from radiance import config
from radiance.base.trees import count_bytes, leaf_path
from radiance.distributed.sharding import BATCH_SPEC, make_shardings
from radiance.flow.distillation import Teacher
from radiance.flow.sampler import TextCondition, compute_modulations, generate_images
from radiance.model.paths import count_inputs, is_always_float32, is_block_matrix
from radiance.model.quantized import Q8_0_BLOCK, QuantizedKernel
from radiance.model.transformer import Params, make_abstract_params
from radiance.training.seeds import make_seeds_step
from radiance.training.step import init_state
from radiance.training.trajectories import POINTS_DTYPE
from radiance.weights.checkpoint import output_sharding


class PlannedProgram(NamedTuple):
    """A program that can be lowered, and its inputs as trees of abstract arrays."""

    lower: Callable[[], jax.stages.Lowered]
    parameters: Any
    ema: Any
    optimizer: Any
    batch: Any


def prepare_training(run: config.Config, mesh: jax.sharding.Mesh) -> PlannedProgram:
    """Return the training step as the trainer compiles it."""
    state = jax.eval_shape(partial(init_state, run))
    state_shardings = make_shardings(state, mesh)
    state = _add_shardings(state, state_shardings)
    base_params = None
    if run.lora.rank:
        base_params = _abstract_params(run.model, run.lora.dtype, run.lora.weight_format, mesh)
    teacher, teacher_params = _abstract_teacher(run, base_params, mesh)
    batch = _abstract_batch(run, mesh)
    step = jax.jit(
        make_seeds_step(run, 1),
        in_shardings=(state_shardings, None, None, None, None),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
    )
    fake_score = state.fake_score
    return PlannedProgram(
        partial(step.lower, state, batch, base_params, None, teacher),
        (state.params, base_params, teacher_params, fake_score and fake_score.params),
        state.ema,
        (state.optimizer_state, fake_score and fake_score.optimizer_state),
        batch,
    )


def count_disk_bytes(run: config.Config) -> int:
    """Return the bytes of the checkpoints and snapshots that a run keeps, over all devices.

    One checkpoint more than `train.max_to_keep` exists while it is written.
    """
    state = jax.eval_shape(partial(init_state, run))
    num_bytes = (run.train.max_to_keep + 1) * count_bytes(state)
    if run.optimizer.ema_widths:
        averages = [state.ema[name] for name in state.ema if name.startswith("width=")]
        num_bytes += run.train.steps // run.train.snapshot_every * count_bytes(averages)
    return num_bytes


def prepare_sampling(run: config.Config, mesh: jax.sharding.Mesh) -> PlannedProgram:
    """Return the sampling program as the pipeline compiles it, for prompts of maximum length.

    As in the pipeline, the weights have the type of the computation, and the modulation vectors of
    all times are inputs: the layers that compute them are not parameters of this program.
    """
    params = _abstract_params(run.model, run.compute.dtype, "none", mesh)
    modulation = params.pop("modulation")
    times = jax.ShapeDtypeStruct((run.sample.steps + 1,), jnp.float32)
    vectors = jax.eval_shape(
        partial(compute_modulations, model=run.model, compute=run.compute), modulation, times
    )
    batch_size = run.sample.batch_size
    condition = _abstract_condition(run, batch_size)
    seeds = jax.ShapeDtypeStruct((batch_size,), jnp.uint32)
    lower = partial(
        generate_images.lower,
        params,
        seeds,
        condition,
        condition,
        model=run.model,
        compute=run.compute,
        settings=replace(run.sample, negative_prompt=""),
        noise_scale=run.flow.noise_scale,
        height=run.data.resolution,
        width=run.data.resolution,
        vectors=vectors,
    )
    return PlannedProgram(lower, params, (), (), (condition, condition, seeds, vectors))


def planned_resolution(run: config.Config, sampling: bool) -> int:
    """Return the resolution that is planned for.

    Training is planned at the largest resolution: no bucket has more pixels than its square.
    """
    return run.data.resolution if sampling else max(run.data.resolutions)


def count_bytes_on_device(tree: Any) -> int:
    """Return the bytes of a tree of abstract arrays on one device."""
    total = 0
    for x in jax.tree.leaves(tree):
        local_shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        total += int(np.prod(local_shape)) * x.dtype.itemsize
    return total


def _abstract_batch(run: config.Config, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a training batch: images, trajectories or captions, whichever the run reads."""
    batch_size, resolution = run.data.batch_size, planned_resolution(run, sampling=False)
    image_shape = (resolution, resolution, run.model.channels)
    text_shape = (run.text.max_length, run.model.text_dim)
    specs: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((batch_size, *image_shape), "uint8"),
        "text": ((batch_size, *text_shape), _text_dtype(run)),
        "lengths": ((batch_size,), "int32"),
        "weight": ((batch_size,), "float32"),
    }
    if run.distill.kind == "trajectories":
        specs["image"] = ((batch_size, run.distill.segments, *image_shape), POINTS_DTYPE)
        specs["seed"] = ((batch_size,), "uint32")
    if run.distill.has_fake_score:
        del specs["image"]
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in specs.items()
    }


def _abstract_teacher(
    run: config.Config, base_params: Params | None, mesh: jax.sharding.Mesh
) -> tuple[Teacher | None, Params | None]:
    """Return the teacher, and its parameters where they are stored beside those of the run."""
    if not run.distill.has_guided_targets:
        return None, None
    teacher_params = None
    if run.distill.needs_teacher and not run.is_base_teacher:
        teacher_params = _abstract_params(run.model, run.compute.dtype, "none", mesh)
    negative = _abstract_condition(run, 1)
    return Teacher(base_params if run.is_base_teacher else teacher_params, negative), teacher_params


def _abstract_condition(run: config.Config, batch_size: int) -> TextCondition:
    text_shape = (batch_size, run.text.max_length, run.model.text_dim)
    text: Any = jax.ShapeDtypeStruct(text_shape, _text_dtype(run))
    lengths: Any = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return TextCondition(text, lengths)


def _text_dtype(run: config.Config) -> str:
    return "float32" if run.text.encoder == "hash" else run.text.dtype


def _abstract_params(
    model: config.Model, dtype: str, weight_format: str, mesh: jax.sharding.Mesh
) -> Params:
    """Return the parameters as `weights/checkpoint.py` loads them from a file."""

    def abstract_leaf(keys: tuple, x: jax.ShapeDtypeStruct, sharding: NamedSharding):
        path = leaf_path(keys)
        if weight_format == "none" or not is_block_matrix(path):
            leaf_dtype = "float32" if is_always_float32(path) else dtype
            return jax.ShapeDtypeStruct(x.shape, leaf_dtype, sharding=sharding)
        return _abstract_quantized(path, x, sharding, weight_format)

    tree = make_abstract_params(model)
    return jax.tree_util.tree_map_with_path(abstract_leaf, tree, make_shardings(tree, mesh))


def _abstract_quantized(
    path: str, x: jax.ShapeDtypeStruct, sharding: NamedSharding, weight_format: str
) -> QuantizedKernel:
    """Return values [layers, inputs, outputs] and scales [layers, groups, outputs] of a matrix."""
    inputs = count_inputs(path, x.shape)
    outputs = math.prod(x.shape[1:]) // inputs
    num_groups, dtypes = 1, (weight_format, "float32")
    if weight_format == "q8_0":
        num_groups, dtypes = inputs // Q8_0_BLOCK, ("int8", "float16")

    def abstract_array(rows: int, dtype: str) -> Any:
        array: Any = jax.ShapeDtypeStruct((x.shape[0], rows, outputs), dtype)
        array_sharding = output_sharding(sharding, array)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array_sharding)

    values, scales = abstract_array(inputs, dtypes[0]), abstract_array(num_groups, dtypes[1])
    return QuantizedKernel(values, scales, x.shape[1:])


def _add_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
