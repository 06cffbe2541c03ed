"""What is read of a checkpoint where not all of it is wanted, and what follows when one cannot be written."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance.base.errors import CheckpointError
from radiance.training.checkpoints import Checkpoints
from radiance.training.parameter_groups import split_frozen
from radiance.training.step import init_state
from tests.helpers.toy_runs import PLAIN, same, toy_run

RUN = [
    "optimizer.ema_decays=0.9,0.99",
    "optimizer.ema_widths=0.1",
    "optimizer.frozen=single,text_embed",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's state in which no two parts are alike, and its checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run, draw = toy_run(folder, str(folder), *RUN, **PLAIN), np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: draw.normal(size=x.shape).astype(x.dtype), jax.eval_shape(lambda: init_state(run))
    )
    checkpoints = Checkpoints(run.run_dir / "checkpoints")
    checkpoints.save(replace(state, step=jnp.int32(3)))
    checkpoints.wait()
    return run, state, checkpoints


@pytest.mark.parametrize(
    ("which", "name"),
    [("params", None), ("ema", "0.99"), ("ema=0.9", "0.9"), ("width=0.1", "width=0.1")],
)
def test_no_more_is_read_than_is_given(saved, monkeypatch, which, name):
    run, state, checkpoints = saved
    read, load = [], checkpoints._checkpointer.load_checkpointables

    def spied(step, wanted):
        read.append(sum(x.size for x in jax.tree.leaves(wanted)))
        return load(step, wanted)

    monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", spied)
    found = checkpoints.restore_params(3, run, which)
    assert read == [sum(x.size for x in jax.tree.leaves(found))]
    assert found.keys() == state.params.keys()
    trained, frozen = split_frozen(found, run.optimizer.frozen)
    assert same(frozen, split_frozen(state.params, run.optimizer.frozen)[1])
    assert same(
        trained, state.ema[name] if name else split_frozen(state.params, run.optimizer.frozen)[0]
    )


def test_a_save_that_failed_is_told_and_the_next_is_made(saved, tmp_path, monkeypatch):
    """Of two in a row the run ends, and what is whole stays."""
    _, state, _ = saved
    checkpoints, told = Checkpoints(tmp_path / "checkpoints"), []
    failing, write = {2}, checkpoints._checkpointer.save_checkpointables_async
    wait = checkpoints._checkpointer.wait

    def begun(step, *arguments, **named):
        if step in failing:
            monkeypatch.setattr(checkpoints._checkpointer, "wait", fails)
        else:
            write(step, *arguments, **named)

    def fails():
        monkeypatch.setattr(checkpoints._checkpointer, "wait", wait)
        raise OSError("the disk is away")

    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables_async", begun)
    for step in (1, 2, 3):
        checkpoints.save(replace(state, step=jnp.int32(step)), told.append)
    assert len(told) == 1
    assert told[0].startswith("No checkpoint was written, and training continues.")
    assert "the disk is away" in told[0]
    assert checkpoints.latest_complete_step == 3  # already: behind one that failed it is waited for
    failing |= {4, 5}
    checkpoints.save(replace(state, step=jnp.int32(4)), told.append)
    with pytest.raises(CheckpointError, match="step 5 .*the disk is away"):
        checkpoints.save(replace(state, step=jnp.int32(5)), told.append)
    assert len(told) == 2
    assert checkpoints.latest_complete_step == 3
    checkpoints.close()


def test_what_is_not_there_is_refused(saved):
    run, _, checkpoints = saved
    with pytest.raises(CheckpointError, match="could not be read"):
        checkpoints.restore_params(3, replace(run, model=replace(run.model, registers=2)), "params")
