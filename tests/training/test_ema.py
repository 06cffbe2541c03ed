"""Averages of the weights against sums in float64, and averages from snapshots after a run."""

import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.cli import main
from radiance.loading import restore_run_weights
from radiance.training.checkpoints import Checkpoints
from radiance.training.ema import solve_posthoc_coefficients, update_averages, width_to_exponent
from radiance.training.parameter_groups import split_frozen
from radiance.training.snapshots import Snapshots
from radiance.weights.opening import open_tensors
from tests.helpers.toy_runs import PLAIN, same, toy_run, train

WIDTHS = (0.05, 0.1)


def test_decays_warm_up():
    ema = {"0.5": {"w": jnp.zeros(1)}, "0.9": {"w": jnp.zeros(1)}}
    expected = {"0.5": 0.0, "0.9": 0.0}
    for step in range(40):
        ema = update_averages(
            ema, {"w": jnp.full(1, float(step))}, jnp.int32(step), jax.random.key(0)
        )
        for decay in expected:
            d = min(float(decay), (1 + step) / (10 + step))
            expected[decay] = d * expected[decay] + (1 - d) * step
    for decay in expected:
        np.testing.assert_allclose(ema[decay]["w"], expected[decay], rtol=1e-5)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_exponents_follow_the_definition_of_a_width(width):
    """It is the standard deviation of τ / t under the weight τ^γ."""
    power = width_to_exponent(width)
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    weight = tau**power / (tau**power).sum()
    assert power > 0
    assert np.sqrt(weight @ tau**2 - (weight @ tau) ** 2) == pytest.approx(width, rel=1e-4)


def profile(step, width):
    """Integrate τ^γ between the steps 1 to `step`."""
    edges = (np.arange(step + 1) / step) ** (width_to_exponent(width) + 1)
    return np.diff(edges)


def tracked(values, width):
    ema = {f"width={width}": {"w": jnp.full(values.shape[1:], 7.0)}}
    update = jax.jit(
        lambda ema, value, step: update_averages(ema, {"w": value}, step, jax.random.key(0))
    )
    for step, value in enumerate(values):
        ema = update(ema, jnp.asarray(value, jnp.float32), jnp.int32(step))
        yield np.asarray(ema[f"width={width}"]["w"])


@pytest.mark.parametrize("width", [0.05, 0.25])
def test_running_averages_equal_direct_sums(width):
    values = np.cumsum(np.random.default_rng(0).standard_normal((300, 4)), axis=0)
    for step, result in enumerate(tracked(values, width), start=1):
        np.testing.assert_allclose(
            result, profile(step, width) @ values[:step], rtol=0, atol=2e-5 * np.abs(values).max()
        )


def test_averages_late_in_a_run_are_exact():
    before = {"width=0.1": {"w": jnp.zeros(1)}}
    result = update_averages(
        before, {"w": jnp.ones(1)}, jnp.int32(2_000_000 - 1), jax.random.key(0)
    )["width=0.1"]["w"]
    assert float(result[0]) == pytest.approx(
        -np.expm1((width_to_exponent(0.1) + 1) * np.log1p(-0.5e-6)), rel=1e-5
    )


@pytest.mark.parametrize(("wanted", "limit"), [(0.07, 0.01), (0.13, 0.01), (0.2, 0.03)])
def test_other_widths_follow_from_snapshots(wanted, limit):
    values = 100 + np.cumsum(np.random.default_rng(0).standard_normal((800, 50)), axis=0)
    remaining = {width: list(tracked(values, width)) for width in WIDTHS}
    known = [(step, width) for step in range(50, 801, 50) for width in WIDTHS]
    factors, missed = solve_posthoc_coefficients(known, (800, wanted))
    assert factors.sum() == pytest.approx(1, abs=1e-9)
    weights = sum(
        f * np.pad(profile(step, width), (0, 800 - step))
        for f, (step, width) in zip(factors, known)
    )
    exact = profile(800, wanted)
    assert missed < limit
    assert np.linalg.norm(weights - exact) / np.linalg.norm(exact) == pytest.approx(
        missed, abs=0.01
    )
    made = sum(f * remaining[width][step - 1] for f, (step, width) in zip(factors, known))
    direct = list(tracked(values, wanted))[-1]
    assert np.abs(made - direct).max() < 0.02 * np.abs(direct - values[-1]).max()


def test_a_saved_width_is_not_combined():
    known = [(step, width) for step in (100, 200, 300) for width in WIDTHS]
    factors, missed = solve_posthoc_coefficients(known, (300, 0.1))
    np.testing.assert_allclose(factors, [0, 0, 0, 0, 0, 1], atol=1e-6)
    assert missed < 1e-6
    assert solve_posthoc_coefficients([(100, 0.05)], (100, 0.25))[1] > 0.5


FROZEN = "text_embed,patch_embed,single/attention"


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_directory):
    changes = [
        "optimizer.ema_widths=0.05,0.1,0.13",
        f"optimizer.frozen={FROZEN}",
        "train.snapshot_every=2",
    ]
    run = toy_run(
        tmp_path_factory.mktemp("averages"),
        data_directory,
        *changes,
        "train.steps=12",
        "optimizer.learning_rate=1e-2",
        **PLAIN,
    )
    assert train(config.override(run, ["train.steps=5"])) == 5
    assert train(run) == 12
    return run


@pytest.mark.slow
def test_a_run_saves_every_snapshot(run):
    assert Snapshots(run.run_dir / "averages").steps == [2, 4, 5, 6, 8, 10, 12]
    newest = Checkpoints(run.run_dir / "checkpoints").restore_params(12, run, "width=0.13")
    chosen = config.override(run, ["sample.weights=width=0.130"])
    assert same(restore_run_weights(run.run_dir, chosen)[0], newest)
    assert not same(newest, restore_run_weights(run.run_dir, run)[0])


@pytest.mark.slow
def test_sample_and_convert_compute_a_width_from_snapshots(run, tmp_path):
    """The third width was saved too, and is compared with the combination of the other two."""
    two = config.override(run, ["optimizer.ema_widths=0.05,0.1"])
    like = restore_run_weights(run.run_dir, config.override(run, ["sample.weights=params"]))[0]
    trained, frozen = split_frozen(like, run.optimizer.frozen)
    exact = restore_run_weights(run.run_dir, config.override(run, ["sample.weights=width=0.13"]))[0]
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trained
    )
    combined = Snapshots(run.run_dir / "averages").compute_average(two, 0.13, shapes)
    change = max(
        float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(like))
    )
    exact, still = split_frozen(exact, run.optimizer.frozen)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=0.05 * change), combined, exact
    )
    assert same(still, frozen)
    assert (
        main(
            [
                "convert",
                str(run.run_dir),
                str(tmp_path / "w.safetensors"),
                "--weights",
                "width=0.08",
            ]
        )
        == 0
    )
    assert open_tensors(tmp_path / "w.safetensors").shapes
    out = str(tmp_path / "out")
    assert (
        main(
            [
                "sample",
                str(run.run_dir),
                "--prompt",
                "a handwritten one",
                "--out",
                out,
                "weights=width=0.08",
            ]
        )
        == 0
    )
    with pytest.raises(CheckpointError, match=r"7 snapshots .* too few for one of width 0.01"):
        restore_run_weights(run.run_dir, config.override(run, ["sample.weights=width=0.01"]))


@pytest.mark.slow
def test_a_full_disk_loses_a_snapshot_and_no_checkpoint(
    tmp_path, data_directory, monkeypatch, capsys
):
    changes = [
        "optimizer.ema_widths=0.1",
        "train.snapshot_every=2",
        "train.steps=4",
        "train.max_to_keep=9",
    ]
    run = toy_run(tmp_path, data_directory, *changes, "train.checkpoint_every=2", **PLAIN)
    usage, disk = namedtuple("usage", "total used free"), shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(1, 1, 0) if "averages" in str(path) else disk(path)
    )
    (run.run_dir / "averages").mkdir(parents=True)
    assert train(run) == 4
    assert Snapshots(run.run_dir / "averages").steps == []
    assert Checkpoints(run.run_dir / "checkpoints").latest_step == 4
    assert "No snapshot of the averages, and training continues." in capsys.readouterr().err


def test_wrong_settings_are_an_error(tmp_path, data_directory):
    for changes, message in (
        (["optimizer.ema_widths=0.3"], "between 0 and 0.288"),
        (["optimizer.ema_widths=0.1,0.1"], "twice"),
        (["sample.weights=width=0.1"], "set optimizer.ema_widths"),
        (["optimizer.ema_widths=0.1", "sample.weights=width=x"], "width=WIDTH"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            config.override(config.Config(), changes)
    run = toy_run(tmp_path, data_directory, "optimizer.ema_widths=0.1", "sample.weights=width=0.2")
    with pytest.raises(
        CheckpointError,
        match=r"no average 'width=0.2': it has params and ema=0.9, ema=0.99, width=0.1",
    ):
        train(run)
