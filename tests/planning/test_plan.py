"""Plans against closed forms, and against what a step takes on this machine."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.cli import main
from radiance.distributed.hardware import DEVICE_SPECS
from radiance.flow.guidance import count_evaluations
from radiance.flow.sampler import TextCondition, sample_from_noise
from radiance.flow.schedules import make_time_schedule
from radiance.model.flops import forward_flops
from radiance.model.modulation import ModulationVectors
from radiance.model.transformer import Transformer, make_abstract_params
from radiance.planning.kernel_times import NUM_LISTED
from radiance.planning.plan import format_plan, make_plan, send_bandwidth
from tests.helpers.toy_runs import PLAIN, environment_of, toy_run, written_experiment


def run_plan_command(run: config.Config, out: Path, device: str, **environment) -> tuple[dict, str]:
    """Run `radiance plan` for four devices in its own process; return JSON and output."""
    command = [sys.executable, "-m", "radiance", "plan", str(written_experiment(run))]
    command += ["--device", device, "--mesh", "fsdp=4", "--json", str(out)]
    command += [] if device == "cpu" else ["--kernels"]
    process = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(out.read_text()), process.stdout


def test_groups_beyond_the_links_use_the_network():
    h100 = DEVICE_SPECS["NVIDIA H100"]
    assert send_bandwidth(h100, np.arange(16).reshape(2, 8)) == h100.link_bandwidth
    assert send_bandwidth(h100, np.array([[0, 8], [1, 9]])) == h100.network_bandwidth
    # The eight devices of a host share its eight network cards.
    assert send_bandwidth(h100, np.arange(16).reshape(1, 16)) == 8 * h100.network_bandwidth


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"solver": "heun"},
        {"solver": "heun", "guidance_scale": 1.0},
        {"guidance_interval": (0.3, 0.8)},
    ],
)
def test_count_of_evaluations_agrees_with_a_model_that_counts_its_rows(changes):
    settings = config.Sample(**({"steps": 4, "guidance_scale": 2.0} | changes))
    rows = []

    class Model:
        def modulation(self, time, guidance, pooled):
            return ModulationVectors(*[jnp.zeros((1, 1, 1))] * 3, jnp.zeros((1, 2, 1)))

        def __call__(self, x, text, lengths, time, divisor, vectors):
            jax.debug.callback(lambda t: rows.append(len(t)), time)
            return x

    condition = TextCondition(jnp.zeros((1, 2, 3)), jnp.ones((1,), jnp.int32))
    noise, times = jnp.zeros((1, 4, 4, 3)), make_time_schedule(settings, 4)
    stub = Model()
    model = Mock(Transformer, side_effect=stub, modulation=stub.modulation)
    sample_from_noise(model, noise, times, settings, condition, condition)
    jax.effects_barrier()
    assert sum(rows) == count_evaluations(settings, 4)


def test_plan_of_training_counts_the_state_of_one_of_four_devices(tmp_path):
    run = toy_run(tmp_path, str(tmp_path), **PLAIN)
    plan, output = run_plan_command(run, tmp_path / "plan.json", "cpu")
    params = jax.tree.leaves(make_abstract_params(run.model))
    total_bytes = 4 * sum(x.size for x in params)
    # Biases and norms are replicated; matrices are sharded.
    assert total_bytes / 4 < plan["parameters"] < total_bytes / 2
    assert plan["ema"] == 2 * plan["parameters"]
    # Two moments, and the optimizer's step counts.
    assert abs(plan["optimizer"] - 2 * plan["parameters"]) <= 16
    assert plan["flops"] == pytest.approx(plan["model_flops"], rel=0.05)
    assert plan["unbounded_loops"] == 0
    assert plan["collectives"]["all-gather"] > 0
    state_bytes = 5 * total_bytes  # weights, two averages and two moments
    assert plan["disk"] == pytest.approx((run.train.max_to_keep + 1) * state_bytes, rel=0.01)
    assert "The run: 8 steps; " in output
    assert "peak" in output
    assert "counted in the compiled program" in output


def test_plan_of_sampling_does_the_work_of_the_model():
    run = toy_run(".", ".", "sample.batch_size=3", "mesh.data=1", **PLAIN)
    plan = make_plan(run, "cpu", sampling=True)
    assert plan.model_flops == 3 * 2 * 2 * forward_flops(run.model, 8, 8, 8)
    assert plan.flops == pytest.approx(plan.model_flops, rel=0.02)
    assert plan.optimizer == plan.ema == 0
    assert plan.collectives == {}
    assert plan.seconds == {}
    assert plan.fits is None
    assert "The run" not in format_plan(plan)
    assert plan.kernels is None


@pytest.mark.slow
def test_planned_peak_is_at_most_the_memory_of_a_process():
    """A step may take more than planned.

    XLA's runtime for CPUs sometimes keeps the temporaries of a call into the next one. The
    benchmark shows it, and this test does not assert it.
    """
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_memory", "few"],
        env=environment_of(1),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    memory = json.loads(process.stdout.splitlines()[-1])
    assert memory["measured"] > 0.9 * memory["predicted"] > 0.2e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "package", "attention"),
    [("v5e", "libtpu", "splash"), ("h200", "jax_cuda13_plugin", "cudnn")],
)
def test_plan_with_the_compiler_of_the_device(device, package, attention, tmp_path):
    pytest.importorskip(package, reason=f"{package}, the compiler for {device}, is not installed.")
    sizes = PLAIN | dict(hidden=64, heads=1, rope_axes=(8, 28, 28), double_blocks=1)
    run = toy_run(tmp_path, str(tmp_path), "compute.dtype=bfloat16", **sizes)
    # The flags of these tests are for CPUs.
    plan, output = run_plan_command(run, tmp_path / "plan.json", device, XLA_FLAGS="")
    assert plan["attention"] == attention
    assert plan["exact"]
    assert plan["fits"]
    assert plan["bottleneck"]
    assert plan["unbounded_loops"] == 0
    assert set(plan["collectives"]) & {"all-gather", "reduce-scatter"}
    assert plan["kernels"]["seconds"] > plan["seconds"]["compute"]
    assert len(plan["kernels"]["listed"]) == NUM_LISTED
    assert "beyond products" in output


def test_a_program_that_the_compiler_refuses_does_not_fit(tmp_path, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (21.35G) exceeds available HBM (15.75G). "
            "HLO module: jit_step."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    plan = make_plan(toy_run(tmp_path, str(tmp_path), "mesh.data=1"), "cpu")
    assert plan.peak == 21.35 * 2**30
    assert plan.temporaries is None
    plan = replace(plan, memory=16e9)
    assert plan.fits is False
    assert "DOES NOT FIT" in format_plan(plan)
    assert "there are no times of kernels" in format_plan(plan, with_kernels=True)


def test_an_uneven_mesh_is_an_error_if_the_run_or_the_mesh_says_so(tmp_path, monkeypatch):
    settings = []
    monkeypatch.setattr("radiance.cli.prepare_plan_environment", lambda *_: None)
    monkeypatch.setattr(
        "radiance.planning.plan.make_plan", lambda run, *_: settings.append(run.mesh.uneven)
    )
    monkeypatch.setattr("radiance.planning.plan.format_plan", Mock())
    for uneven, mesh in (
        ("replicate", "fsdp=2"),
        ("replicate", "fsdp=2,uneven=error"),
        ("error", "fsdp=2"),
    ):
        run = written_experiment(toy_run(tmp_path, str(tmp_path), f"mesh.uneven={uneven}"))
        assert main(["plan", str(run), "--device", "cpu", "--mesh", mesh]) == 0
    assert settings == ["replicate", "error", "error"]


def test_error_messages(capsys, tmp_path, monkeypatch):
    run = written_experiment(toy_run(tmp_path, str(tmp_path)))

    def error_of(*arguments: str) -> str:
        assert main(["plan", str(run), *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    # The command must not change the environment of this process.
    monkeypatch.setattr("radiance.cli.prepare_plan_environment", lambda *_: None)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    assert "did you mean 'h200'?" in error_of("--device", "h2000")
    assert "does not say how many devices" in error_of("--device", "cpu", "--mesh", "fsdp=-1")
    assert "given as --mesh" in error_of("--device", "cpu", "mesh.fsdp=2")
    assert "--kernels needs a device with known rates" in error_of("--device", "cpu", "--kernels")
    if importlib.util.find_spec("libtpu"):
        assert "data.batch_size=8 does not divide into 64 parts" in error_of(
            "--device", "v5e", "--mesh", "fsdp=64"
        )
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=64" in error_of(
        "--device", "cpu", "--mesh", "fsdp=64"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install radiance[tpu]" in error_of("--device", "v5p")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert "There is no slice of 12 v5p: a mesh has 1, 4, 8" in error_of(
        "--device", "v5p", "--mesh", "fsdp=12"
    )
    assert "do not fill hosts of 8" in error_of("--device", "h100", "--mesh", "fsdp=12")
