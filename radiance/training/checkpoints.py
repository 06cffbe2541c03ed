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
from radiance.base.errors import CheckpointError, OutputError, RadianceError
from radiance.base.files import is_disk_full, require_space
from radiance.model.transformer import Params, make_abstract_params
from radiance.training.ema import solve_posthoc_coefficients
from radiance.training.parameter_groups import merge_params, split_frozen
from radiance.training.step import TrainState, init_state

# Orbax tells of every step of every save, and of one that fails in thousands of lines: here it is one sentence.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

PARTIAL_LOAD = ocp.options.PyTreeOptions(
    loading=ocp.options.PyTreeOptions.Loading(partial_load=True)
)  # of a tree may be read alone
MAX_RELATIVE_ERROR = (
    0.1  # from the average that is asked for: what snapshots can give is another one
)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, max_to_keep: int = 1):
        self.directory = Path(directory).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(max_to_keep),
        )
        self._last_save_failed = False  # the save before

    @property
    def latest_step(self) -> int | None:
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def latest_complete_step(self) -> int | None:
        """The newest that is whole on the disk; `latest` may still be on its way there."""
        return find_latest_complete_step(self.directory)

    def save(self, state: TrainState, report: Callable[[str], None] = print):
        """Starts writing `state`; it may be donated at once. Raises OutputError when there is no room, and CheckpointError when two in a row fail."""
        checkpointables = _split_state(state)
        self.wait_and_report(report)
        require_space(self.directory, sum(x.nbytes for x in jax.tree.leaves(checkpointables)))
        with _ErrorTranslator(f"The checkpoint of step {int(state.step)}", self.directory):
            self._checkpointer.save_checkpointables_async(
                int(state.step), checkpointables, force=True
            )
            if self._last_save_failed:  # behind one that failed nothing is left to chance
                self._checkpointer.wait()
                self._last_save_failed = False

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state of that step, on the devices and in the shapes of the abstract state `like`."""
        with _ErrorTranslator(f"The checkpoint of step {step}", self.directory, "read"):
            checkpointables = self._checkpointer.load_checkpointables(
                step, _split_state(_with_shardings(abstract_state))
            )
        return TrainState(
            params=checkpointables["params"],
            ema=checkpointables.get("ema", {}),
            optimizer_state=checkpointables["optimizer"],
            **checkpointables["progress"],
        )

    def restore_params(
        self, step: int, run: config.Config, selector: str, shardings: Params | None = None
    ) -> Params:
        """Only the weights (of a LoRA run, what it adds), on the first device unless `shardings` says otherwise.

        which: params, ema (the largest decay; params where the run keeps none), ema=DECAY, or width=WIDTH, which is made from the run's
        snapshots where it is none of those that the run keeps.
        """
        abstract_params = (
            jax.eval_shape(partial(init_state, run)).params
            if run.lora.rank
            else make_abstract_params(run.model)
        )
        if shardings is not None:
            abstract_params = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                abstract_params,
                shardings,
            )
        abstract_params = _with_shardings(abstract_params)
        trainable, frozen = split_frozen(abstract_params, run.optimizer.frozen)
        width = config.Sample(weights=selector).ema_width
        from_snapshots = width is not None and width not in run.optimizer.ema_widths
        name = None if from_snapshots else resolve_average(selector, run.optimizer.ema_names)
        with _ErrorTranslator(f"The checkpoint of step {step}", self.directory, "read"):
            if not (from_snapshots or name):
                return self._checkpointer.load_checkpointables(step, {"params": abstract_params})[
                    "params"
                ]
            # Nothing else is read: each average is as large as the weights.
            abstract_checkpointables = ({"ema": {name: trainable}} if name else {}) | (
                {"params": frozen} if frozen else {}
            )
            with ocp.Context(pytree_options=PARTIAL_LOAD):
                checkpointables = (
                    self._checkpointer.load_checkpointables(step, abstract_checkpointables)
                    if abstract_checkpointables
                    else {}
                )
        average = (
            Snapshots(self.directory.with_name("averages")).compute_average(run, width, trainable)
            if from_snapshots
            else checkpointables["ema"][name]
        )
        return merge_params(average, checkpointables["params"]) if frozen else average

    def wait_and_report(self, report: Callable[[str], None] = print):
        """Waits for what is being written. That it failed is told, for a run that goes on has a state to save yet; over several hosts, which must
        all do the same, it raises CheckpointError.
        """
        try:
            self.wait()
        except CheckpointError as error:
            if jax.process_count() > 1:
                raise
            self._last_save_failed = True
            report(f"No checkpoint, and the run goes on to the next. {error}")

    def wait(self):
        """Until what is being written is. Raises CheckpointError when that failed."""
        with _ErrorTranslator("The last checkpoint", self.directory):
            self._checkpointer.wait()

    def close(self):
        """Waits for what is being written."""
        with _ErrorTranslator("The last checkpoint", self.directory):
            self._checkpointer.close()


def find_latest_complete_step(directory: Path) -> int | None:
    """The step of the newest checkpoint in a directory that may not be there, and nothing is written."""
    return (
        max((int(path.name) for path in directory.iterdir() if path.name.isdecimal()), default=None)
        if directory.is_dir()
        else None
    )


class Snapshots:
    """The averages of optimizer.ema_widths at some steps of a run, all of which are kept: from them come those of other widths.

    Nothing that goes wrong in writing one stops a run: it is told, and there is a snapshot less.
    """

    def __init__(self, directory: Path, report: Callable[[str], None] = print):
        self.directory, self.report = Path(directory).absolute(), report
        self._checkpointer = ocp.training.Checkpointer(self.directory)

    @property
    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState):
        """Writes those of `state`, in the type it keeps them in, where there is room for them and for a checkpoint."""
        step = int(state.step)
        if step in self.steps:  # of before a kill; it is the same
            return
        averages = {
            name: average for name, average in state.ema.items() if name.startswith("width=")
        }
        has_space = False
        with self._report_errors(step):
            require_space(
                self.directory,
                sum(x.nbytes for x in jax.tree.leaves((averages, _split_state(state)))),
            )
            has_space = True
        if jax.process_count() > 1:  # all write, or none does
            has_space = bool(multihost_utils.process_allgather(np.array(has_space)).all())
        if not has_space:
            return
        with self._report_errors(step):
            self._checkpointer.save_checkpointables(step, {"averages": averages})

    def compute_average(self, run: config.Config, width: float, abstract_params: Params) -> Params:
        """The average of that relative width at the newest snapshot, in the shapes and places of `like`, computed leaf by leaf in float32.

        Raises CheckpointError when the snapshots are too few to come within a tenth of it.
        """
        steps, widths = self.steps, run.optimizer.ema_widths
        snapshots = [(step, snapshot_width) for step in steps for snapshot_width in widths]
        coefficients, relative_error = (
            solve_posthoc_coefficients(snapshots, (steps[-1], width)) if snapshots else ([], 1.0)
        )
        if relative_error > MAX_RELATIVE_ERROR:
            raise CheckpointError(
                f"{self.directory} has {len(steps)} snapshots of the averages of width {', '.join(map(str, widths))}, too few for one of width "
                f"{width:g} (off by {relative_error:.0%}): ask for a width nearer to those, or train with a smaller train.snapshot_every."
            )

        def average_leaf(keys: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
            abstract_averages = {
                "averages": {
                    f"width={snapshot_width}": _nest_leaf(keys, x) for snapshot_width in widths
                }
            }
            total = 0.0
            for step, step_coefficients in zip(steps, np.reshape(coefficients, (len(steps), -1))):
                averages = ocp.load_checkpointables(self.directory / str(step), abstract_averages)[
                    "averages"
                ]
                total += sum(
                    float(coefficient) * array
                    for coefficient, array in zip(
                        step_coefficients,
                        (
                            jax.tree.leaves(averages[f"width={snapshot_width}"])[0]
                            for snapshot_width in widths
                        ),
                    )
                )
            return total

        with (
            _ErrorTranslator("A snapshot", self.directory, "read"),
            ocp.Context(pytree_options=PARTIAL_LOAD),
        ):
            return jax.tree_util.tree_map_with_path(average_leaf, abstract_params)

    def close(self):
        """Waits for what is being written."""
        with self._report_errors(None):
            self._checkpointer.close()

    @contextmanager
    def _report_errors(self, step: int | None) -> Iterator[None]:
        try:
            with _ErrorTranslator(
                "The last snapshot" if step is None else f"The snapshot of step {step}",
                self.directory,
            ):
                yield
        except (CheckpointError, OutputError) as error:
            self.report(f"No snapshot of the averages, and the run goes on. {error}")


def _nest_leaf(keys: tuple, leaf: jax.ShapeDtypeStruct) -> Params:
    for key in reversed(keys):
        leaf = {key.key: leaf}
    return leaf


def resolve_average(selector: str, names: Iterable[str]) -> str | None:
    """The average that `which` (params, ema, ema=DECAY or width=WIDTH) means among those a run keeps; None for the weights themselves."""
    names = list(names)
    decays = [name for name in names if not name.startswith("width=")]
    if selector == "params" or (selector == "ema" and not decays):
        return None
    width = config.Sample(weights=selector).ema_width
    name = (
        f"width={width}"
        if width is not None
        else selector.partition("=")[2] or max(decays, key=float)
    )
    if name not in names:
        choices = (name if name not in decays else f"ema={name}" for name in names)
        raise CheckpointError(
            f"The run has no average {selector!r}: it has params and {', '.join(choices) or 'no averages'}."
        )
    return name


def _split_state(state: TrainState) -> dict:
    """What is kept apart. Orbax writes nothing empty, as the averages of a run are that has none."""
    progress = {
        "step": state.step,
        "skipped_steps": state.skipped_steps,
        "consecutive_skipped_steps": state.consecutive_skipped_steps,
    }
    averages = {"ema": state.ema} if state.ema else {}
    return {
        "params": state.params,
        **averages,
        "optimizer": state.optimizer_state,
        "progress": progress,
    }


def _with_shardings(abstract_tree):
    """Shapes with a place each: this host's first device, where none is given (Orbax would put them where they were when saved)."""
    default_sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default_sharding),
        abstract_tree,
    )


class _ErrorTranslator:
    """Turns what goes wrong inside Orbax into one sentence."""

    def __init__(self, subject: str, directory: Path, verb: str = "written"):
        self.message, self.verb = f"{subject} in {directory} could not be {verb}", verb

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, RadianceError):
            reason = (
                str(error).strip().splitlines()[0][:300]
                if str(error).strip()
                else error_type.__name__
            )
            if self.verb == "written" and is_disk_full(error):
                reason = (
                    f"its disk is full: make room there and run the same command again ({reason})"
                )
            raise CheckpointError(f"{self.message}: {reason}") from error
