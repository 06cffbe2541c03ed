"""Runs of students, their errors, and the memory that a plan counts for their teachers."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.base.errors import CheckpointError, OutputError, TextError
from radiance.data.datasets import open_source
from radiance.distributed.sharding import make_mesh
from radiance.evaluation import evaluate
from radiance.loading import load, open_model
from radiance.model.transformer import make_abstract_params
from radiance.planning.plan import make_plan
from radiance.planning.programs import prepare_training
from radiance.training import initialization, loop, trajectories
from radiance.training.checkpoints import Checkpoints
from radiance.training.initialization import load_frozen_params
from radiance.training.loss_diagnosis import find_reference_loss
from radiance.training.step import init_state
from radiance.training.trajectories import open_trajectories
from radiance.weights import checkpoint
from radiance.weights.checkpoint import LOSS_KEY
from tests.helpers.toy_models import toy_model, toy_params
from tests.helpers.toy_runs import MEAN, PLAIN, metrics, same, state_of, toy_run, train

pytestmark = pytest.mark.usefixtures("four_trajectories_per_file")


def saved(folder, model, seed=0):
    file = folder / f"teacher{seed}.safetensors"
    checkpoint.write_checkpoint(file, model, toy_params(model, seed))
    return file


def student(output, data_directory, kind, *changes, seed=0, **model):
    """A run that starts from its teacher."""
    run = toy_run(output, data_directory, **model)
    file = saved(output, run.model, seed)
    return config.override(
        run,
        [
            f"init={file}",
            f"distill.kind={kind}",
            "distill.sample.steps=4",
            "distill.sample.batch_size=4",
            *changes,
        ],
    )


def files(folder):
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.glob("*.safetensors")
    }


def validation(run):
    return [row["validation_loss"] for row in metrics(run) if "validation_loss" in row]


# --- before anything is generated ---------------------------------------------------------------


def test_an_invalid_schedule_leaves_no_folder(tmp_path, data_directory):
    changes = [
        "distill.sample.schedule=beta",
        "distill.sample.beta=0.01,0.01",
        "distill.sample.steps=100",
    ]
    run = student(tmp_path, data_directory, "trajectories", *changes, **PLAIN)
    with pytest.raises(config.ConfigError, match="repeats a time"):
        train(run)
    assert not run.run_dir.exists()


def test_an_init_of_another_model_is_refused_before_generation(
    tmp_path, data_directory, monkeypatch
):
    monkeypatch.setattr(
        initialization, "load_frozen_params", lambda *_, **__: pytest.fail("generation started")
    )
    run = student(tmp_path, data_directory, "trajectories", **PLAIN)
    checkpoint.write_checkpoint(
        tmp_path / "other.safetensors", toy_model(**PLAIN), toy_params(toy_model(**PLAIN))
    )
    with pytest.raises(CheckpointError, match=r"other.safetensors"):
        train(
            config.override(
                run, [f"distill.teacher={run.init}", f"init={tmp_path / 'other.safetensors'}"]
            )
        )


def test_a_teacher_of_another_model_and_a_long_prompt_are_refused(tmp_path, data_directory):
    run = student(tmp_path, data_directory, "guidance", **PLAIN)
    other = saved(tmp_path, toy_model(**PLAIN), 1)
    with pytest.raises(CheckpointError, match=r"teacher1.safetensors"):
        train(config.override(run, [f"distill.teacher={other}"]))
    for key in ("sample.negative_prompt", "distill.sample.negative_prompt"):
        with pytest.raises(TextError, match=r"over the limit|the limit is 8"):
            train(config.override(run, [f"{key}={'very ' * 20}"]))
    assert not run.run_dir.exists()


def test_runs_of_one_name_with_different_losses_are_different_teachers(tmp_path):
    run = toy_run(tmp_path, "unused", **PLAIN)
    identities = []
    for loss in (0.25, 0.25, 0.2500001):
        shutil.rmtree(run.run_dir, ignore_errors=True)
        run.run_dir.mkdir(parents=True)
        (run.run_dir / "config.json").write_text(config.to_json(run))
        (run.run_dir / "metrics.jsonl").write_text(
            f'{{"step": 1, "loss": {loss}}}\n{{"step": 2, "loss": 9}}\n'
        )
        checkpoints = Checkpoints(run.run_dir / "checkpoints")
        checkpoints.save(replace(init_state(run), step=jnp.int32(1)))
        checkpoints.close()
        identities.append(initialization.identify_weights(str(run.run_dir), run))
    assert identities[0] == identities[1] != identities[2]
    assert identities[0] == "toy step 1 loss 0.25 ema"


def test_missing_disk_space_is_reported_before_generation(tmp_path, data_directory, monkeypatch):
    monkeypatch.setattr(
        trajectories, "generate_missing_trajectories", lambda *_: pytest.fail("generation started")
    )
    run = student(tmp_path, data_directory, "trajectories", **PLAIN)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1000))
    with pytest.raises(OutputError, match="GB are needed: make room"):
        train(run)
    assert not run.run_dir.exists()


# --- runs ----------------------------------------------------------------------------------------


ON_TRAJECTORIES = ["distill.segments=2", "distill.num_trajectories=10", "train.validation_images=3"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_directory):
    run = student(
        tmp_path_factory.mktemp("student"),
        data_directory,
        "trajectories",
        *ON_TRAJECTORIES,
        "data.batch_size=4",
        **PLAIN,
    )
    assert train(run) == 8
    return run


@pytest.mark.slow
def test_a_run_on_trajectories_resumes_bit_for_bit(uninterrupted, data_directory):
    folder = uninterrupted.run_dir / "trajectories"
    assert len(files(folder)) == 4
    assert len(validation(uninterrupted)) == 3
    metadata = json.loads((uninterrupted.run_dir / "data.json").read_text())["trajectories"]
    assert metadata["segments"] == 2
    assert metadata["sample"]["steps"] == 4
    broken = config.override(
        uninterrupted, ["name=broken", f"distill.trajectory_dir={folder}", "train.steps=3"]
    )
    before = files(folder)
    assert train(broken) == 3
    assert train(config.override(broken, ["train.steps=8"])) == 8
    assert files(folder) == before
    assert not (broken.run_dir / "trajectories").exists()
    assert same(state_of(broken, 8), state_of(uninterrupted, 8))
    expected = [row for row in metrics(uninterrupted) if row["step"] > 3 and "loss" in row]
    assert [row for row in metrics(broken) if row["step"] > 3 and "loss" in row] == expected


@pytest.mark.slow
def test_another_teacher_is_refused_on_resumption(uninterrupted, tmp_path):
    other = saved(tmp_path, uninterrupted.model, seed=3)
    with pytest.raises(config.ConfigError, match=r"generated with other settings \(teacher\)"):
        train(config.override(uninterrupted, [f"distill.teacher={other}", "train.steps=9"]))


@pytest.mark.slow
def test_teacher_and_folder_may_have_moved(uninterrupted, tmp_path):
    before = metrics(uninterrupted)
    shutil.copytree(uninterrupted.run_dir / "trajectories", tmp_path / "trajectories")
    shutil.copy(uninterrupted.init, tmp_path / "moved.safetensors")
    moved = config.override(
        uninterrupted,
        [f"init={tmp_path / 'moved.safetensors'}", f"distill.trajectory_dir={tmp_path / 'ways'}"],
    )
    partial_file = uninterrupted.run_dir / "trajectories" / ".train-000000.safetensors.1.part"
    partial_file.touch()
    assert train(moved) == 8
    assert metrics(uninterrupted) == before
    assert partial_file.exists()  # another run may be writing it
    os.utime(partial_file, (0, 0))
    assert train(moved) == 8
    assert not partial_file.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prediction", "image", "mean_flow"])
def test_students_learn(kind, tmp_path, data_directory):
    changes = [
        "distill.sample.guidance_scale=3",
        "optimizer.learning_rate=1e-2",
        "train.validate_every=100",
        "optimizer.ema_decays=0.5",
    ]
    if kind == "mean_flow":
        run = student(
            tmp_path,
            data_directory,
            "mean_flow",
            *changes,
            "distill.finite_difference=0",
            "compute.attention=xla",
            "sample.solver=mean_flow",
            **MEAN,
        )
    else:
        run = student(
            tmp_path,
            data_directory,
            "guidance",
            *changes,
            f"distill.guidance_target={kind}",
            **PLAIN,
        )
    if kind == "prediction":
        run = config.override(run, [f"distill.teacher={saved(tmp_path, run.model, 1)}"])
    assert train(run) == 8
    before, after = validation(run)
    assert 0 < after < before
    data = json.loads((run.run_dir / "data.json").read_text())
    assert ("teacher" in data) == (kind != "image")
    assert not any(
        "tflops_per_device" in json.loads(line)
        for line in run.run_dir.joinpath("metrics.jsonl").read_text().splitlines()
    )
    if kind == "prediction":
        other = saved(tmp_path, run.model, seed=3)
        with pytest.raises(config.ConfigError, match=r"another run \(teacher.identity was"):
            train(config.override(run, [f"distill.teacher={other}", "train.steps=9"]))


@pytest.mark.slow
def test_the_teacher_of_a_lora_is_its_base(tmp_path, data_directory, monkeypatch):
    """The base is in memory once, and without guidance the initial loss is zero."""
    monkeypatch.setattr(
        initialization,
        "_load_teacher_params",
        lambda *_, **__: pytest.fail("the base is in memory already"),
    )
    changes = [
        "distill.sample.guidance_scale=1",
        "lora.rank=2",
        "lora.dtype=float32",
        "train.steps=1",
        "data.batch_size=4",
    ]
    run = student(tmp_path, data_directory, "guidance", *changes, **PLAIN)
    assert train(run) == 1
    assert max(validation(run)) < 1e-10
    data = json.loads((run.run_dir / "data.json").read_text())
    assert data["teacher"] == data["base"]


@pytest.mark.slow
def test_a_latent_model_needs_no_images(tmp_path, data_directory):
    changes = [
        *ON_TRAJECTORIES,
        "distill.sample.guidance_scale=2",
        "data.batch_size=4",
        "train.steps=4",
        "optimizer.learning_rate=1e-2",
        "optimizer.ema_decays=0.5",
    ]
    run = student(tmp_path, data_directory, "trajectories", *changes, **PLAIN, patch=1, channels=6)
    assert loop.train(run) == 4
    before, *_, after = validation(run)
    assert after < before
    assert open_trajectories(run)["train"].points(0).shape == (2, 8, 8, 6)
    assert not list(run.run_dir.glob("samples/*.png"))
    with pytest.raises(config.ConfigError, match="images of 3 channels: train a pixel model"):
        train(config.override(run, ["distill.kind=guidance", "distill.segments=1", "name=other"]))


# --- losses of students, and weights of teachers ------------------------------------------------


@pytest.mark.slow
def test_the_loss_of_a_student_is_no_reference_for_training_on_images(uninterrupted):
    next_run = config.override(
        uninterrupted, [f"init={uninterrupted.run_dir}", "distill.kind=none", "distill.segments=1"]
    )
    assert validation(uninterrupted)
    assert find_reference_loss(next_run) is None
    assert LOSS_KEY not in open_model(uninterrupted.run_dir).metadata


@pytest.mark.slow
def test_a_student_is_evaluated_by_the_plain_loss(uninterrupted):
    source, mesh = (
        open_source(uninterrupted.data, "validation"),
        make_mesh(config.Mesh(1, 1, 1), jax.devices()[:1]),
    )
    result = []
    for changes in (
        [],
        ["flow.timestep_distribution=pure_noise"],
        ["distill.kind=none", "distill.segments=1"],
    ):
        pipeline = load(uninterrupted.run_dir, run=config.override(uninterrupted, changes))
        result.append(evaluate.evaluate_loss(pipeline, source, 4, mesh))
    assert result[0] == result[1] == result[2]
    assert result[0]["loss"] > 0


def test_frozen_weights_are_bfloat16_except_precise_parts(monkeypatch):
    """Weights of a run are loaded sharded, and equal those of a file."""
    run = toy_run("unused", "unused")
    params = toy_params(run.model)
    monkeypatch.setattr(initialization, "is_run_directory", lambda _: True)
    monkeypatch.setattr(
        initialization,
        "load_pretrained_params",
        lambda path, run, shardings: (
            params if shardings == {"x": 1} else pytest.fail("a whole tree on one device")
        ),
    )
    result = load_frozen_params("a run", run, "bfloat16", shardings={"x": 1})
    expected = checkpoint.checkpoint_from_params(run.model, params, "a run").load_params("bfloat16")
    assert same(result, expected)
    assert jax.tree.map(lambda x: x.dtype, result) == jax.tree.map(lambda x: x.dtype, expected)
    assert {str(x.dtype) for x in jax.tree.leaves(result)} == {"bfloat16", "float32"}


# --- memory in plans ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "teachers", "model"),
    [
        ("distill.kind=guidance", 1, PLAIN),
        ("distill.kind=guidance distill.guidance_target=image", 0, PLAIN),
        ("distill.kind=trajectories distill.segments=2", 0, PLAIN),
        ("distill.kind=mean_flow compute.attention=xla", 1, MEAN),
    ],
)
def test_a_plan_counts_the_teacher(changes, teachers, model):
    run = toy_run(
        "unused",
        "unused",
        "distill.teacher=another",
        "data.batch_size=2",
        "optimizer.ema_decays=0.9",
        "mesh.data=1",
        *changes.split(),
        **model,
    )
    program = prepare_training(run, make_mesh(run.mesh, jax.devices()[:1]))
    program.lower()  # the step accepts the planned inputs
    parameters = sum(x.size for x in jax.tree.leaves(make_abstract_params(run.model)))
    assert sum(x.size for x in jax.tree.leaves(program.parameters)) == (1 + teachers) * parameters
    if run.distill.kind == "trajectories":
        assert program.batch["image"].shape == (2, 2, 8, 8, 3)
        assert program.batch["image"].dtype == np.float16
    if changes == "distill.kind=guidance":
        result = make_plan(run, "cpu")
        assert (result.parameters, result.ema) == (2 * 4 * parameters, 4 * parameters)


def test_a_plan_counts_the_base_of_a_lora_once():
    changes = ["distill.kind=guidance", "init=somewhere", "lora.rank=2", "data.batch_size=2"]
    runs = [
        toy_run("unused", "unused", *changes, teacher, **PLAIN)
        for teacher in ("distill.teacher=", "distill.teacher=another")
    ]
    sizes = [
        sum(x.size for x in jax.tree.leaves(prepare_training(run, make_mesh(run.mesh)).parameters))
        for run in runs
    ]
    assert sizes[1] - sizes[0] == sum(
        x.size for x in jax.tree.leaves(make_abstract_params(runs[0].model))
    )
