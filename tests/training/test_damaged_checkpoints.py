"""A damaged checkpoint is passed over in one line; others may vanish while they are read."""

import asyncio
import gc
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.loading import restore_run_weights
from radiance.training.checkpoint_errors import DamagedCheckpointError
from radiance.training.checkpoint_reader import CheckpointReader, read_newest
from radiance.training.loop import train
from radiance.training.seed_checkpoints import open_checkpoints
from radiance.training.seeds import init_states
from tests.helpers.toy_runs import (
    PLAIN,
    environment_of,
    metrics,
    same,
    state_of,
    toy_run,
    written_experiment,
)

pytestmark = pytest.mark.slow


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "metadata": lambda step: halve(step / "params" / "_METADATA"),
    "nested": lambda step: (step / "ema" / "_METADATA").write_text("[" * 100_000),
    "index": lambda step: (step / "optimizer" / "manifest.ocdbt").unlink(),
    "data": lambda step: [halve(path) for path in (step / "params").glob("ocdbt.process_0/d/*")],
    "item": lambda step: shutil.rmtree(step / "progress"),
    "everything": lambda step: [
        path.write_bytes(b"") for path in step.rglob("*") if path.is_file()
    ],
    "nothing": lambda step: (shutil.rmtree(step), step.mkdir()),
    "file": lambda step: (shutil.rmtree(step), step.write_bytes(b"")),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_directory):
    run = toy_run(tmp_path_factory.mktemp("trained"), data_directory, **PLAIN)
    assert train(run) == 8
    return run


def copy_of(run: config.Config, folder, *changes: str) -> config.Config:
    copied = config.override(run, [f"output={folder}", *changes])
    shutil.copytree(run.run_dir, copied.run_dir)
    return copied


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_complete_checkpoint_is_used(kind, trained, tmp_path, capsys):
    run = copy_of(trained, tmp_path)
    steps = run.run_dir / "checkpoints"
    DAMAGE[kind](steps / "8")
    assert train(run) == 8
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if "could not be read" in line]
    assert len(lines) == 1
    assert "The checkpoint of step 8 in" in lines[0]
    assert "Step 6 is used instead. The damaged one is kept in" in lines[0]
    assert len(lines[0]) < 600
    assert "resumed from step 6" in output.out
    assert (run.run_dir / "damaged" / "8").exists()
    assert same(state_of(run, 8), state_of(trained, 8))
    assert metrics(run) == metrics(trained)


def test_damage_prints_one_line_and_no_trace_of_orbax(trained, tmp_path):
    run = copy_of(trained, tmp_path)
    DAMAGE["data"](run.run_dir / "checkpoints" / "8")
    DAMAGE["index"](run.run_dir / "checkpoints" / "6")
    process = subprocess.run(
        [sys.executable, "-m", "radiance", "train", str(written_experiment(run))],
        capture_output=True,
        text=True,
        env=environment_of(1),
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("could not be read") == 2
    assert "resumed from step 3" in process.stdout
    text = process.stdout + process.stderr
    for noise in ("Event loop", "never awaited", "Traceback", "tensorstore_spec"):
        assert noise not in text


COLLECTED_READ = """
import sys
import types
import radiance.training.checkpoint_errors

source = '''
async def read():
    try:
        await wait()
    finally:
        raise ValueError("damaged")
'''
@types.coroutine
def wait():
    yield

scope = {"wait": wait}
exec(compile(source, sys.argv[1], "exec"), scope)
read = scope["read"]()
read.send(None)
del read
"""


@pytest.mark.parametrize(
    ("path", "is_reported"), [("/packages/orbax/reading.py", False), ("/packages/others.py", True)]
)
def test_collected_reads_of_orbax_are_not_reported(path, is_reported):
    """Pytest replaces the hook for errors that cannot be raised, so this is a process."""
    process = subprocess.run(
        [sys.executable, "-c", COLLECTED_READ, path], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert ("ValueError: damaged" in process.stderr) == is_reported


def test_forgotten_reads_of_orbax_are_not_reported(caplog):
    async def forget(path):
        # The name of the file that defines a coroutine is part of asyncio's report.
        scope = {}
        exec(compile("async def read():\n    raise ValueError('damaged')", path, "exec"), scope)
        task = asyncio.ensure_future(scope["read"]())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task

    asyncio.run(forget("/packages/orbax/checkpoint/serialization.py"))
    gc.collect()
    assert not caplog.records
    asyncio.run(forget("/packages/others.py"))
    gc.collect()
    assert "never retrieved" in caplog.text


def test_nothing_is_moved_if_no_checkpoint_is_complete(trained, tmp_path):
    run = copy_of(trained, tmp_path)
    for step in (3, 6, 8):
        DAMAGE["everything"](run.run_dir / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match=r"step 8 .*No other checkpoint is complete: restore"):
        train(run)
    assert not (run.run_dir / "damaged").exists()
    with pytest.raises(CheckpointError, match=r"step 8 .*No other checkpoint is complete: restore"):
        restore_run_weights(run.run_dir, config.override(run, ["sample.weights=params"]))


def test_readers_pass_over_damage_and_move_nothing(trained, tmp_path, capsys):
    run = copy_of(trained, tmp_path)
    DAMAGE["data"](run.run_dir / "checkpoints" / "8")
    params, origin = restore_run_weights(
        run.run_dir, config.override(run, ["sample.weights=params"])
    )
    assert "step 6" in origin
    assert same(params, state_of(trained, 6).params)
    assert "Step 6 is used instead." in capsys.readouterr().out
    assert (run.run_dir / "checkpoints" / "8").is_dir()


def test_seeds_fall_back_to_a_common_checkpoint(tmp_path):
    run = toy_run(tmp_path, str(tmp_path), **PLAIN)
    directories = [tmp_path / f"seed_{seed}" / "checkpoints" for seed in (3, 5)]
    state = init_states(run, (3, 5))
    checkpoints = open_checkpoints(directories, 2)
    for step in (2, 4):
        state.step = jnp.int32(step)
        checkpoints.save(state)
    checkpoints.close()
    DAMAGE["index"](directories[1] / "4")
    checkpoints = open_checkpoints(directories, 2)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        shapes,
    )
    step, restored = checkpoints.restore_newest(shapes)
    assert step == 2
    assert same(restored.params, state.params)
    for directory in directories:
        assert [path.name for path in directory.iterdir()] == ["2"]
        assert [path.name for path in (directory.parent / "damaged").iterdir()] == ["4"]
    checkpoints.save(state)
    checkpoints.close()
    assert checkpoints.complete_steps == [2, 4]


def test_errors_of_the_machine_are_no_damage(trained, tmp_path, monkeypatch):
    run = copy_of(trained, tmp_path)
    path = run.run_dir / "checkpoints" / "8" / "params" / "_METADATA"
    reader = CheckpointReader(run.run_dir / "checkpoints")

    def refuse(step, items):
        raise PermissionError(13, "Permission denied", str(path))

    from orbax.checkpoint import v1 as ocp

    monkeypatch.setattr(ocp, "load_checkpointables", lambda path, items: refuse(path, items))
    with pytest.raises(CheckpointError, match="Permission denied") as error:
        reader.restore_params(8, run, "params")
    assert not isinstance(error.value, DamagedCheckpointError)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_no_error():
    steps = iter([[2], [4], [4], [6], [6], [6]])
    reads = []

    def read(step):
        reads.append(step)
        if step < 6:
            raise DamagedCheckpointError(f"step {step}")
        return "weights"

    lines = []
    assert read_newest(lambda: next(steps), read, lines.append) == (6, "weights")
    assert reads == [2, 4, 6]
    assert not lines


def test_the_only_checkpoint_is_found_while_it_is_replaced(tmp_path, monkeypatch):
    """A scan of the folder may begin before the new one appears, and end after the old one went."""
    scans = iter([[], [tmp_path / "7"]])
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: iter(next(scans)))
    assert CheckpointReader(tmp_path).complete_steps == [7]


def test_reads_of_checkpoints_that_vanish_end(tmp_path):
    counter = iter(range(10**6))

    def read(step):
        raise CheckpointError(f"step {step} vanished")

    with pytest.raises(CheckpointError, match="vanished"):
        read_newest(lambda: [next(counter)], read)
    assert read_newest(list, read) is None
    assert np.isfinite(next(counter))
