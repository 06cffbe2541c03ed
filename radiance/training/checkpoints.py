"""Checkpoints of a run: params, ema, optimizer and progress apart, written in the background, whole or not at all.

A save that is cut short leaves a temporary directory that nothing reads; the checkpoint before it stands.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from radiance import config
from radiance.model.transformer import Params, abstract
from radiance.training.averages import combination
from radiance.training.optimizer import join, split_frozen
from radiance.training.step import State, init_state
from radiance.weights.files import CheckpointError, is_full, require_space

# Orbax tells of every step of every save, and of one that fails in thousands of lines: here it is one sentence.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

PARTS = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))  # of a tree may be read alone
FAR = 0.1  # from the average that is asked for: what snapshots can give is another one


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int = 1, keep_every: int = 0):
        policies = ocp.training.preservation_policies
        preserve = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self.directory = Path(directory).absolute()
        self._checkpointer = ocp.training.Checkpointer(self.directory, preservation_policy=policies.AnyPreservationPolicy(preserve))
        self._failed = False  # the save before

    @property
    def latest(self) -> int | None:
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def standing(self) -> int | None:
        """The newest that is whole on the disk; `latest` may still be on its way there."""
        return standing(self.directory)

    def save(self, state: State, tell: Callable[[str], None] = print):
        """Starts writing `state`; it may be donated at once. Raises CheckpointError when there is no room, or when two in a row fail."""
        parts = _parts(state)
        self.settle(tell)
        require_space(self.directory, sum(x.nbytes for x in jax.tree.leaves(parts)))
        with _told(f"The checkpoint of step {int(state.step)}", self.directory):
            self._checkpointer.save_checkpointables_async(int(state.step), parts, force=True)
            if self._failed:  # behind one that failed nothing is left to chance
                self._checkpointer.wait()
                self._failed = False

    def restore(self, step: int, like: State) -> State:
        """The state of that step, on the devices and in the shapes of the abstract state `like`."""
        with _told(f"The checkpoint of step {step}", self.directory, "read"):
            parts = self._checkpointer.load_checkpointables(step, _parts(_placed(like)))
        return State(params=parts["params"], ema=parts.get("ema", {}), optimizer=parts["optimizer"], **parts["progress"])

    def restore_weights(self, step: int, run: config.Config, which: str, shardings: Params | None = None) -> Params:
        """Only the weights (of a LoRA run, what it adds), on the first device unless `shardings` says otherwise.

        which: params, ema (the largest decay; params where the run keeps none), ema=DECAY, or width=WIDTH, which is made from the run's
        snapshots where it is none of those that the run keeps.
        """
        like = jax.eval_shape(partial(init_state, run)).params if run.lora.rank else abstract(run.model)
        if shardings is not None:
            like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
        like = _placed(like)
        trained, frozen = split_frozen(like, run.optimizer.frozen)
        width = config.Sample(weights=which).width
        made = width is not None and width not in run.optimizer.ema_widths
        name = None if made else chosen_average(which, run.optimizer.averages)
        with _told(f"The checkpoint of step {step}", self.directory, "read"):
            if not (made or name):
                return self._checkpointer.load_checkpointables(step, {"params": like})["params"]
            # Nothing else is read: each average is as large as the weights.
            wanted = ({"ema": {name: trained}} if name else {}) | ({"params": frozen} if frozen else {})
            with ocp.Context(pytree_options=PARTS):
                parts = self._checkpointer.load_checkpointables(step, wanted) if wanted else {}
        average = Snapshots(self.directory.with_name("averages")).average(run, width, trained) if made else parts["ema"][name]
        return join(average, parts["params"]) if frozen else average

    def settle(self, tell: Callable[[str], None] = print):
        """Waits for what is being written. That it failed is told, for a run that goes on has a state to save yet; over several hosts, which must
        all do the same, it raises CheckpointError."""
        try:
            self.wait()
        except CheckpointError as error:
            if jax.process_count() > 1:
                raise
            self._failed = True
            tell(f"No checkpoint, and the run goes on to the next. {error}")

    def wait(self):
        """Until what is being written is. Raises CheckpointError when that failed."""
        with _told("The last checkpoint", self.directory):
            self._checkpointer.wait()

    def close(self):
        """Waits for what is being written."""
        with _told("The last checkpoint", self.directory):
            self._checkpointer.close()


def standing(directory: Path) -> int | None:
    """The step of the newest checkpoint in a directory that may not be there, and nothing is written."""
    return max((int(path.name) for path in directory.iterdir() if path.name.isdecimal()), default=None) if directory.is_dir() else None


class Snapshots:
    """The averages of optimizer.ema_widths at some steps of a run, all of which are kept: from them come those of other widths.

    Nothing that goes wrong in writing one stops a run: it is told, and there is a snapshot less.
    """

    def __init__(self, directory: Path, tell: Callable[[str], None] = print):
        self.directory, self.tell = Path(directory).absolute(), tell
        self._checkpointer = ocp.training.Checkpointer(self.directory)

    @property
    def steps(self) -> list[int]:
        return sorted(found.step for found in self._checkpointer.checkpoints)

    def save(self, state: State):
        """Writes those of `state`, in the type it keeps them in, where there is room for them and for a checkpoint."""
        step = int(state.step)
        if step in self.steps:  # of before a kill; it is the same
            return
        averages = {name: average for name, average in state.ema.items() if name.startswith("width=")}
        ready = False
        with self._forgiven(step):
            require_space(self.directory, sum(x.nbytes for x in jax.tree.leaves((averages, _parts(state)))))
            ready = True
        if jax.process_count() > 1:  # all write, or none does
            ready = bool(multihost_utils.process_allgather(np.array(ready)).all())
        if not ready:
            return
        with self._forgiven(step):
            self._checkpointer.save_checkpointables(step, {"averages": averages})

    def average(self, run: config.Config, width: float, like: Params) -> Params:
        """The average of that relative width at the newest snapshot, in the shapes and places of `like`, computed leaf by leaf in float32.

        Raises CheckpointError when the snapshots are too few to come within a tenth of it.
        """
        steps, widths = self.steps, run.optimizer.ema_widths
        known = [(step, kept) for step in steps for kept in widths]
        factors, missed = combination(known, (steps[-1], width)) if known else ([], 1.0)
        if missed > FAR:
            raise CheckpointError(
                f"{self.directory} has {len(steps)} snapshots of the averages of width {', '.join(map(str, widths))}, too few for one of width "
                f"{width:g} (off by {missed:.0%}): ask for a width nearer to those, or train with a smaller train.snapshot_every."
            )

        def leaf(keys: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
            wanted = {"averages": {f"width={kept}": _nested(keys, x) for kept in widths}}
            total = 0.0
            for step, share in zip(steps, np.reshape(factors, (len(steps), -1))):
                loaded = ocp.load_checkpointables(self.directory / str(step), wanted)["averages"]
                total += sum(float(s) * one for s, one in zip(share, (jax.tree.leaves(loaded[f"width={kept}"])[0] for kept in widths)))
            return total

        with _told("A snapshot", self.directory, "read"), ocp.Context(pytree_options=PARTS):
            return jax.tree_util.tree_map_with_path(leaf, like)

    def close(self):
        """Waits for what is being written."""
        with self._forgiven(None):
            self._checkpointer.close()

    @contextmanager
    def _forgiven(self, step: int | None) -> Iterator[None]:
        try:
            with _told("The last snapshot" if step is None else f"The snapshot of step {step}", self.directory):
                yield
        except CheckpointError as error:
            self.tell(f"No snapshot of the averages, and the run goes on. {error}")


def _nested(keys: tuple, leaf: jax.ShapeDtypeStruct) -> Params:
    for key in reversed(keys):
        leaf = {key.key: leaf}
    return leaf


def chosen_average(which: str, names: Iterable[str]) -> str | None:
    """The average that `which` (params, ema, ema=DECAY or width=WIDTH) means among those a run keeps; None for the weights themselves."""
    names = list(names)
    decays = [name for name in names if not name.startswith("width=")]
    if which == "params" or (which == "ema" and not decays):
        return None
    width = config.Sample(weights=which).width
    name = f"width={width}" if width is not None else which.partition("=")[2] or max(decays, key=float)
    if name not in names:
        kept = (name if name not in decays else f"ema={name}" for name in names)
        raise CheckpointError(f"The run has no average {which!r}: it has params and {', '.join(kept) or 'no averages'}.")
    return name


def _parts(state: State) -> dict:
    """What is kept apart. Orbax writes nothing empty, as the averages of a run are that has none."""
    progress = {"step": state.step, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}
    averages = {"ema": state.ema} if state.ema else {}
    return {"params": state.params, **averages, "optimizer": state.optimizer, "progress": progress}


def _placed(like):
    """Shapes with a place each: this host's first device, where none is given (Orbax would put them where they were when saved)."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), like)


class _told:
    """Turns what goes wrong inside Orbax into one sentence."""

    def __init__(self, what: str, directory: Path, verb: str = "written"):
        self.message, self.verb = f"{what} in {directory} could not be {verb}", verb

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else kind.__name__
            if self.verb == "written" and is_full(error):
                reason = f"its disk is full: make room there and give the same command again ({reason})"
            raise CheckpointError(f"{self.message}: {reason}") from error
