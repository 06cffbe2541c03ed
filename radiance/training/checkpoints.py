"""Checkpoints of a run: params, ema, optimizer and progress apart, written in the background, whole or not at all.

A save that is cut short leaves a temporary directory that nothing reads; the checkpoint before it stands.
"""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from radiance import config
from radiance.model.transformer import Params, abstract
from radiance.training.optimizer import join, split_frozen
from radiance.training.step import State, init_state
from radiance.weights.files import CheckpointError, require_space

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every step of every save


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int = 1, keep_every: int = 0, clean: bool = False):
        """clean: remove what a killed save left behind; for the one process that writes here."""
        policies = ocp.training.preservation_policies
        preserve = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self.directory = Path(directory).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=policies.AnyPreservationPolicy(preserve), cleanup_tmp_directories=clean
        )

    @property
    def latest(self) -> int | None:
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: State):
        """Starts writing `state`; it may be donated at once. Raises CheckpointError when there is no room, or when the save before failed."""
        parts = _parts(state)
        with _told(f"The checkpoint before step {int(state.step)}", self.directory):
            self._checkpointer.wait()
        require_space(self.directory, sum(x.nbytes for x in jax.tree.leaves(parts)))
        with _told(f"The checkpoint of step {int(state.step)}", self.directory):
            self._checkpointer.save_checkpointables_async(int(state.step), parts, force=True)

    def restore(self, step: int, like: State) -> State:
        """The state of that step, on the devices and in the shapes of the abstract state `like`."""
        with _told(f"The checkpoint of step {step}", self.directory, "read"):
            parts = self._checkpointer.load_checkpointables(step, _parts(_placed(like)))
        return State(params=parts["params"], ema=parts["ema"], optimizer=parts["optimizer"], **parts["progress"])

    def restore_weights(self, step: int, run: config.Config, which: str, shardings: Params | None = None) -> Params:
        """Only the weights (of a LoRA run, what it adds), on the first device unless `shardings` says otherwise.

        which: params, ema (the largest decay; params where the run keeps none) or ema=DECAY.
        """
        like = jax.eval_shape(partial(init_state, run)).params if run.lora.rank else abstract(run.model)
        if shardings is not None:
            like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
        like = _placed(like)
        trained, _ = split_frozen(like, run.optimizer.frozen)
        decays = [str(d) for d in run.optimizer.ema]
        decay = chosen_average(which, decays)
        with _told(f"The checkpoint of step {step}", self.directory, "read"):
            if decay is None:
                return self._checkpointer.load_checkpointables(step, {"params": like})["params"]
            wanted = {"ema": {d: trained for d in decays}} | ({"params": like} if run.optimizer.frozen else {})
            parts = self._checkpointer.load_checkpointables(step, wanted)
        if not run.optimizer.frozen:
            return parts["ema"][decay]
        return join(parts["ema"][decay], split_frozen(parts["params"], run.optimizer.frozen)[1])

    def close(self):
        """Waits for what is being written."""
        with _told("The last checkpoint", self.directory):
            self._checkpointer.close()


def chosen_average(which: str, decays: Iterable[str]) -> str | None:
    """The decay that `which` (params, ema or ema=DECAY) means among those a run keeps; None for the weights themselves."""
    decays = list(decays)
    if which == "params" or (which == "ema" and not decays):
        return None
    decay = which.partition("=")[2] or max(decays, key=float)
    if decay not in decays:
        raise CheckpointError(
            f"The run has no average {which!r}: it has params and {', '.join(f'ema={d}' for d in decays) or 'no averages'}."
        )
    return decay


def _parts(state: State) -> dict:
    progress = {"step": state.step, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}
    return {"params": state.params, "ema": state.ema, "optimizer": state.optimizer, "progress": progress}


def _placed(like):
    """Shapes with a place each: this host's first device, where none is given (Orbax would put them where they were when saved)."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), like)


class _told:
    """Turns what goes wrong inside Orbax into one sentence."""

    def __init__(self, what: str, directory: Path, verb: str = "written"):
        self.message = f"{what} in {directory} could not be {verb}"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else kind.__name__
            raise CheckpointError(f"{self.message}: {reason}") from error
