"""Runs of seconds, for tests."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.distributed import environment
from radiance.training import callbacks, loop
from radiance.training.checkpoints import Checkpoints
from radiance.training.step import init_state, make_train_step
from tests.helpers.toy_models import toy_model

# What compiles fastest, where any network will do.
PLAIN = dict(head="linear", modulation="none", double_blocks=0)
MEAN = dict(
    head="linear", double_blocks=0, approximator_depth=1, approximator_hidden=32
)  # the same, of what reads a step's length


def toy_run(output, data_directory: str, *changes: str, **model) -> config.Config:
    sizes = dict(
        hidden=32,
        rope_axes=(4, 6, 6),
        double_blocks=1,
        single_blocks=1,
        text_dim=16,
        prediction="x0",
    )
    run = config.Config(
        name="toy",
        output=str(output),
        model=toy_model(**(sizes | model)),
        compute=config.Compute(dtype="float32"),
        text=config.Text(max_length=8),
        data=config.Data(cache_dir=data_directory, resolution=8, batch_size=8, num_threads=1),
        # A large eps: Adam would turn the rounding of gradients that are zero (keys have such biases) into whole steps.
        optimizer=config.Optimizer(learning_rate=1e-3, warmup_steps=2, eps=1e-3, ema_decays=(0.9, 0.99)),
        train=config.Train(
            steps=8, log_every=2, validate_every=4, validation_images=10, sample_every=8, checkpoint_every=3,
            sample_prompts=("a handwritten one", "the digit 2"),
        ),
        sample=config.Sample(steps=2, guidance_scale=2.0),
    )  # fmt: skip
    return config.override(run, changes)


@lru_cache(6)
def step_of(run: config.Config):
    """Its step, compiled once for tests that follow one another: that takes seconds."""
    return jax.jit(make_train_step(run))


def train(run: config.Config) -> int:
    """That of the trainer, but no images are painted on the way: for tests that look at none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "sample_gallery", lambda *_: None)
        return loop.train(run)


def batch_of(run: config.Config, seed: int = 0) -> dict[str, jnp.ndarray]:
    """A batch that has nothing to learn but its images."""
    draw, b = np.random.default_rng(seed), run.data.batch_size
    return {
        "image": jnp.asarray(
            draw.uniform(-1, 1, (b, run.data.resolution, run.data.resolution, 3)), jnp.float32
        ),
        "text": jnp.asarray(
            draw.normal(size=(b, run.text.max_length, run.model.text_dim)), jnp.float32
        ),
        "lengths": jnp.asarray(draw.integers(1, run.text.max_length, b), jnp.int32),
        "weight": jnp.ones(b),
    }


def environment_of(devices: int) -> dict[str, str]:
    """Of a process that sees that many devices."""
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={devices}",
        *environment.MULTI_CPU_FLAGS,
    ]
    return os.environ | ({"XLA_FLAGS": " ".join(flags)} if devices > 1 else {})


def output_of(script: str, devices: int = 1, environment: dict[str, str] | None = None) -> bytes:
    """What a program of Python puts out in a process of its own. Fails with what it said of its end.

    devices: that it sees; environment: its variables instead."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment or environment_of(devices),
        capture_output=True,
    )
    assert done.returncode == 0, (
        f"ended with {done.returncode}: {done.stderr.decode(errors='replace')}"
    )
    return done.stdout


def written_experiment(run: config.Config, folder: Path | None = None) -> Path:
    """A file of that experiment, in a folder that is there; beside its run directory when None."""
    path = Path(folder or run.output) / "experiment.py"
    path.write_text(
        f"from radiance import config as c\n\n\ndef config():\n    return c.from_json(c.Config, {config.to_json(run)!r})\n"
    )
    return path


def command(run: config.Config, *, devices: int = 1, wait: bool = True) -> subprocess.Popen:
    """`radiance train` of that run in a process of its own."""
    path = written_experiment(run)
    process = subprocess.Popen(
        [sys.executable, "-m", "radiance", "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment_of(devices),
    )
    if wait:
        process.output = process.communicate(timeout=300)[0]
    return process


def metrics(run: config.Config) -> list[dict]:
    """What a run measured, without what depends on the clock."""
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("images_per_second", "input_wait_seconds", "tflops_per_device")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def state_of(run: config.Config, step: int):
    """What the checkpoint of that step holds."""
    checkpoints = Checkpoints(run.run_dir / "checkpoints")
    state = checkpoints.restore(step, jax.eval_shape(lambda: init_state(run)))
    checkpoints.close()
    return state


def painted(run: config.Config) -> dict[str, bytes]:
    """Pixels by the name of the file."""
    return {path.name: Image.open(path).tobytes() for path in (run.run_dir / "samples").iterdir()}


def same(a, b) -> bool:
    """Bit for bit, over trees."""
    x, y = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(np.asarray(p), np.asarray(q)) for p, q in zip(x, y)
    )
