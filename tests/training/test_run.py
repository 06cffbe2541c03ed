"""Whole runs: the files they write, and that a resumed run equals an uninterrupted one."""

import itertools
import json
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.base.errors import CheckpointError, OutputError, TrainingError
from radiance.evaluation.report import write_report
from radiance.training import feed, inputs, run_directory
from radiance.training.checkpoints import Checkpoints
from radiance.training.initialization import load_pretrained_params
from radiance.training.step import init_state
from radiance.weights import checkpoint
from tests.helpers.toy_folders import fill
from tests.helpers.toy_runs import PLAIN, command, metrics, same, toy_run, train

pytestmark = pytest.mark.slow


def final_state(run):
    like = jax.eval_shape(lambda: init_state(run))
    checkpoints = Checkpoints(run.run_dir / "checkpoints")
    state = checkpoints.restore(checkpoints.latest_step, like)
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_directory):
    """A run of 8 steps in its own process."""
    run = toy_run(tmp_path_factory.mktemp("uninterrupted"), data_directory, **PLAIN)
    process = command(run)
    assert process.returncode == 0, process.output
    return run, process.output


def test_a_run_directory_holds_the_record_of_the_run(uninterrupted):
    run, output = uninterrupted
    folder = run.run_dir
    assert config.from_json(config.Config, (folder / "config.json").read_text()) == run
    assert "radiance" in (folder / "command.txt").read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert [start["from_step"] for start in environment] == [0]
    assert environment[0]["packages"]["jax"] == jax.__version__
    assert environment[0]["devices"]
    assert json.loads((folder / "data.json").read_text())["train"]["count"] == 1498
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [3, 6, 8]
    assert [p.name for p in (folder / "samples").iterdir()] == ["00000008.png"]
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert not (folder / "tensorboard").exists()
    assert not (folder / "wandb").exists()
    rows = metrics(run)
    assert [r["step"] for r in rows if "loss" in r] == [2, 4, 6, 8]
    assert [r["step"] for r in rows if "validation_bins" in r] == [4, 8]
    all_rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in all_rows if r.get("seconds_to_first_step", 0) > 0] == [2]
    assert "from scratch" in output
    assert "trained for 8 steps" in output


def wait_for_step(run, step, process):
    file = run.run_dir / "metrics.jsonl"
    for _ in range(10_000):
        if file.exists() and any(f'"step": {s},' in file.read_text() for s in range(step, 9)):
            return
        if process.poll() is not None:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not reach the step")


def test_a_run_without_averages_is_saved_and_restored(tmp_path):
    run = toy_run(tmp_path, "unused", "optimizer.ema_decays=", "sample.weights=params")
    state, checkpoints = init_state(run), Checkpoints(run.run_dir / "checkpoints")
    checkpoints.save(state)
    checkpoints.wait()
    assert same(final_state(run), state)


def test_sigterm_saves_and_the_same_command_resumes(uninterrupted, tmp_path, data_directory):
    run = toy_run(tmp_path, data_directory, "train.checkpoint_every=1000", **PLAIN)
    process = command(run, wait=False)
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert "the same command" in output
    stopped = Checkpoints(run.run_dir / "checkpoints").latest_step
    assert 2 <= stopped < 8
    process = command(run)
    assert f"resumed from step {stopped}" in process.output
    assert same(final_state(run), final_state(uninterrupted[0]))
    assert metrics(run) == metrics(uninterrupted[0])


def test_batches_of_many_shapes_resume_in_the_middle_of_an_epoch(tmp_path):
    """With new random resolutions in each epoch, broken images, and worker processes."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i, (width, height) in enumerate(((32, 32), (40, 17), (17, 40), (12, 12)) * 5):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(
            tmp_path / "images" / f"{i}.png"
        )
        (tmp_path / "images" / f"{i}.txt").write_text(f"number {i}")
    for i in (2, 5):  # truncated
        (tmp_path / "images" / f"{i}.png").write_bytes(
            (tmp_path / "images" / f"{i}.png").read_bytes()[:500]
        )
    changes = (
        "data.source=folder data.validation_fraction=0.2 data.resolution=16 "
        "data.extra_resolutions=8 data.bucket_step=8 data.max_aspect_ratio=2.5 data.batch_size=4 "
        "data.flip_probability=0.5 data.max_broken_fraction=0.5 train.steps=9 train.log_every=1 "
        f"train.checkpoint_every=4 sample.steps=1 data.path={tmp_path / 'images'}"
    )
    uninterrupted = toy_run(tmp_path, str(tmp_path / "prepared"), *changes.split(), **PLAIN)
    assert train(uninterrupted) == 9
    rows = [row for row in metrics(uninterrupted) if "loss" in row]
    assert sum(row["images_skipped"] for row in rows) > 1
    interrupted = config.override(uninterrupted, ["name=interrupted", "train.steps=4"])
    assert train(interrupted) == 4
    assert train(config.override(interrupted, ["train.steps=9", "data.num_workers=2"])) == 9
    assert same(final_state(interrupted), final_state(uninterrupted))
    assert [row for row in metrics(interrupted) if "loss" in row] == rows


@pytest.mark.parametrize(
    ("name", "is_dirty"),
    [("runs/mine/config.json", False), ("package/new.py", True), ("experiment.py", True)],
)
def test_outputs_do_not_mark_the_code_as_changed(name, is_dirty, tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    for path in (package / "code.py", tmp_path / "experiment.py"):
        path.write_text("1\n")
    author = ["-c", "user.name=A", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "Start"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(run_directory, "PACKAGE_DIR", package)
    assert run_directory.describe_environment()["dirty"] is False
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("2\n")
    assert run_directory.describe_environment()["dirty"] is is_dirty


def test_a_run_may_do_without_validation(tmp_path, capfd):
    fill(tmp_path / "images", 3)
    changes = (
        f"data.source=folder data.path={tmp_path / 'images'} data.validation_fraction=0 "
        "data.resolution=8 data.batch_size=2 train.steps=2 train.log_every=1 "
        "train.sample_prompts=[]"
    )
    run = toy_run(tmp_path, str(tmp_path / "prepared"), *changes.split(), **PLAIN)
    assert train(run) == 2
    assert [row.keys() & {"loss", "validation_loss"} for row in metrics(run)] == [{"loss"}] * 2
    tuned = [f"init={run.run_dir}", "name=tuned", "train.steps=1"]
    assert train(config.override(run, tuned)) == 1
    assert "step 0: no image is held out, so the loss" in capfd.readouterr().err
    distilled = [f"init={run.run_dir}", "name=distilled", "distill.kind=trajectories"]
    with pytest.raises(config.ConfigError, match=r"needs captions .*validation_fraction=0.05"):
        train(config.override(run, distilled))


def test_a_checkpoint_of_one_mesh_resumes_on_another(uninterrupted, tmp_path, data_directory):
    run = toy_run(tmp_path, data_directory, "train.steps=4", **PLAIN)
    assert train(run) == 4
    longer = config.override(run, ["train.steps=8", "mesh.data=2", "mesh.fsdp=2"])
    process = command(longer, devices=4)
    assert process.returncode == 0, process.output
    assert "resumed from step 4" in process.output
    for x, y in zip(
        jax.tree.leaves(final_state(longer).params),
        jax.tree.leaves(final_state(uninterrupted[0]).params),
    ):
        np.testing.assert_allclose(x, y, atol=2e-4)
    for x, y in zip(metrics(longer), metrics(uninterrupted[0])):
        np.testing.assert_allclose([*x.values()][1], [*y.values()][1], rtol=1e-3)


def test_weights_come_from_a_file_or_a_run(uninterrupted, tmp_path, capsys, monkeypatch):
    run, _ = uninterrupted
    average = load_pretrained_params(str(run.run_dir), run)
    assert same(average, final_state(run).ema["0.99"])
    file = tmp_path / "model.safetensors"
    checkpoint.write_checkpoint(file, run.model, average)
    assert same(load_pretrained_params(str(file), run), average)
    second = config.override(
        run, ["name=second", f"output={tmp_path}", f"init={file}", "train.steps=1"]
    )
    assert train(second) == 1
    assert f"from the weights of {file}" in capsys.readouterr().out
    other = config.override(run, ["model.mlp_ratio=3"])
    with pytest.raises(
        config.ConfigError, match=r"another model .*mlp_ratio is 4.0 in the run and 3.0 here"
    ):
        load_pretrained_params(str(run.run_dir), other)
    with pytest.raises(
        CheckpointError, match=r"another model .*mlp_ratio is 4.0 in the file and 3.0 here"
    ):
        load_pretrained_params(str(file), other)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same(
        load_pretrained_params("~/model.safetensors", run), average
    )  # shells do not expand it after "="
    file.unlink()  # a started run does not need it
    assert train(config.override(second, ["train.steps=2"])) == 2


def test_a_finished_run_stays_finished(uninterrupted):
    run, _ = uninterrupted
    before = metrics(run)
    assert train(run) == 8
    assert metrics(run) == before
    assert write_report(run.run_dir).is_file()


def test_a_directory_of_another_config_is_refused(uninterrupted):
    with pytest.raises(
        config.ConfigError,
        match=r"optimizer.learning_rate was 0.001, now 0.002.*init=.* name=NEW, or continue it",
    ):
        train(config.override(uninterrupted[0], ["optimizer.learning_rate=2e-3"]))


def test_a_directory_of_other_data_is_refused(uninterrupted, monkeypatch):
    monkeypatch.setattr(inputs, "describe_source", lambda source, data, split: {"count": 1})
    with pytest.raises(
        config.ConfigError, match=r"data.train.count was 1498, now 1,.*--allow-changes data"
    ):
        train(uninterrupted[0])


@pytest.mark.parametrize(
    "changes",
    [
        "init=nowhere",
        "optimizer.frozen=nothing",
        "sample.schedule=beta sample.beta=0.01,0.01 sample.steps=99",
    ],
)
def test_a_run_that_cannot_start_writes_nothing(tmp_path, data_directory, changes):
    run = toy_run(tmp_path, data_directory, *changes.split())
    with pytest.raises(config.ConfigError):
        train(run)
    assert not (run.run_dir / "config.json").exists()


def test_a_loss_that_stays_non_finite_ends_the_run(tmp_path, data_directory, monkeypatch):
    run = toy_run(
        tmp_path,
        data_directory,
        "train.max_nonfinite_steps=3",
        "train.steps=50",
        "train.checkpoint_every=2",
        **PLAIN,
    )
    put_batches, num_batches = feed.put_batches, itertools.count()

    def put_failing_batches(batches, *rest):
        if next(num_batches) >= 4:
            batches = [batch | {"text": np.full_like(batch["text"], np.nan)} for batch in batches]
        return put_batches(batches, *rest)

    monkeypatch.setattr(feed, "put_batches", put_failing_batches)
    with pytest.raises(
        TrainingError,
        match=r"not finite in the 3 steps up to 7: lower optimizer.learning_rate .* step 6 is good",
    ):
        train(run)
    state = final_state(run)
    assert int(state.step) == 6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_missing_disk_space_is_reported_before_training(tmp_path, data_directory, monkeypatch):
    import shutil
    from collections import namedtuple

    run = toy_run(tmp_path, data_directory, **PLAIN)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(100, 100, 0)
    )
    with pytest.raises(OutputError, match=r"GB free, and .* GB are needed: make room"):
        train(run)
    assert not run.run_dir.exists()
