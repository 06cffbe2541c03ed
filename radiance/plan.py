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

from radiance import compiled, config, devices
from radiance.model.flops import forward_flops, training_flops
from radiance.model.stored import BLOCK, Quantised
from radiance.model.transformer import Params, abstract
from radiance.sampling import Condition, evaluations, modulations, paint
from radiance.sharding import BATCH, check_even, make_mesh, shardings
from radiance.targets import target_of
from radiance.training.distillation import Teacher
from radiance.training.step import init_state, make_step
from radiance.training.trajectories import STORED
from radiance.weights.checkpoint import PRECISE, by_output, inputs_of, is_block_matrix


@dataclass(frozen=True)
class Plan:
    """Of one device, in bytes and for one step: a training step, or the painting of one batch. None is what the compiler does not tell
    of a program that does not fit."""

    what: str
    device: str
    mesh: dict[str, int]
    compiler: str
    exact: bool  # whether temporaries and traffic are those of the device's own compiler
    compile_seconds: float
    attention: str
    parameters: int
    averages: int
    optimizer: int
    batch: int
    temporary: float | None  # gradients, activations, workspace and the program itself
    peak: float
    memory: float | None  # of the device
    model_flops: float  # what the model asks for
    flops: float | None  # what the program does, recomputation included
    traffic: float | None
    collectives: dict[str, float]  # bytes sent, by kind
    endless: int  # loops counted as one turn
    seconds: dict[str, float]  # at the roofline: compute, memory, network

    @property
    def fits(self) -> bool | None:
        """None where it cannot be said: the fake devices' compiler takes more than the device's own."""
        if self.memory is None:
            return None
        held = self.parameters + self.averages + self.optimizer + self.batch
        return True if self.peak <= self.memory else False if self.exact or held > self.memory else None

    @property
    def bound(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else ""

    @property
    def mfu(self) -> float | None:
        """Of the model's FLOPs, if nothing but the bound took time."""
        return self.model_flops / (self.seconds[self.bound] * devices.DEVICES[self.device].flops) if self.seconds else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits, "bound": self.bound, "mfu": self.mfu}


def plan(run: config.Config, device: str, sampling: bool = False) -> Plan:
    """The cost of a step of `run` over its mesh of that device (`NAMES`), or of painting `sample.batch` pictures.

    Raises ConfigError for what cannot be compiled: a mesh that is no slice, a batch that does not divide, a compiler that is missing.
    """
    target = target_of(device, run)
    _check(run, sampling)
    if run.compute.attention == "auto":
        run = replace(run, compute=replace(run.compute, attention=target.attention))
    try:
        mesh = make_mesh(run.mesh, target.devices)
    except NotImplementedError:
        raise config.ConfigError(
            f"This mesh cannot be laid over the links of {len(target.devices)} {device}: try other sizes of data, fsdp and tensor."
        ) from None
    if run.mesh.uneven == "refuse":
        check_even(abstract(run.model), mesh)
    kind = devices.NAMES.get(device, "")
    known = devices.DEVICES.get(kind)
    began = time.monotonic()
    lower, held = (_sampling if sampling else _training)(run, mesh)
    try:
        with jax.set_mesh(mesh):
            program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"(?:Used |memory required [^(]*\()([\d.]+)([KMGT])", str(error))  # the TPU's compiler refuses what does not fit
        if not used:
            raise
        program, peak = None, float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1)
    took = time.monotonic() - began
    facts: dict[str, Any] = dict(temporary=None, flops=None, traffic=None, collectives={}, endless=0, seconds={})
    if program is not None:
        facts |= _read(program, known)
        peak = program.memory_analysis().argument_size_in_bytes + facts["temporary"]
    side, words = _side(run, sampling), run.text.length
    if sampling:
        of_one, pictures = forward_flops, run.sample.batch * evaluations(run.sample, (side // run.model.patch) ** 2)
    else:
        of_one, pictures = partial(training_flops, frozen=run.lora.rank > 0), run.data.batch
    facts |= {name: _held(tree) for name, tree in held.items()}
    return Plan(
        what=_what(run, sampling), device=kind or device, mesh=dict(mesh.shape), compiler=target.compiler, exact=target.exact,
        compile_seconds=took, attention=run.compute.attention, peak=peak, memory=known and known.memory,
        model_flops=pictures * of_one(run.model, side, side, words) / mesh.size, **facts,
    )  # fmt: skip


def _read(program: jax.stages.Compiled, device: devices.Device | None) -> dict[str, Any]:
    memory, work = program.memory_analysis(), compiled.read(program.as_text())
    beside = memory.output_size_in_bytes - memory.alias_size_in_bytes  # what is not written over an input
    sent = {kind: sum(c.bytes for c in work.collectives if c.kind == kind) for kind in compiled.KINDS}
    seconds = {}
    if device:
        network = sum(c.bytes / _rate(device, c.groups) for c in work.collectives)
        seconds = {"compute": work.flops / device.flops, "memory": work.traffic / device.bandwidth, "network": network}
    return dict(
        temporary=memory.temp_size_in_bytes + beside + memory.generated_code_size_in_bytes, flops=work.flops, traffic=work.traffic,
        collectives={kind: size for kind, size in sent.items() if size}, endless=work.endless, seconds=seconds,
    )  # fmt: skip


def run_named(name: str) -> config.Config:
    """A run of a named model with the settings that suit it, as `radiance sample` takes them for a checkpoint file."""
    model = config.Model.named(name)
    suited = config.preset(config.preset_for(model))
    text = config.Text(encoder="t5", length=512)
    return config.Config(name=name, model=model, text=text, sample=suited.sample, data=config.Data(side=suited.side))


# --- programs -----------------------------------------------------------------------------------------------------------


def _training(run: config.Config, mesh: jax.sharding.Mesh) -> tuple[Callable[[], jax.stages.Lowered], dict[str, Any]]:
    """The step as training/loop.py jits it, and its inputs."""
    like = jax.eval_shape(partial(init_state, run))
    places = shardings(like, mesh)
    like = _placed(like, places)
    base = _weights(run.model, run.lora.dtype, run.lora.store, mesh) if run.lora.rank else None
    count, side, spread = run.data.batch, _side(run, False), NamedSharding(mesh, BATCH)
    text = (run.text.length, run.model.text_dim)
    shapes = {
        "image": ((count, side, side, run.model.channels), "uint8"), "text": ((count, *text), _text_type(run)),
        "lengths": ((count,), "int32"), "weight": ((count,), "float32"),
    }  # fmt: skip
    if run.distill.kind == "trajectories":
        points = (count, run.distill.segments, side, side, run.model.channels)
        shapes |= {"image": (points, STORED), "seed": ((count,), "uint32")}
    teacher, predicting = None, None  # its weights beside those of the run, if it has any
    if run.distill.in_every_step:
        if run.distill.needs_teacher and not run.base_teaches:
            predicting = _weights(run.model, run.compute.dtype, "none", mesh)
        negative = Condition(jax.ShapeDtypeStruct((1, *text), _text_type(run)), jax.ShapeDtypeStruct((1,), "int32"))
        teacher = Teacher(base if run.base_teaches else predicting, negative)
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=spread) for name, (shape, kind) in shapes.items()}
    step = jax.jit(make_step(run), in_shardings=(places, None, None, None, None), out_shardings=(places, None), donate_argnums=0)
    held = {"parameters": (like.params, base, predicting), "averages": like.ema, "optimizer": like.optimizer, "batch": batch}
    return partial(step.lower, like, batch, base, None, teacher), held


def _sampling(run: config.Config, mesh: jax.sharding.Mesh) -> tuple[Callable[[], jax.stages.Lowered], dict[str, Any]]:
    """Painting as pipeline.py does it, for the longest prompts and with weights in the type of the computation: the network without what
    makes its modulation, and the modulation of all times."""
    params = _weights(run.model, run.compute.dtype, "none", mesh)
    modulation = params.pop("modulation")
    times = jax.ShapeDtypeStruct((run.sample.steps + 1,), jnp.float32)
    vectors = jax.eval_shape(partial(modulations, model=run.model, compute=run.compute), modulation, times)
    count = run.sample.batch
    texts, lengths = (count, run.text.length, run.model.text_dim), (count,)
    condition = Condition(jax.ShapeDtypeStruct(texts, _text_type(run)), jax.ShapeDtypeStruct(lengths, jnp.int32))
    seeds = jax.ShapeDtypeStruct((count,), jnp.uint32)
    lower = partial(
        paint.lower, params, seeds, condition, condition, model=run.model, compute=run.compute, settings=replace(run.sample, negative=""),
        noise_scale=run.flow.noise_scale, height=run.data.side, width=run.data.side, vectors=vectors,
    )  # fmt: skip
    return lower, {"parameters": params, "averages": (), "optimizer": (), "batch": (condition, condition, seeds, vectors)}


def _text_type(run: config.Config) -> str:
    return "float32" if run.text.encoder == "hash" else run.text.dtype


def _weights(model: config.Model, dtype: str, store: str, mesh: jax.sharding.Mesh) -> Params:
    """The parameters as a checkpoint file gives them (weights/checkpoint.py)."""

    def leaf(keys, x, place):
        path = "/".join(key.key for key in keys)
        if store == "none" or not is_block_matrix(path):
            return jax.ShapeDtypeStruct(x.shape, "float32" if path.startswith(PRECISE) else dtype, sharding=place)
        inputs = inputs_of(path, x.shape)
        outputs, groups = math.prod(x.shape[1:]) // inputs, inputs // BLOCK if store == "q8_0" else 1
        kinds = ("int8", "float16") if store == "q8_0" else (store, "float32")
        parts = (jax.ShapeDtypeStruct((x.shape[0], rows, outputs), kind) for rows, kind in zip((inputs, groups), kinds))
        return Quantised(*(jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=by_output(place, p)) for p in parts), x.shape[1:])

    tree = abstract(model)
    return jax.tree_util.tree_map_with_path(leaf, tree, shardings(tree, mesh))


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _held(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _check(run: config.Config, sampling: bool):
    parts = run.mesh.data * run.mesh.fsdp * run.optimizer.accumulate
    if not sampling and run.data.batch % parts:
        raise config.ConfigError(
            f"data.batch={run.data.batch} does not divide into {parts} parts (mesh data × fsdp × optimizer.accumulate): change one of them."
        )


def _side(run: config.Config, sampling: bool) -> int:
    """Of the square that is planned for: no bucket has more pixels than that of the largest base resolution."""
    return run.data.side if sampling else max(run.data.sides)


def _rate(device: devices.Device, groups: np.ndarray) -> float:
    """Bytes a second that a device of such groups sends at best. Where they go beyond the reach of the links, the members of a group
    within it share their network cards."""
    hosts = groups // device.reach
    if (hosts == hosts[:, :1]).all():
        return device.links
    together = (hosts[0] == hosts[0, 0]).sum()
    return min(device.links, together * device.network)


# --- in words -----------------------------------------------------------------------------------------------------------


def _what(run: config.Config, sampling: bool) -> str:
    side = _side(run, sampling)
    size = f"{side}×{side}, {run.text.length} text tokens"
    if sampling:
        return f"{run.name}: {run.sample.batch} pictures of {size}, {run.sample.steps} steps of {run.sample.solver}, guidance {run.sample.guidance:g}"
    parts = f" in {run.optimizer.accumulate} parts" if run.optimizer.accumulate > 1 else ""
    return f"{run.name}: a training step of {run.data.batch} pictures of {size}{parts}, remat {run.compute.remat}"


def _amount(number: float, unit: str) -> str:
    power = next((p for p in (12, 9, 6, 3) if number >= 10**p), 0)
    return f"{number / 10**power:10.2f} {dict(zip((12, 9, 6, 3, 0), 'TGMk '))[power]}{unit}"


def table(plan: Plan) -> str:
    """The plan as users read it. Numbers are of one device."""
    rows = {"parameters": plan.parameters, "averages": plan.averages, "optimizer": plan.optimizer, "batch": plan.batch}
    lines = [
        plan.what,
        f"{math.prod(plan.mesh.values())} × {plan.device} ({' '.join(f'{name}={size}' for name, size in plan.mesh.items())}), attention {plan.attention}",
        f"compiler: {plan.compiler} ({plan.compile_seconds:.0f} s)",
        "",
        "Memory of a device",
        *(f"  {name:34}{_amount(size, 'B')}" for name, size in rows.items() if size),
    ]
    if plan.temporary is not None:
        lines.append(f"  {'gradients, activations, workspace':34}{_amount(plan.temporary, 'B')}   the compiler's")
    verdict = {True: "fits", False: "DOES NOT FIT", None: "the true peak is lower; whether it fits is not known"}[plan.fits]
    limit = f"   of {plan.memory / 1e9:g} GB: {verdict}" if plan.memory else ""
    lines += [f"  {'peak':34}{_amount(plan.peak, 'B')}{limit}", "", "Work of a device"]
    lines.append(f"  {'model':34}{_amount(plan.model_flops, 'FLOP')}   analytic, nothing recomputed")
    if plan.flops is None:
        return "\n".join(lines)
    lines += [
        f"  {'program':34}{_amount(plan.flops, 'FLOP')}   counted in the compiled program",
        f"  {'memory traffic':34}{_amount(plan.traffic, 'B')}",
        *(f"  {f'{kind}, sent':34}{_amount(size, 'B')}" for kind, size in plan.collectives.items()),
    ]
    if plan.endless:
        lines.append(f"  {plan.endless} loops of unknown length are counted as one turn: the program's numbers are too low.")
    if plan.seconds:
        times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.seconds.items())
        lines += ["", f"At the roofline: {times}. Bound by {plan.bound}; MFU at most {plan.mfu:.0%}."]
    return "\n".join(lines)
