"""Time from a config to a compiled program, without weights, and with `torch.compile`.

    python -m benchmarks.compile_time
    python -m benchmarks.compile_time --models chroma1-radiance --parts step --devices 8 --peers

The default compiles forward pass and training step for 1 and 8 devices. On a CPU the devices are
fakes, and parameters, optimizer state and batch are sharded over them (fsdp). No cache is read.
PyTorch compiles for one device with weights in memory: its row is the first call less the second,
and is left out for large models. "57 narrow blocks" has as many blocks as the 9.5 B model. Blocks
are rematerialized in all rows.
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
MAX_TORCH_PARAMETERS = 1e9  # from this size on PyTorch's rows are left out
HEADER = ("", "part", "devices", "lowering", "compiling", "total")


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.make_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--parts", nargs="+", default=list(training.PARTS), choices=list(training.PARTS)
    )
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--resolution", type=int, default=256, help="of the images, in pixels; default: %(default)s"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="default: %(default)s"
    )
    parser.add_argument(
        "--peers", nargs="*", default=["torch"], choices=["torch"], help="without names: only ours"
    )
    options = parser.parse_args(arguments)

    report = Report("compile_time", arguments)
    rows = []
    for name in options.models:
        for part in options.parts:
            for devices in options.devices:
                run = make_run(SIZES[name], options.resolution, devices, options.dtype)
                rows.append([f"radiance, {name}", part, str(devices), *time_radiance(run, part)])
                print(*rows[-1], flush=True)
            if "torch" in options.peers:
                rows.append(
                    [
                        f"torch.compile, {name}",
                        part,
                        "1",
                        *time_torch(
                            make_run(SIZES[name], options.resolution, 1, options.dtype), part
                        ),
                    ]
                )
                print(*rows[-1], flush=True)
    report.write(measure.format_table(HEADER, rows))
    if options.record:
        report.record()
    return report


def make_run(model: config.Model, resolution: int, devices: int, dtype: str) -> config.Config:
    return config.Config(
        name="benchmark",
        model=model,
        compute=config.Compute(dtype=dtype, remat="full"),
        text=config.Text(max_length=512),
        data=config.Data(resolution=resolution, batch_size=devices),
        mesh=config.Mesh(data=1, fsdp=devices),
    )


def time_radiance(run: config.Config, part: str) -> list[str]:
    """Return the seconds, or why there are none."""
    if run.mesh.fsdp > len(jax.devices()):
        return [f"not measured: there are {len(jax.devices())} devices"]
    jax.clear_caches()
    mesh = make_mesh(run.mesh, jax.devices()[: run.mesh.fsdp])
    with jax.set_mesh(mesh):
        program, inputs = (make_training_step if part == "step" else make_forward)(run, mesh)
        start = time.perf_counter()
        lowered = program.lower(*inputs)
        lowered_at = time.perf_counter()
        lowered.compile()
    end = time.perf_counter()
    return [f"{seconds:.1f} s" for seconds in (lowered_at - start, end - lowered_at, end - start)]


def make_abstract_batch(
    run: config.Config, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    task = networks.Task(run, 40)
    b = run.data.batch_size
    shapes = {
        "image": task.shape,
        "text": (b, training.padded_length(task), run.model.text_dim),
        "lengths": (b,),
        "weight": (b,),
        "time": (b,),
    }
    kinds = {"text": jnp.dtype(task.dtype), "lengths": jnp.int32}
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {
        name: jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.float32), sharding=sharding)
        for name, shape in shapes.items()
    }


def make_forward(run: config.Config, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    def velocity(params, batch):
        return bind_model(run.model, run.compute, params)(
            *(batch[name] for name in ("image", "text", "lengths", "time"))
        )

    params = make_abstract_params(run.model)
    return jax.jit(velocity, in_shardings=(make_shardings(params, mesh), None)), (
        params,
        make_abstract_batch(run, mesh),
    )


def make_training_step(run: config.Config, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    state = jax.eval_shape(partial(init_state, run))
    shardings = make_shardings(state, mesh)
    program = jax.jit(
        make_train_step(run),
        in_shardings=(shardings, None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    return program, (state, make_abstract_batch(run, mesh))


def time_torch(run: config.Config, part: str) -> list[str]:
    """Return the seconds of `torch.compile`, or why there are none."""
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(make_abstract_params(run.model)))
    if count >= MAX_TORCH_PARAMETERS:
        return ["not measured: its weights would have to be in memory"]
    try:
        call = make_torch_call(networks.Task(run, 40), part)
        first, second = measure.time_call(call), measure.time_call(call)
    except Exception as error:  # any error of its compiler
        return [measure.describe_error(error)]
    finally:
        measure.free_memory()
    return ["", "", f"{first - second:.1f} s"]


def make_torch_call(task: networks.Task, part: str) -> Callable[[], Any]:
    import torch

    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True
    module = networks.make_torch_module(
        task.model, networks.make_random_params(task.model, "float32"), "float32"
    )
    if part == "forward":
        return training.make_torch_forward(
            task, lambda: module, "compiled", training.padded_length(task)
        )
    return training.make_torch_step(
        task,
        lambda: module,
        lambda: training.make_adamw(task.run.optimizer, module),
        "compiled",
        training.padded_length(task),
        recompute=True,
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_num_cpu_devices", 8)
    main()
