"""Runs of distribution matching: resumption, devices, exports, plans and bad steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import radiance
from radiance import config
from radiance.cli import main
from radiance.distributed.sharding import make_mesh
from radiance.flow.distillation import Teacher
from radiance.flow.sampler import TextCondition
from radiance.model.transformer import make_abstract_params
from radiance.planning.plan import make_plan
from radiance.planning.programs import prepare_training
from radiance.training.lora import to_lora_weights
from radiance.training.seeds import make_seeds_step
from radiance.training.step import init_state
from radiance.weights import checkpoint, lora_reading
from tests.helpers.toy_models import toy_params
from tests.helpers.toy_runs import (
    PLAIN,
    batch_of,
    metrics,
    same,
    state_of,
    toy_run,
    train,
    train_on_devices,
)

SIZES = PLAIN | dict(hidden=64, rope_axes=(4, 14, 14))
MATCHING = [
    "lora.rank=2",
    "lora.weight_format=int8",
    "lora.dtype=float32",
    "distill.kind=distribution_matching",
    "distill.segments=2",
    "distill.sample.guidance_scale=3",
    "optimizer.learning_rate=1e-2",
    "optimizer.gradient_accumulation_steps=2",
    "optimizer.ema_decays=0.9",
    "data.batch_size=4",
    "sample.steps=2",
    "sample.guidance_scale=1",
]


@pytest.fixture(scope="module")
def complete(tmp_path_factory, data_directory):
    """Train a student of a base file."""
    folder = tmp_path_factory.mktemp("matching")
    run = toy_run(folder, data_directory, f"init={folder / 'base'}.safetensors", *MATCHING, **SIZES)
    checkpoint.write_checkpoint(run.init, run.model, toy_params(run.model))
    assert train(run) == 8
    return run


def losses(run):
    return [[row["loss"], row["fake_loss"]] for row in metrics(run) if "loss" in row]


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(complete):
    assert np.isfinite(losses(complete)).all()
    assert all("validation_loss" not in row for row in metrics(complete))
    assert metrics(complete)[-1]["gradient_norms"].keys() == {"single", "fake_score"}
    first, last = init_state(complete), state_of(complete, 8)
    for before, after in ((first, last), (first.fake_score, last.fake_score)):
        changes = jax.tree.map(lambda x, y: np.abs(x - y).max(), before.params, after.params)
        assert min(jax.tree.leaves(changes)) > 1e-4

    interrupted = config.override(complete, ["name=interrupted", "train.steps=5"])
    assert train(interrupted) == 5
    assert train(config.override(interrupted, ["train.steps=8"])) == 8
    assert same(state_of(interrupted, 8), last)
    assert losses(interrupted)[-2:] == losses(complete)[-2:]


@pytest.mark.slow
def test_samples_and_exports_are_those_of_the_student(complete, tmp_path):
    """The fake score is in no export."""
    files = {"lora": tmp_path / "lora.safetensors", "merged": tmp_path / "merged.safetensors"}
    assert main(["convert", str(complete.run_dir), str(files["lora"]), "--to", "peft"]) == 0
    arguments = ["convert", str(complete.run_dir), str(files["merged"]), "--dtype", "fp32"]
    assert main(arguments) == 0
    state = state_of(complete, 8)
    student = to_lora_weights(complete, state.ema["0.9"], "student").pairs
    fake_score = to_lora_weights(complete, state.fake_score.params, "fake score").pairs
    exported = lora_reading.read_lora(files["lora"], complete.model).pairs
    assert exported.keys() == student.keys()
    for name, pair in exported.items():
        difference = np.abs(np.asarray(pair.down, np.float32) - student[name].down).max()
        assert difference < 0.01
        assert np.abs(np.asarray(fake_score[name].down) - student[name].down).max() > 0.1
    images = [
        np.asarray(pipeline(["a handwritten one"], seeds=[3])[0].image, int)
        for pipeline in (
            radiance.load(complete.run_dir, weight_format="none"),
            radiance.load(files["merged"], dtype="float32"),
            radiance.load(
                complete.init,
                loras=[(str(files["lora"]), 1.0)],
                dtype="float32",
                run=complete,
            ),
            radiance.load(complete.init, dtype="float32", run=complete),
        )
    ]
    assert np.abs(images[0] - images[1]).max() <= 2
    assert np.abs(images[0] - images[2]).max() <= 3  # its file is in bfloat16
    assert np.abs(images[0] - images[3]).max() > 10


@pytest.mark.slow
def test_devices_and_microbatches_change_nothing(complete):
    run = config.override(
        complete,
        ["name=two", "mesh.fsdp=2", "mesh.data=1", "optimizer.gradient_accumulation_steps=1"],
    )
    train_on_devices(run, 2)
    np.testing.assert_allclose(losses(run), losses(complete), rtol=1e-3)


def planned(*changes):
    return toy_run("unused", "unused", "init=base", *MATCHING, "mesh.data=1", *changes, **SIZES)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_a_plan_has_one_base_and_two_loras():
    run = planned("lora.weight_format=none")
    program = prepare_training(run, make_mesh(run.mesh, jax.devices()[:1]))
    state = jax.eval_shape(lambda: init_state(run))
    base = count(make_abstract_params(run.model))
    assert count(program.parameters) == base + 2 * count(state.params)
    assert count(program.optimizer) == 2 * count(state.optimizer_state)
    assert "image" not in program.batch
    result = make_plan(run, "cpu")
    assert result.parameters == 4 * (base + 2 * count(state.params))


def test_a_step_that_is_not_finite_changes_neither_network():
    run = planned()
    step = jax.jit(make_seeds_step(run, 1))
    state, base = init_state(run), toy_params(run.model)
    captions = batch_of(run)
    del captions["image"]
    negative = TextCondition(captions["text"][:1], captions["lengths"][:1])
    good, _ = step(state, captions, base, None, Teacher(None, negative))
    assert not same(good.params, state.params)
    assert not same(good.fake_score, state.fake_score)
    # Only the teacher's evaluation fails, and with it the student's loss.
    broken = negative._replace(text=jnp.full_like(negative.text, jnp.nan))
    bad, numbers = step(state, captions, base, None, Teacher(None, broken))
    assert np.isfinite(numbers["fake_loss"])
    assert not np.isfinite(numbers["loss"])
    kept = ("params", "ema", "optimizer_state", "fake_score")
    assert all(same(getattr(bad, name), getattr(state, name)) for name in kept)
    assert (int(bad.step), int(bad.skipped_steps)) == (1, 1)
