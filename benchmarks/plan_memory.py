"""Compare the peak memory that `radiance plan` predicts with that of a training step on this CPU.

Every size is planned and then trained for three steps, each in its own process, by `python -m
benchmarks.plan_memory`. A step's memory is the largest growth of the resident memory since before
the state was initialized; memory of the compiler is returned before. On two cores (x86, JAX
0.10.2, a minute of processor time per size):

    |             | parameters | predicted | measured | ratio |
    |-------------|------------|-----------|----------|-------|
    | few         |       11 M |   0.44 GB |  0.47 GB |  0.94 |
    | activations |       11 M |   1.11 GB |  1.17 GB |  0.95 |
    | both        |       33 M |   1.14 GB |  1.19 GB |  0.96 |
    | weights     |      116 M |   3.07 GB |  3.15 GB |  0.97 |

The missing 50 to 80 MB are the process's own: programs, threads, and the batch on the host. Now
and then a run measures one set of temporaries more (2.1 GB for `activations`): XLA's CPU runtime
has then not returned those of a step when the next one starts.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from radiance import config

# Hidden width and batch size: weights fill more and more of the memory.
SIZES = {"few": (256, 2), "activations": (256, 8), "both": (512, 4), "weights": (1024, 1)}


def make_run(name: str) -> config.Config:
    hidden, batch = SIZES[name]
    model = replace(
        config.Model.from_name("nano"),
        hidden=hidden,
        heads=hidden // 64,
        approximator_hidden=256,
        text_dim=512,
    )
    return config.Config(
        model=model,
        compute=config.Compute(dtype="float32", remat="full"),
        text=config.Text(max_length=64),
        data=config.Data(resolution=128, batch_size=batch),
        mesh=config.Mesh(1, 1, 1),
    )


def read_resident_memory(field: str) -> int:
    """Return bytes of this process: VmRSS is the current value, VmHWM the peak."""
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field)
    )


def measure_peak(name: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from radiance.distributed.sharding import make_mesh, make_shardings
    from radiance.planning.plan import make_plan
    from radiance.training.step import init_state, make_train_step

    run = make_run(name)
    predicted = make_plan(run, "cpu")
    mesh = make_mesh(run.mesh)
    fresh = jax.jit(lambda: init_state(run))
    shardings = make_shardings(jax.eval_shape(fresh), mesh)
    count, resolution, text_length = run.data.batch_size, run.data.resolution, run.text.max_length
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((count, resolution, resolution, 3), np.float32),
        "text": rng.standard_normal((count, text_length, run.model.text_dim), np.float32),
        "lengths": np.full(count, text_length, np.int32),
        "weight": np.ones(count, np.float32),
    }
    with jax.set_mesh(mesh):
        step = jax.jit(
            make_train_step(run),
            in_shardings=(shardings, None, None),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        abstract_state = jax.eval_shape(fresh)
        step = step.lower(abstract_state, jax.tree.map(jnp.asarray, batch), None).compile()
        fresh = jax.jit(lambda: init_state(run), out_shardings=shardings).lower().compile()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = read_resident_memory("VmRSS")
        state = jax.block_until_ready(fresh())
        batch = {key: jax.device_put(x) for key, x in batch.items()}
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # resets the peak: initializing the state may take more than a step
        for _ in range(3):
            state, metrics = step(state, batch, None)
            jax.block_until_ready(metrics)
            time.sleep(0.5)  # results are ready before their step's temporaries are returned
    return {
        "parameters": predicted.parameters,
        "predicted": predicted.peak,
        "measured": read_resident_memory("VmHWM") - before,
    }


def main():
    if len(sys.argv) > 1:
        print(json.dumps(measure_peak(sys.argv[1])))
        return
    print(
        f"| {'':11} | parameters | predicted | measured | ratio |\n"
        "|-------------|------------|-----------|----------|-------|"
    )
    for name in SIZES:
        command = [sys.executable, "-m", "benchmarks.plan_memory", name]
        process = subprocess.run(
            command,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=True,
            capture_output=True,
            text=True,
        )
        sizes = json.loads(process.stdout.splitlines()[-1])
        ratio = sizes["predicted"] / sizes["measured"]
        print(
            f"| {name:11} | {sizes['parameters'] / 4e6:8.0f} M | "
            f"{sizes['predicted'] / 1e9:6.2f} GB | {sizes['measured'] / 1e9:5.2f} GB | "
            f"{ratio:5.2f} |"
        )


if __name__ == "__main__":
    main()
