"""Predict memory, work and time of a run by compiling its program for absent devices."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax

from radiance import config
from radiance.distributed import hardware
from radiance.distributed.sharding import check_divisible, make_mesh
from radiance.flow.guidance import count_evaluations
from radiance.model.flops import forward_flops, training_flops
from radiance.model.transformer import make_abstract_params
from radiance.planning import hlo_cost
from radiance.planning.hlo_text import DeviceGroups
from radiance.planning.kernel_times import (
    NUM_LISTED,
    KernelTimes,
    count_compute_seconds,
    format_kernel_times,
    get_device_rates,
    time_kernels,
)
from radiance.planning.programs import (
    count_bytes_on_device,
    count_disk_bytes,
    planned_resolution,
    prepare_sampling,
    prepare_training,
)
from radiance.planning.topologies import CompilationTarget, make_target


@dataclass(frozen=True)
class Plan:
    """The cost of one step on one device: a training step, or sampling one batch of images.

    Sizes are in bytes. Fields that may be None are unknown where the compiler refused the program
    because it needs too much memory.
    """

    description: str
    device: str
    mesh: dict[str, int]
    compiler: str
    exact: bool  # whether the device's own compiler was used
    compile_seconds: float
    attention: str
    parameters: int
    ema: int
    optimizer: int
    batch: int
    temporaries: float | None  # gradients, activations, workspace and the program itself
    peak: float
    memory: float | None  # of the device; None if it is not in the table of devices
    model_flops: float  # analytic, without recomputation
    flops: float | None  # of the compiled program, with recomputation
    traffic: float | None  # to and from main memory
    collectives: dict[str, float]  # bytes sent, by kind
    unbounded_loops: int  # loops without a known trip count, which are counted as one trip
    seconds: dict[str, float]  # lower bounds from the roofline model: compute, memory, network
    steps: int  # of the run; 0 for sampling
    disk: int  # bytes of all checkpoints and snapshots at the end of the run
    kernels: KernelTimes | None  # None if the device is not in the table of devices

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits into the device's memory, or None if that is unknown.

        It is unknown if another compiler, which needs more memory, replaces the device's own.
        """
        if self.memory is None:
            return None
        if self.peak <= self.memory:
            return True
        resident = self.parameters + self.ema + self.optimizer + self.batch
        return False if self.exact or resident > self.memory else None

    @property
    def bottleneck(self) -> str:
        """The largest of the roofline times: compute, memory or network; empty if unknown."""
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else ""

    @property
    def mfu(self) -> float | None:
        """The model FLOPs utilization if the step takes as long as its bottleneck."""
        if not self.seconds:
            return None
        peak_flops = hardware.DEVICE_SPECS[self.device].flops_per_second
        return self.model_flops / (self.seconds[self.bottleneck] * peak_flops)

    @property
    def run_hours(self) -> float | None:
        """The least time of all steps of the run in hours, or None if it is unknown."""
        return self.steps * self.seconds[self.bottleneck] / 3600 if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and properties by name; of the kernels, those that cost most."""
        kernels = None
        if self.kernels:
            kernels = {
                "seconds": self.kernels.seconds,
                "seconds_beyond_products": self.kernels.seconds_beyond_products,
                "async_seconds": self.kernels.async_seconds,
                "listed": [kernel._asdict() for kernel in self.kernels.kernels[:NUM_LISTED]],
            }
        names = ("fits", "bottleneck", "mfu", "run_hours")
        properties = {name: getattr(self, name) for name in names}
        return asdict(replace(self, kernels=None)) | properties | {"kernels": kernels}


def make_plan(run: config.Config, device: str, sampling: bool = False) -> Plan:
    """Return the predicted cost of a step of `run`.

    Args:
        run: Settings, with a mesh of fixed sizes.
        device: A name of `topologies.TARGET_NAMES`.
        sampling: Plan the sampling of `sample.batch_size` images instead of a training step.

    Raises:
        ConfigError: The program cannot be compiled: the devices cannot form the mesh, the batch
            does not divide, or the compiler is missing.
    """
    run, target, mesh = _resolve_target(run, device, sampling)
    program = (prepare_sampling if sampling else prepare_training)(run, mesh)
    start_time = time.monotonic()
    compiled, required_memory = _compile(program.lower, mesh)
    compile_seconds = time.monotonic() - start_time
    device_kind = hardware.DEVICE_ALIASES.get(device, "")
    device_spec = hardware.DEVICE_SPECS.get(device_kind)
    costs = _read_costs(compiled, device_kind) if compiled else UNKNOWN_COSTS
    return Plan(
        description=_describe_run(run, sampling),
        device=device_kind or device,
        mesh=dict(mesh.shape),
        compiler=target.compiler,
        exact=target.exact,
        compile_seconds=compile_seconds,
        attention=run.compute.attention,
        parameters=count_bytes_on_device(program.parameters),
        ema=count_bytes_on_device(program.ema),
        optimizer=count_bytes_on_device(program.optimizer),
        batch=count_bytes_on_device(program.batch),
        temporaries=costs.temporaries,
        peak=required_memory,
        memory=device_spec.memory_bytes if device_spec else None,
        model_flops=_count_model_flops(run, sampling) / mesh.size,
        flops=costs.flops,
        traffic=costs.traffic,
        collectives=costs.collectives,
        unbounded_loops=costs.unbounded_loops,
        seconds=costs.seconds,
        steps=0 if sampling else run.train.steps,
        disk=0 if sampling else count_disk_bytes(run),
        kernels=costs.kernels,
    )


# --- compiling -----------------------------------------------------------------------------------


def _resolve_target(
    run: config.Config, device: str, sampling: bool
) -> tuple[config.Config, CompilationTarget, jax.sharding.Mesh]:
    """Return the run with the device's attention backend, the compilation target and the mesh."""
    target = make_target(device, run)
    if not sampling:
        _check_batch_size(run)
    if run.compute.attention == "auto":
        run = replace(run, compute=replace(run.compute, attention=target.attention))
    try:
        mesh = make_mesh(run.mesh, target.devices)
    except NotImplementedError:
        raise config.ConfigError(
            f"This mesh does not map to the links of {len(target.devices)} {device}: "
            "try other sizes of data, fsdp and tensor."
        ) from None
    if run.mesh.uneven == "error":
        check_divisible(make_abstract_params(run.model), mesh)
    return run, target, mesh


def _check_batch_size(run: config.Config):
    divisor = run.mesh.data * run.mesh.fsdp * run.optimizer.gradient_accumulation_steps
    if run.data.batch_size % divisor:
        raise config.ConfigError(
            f"data.batch_size={run.data.batch_size} does not divide into {divisor} parts "
            "(mesh data × fsdp × optimizer.gradient_accumulation_steps): change one of them."
        )


def _compile(
    lower: Callable[[], jax.stages.Lowered], mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Compiled | None, float]:
    """Return the compiled program and the bytes that it needs on a device.

    The compilers for accelerators refuse programs that do not fit. Then the program is None, and
    the bytes are those of the error message.
    """
    try:
        with jax.set_mesh(mesh):
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        match = re.search(r"(?:Used |memory required [^(]*\()([\d.]+)([KMGT])", str(error))
        if not match:
            raise
        return None, float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1)
    memory: Any = compiled.memory_analysis()
    return compiled, memory.argument_size_in_bytes + _temporary_bytes(compiled)


def _temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes of temporaries, of outputs that replace no input, and of the program."""
    memory: Any = compiled.memory_analysis()
    output_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + output_bytes + memory.generated_code_size_in_bytes


class _CompiledCosts(NamedTuple):
    """The fields of `Plan` that are read from the compiled program."""

    temporaries: float | None
    flops: float | None
    traffic: float | None
    collectives: dict[str, float]
    unbounded_loops: int
    seconds: dict[str, float]
    kernels: KernelTimes | None


UNKNOWN_COSTS = _CompiledCosts(None, None, None, {}, 0, {}, None)


def _read_costs(compiled: jax.stages.Compiled, device_kind: str) -> _CompiledCosts:
    hlo: Any = compiled.as_text()
    cost = hlo_cost.count_program_cost(hlo)
    collectives = {}
    for kind in hlo_cost.COLLECTIVE_KINDS:
        if sent_bytes := sum(c.sent_bytes for c in cost.collectives if c.kind == kind):
            collectives[kind] = sent_bytes
    seconds, kernels = {}, None
    if device := hardware.DEVICE_SPECS.get(device_kind):
        network_seconds = sum(
            c.sent_bytes / send_bandwidth(device, c.groups) for c in cost.collectives
        )
        seconds = {
            "compute": count_compute_seconds(cost, device),
            "memory": cost.traffic / device.memory_bandwidth,
            "network": network_seconds,
        }
        kernels = time_kernels(hlo, cost, get_device_rates(device_kind))
    return _CompiledCosts(
        temporaries=_temporary_bytes(compiled),
        flops=cost.flops,
        traffic=cost.traffic,
        collectives=collectives,
        unbounded_loops=cost.unbounded_loops,
        seconds=seconds,
        kernels=kernels,
    )


def send_bandwidth(device: hardware.DeviceSpec, groups: DeviceGroups) -> float:
    """Return the bytes per second that a device sends at best to the others of its group.

    A group that is larger than the reach of the links uses the network: its members on one host
    share their network cards.
    """
    hosts = groups // device.link_domain_size
    if (hosts == hosts[:, :1]).all():
        return device.link_bandwidth
    members_per_host = (hosts[0] == hosts[0, 0]).sum()
    return min(device.link_bandwidth, members_per_host * device.network_bandwidth)


def _count_model_flops(run: config.Config, sampling: bool) -> float:
    """Return the analytic FLOPs of a step on all devices."""
    resolution, text_tokens = planned_resolution(run, sampling), run.text.max_length
    if sampling:
        num_tokens = (resolution // run.model.patch) ** 2
        num_evaluations = run.sample.batch_size * count_evaluations(run.sample, num_tokens)
        return num_evaluations * forward_flops(run.model, resolution, resolution, text_tokens)
    shape = (resolution, resolution, text_tokens)
    image_flops = training_flops(run.model, *shape, frozen_base=run.lora.rank > 0)
    if run.distill.has_fake_score:
        # Both LoRAs are trained; besides, the student samples and both scores are evaluated.
        num_evaluations = run.distill.segments + 2 + (run.distill.sample.guidance_scale != 1)
        image_flops = 2 * image_flops + num_evaluations * forward_flops(run.model, *shape)
    return run.data.batch_size * image_flops


# --- formatting ----------------------------------------------------------------------------------

NAME_WIDTH = 34  # characters


def format_plan(plan: Plan, with_kernels: bool = False) -> str:
    """Return the plan as a text of several lines. Numbers are per device.

    Args:
        plan: The plan.
        with_kernels: Add the times of kernels, which `plan` must have.
    """
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items())
    num_devices = math.prod(plan.mesh.values())
    return "\n".join(
        [
            plan.description,
            f"{num_devices} × {plan.device} ({mesh}), attention {plan.attention}",
            f"compiler: {plan.compiler} ({plan.compile_seconds:.0f} s)",
            "",
            *_format_memory(plan),
            "",
            *_format_work(plan),
            *_format_run(plan),
            *(_format_kernels(plan) if with_kernels else []),
        ]
    )


def _format_memory(plan: Plan) -> list[str]:
    lines = ["Memory per device"]
    for name in ("parameters", "ema", "optimizer", "batch"):
        if size := getattr(plan, name):
            lines.append(_format_row(name, size, "B"))
    if plan.temporaries is not None:
        row = _format_row("gradients, activations, workspace", plan.temporaries, "B")
        lines.append(f"{row}   from the compiler")
    verdict = {
        True: "fits",
        False: "DOES NOT FIT",
        None: "the true peak is lower; whether it fits is unknown",
    }[plan.fits]
    limit = f"   of {plan.memory / 1e9:g} GB: {verdict}" if plan.memory else ""
    return [*lines, _format_row("peak", plan.peak, "B") + limit]


def _format_work(plan: Plan) -> list[str]:
    model_row = _format_row("model", plan.model_flops, "FLOP")
    lines = ["Work per device", f"{model_row}   analytic, without recomputation"]
    if plan.flops is None or plan.traffic is None:
        return lines
    program_row = _format_row("program", plan.flops, "FLOP")
    lines += [
        f"{program_row}   counted in the compiled program",
        _format_row("memory traffic", plan.traffic, "B"),
        *(_format_row(f"{kind}, sent", size, "B") for kind, size in plan.collectives.items()),
    ]
    if plan.unbounded_loops:
        lines.append(
            f"  {plan.unbounded_loops} loops have no known trip count and are counted as one trip: "
            "the program's numbers are too low."
        )
    if plan.seconds:
        times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.seconds.items())
        lines += [
            "",
            f"Roofline: {times}. Bottleneck: {plan.bottleneck}; "
            f"MFU in bfloat16 at most {plan.mfu:.0%}.",
        ]
    return lines


def _format_run(plan: Plan) -> list[str]:
    """Return lines about the whole run; none for sampling."""
    if not plan.steps:
        return []
    hours = f"at least {plan.run_hours:.3g} hours, and " if plan.run_hours is not None else ""
    return [
        "",
        f"The run: {plan.steps:,} steps; {hours}{plan.disk / 1e9:.3g} GB of disk for checkpoints.",
    ]


def _format_kernels(plan: Plan) -> list[str]:
    if not plan.kernels:
        return ["", "The compiler refused the program: there are no times of kernels."]
    rates = get_device_rates(plan.device)
    note = ["Collectives take further time where they do not overlap."] if plan.collectives else []
    return ["", format_kernel_times(plan.kernels, rates, plan.model_flops), *note]


def _format_row(name: str, value: float, unit: str) -> str:
    power = next((p for p in (12, 9, 6, 3) if value >= 10**p), 0)
    prefix = {12: "T", 9: "G", 6: "M", 3: "k", 0: " "}[power]
    return f"  {name:{NAME_WIDTH}}{value / 10**power:10.2f} {prefix}{unit}"


def _describe_run(run: config.Config, sampling: bool) -> str:
    resolution = planned_resolution(run, sampling)
    size = f"{resolution}×{resolution}, {run.text.max_length} text tokens"
    if sampling:
        return (
            f"{run.name}: {run.sample.batch_size} images of {size}, {run.sample.steps} steps of "
            f"{run.sample.solver}, guidance scale {run.sample.guidance_scale:g}"
        )
    num_microbatches = run.optimizer.gradient_accumulation_steps
    microbatches = f" in {num_microbatches} microbatches" if num_microbatches > 1 else ""
    return (
        f"{run.name}: a training step of {run.data.batch_size} images of {size}{microbatches}, "
        f"remat {run.compute.remat}"
    )
