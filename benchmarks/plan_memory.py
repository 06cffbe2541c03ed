"""The peak memory that `radiance plan` predicts, beside what a training step takes, on this CPU: `python -m benchmarks.plan_memory`.

Every size is planned, and then trained for three steps, in a process of its own. What a step takes is the growth of the process's
resident memory, at its highest, over what it was before the state was made; what the compiler used is given back before. On two
cores (x86, JAX 0.10.2, a minute of processor time a size):

    |             | parameters | predicted | measured | ratio |
    |-------------|------------|-----------|----------|-------|
    | few         |       11 M |   0.44 GB |  0.47 GB |  0.94 |
    | activations |       11 M |   1.11 GB |  1.17 GB |  0.95 |
    | both        |       33 M |   1.14 GB |  1.19 GB |  0.96 |
    | weights     |      116 M |   3.07 GB |  3.15 GB |  0.97 |

What is missing, 50 to 80 MB, is the process's own: the programs, threads, and the batch as the host has it. Now and then a run measures one
set of temporaries more (for `activations` 2.1 GB): XLA's CPU runtime has then not given those of a step back when the next one begins.
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

# Hidden width and images a step: of what fills the memory, more and more is weights.
SIZES = {"few": (256, 2), "activations": (256, 8), "both": (512, 4), "weights": (1024, 1)}


def run_of(name: str) -> config.Config:
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


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field)
    )


def measure(name: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from radiance.distributed.sharding import make_mesh, make_shardings
    from radiance.planning.plan import make_plan
    from radiance.training.step import init_state, make_train_step

    run = run_of(name)
    predicted = make_plan(run, "cpu")
    mesh = make_mesh(run.mesh)
    fresh = jax.jit(lambda: init_state(run))
    places = make_shardings(jax.eval_shape(fresh), mesh)
    count, side, words = run.data.batch_size, run.data.resolution, run.text.max_length
    draw = np.random.default_rng(0)
    batch = {
        "image": draw.standard_normal((count, side, side, 3), np.float32),
        "text": draw.standard_normal((count, words, run.model.text_dim), np.float32),
        "lengths": np.full(count, words, np.int32),
        "weight": np.ones(count, np.float32),
    }
    with jax.set_mesh(mesh):
        step = jax.jit(
            make_train_step(run),
            in_shardings=(places, None, None),
            out_shardings=(places, None),
            donate_argnums=0,
        )
        like = jax.eval_shape(fresh)
        step = step.lower(like, jax.tree.map(jnp.asarray, batch), None).compile()
        fresh = jax.jit(lambda: init_state(run), out_shardings=places).lower().compile()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = resident("VmRSS")
        state = jax.block_until_ready(fresh())
        batch = {key: jax.device_put(x) for key, x in batch.items()}
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the highest starts anew: making the state took more than a step may
        for _ in range(3):
            state, metrics = step(state, batch, None)
            jax.block_until_ready(metrics)
            time.sleep(
                0.5
            )  # results are ready before their step's temporaries are given back, for which the next would not wait
    return {
        "parameters": predicted.parameters,
        "predicted": predicted.peak,
        "measured": resident("VmHWM") - before,
    }


def main():
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    print(
        f"| {'':11} | parameters | predicted | measured | ratio |\n|-------------|------------|-----------|----------|-------|"
    )
    for name in SIZES:
        command = [sys.executable, "-m", "benchmarks.plan_memory", name]
        done = subprocess.run(
            command,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=True,
            capture_output=True,
            text=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["predicted"] / found["measured"]
        print(
            f"| {name:11} | {found['parameters'] / 4e6:8.0f} M | {found['predicted'] / 1e9:6.2f} GB | {found['measured'] / 1e9:5.2f} GB | {ratio:5.2f} |"
        )


if __name__ == "__main__":
    main()
