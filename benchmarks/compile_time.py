"""Time from a config to a compiled program, ahead of time and without weights: tracing and lowering, then compiling; and `torch.compile`.

    python -m benchmarks.compile_time                                          # forward and training step on 1 and 8 devices
    python -m benchmarks.compile_time --models chroma1-radiance --parts step --devices 8 --peers

On a CPU the devices are fakes, and parameters, optimizer and batch are spread over them (fsdp). No cache is read. PyTorch compiles for
one device with weights in memory, so its row is the first call less the second, and is left out for models that are too large; the 57
narrow blocks have as many blocks as the 9.5 B model. Blocks are recomputed in the backward pass, in all rows.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from benchmarks import measure, networks, training
from benchmarks.measure import Report
from radiance import config
from radiance.distributed.sharding import BATCH_SPEC, make_mesh, make_shardings
from radiance.model.transformer import bind_model, make_abstract_params
from radiance.training.step import init_state, make_train_step

SIZES = {
    "nano": config.MODELS["nano"],
    "small": config.MODELS["small"],
    "57 narrow blocks": replace(config.MODELS["nano"], double_blocks=19, single_blocks=38),
    "chroma1-radiance": config.MODELS["chroma1-radiance"],
}
LARGE = 1e9  # parameters, from which on PyTorch's rows are left out
HEADER = ("", "part", "devices", "lowering", "compiling", "in all")


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--parts", nargs="+", default=list(training.PARTS), choices=list(training.PARTS)
    )
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--side", type=int, default=256, help="of the images, in pixels; default: %(default)s"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="default: %(default)s"
    )
    parser.add_argument(
        "--peers", nargs="*", default=["torch"], choices=["torch"], help="none: ours alone"
    )
    options = parser.parse_args(arguments)

    report = Report("compile_time", arguments)
    rows = []
    for name in options.models:
        for part in options.parts:
            for devices in options.devices:
                run = run_of(SIZES[name], options.side, devices, options.dtype)
                rows.append([f"radiance, {name}", part, str(devices), *ours(run, part)])
                print(*rows[-1], flush=True)
            if "torch" in options.peers:
                rows.append(
                    [
                        f"torch.compile, {name}",
                        part,
                        "1",
                        *theirs(run_of(SIZES[name], options.side, 1, options.dtype), part),
                    ]
                )
                print(*rows[-1], flush=True)
    report.say(measure.table(HEADER, rows))
    if options.record:
        report.record()
    return report


def run_of(model: config.Model, side: int, devices: int, dtype: str) -> config.Config:
    return config.Config(
        name="benchmark",
        model=model,
        compute=config.Compute(dtype=dtype, remat="full"),
        text=config.Text(max_length=512),
        data=config.Data(resolution=side, batch_size=devices),
        mesh=config.Mesh(data=1, fsdp=devices),
    )


def ours(run: config.Config, part: str) -> list[str]:
    """Seconds, or why there are none."""
    if run.mesh.fsdp > len(jax.devices()):
        return [f"not measured: there are {len(jax.devices())} devices"]
    jax.clear_caches()
    mesh = make_mesh(run.mesh, jax.devices()[: run.mesh.fsdp])
    with jax.set_mesh(mesh):
        program, inputs = (training_step if part == "step" else forward)(run, mesh)
        began = time.perf_counter()
        lowered = program.lower(*inputs)
        middle = time.perf_counter()
        lowered.compile()
    ended = time.perf_counter()
    return [f"{seconds:.1f} s" for seconds in (middle - began, ended - middle, ended - began)]


def batch_of(run: config.Config, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    task = networks.Task(run, 40)
    b = run.data.batch_size
    shapes = {
        "image": task.shape,
        "text": (b, training.cut(task), run.model.text_dim),
        "lengths": (b,),
        "weight": (b,),
        "time": (b,),
    }
    kinds = {"text": jnp.dtype(task.dtype), "lengths": jnp.int32}
    place = NamedSharding(mesh, BATCH_SPEC)
    return {
        name: jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.float32), sharding=place)
        for name, shape in shapes.items()
    }


def forward(run: config.Config, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    def velocity(params, batch):
        return bind_model(run.model, run.compute, params)(
            *(batch[name] for name in ("image", "text", "lengths", "time"))
        )

    params = make_abstract_params(run.model)
    return jax.jit(velocity, in_shardings=(make_shardings(params, mesh), None)), (
        params,
        batch_of(run, mesh),
    )


def training_step(run: config.Config, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    state = jax.eval_shape(partial(init_state, run))
    places = make_shardings(state, mesh)
    program = jax.jit(
        make_train_step(run),
        in_shardings=(places, None),
        out_shardings=(places, None),
        donate_argnums=0,
    )
    return program, (state, batch_of(run, mesh))


def theirs(run: config.Config, part: str) -> list[str]:
    """Seconds that `torch.compile` takes, or why there are none."""
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(make_abstract_params(run.model)))
    if count >= LARGE:
        return ["not measured: its weights would have to be in memory"]
    try:
        call = torch_call(networks.Task(run, 40), part)
        first, second = measure.seconds(call), measure.seconds(call)
    except Exception as error:  # whatever its compiler comes up with
        return [measure.told(error)]
    finally:
        measure.forget()
    return ["", "", f"{first - second:.1f} s"]


def torch_call(task: networks.Task, part: str) -> Callable[[], Any]:
    import torch

    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True
    module = networks.torch_module(
        task.model, networks.random_params(task.model, "float32"), "float32"
    )
    if part == "forward":
        return training.torch_forward(task, lambda: module, "compiled", training.cut(task))
    return training.torch_step(
        task,
        lambda: module,
        lambda: training.adamw(task.run.optimizer, module),
        "compiled",
        training.cut(task),
        recompute=True,
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_num_cpu_devices", 8)
    main()
