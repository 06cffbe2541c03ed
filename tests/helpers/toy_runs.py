"""Runs of seconds for tests, and their files."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
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

# The networks that compile fastest: any, and one that reads the length of a step.
PLAIN = dict(head="linear", modulation="none", double_blocks=0)
MEAN = dict(head="linear", double_blocks=0, approximator_depth=1, approximator_hidden=32)


def toy_run(output, data_directory: str, *changes: str, **model) -> config.Config:
    """Return a run of 8 steps, with changes of its settings and of its model."""
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
        # With a small eps, Adam would turn rounding errors of zero gradients into full steps.
        optimizer=config.Optimizer(
            learning_rate=1e-3, warmup_steps=2, eps=1e-3, ema_decays=(0.9, 0.99)
        ),
        train=config.Train(
            steps=8,
            log_every=2,
            validate_every=4,
            validation_images=10,
            sample_every=8,
            checkpoint_every=3,
            sample_prompts=("a handwritten one", "the digit 2"),
        ),
        sample=config.Sample(steps=2, guidance_scale=2.0),
    )
    return config.override(run, changes)


@lru_cache(6)
def step_of(run: config.Config):
    """Return the step of a run, compiled once for consecutive tests."""
    return jax.jit(make_train_step(run))


def train(run: config.Config, allowed_changes: Sequence[str] = ()) -> int:
    """Train without samples, for tests that need none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "sample_gallery", lambda *_: None)
        return loop.train(run, allowed_changes)


def batch_of(run: config.Config, seed: int = 0) -> dict[str, jnp.ndarray]:
    """Return a random batch."""
    rng, b = np.random.default_rng(seed), run.data.batch_size
    return {
        "image": jnp.asarray(
            rng.uniform(-1, 1, (b, run.data.resolution, run.data.resolution, 3)), jnp.float32
        ),
        "text": jnp.asarray(
            rng.normal(size=(b, run.text.max_length, run.model.text_dim)), jnp.float32
        ),
        "lengths": jnp.asarray(rng.integers(1, run.text.max_length, b), jnp.int32),
        "weight": jnp.ones(b),
    }


def environment_of(devices: int) -> dict[str, str]:
    """Return the environment variables of a process with that many devices."""
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={devices}",
        *environment.MULTI_CPU_FLAGS,
    ]
    return os.environ | ({"XLA_FLAGS": " ".join(flags)} if devices > 1 else {})


def output_of(script: str, devices: int = 1, environment: dict[str, str] | None = None) -> bytes:
    """Run a Python program in its own process and return its output; fail if it fails.

    Args:
        script: The program.
        devices: Number of devices that it sees.
        environment: Its environment variables instead.
    """
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=environment or environment_of(devices),
        capture_output=True,
    )
    assert process.returncode == 0, (
        f"ended with {process.returncode}: {process.stderr.decode(errors='replace')}"
    )
    return process.stdout


def written_experiment(run: config.Config, folder: Path | None = None) -> Path:
    """Write the file of an experiment with that config, by default beside its run directory."""
    path = Path(folder or run.output) / "experiment.py"
    path.write_text(
        f"from radiance import config as c\n\n\n"
        f"def config():\n    return c.from_json(c.Config, {config.to_json(run)!r})\n"
    )
    return path


def command(run: config.Config, *, devices: int = 1, wait: bool = True) -> subprocess.Popen:
    """Run `radiance train` in its own process."""
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


def train_on_devices(run: config.Config, devices: int):
    """Train without samples in a process with that many devices; fail if it fails."""
    path = written_experiment(run)
    script = (
        "from radiance.config.experiments import load_experiment\n"
        "from tests.helpers.toy_runs import train\n"
        f"train(load_experiment({str(path)!r}))\n"
    )
    output_of(script, devices)


def metrics(run: config.Config) -> list[dict]:
    """Return the rows of metrics of a run, without those that depend on the clock."""
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = (
        *("images_per_second", "input_wait_seconds", "tflops_per_device"),
        "seconds_to_first_step",
    )
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def state_of(run: config.Config, step: int):
    """Return the state in the checkpoint of a step."""
    checkpoints = Checkpoints(run.run_dir / "checkpoints")
    state = checkpoints.restore(step, jax.eval_shape(lambda: init_state(run)))
    checkpoints.close()
    return state


def read_samples(run: config.Config) -> dict[str, bytes]:
    """Return the pixels of the samples of a run by file name."""
    return {path.name: Image.open(path).tobytes() for path in (run.run_dir / "samples").iterdir()}


def same(a, b) -> bool:
    """Return whether two trees are equal bit for bit."""
    x, y = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(np.asarray(p), np.asarray(q)) for p, q in zip(x, y)
    )
