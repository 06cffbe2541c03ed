"""Benchmarks at toy size run, print their tables, and list failing peers. No time is asserted."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    attention,
    compile_time,
    host_memory,
    measure,
    networks,
    optimization_levels,
    sampling,
    training,
)
from benchmarks.measure import Contender, Limits, Report, Result
from radiance import config
from radiance.distributed.environment import HAS_OLDER_GENERATOR
from radiance.model.flops import forward_flops
from radiance.weights import checkpoint
from tests.helpers.toy_models import toy_model, toy_params
from tests.helpers.toy_runs import PLAIN, toy_run

TOY = [
    *(
        "model.hidden=48",
        "model.heads=2",
        "model.double_blocks=1",
        "model.single_blocks=1",
        "model.rope_axes=4,10,10",
        "model.text_dim=32",
    ),
    *("model.approximator_hidden=40", "model.patch=4", "model.head=linear"),
    *(
        "--model",
        "nano",
        "--resolution",
        "8",
        "--text-limit",
        "16",
        "--prompt-tokens",
        "3",
        "--repeats",
        "1",
    ),
]
PEERS = ["PyTorch module, eager, text at the limit", "PyTorch module, eager, text cut"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "SIZES", {"cpu": (32, 1024)})
    monkeypatch.setattr(measure, "SETTLE_SECONDS", 0)


@pytest.fixture
def torch(monkeypatch):
    """PyTorch without compilation, which takes minutes."""
    result = pytest.importorskip("torch", reason="PyTorch is not installed.")
    monkeypatch.setattr(result, "compile", lambda module, dynamic: module)
    return result


@pytest.fixture
def no_torch(monkeypatch):
    for name in ("torch", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)


def read_rows(report: Report) -> dict[str, list[str]]:
    """Cells of all tables by the first one."""
    lines = [
        line for part in report.sections for line in part.splitlines() if line.startswith("| ")
    ]
    return {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    }


# --- Timing and tables ---


def test_contenders_are_called_in_turn():
    calls = []
    results = measure.time_in_turn(
        [Contender(name, lambda name=name: lambda: calls.append(name)) for name in "abc"], 2
    )
    assert "".join(calls) == "aabbcc" + "abc" * 2
    assert [r.contender.name for r in results] == list("abc")
    assert all(len(r.times) == 2 and min(r.times) > 0 for r in results)


def test_failing_peer_is_a_row_and_our_failure_raises(capsys):
    def failing():
        raise RuntimeError("no C++\ncompiler")

    fine = Contender("ours", lambda: lambda: None, peer=False)
    results = measure.time_in_turn(
        [fine, Contender("at once", failing), Contender("when called", lambda: failing)], 1
    )
    report = Report("test", [])
    report.compare(results, Limits(1e12, 1e9))
    for name in ("at once", "when called"):
        assert f"{name}: not measured, RuntimeError: no C++ compiler" in report.sections[-1]
    assert report.sections[-1] in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        measure.time_in_turn([Contender("ours", failing, peer=False)], 1)


def test_table_has_ratios_to_the_first_row():
    ours = Result(Contender("ours", lambda: None, flops=3e12), 9.0, (4.0, 2.0, 3.0))
    theirs = Result(Contender("theirs", lambda: None, flops=6e12), 1.0, (7.0, 6.0, 5.0))
    report = Report("test", [])
    report.compare(
        [ours, theirs], Limits(4e12, 1e9), {"images/s": lambda result: f"{6 / result.median:.3g}"}
    )
    rows = read_rows(report)
    assert rows["ours"] == ["3", "2 – 4", "1.00", "1", "25%", "2", "9.0 s"]
    assert rows["theirs"] == ["6", "5 – 7", "2.00", "1", "25%", "1", "1.0 s"]
    assert len({len(line) for line in report.sections[-1].splitlines()}) == 1


@pytest.mark.usefixtures("no_torch")
def test_limits_without_pytorch():
    limits = measure.measure_limits("float32", repeats=1)
    assert 0 < limits.flops < 1e16
    assert 0 < limits.bandwidth < 1e14


def test_report_is_appended(monkeypatch, tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n")
    monkeypatch.setattr(measure, "RESULTS", path)
    report = Report("sampling", ["--steps", "2", "--record"])
    report.write("| a |")
    report.record()
    heading, command, versions, last = (
        path.read_text().removeprefix("# Results\n\n").strip().split("\n\n")
    )
    assert heading.startswith("## sampling: ")
    assert measure.describe_hardware() in heading
    assert command == "`python -m benchmarks.sampling --steps 2`"
    assert f"jax {jax.__version__}" in versions
    assert "commit" in versions
    assert last == "| a |"


# --- what is compared ---


def toy_task(**changes) -> networks.Task:
    run = config.Config(
        model=toy_model(**changes),
        compute=config.Compute(dtype="float32"),
        text=config.Text(max_length=40),
        data=config.Data(resolution=8, batch_size=2),
    )
    return networks.Task(run, 17)


def test_flops_are_those_of_the_network():
    task = toy_task()
    assert task.padded_length() == 32
    assert task.count_flops(32, 1, 1) == forward_flops(task.model, 8, 8, 32)
    once = task.count_flops(32, 0, 1)
    assert 0 < once < task.count_flops(32, 1, 0)
    assert task.count_flops(32, 6, 4) == 6 * task.count_flops(32, 1, 0) + 4 * once


def test_cut_text_is_the_start_of_the_full_text():
    task = toy_task()
    (whole, lengths), (cut, _) = task.make_text(40, [17, 1]), task.make_text(32, [17, 1])
    assert whole.shape == (2, 40, 32)
    assert lengths.tolist() == [17, 1]
    np.testing.assert_array_equal(whole[:, :32], cut)


@pytest.mark.parametrize("store", config.WEIGHT_FORMATS)
def test_quantized_params_match_a_checkpoint(store):
    model = toy_model(hidden=64, rope_axes=(4, 14, 14))
    params = toy_params(model)
    expected = checkpoint.checkpoint_from_params(model, params, "toy").load_params(
        weight_format=store
    )
    ours = networks.quantize_params(params, store)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: (
            (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a.shape} {b.shape}")
        ),
        ours,
        expected,
    )


@pytest.mark.reference
def test_different_networks_are_not_timed(torch):
    task = toy_task()
    params = networks.make_random_params(task.model, "float32")
    module = networks.make_torch_module(task.model, params, "float32")
    assert "differ by" in networks.compare_outputs(task, params, lambda: module)
    with torch.no_grad():
        module.nerf_blocks[0].param_generator.bias.add_(torch.linspace(0, 1, 384))
    with pytest.raises(SystemExit, match="nothing is timed"):
        networks.compare_outputs(task, params, lambda: module)


# --- each of them ---


@pytest.mark.usefixtures("no_torch")
def test_sampling_without_peers():
    rows = read_rows(sampling.main([*TOY, "--steps", "2", "--weight-formats", "int8"]))
    assert {
        "radiance, text cut",
        "radiance, text at the limit",
        "radiance, weights in float32",
        "radiance, weights in int8",
    } <= set(rows)
    assert sum("not measured, ModuleNotFoundError" in name for name in rows) == 6


@pytest.mark.reference
def test_sampling(torch):
    pytest.importorskip("diffusers", reason="diffusers is not installed.")
    rows = read_rows(sampling.main([*TOY, "--steps", "2"]))
    assert {
        *PEERS,
        "PyTorch module, compiled, text cut",
        "diffusers, eager, text at the limit",
        "diffusers, compiled, text at the limit",
    } <= set(rows)
    assert not any("not measured" in name for name in rows)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.slow
def test_training_without_peers():
    rows = read_rows(
        training.main(["model.modulation=none", *TOY, "--parts", "step", "--remat", "full"])
    )
    assert "radiance, text cut, remat full" in rows
    assert all(
        float(rows[name][6]) > 0 for name in rows if name.startswith("radiance")
    )  # GB temporary
    assert sum("not measured, ModuleNotFoundError" in name for name in rows) == 4


@pytest.mark.reference
@pytest.mark.slow
def test_training(torch):
    rows = read_rows(training.main(["model.modulation=none", *TOY, "--batch", "2"]))
    assert {"radiance, text cut", *PEERS, "PyTorch module, compiled, text cut"} <= set(rows)
    assert not any("not measured" in name for name in rows)


def test_attention():
    report = attention.main(
        [
            "--tokens",
            "24",
            "--hidden-tokens",
            "5",
            "--heads",
            "2",
            "--head-dim",
            "8",
            "--repeats",
            "1",
        ]
    )
    tables = [part for part in report.sections if part.startswith("| ")]
    assert len(tables) == 2
    for text in tables:
        for name in ("radiance, xla", "radiance, chunked", "PyTorch, default"):
            line = next(line for line in text.splitlines() if name in line)
            assert "not measured" in line or float(line.split("|")[7]) < 1e-5


def test_error_ignores_hidden_rows():
    exact = [np.ones((1, 4, 1, 1), np.float32)]
    result = [jnp.array([1.0, 1.5, 9.0, 9.0]).reshape(1, 4, 1, 1)]
    assert attention.compute_error(result, exact, np.array([2])) == 0.5


@pytest.mark.slow
def test_compile_time(monkeypatch):
    monkeypatch.setitem(compile_time.SIZES, "nano", toy_model(head="linear", modulation="none"))
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests need their programs
    report = compile_time.main(
        ["--models", "nano", "--devices", "1", "8", "--resolution", "8", "--peers"]
    )
    lines = report.sections[-1].splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["forward", "forward", "step", "step"]
    assert all("not measured: there are" in line for line in lines[1::2]) or len(jax.devices()) >= 8


@pytest.mark.slow
def test_optimization_levels(monkeypatch):
    run = toy_run("unused", "unused", **PLAIN)
    experiment = SimpleNamespace(config=lambda: run)
    monkeypatch.setattr(optimization_levels, "load_module", lambda path: experiment)
    report = optimization_levels.main(["--levels", "0", "--steps", "1"])
    lines = report.sections[-1].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["0"] * (1 + HAS_OLDER_GENERATOR)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Memory is read from /proc.")
def test_host_memory(monkeypatch):
    whole = host_memory.make_run
    quick = ["model.head=linear", "model.modulation=none"]
    monkeypatch.setattr(
        host_memory, "make_run", lambda *given: config.override(whole(*given), quick)
    )
    report = host_memory.main(["--steps", "6", "--images", "20", "--resolution", "16"])
    rows = read_rows(report)
    assert "6" in rows
    assert all(
        float(anonymous) <= float(resident)
        for resident, anonymous in rows.values()
        if resident != "resident MB"
    )
    assert "each 1,000 steps add" in report.sections[-1]


def test_slope_of_memory():
    readings = [host_memory.Reading(step, 50 * step + 7, 0) for step in (10, 20, 50)]
    assert abs(host_memory.fit_slope(readings, "resident") - 50_000) < 1e-6
    assert host_memory.fit_slope(readings, "anonymous") == 0


def test_large_models_are_not_compiled_in_pytorch():
    run = compile_time.make_run(config.MODELS["chroma1-radiance"], 256, 1, "bfloat16")
    assert "in memory" in compile_time.time_torch(run, "forward")[0]
