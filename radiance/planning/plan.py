"""What a run will cost, before it is paid for: the real training or sampling step, compiled ahead of time for devices that are not there.

No weight is ever made: the inputs are shapes and places.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from radiance import config
from radiance.base.trees import leaf_path
from radiance.distributed import hardware
from radiance.distributed.sharding import BATCH_SPEC, check_divisible, make_mesh, make_shardings
from radiance.flow.distillation import Teacher
from radiance.flow.guidance import count_evaluations
from radiance.flow.sampler import TextCondition, compute_modulations, generate_images
from radiance.model.flops import forward_flops, training_flops
from radiance.model.paths import count_inputs, is_always_float32, is_block_matrix
from radiance.model.quantized import Q8_0_BLOCK, QuantizedKernel
from radiance.model.transformer import Params, make_abstract_params
from radiance.planning import hlo_cost
from radiance.planning.topologies import make_target
from radiance.training.step import init_state, make_train_step
from radiance.training.trajectories import POINTS_DTYPE
from radiance.weights.checkpoint import output_sharding


@dataclass(frozen=True)
class Plan:
    """Of one device, in bytes and for one step: a training step, or the painting of one batch. None is what the compiler does not tell
    of a program that does not fit.
    """

    description: str
    device: str
    mesh: dict[str, int]
    compiler: str
    exact: bool  # whether temporaries and traffic are those of the device's own compiler
    compile_seconds: float
    attention: str
    parameters: int
    ema: int
    optimizer: int
    batch: int
    temporaries: float | None  # gradients, activations, workspace and the program itself
    peak: float
    memory: float | None  # of the device
    model_flops: float  # what the model asks for
    flops: float | None  # what the program does, recomputation included
    traffic: float | None
    collectives: dict[str, float]  # bytes sent, by kind
    unbounded_loops: int  # loops counted as one turn
    seconds: dict[str, float]  # at the roofline: compute, memory, network

    @property
    def fits(self) -> bool | None:
        """None where it cannot be said: the fake devices' compiler takes more than the device's own."""
        if self.memory is None:
            return None
        resident = self.parameters + self.ema + self.optimizer + self.batch
        return (
            True
            if self.peak <= self.memory
            else False
            if self.exact or resident > self.memory
            else None
        )

    @property
    def bottleneck(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else ""

    @property
    def mfu(self) -> float | None:
        """Of the model's FLOPs, if nothing but the bound took time."""
        return (
            self.model_flops
            / (self.seconds[self.bottleneck] * hardware.DEVICE_SPECS[self.device].flops_per_second)
            if self.seconds
            else None
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits, "bound": self.bottleneck, "mfu": self.mfu}


def make_plan(run: config.Config, device: str, sampling: bool = False) -> Plan:
    """The cost of a step of `run` over its mesh of that device (`NAMES`), or of painting `sample.batch_size` images.

    Raises ConfigError for what cannot be compiled: a mesh that is no slice, a batch that does not divide, a compiler that is missing.
    """
    target = make_target(device, run)
    _check_batch_size(run, sampling)
    if run.compute.attention == "auto":
        run = replace(run, compute=replace(run.compute, attention=target.attention))
    try:
        mesh = make_mesh(run.mesh, target.devices)
    except NotImplementedError:
        raise config.ConfigError(
            f"This mesh cannot be laid over the links of {len(target.devices)} {device}: try other sizes of data, fsdp and tensor."
        ) from None
    if run.mesh.uneven == "error":
        check_divisible(make_abstract_params(run.model), mesh)
    device_kind = hardware.DEVICE_ALIASES.get(device, "")
    device_spec = hardware.DEVICE_SPECS.get(device_kind)
    start_time = time.monotonic()
    lower, inputs = (_prepare_sampling if sampling else _prepare_training)(run, mesh)
    try:
        with jax.set_mesh(mesh):
            program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        memory_match = re.search(
            r"(?:Used |memory required [^(]*\()([\d.]+)([KMGT])", str(error)
        )  # the TPU's compiler refuses what does not fit
        if not memory_match:
            raise
        program, peak = None, float(memory_match[1]) * 1024 ** ("KMGT".index(memory_match[2]) + 1)
    compile_seconds = time.monotonic() - start_time
    costs: dict[str, Any] = dict(
        temporary=None, flops=None, traffic=None, collectives={}, endless=0, seconds={}
    )
    if program is not None:
        costs |= _read_costs(program, device_spec)
        peak = program.memory_analysis().argument_size_in_bytes + costs["temporary"]
    resolution, text_tokens = _planned_resolution(run, sampling), run.text.max_length
    if sampling:
        count_flops, num_images = (
            forward_flops,
            run.sample.batch_size
            * count_evaluations(run.sample, (resolution // run.model.patch) ** 2),
        )
    else:
        count_flops, num_images = (
            partial(training_flops, frozen_base=run.lora.rank > 0),
            run.data.batch_size,
        )
    costs |= {name: _bytes_on_device(tree) for name, tree in inputs.items()}
    return Plan(
        description=_describe_run(run, sampling), device=device_kind or device, mesh=dict(mesh.shape), compiler=target.compiler, exact=target.exact,
        compile_seconds=compile_seconds, attention=run.compute.attention, peak=peak, memory=device_spec and device_spec.memory_bytes,
        model_flops=num_images * count_flops(run.model, resolution, resolution, text_tokens) / mesh.size, **costs,
    )  # fmt: skip


def _read_costs(program: jax.stages.Compiled, device: hardware.DeviceSpec | None) -> dict[str, Any]:
    memory, cost = program.memory_analysis(), hlo_cost.read_hlo(program.as_text())
    output_bytes = (
        memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # what is not written over an input
    bytes_by_kind = {
        kind: sum(c.sent_bytes for c in cost.collectives if c.kind == kind)
        for kind in hlo_cost.COLLECTIVE_KINDS
    }
    seconds = {}
    if device:
        network_seconds = sum(
            c.sent_bytes / _send_bandwidth(device, c.groups) for c in cost.collectives
        )
        seconds = {
            "compute": cost.flops / device.flops_per_second,
            "memory": cost.traffic / device.memory_bandwidth,
            "network": network_seconds,
        }
    return dict(
        temporary=memory.temp_size_in_bytes + output_bytes + memory.generated_code_size_in_bytes, flops=cost.flops, traffic=cost.traffic,
        collectives={kind: size for kind, size in bytes_by_kind.items() if size}, endless=cost.unbounded_loops, seconds=seconds,
    )  # fmt: skip


def make_model_config(name: str) -> config.Config:
    """A run of a named model with the settings that suit it, as `radiance sample` takes them for a checkpoint file."""
    model = config.Model.from_name(name)
    preset = config.get_preset(config.find_preset_name(model))
    text = config.Text(encoder="t5", max_length=512)
    return config.Config(
        name=name,
        model=model,
        text=text,
        sample=preset.sample,
        data=config.Data(resolution=preset.resolution),
    )


# --- programs -----------------------------------------------------------------------------------------------------------


def _prepare_training(
    run: config.Config, mesh: jax.sharding.Mesh
) -> tuple[Callable[[], jax.stages.Lowered], dict[str, Any]]:
    """The step as training/loop.py jits it, and its inputs."""
    state = jax.eval_shape(partial(init_state, run))
    state_shardings = make_shardings(state, mesh)
    state = _with_shardings(state, state_shardings)
    base_params = (
        _abstract_params(run.model, run.lora.dtype, run.lora.weight_format, mesh)
        if run.lora.rank
        else None
    )
    batch_size, resolution, batch_sharding = (
        run.data.batch_size,
        _planned_resolution(run, False),
        NamedSharding(mesh, BATCH_SPEC),
    )
    text_shape = (run.text.max_length, run.model.text_dim)
    input_specs = {
        "image": ((batch_size, resolution, resolution, run.model.channels), "uint8"), "text": ((batch_size, *text_shape), _text_dtype(run)),
        "lengths": ((batch_size,), "int32"), "weight": ((batch_size,), "float32"),
    }  # fmt: skip
    if run.distill.kind == "trajectories":
        trajectory_shape = (
            batch_size,
            run.distill.segments,
            resolution,
            resolution,
            run.model.channels,
        )
        input_specs |= {
            "image": (trajectory_shape, POINTS_DTYPE),
            "seed": ((batch_size,), "uint32"),
        }
    teacher, teacher_params = None, None  # its weights beside those of the run, if it has any
    if run.distill.has_guided_targets:
        if run.distill.needs_teacher and not run.is_base_teacher:
            teacher_params = _abstract_params(run.model, run.compute.dtype, "none", mesh)
        negative = TextCondition(
            jax.ShapeDtypeStruct((1, *text_shape), _text_dtype(run)),
            jax.ShapeDtypeStruct((1,), "int32"),
        )
        teacher = Teacher(base_params if run.is_base_teacher else teacher_params, negative)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
        for name, (shape, dtype) in input_specs.items()
    }
    step = jax.jit(
        make_train_step(run),
        in_shardings=(state_shardings, None, None, None, None),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
    )
    inputs = {
        "parameters": (state.params, base_params, teacher_params),
        "averages": state.ema,
        "optimizer": state.optimizer,
        "batch": batch,
    }
    return partial(step.lower, state, batch, base_params, None, teacher), inputs


def _prepare_sampling(
    run: config.Config, mesh: jax.sharding.Mesh
) -> tuple[Callable[[], jax.stages.Lowered], dict[str, Any]]:
    """Painting as pipeline.py does it, for the longest prompts and with weights in the type of the computation: the network without what
    makes its modulation, and the modulation of all times.
    """
    params = _abstract_params(run.model, run.compute.dtype, "none", mesh)
    modulation = params.pop("modulation")
    times = jax.ShapeDtypeStruct((run.sample.steps + 1,), jnp.float32)
    vectors = jax.eval_shape(
        partial(compute_modulations, model=run.model, compute=run.compute), modulation, times
    )
    batch_size = run.sample.batch_size
    text_shape, lengths_shape = (batch_size, run.text.max_length, run.model.text_dim), (batch_size,)
    condition = TextCondition(
        jax.ShapeDtypeStruct(text_shape, _text_dtype(run)),
        jax.ShapeDtypeStruct(lengths_shape, jnp.int32),
    )
    seeds = jax.ShapeDtypeStruct((batch_size,), jnp.uint32)
    lower = partial(
        generate_images.lower, params, seeds, condition, condition, model=run.model, compute=run.compute, settings=replace(run.sample, negative_prompt=""),
        noise_scale=run.flow.noise_scale, height=run.data.resolution, width=run.data.resolution, vectors=vectors,
    )  # fmt: skip
    return lower, {
        "parameters": params,
        "averages": (),
        "optimizer": (),
        "batch": (condition, condition, seeds, vectors),
    }


def _text_dtype(run: config.Config) -> str:
    return "float32" if run.text.encoder == "hash" else run.text.dtype


def _abstract_params(
    model: config.Model, dtype: str, weight_format: str, mesh: jax.sharding.Mesh
) -> Params:
    """The parameters as a checkpoint file gives them (weights/checkpoint.py)."""

    def leaf(keys, x, sharding):
        path = leaf_path(keys)
        if weight_format == "none" or not is_block_matrix(path):
            return jax.ShapeDtypeStruct(
                x.shape, "float32" if is_always_float32(path) else dtype, sharding=sharding
            )
        inputs = count_inputs(path, x.shape)
        outputs, groups = (
            math.prod(x.shape[1:]) // inputs,
            inputs // Q8_0_BLOCK if weight_format == "q8_0" else 1,
        )
        array_dtypes = (
            ("int8", "float16") if weight_format == "q8_0" else (weight_format, "float32")
        )
        arrays = (
            jax.ShapeDtypeStruct((x.shape[0], rows, outputs), array_dtype)
            for rows, array_dtype in zip((inputs, groups), array_dtypes)
        )
        return QuantizedKernel(
            *(
                jax.ShapeDtypeStruct(
                    array.shape, array.dtype, sharding=output_sharding(sharding, array)
                )
                for array in arrays
            ),
            x.shape[1:],
        )

    tree = make_abstract_params(model)
    return jax.tree_util.tree_map_with_path(leaf, tree, make_shardings(tree, mesh))


def _with_shardings(tree: Any, tree_shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        tree_shardings,
    )


def _bytes_on_device(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _check_batch_size(run: config.Config, sampling: bool):
    divisor = run.mesh.data * run.mesh.fsdp * run.optimizer.gradient_accumulation_steps
    if not sampling and run.data.batch_size % divisor:
        raise config.ConfigError(
            f"data.batch_size={run.data.batch_size} does not divide into {divisor} parts (mesh data × fsdp × optimizer.gradient_accumulation_steps): change one of them."
        )


def _planned_resolution(run: config.Config, sampling: bool) -> int:
    """Of the square that is planned for: no bucket has more pixels than that of the largest base resolution."""
    return run.data.resolution if sampling else max(run.data.resolutions)


def _send_bandwidth(device: hardware.DeviceSpec, groups: np.ndarray) -> float:
    """Bytes a second that a device of such groups sends at best. Where they go beyond the reach of the links, the members of a group
    within it share their network cards.
    """
    hosts = groups // device.link_domain_size
    if (hosts == hosts[:, :1]).all():
        return device.link_bandwidth
    members_per_host = (hosts[0] == hosts[0, 0]).sum()
    return min(device.link_bandwidth, members_per_host * device.network_bandwidth)


# --- in words -----------------------------------------------------------------------------------------------------------


def _describe_run(run: config.Config, sampling: bool) -> str:
    resolution = _planned_resolution(run, sampling)
    size = f"{resolution}×{resolution}, {run.text.max_length} text tokens"
    if sampling:
        return f"{run.name}: {run.sample.batch_size} images of {size}, {run.sample.steps} steps of {run.sample.solver}, guidance {run.sample.guidance_scale:g}"
    microbatches = (
        f" in {run.optimizer.gradient_accumulation_steps} parts"
        if run.optimizer.gradient_accumulation_steps > 1
        else ""
    )
    return f"{run.name}: a training step of {run.data.batch_size} images of {size}{microbatches}, remat {run.compute.remat}"


def _format_amount(value: float, unit: str) -> str:
    power = next((p for p in (12, 9, 6, 3) if value >= 10**p), 0)
    return f"{value / 10**power:10.2f} {dict(zip((12, 9, 6, 3, 0), 'TGMk '))[power]}{unit}"


def format_plan(plan: Plan) -> str:
    """The plan as users read it. Numbers are of one device."""
    rows = {
        "parameters": plan.parameters,
        "averages": plan.ema,
        "optimizer": plan.optimizer,
        "batch": plan.batch,
    }
    lines = [
        plan.description,
        f"{math.prod(plan.mesh.values())} × {plan.device} ({' '.join(f'{name}={size}' for name, size in plan.mesh.items())}), attention {plan.attention}",
        f"compiler: {plan.compiler} ({plan.compile_seconds:.0f} s)",
        "",
        "Memory of a device",
        *(f"  {name:34}{_format_amount(size, 'B')}" for name, size in rows.items() if size),
    ]
    if plan.temporaries is not None:
        lines.append(
            f"  {'gradients, activations, workspace':34}{_format_amount(plan.temporaries, 'B')}   the compiler's"
        )
    verdict = {
        True: "fits",
        False: "DOES NOT FIT",
        None: "the true peak is lower; whether it fits is not known",
    }[plan.fits]
    limit = f"   of {plan.memory / 1e9:g} GB: {verdict}" if plan.memory else ""
    lines += [f"  {'peak':34}{_format_amount(plan.peak, 'B')}{limit}", "", "Work of a device"]
    lines.append(
        f"  {'model':34}{_format_amount(plan.model_flops, 'FLOP')}   analytic, nothing recomputed"
    )
    if plan.flops is None:
        return "\n".join(lines)
    lines += [
        f"  {'program':34}{_format_amount(plan.flops, 'FLOP')}   counted in the compiled program",
        f"  {'memory traffic':34}{_format_amount(plan.traffic, 'B')}",
        *(
            f"  {f'{kind}, sent':34}{_format_amount(size, 'B')}"
            for kind, size in plan.collectives.items()
        ),
    ]
    if plan.unbounded_loops:
        lines.append(
            f"  {plan.unbounded_loops} loops of unknown length are counted as one turn: the program's numbers are too low."
        )
    if plan.seconds:
        times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.seconds.items())
        lines += [
            "",
            f"At the roofline: {times}. Bound by {plan.bottleneck}; MFU at most {plan.mfu:.0%}.",
        ]
    return "\n".join(lines)
