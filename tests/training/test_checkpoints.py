"""Partial reads of checkpoints, and failures to write them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

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
    """A run, a state whose leaves all differ, and its checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run, rng = toy_run(folder, str(folder), *RUN, **PLAIN), np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), jax.eval_shape(lambda: init_state(run))
    )
    checkpoints = Checkpoints(run.run_dir / "checkpoints")
    checkpoints.save(replace(state, step=jnp.int32(3)))
    checkpoints.wait()
    return run, state, checkpoints


@pytest.mark.parametrize(
    ("selector", "name"),
    [("params", None), ("ema", "0.99"), ("ema=0.9", "0.9"), ("width=0.1", "width=0.1")],
)
def test_only_the_requested_weights_are_read(saved, monkeypatch, selector, name):
    run, state, checkpoints = saved
    sizes, load = [], ocp.load_checkpointables

    def record_size(step, items):
        sizes.append(sum(x.size for x in jax.tree.leaves(items)))
        return load(step, items)

    monkeypatch.setattr(ocp, "load_checkpointables", record_size)
    params = checkpoints.restore_params(3, run, selector)
    assert sizes == [sum(x.size for x in jax.tree.leaves(params))]
    assert params.keys() == state.params.keys()
    trainable, frozen = split_frozen(params, run.optimizer.frozen)
    assert same(frozen, split_frozen(state.params, run.optimizer.frozen)[1])
    assert same(
        trainable, state.ema[name] if name else split_frozen(state.params, run.optimizer.frozen)[0]
    )


def test_a_failed_save_is_reported_and_a_second_one_raises(saved, tmp_path, monkeypatch):
    """The complete checkpoints stay."""
    _, state, _ = saved
    checkpoints, messages = Checkpoints(tmp_path / "checkpoints"), []
    failing, write = {2}, checkpoints._checkpointer.save_checkpointables_async
    wait = checkpoints._checkpointer.wait

    def save(step, *arguments, **named):
        if step in failing:
            monkeypatch.setattr(checkpoints._checkpointer, "wait", fail)
        else:
            write(step, *arguments, **named)

    def fail():
        monkeypatch.setattr(checkpoints._checkpointer, "wait", wait)
        raise OSError("the disk is away")

    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables_async", save)
    for step in (1, 2, 3):
        checkpoints.save(replace(state, step=jnp.int32(step)), messages.append)
    assert len(messages) == 1
    assert messages[0].startswith("No checkpoint was written, and training continues.")
    assert "the disk is away" in messages[0]
    assert checkpoints.latest_complete_step == 3  # after a failed save, the next one is waited for
    failing |= {4, 5}
    checkpoints.save(replace(state, step=jnp.int32(4)), messages.append)
    with pytest.raises(CheckpointError, match=r"step 5 .*the disk is away"):
        checkpoints.save(replace(state, step=jnp.int32(5)), messages.append)
    assert len(messages) == 2
    assert checkpoints.latest_complete_step == 3
    checkpoints.close()


def test_a_checkpoint_of_another_model_is_refused(saved):
    run, _, checkpoints = saved
    with pytest.raises(CheckpointError, match="could not be read"):
        checkpoints.restore_params(3, replace(run, model=replace(run.model, registers=2)), "params")
