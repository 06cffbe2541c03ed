"""Checkpoints of a run and snapshots of its averages, written in the background and atomically.

Parameters, averages, optimizer state and progress are separate items. An interrupted save leaves a
temporary directory that nothing reads, and the checkpoint before it stays valid.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

# Orbax logs every step of every save, and thousands of lines for a failure. One sentence suffices.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

# Some leaves of a tree may be read alone.
PARTIAL_LOAD = ocp.options.PyTreeOptions(
    loading=ocp.options.PyTreeOptions.Loading(partial_load=True)
)
MAX_RELATIVE_ERROR = 0.1  # of a post-hoc average, relative to the requested one


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: Folder of the checkpoints, which may not exist yet.
        max_to_keep: Number of newest checkpoints to keep.

    Attributes:
        last_save_failed: Whether the last save failed, and the next one must succeed.
    """

    def __init__(self, directory: Path, max_to_keep: int = 1):
        self.directory = Path(directory).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(max_to_keep),
        )
        self.last_save_failed = False

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, including one that is still being written."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, including one that is still being written."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest_complete_step(self) -> int | None:
        """Step of the newest checkpoint that is complete on disk."""
        return find_latest_complete_step(self.directory)

    def save(self, state: TrainState, report: Callable[[str], None] = print):
        """Start to write `state`, which may be donated at once.

        Raises:
            CheckpointError: Two saves in a row failed.
            OutputError: There is no room for the checkpoint.
        """
        items = _split_state(state)
        self.wait_and_report(report)
        require_space(self.directory, sum(x.nbytes for x in jax.tree.leaves(items)))
        with _ErrorTranslator(f"The checkpoint of step {int(state.step)}", self.directory):
            self._checkpointer.save_checkpointables_async(int(state.step), items, force=True)
            if self.last_save_failed:  # a second failure must stop the run
                self._checkpointer.wait()
                self.last_save_failed = False

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Return the state of a step, with the shapes and shardings of `abstract_state`."""
        items = self._restore_items(step, _split_state(_with_shardings(abstract_state)))
        return TrainState(
            params=items["params"],
            ema=items.get("ema", {}),
            optimizer_state=items["optimizer"],
            **items["progress"],
        )

    def restore_params(
        self, step: int, run: config.Config, selector: str, shardings: Params | None = None
    ) -> Params:
        """Return only the weights; of a LoRA run, its adapters.

        Args:
            step: Step of the checkpoint.
            run: Config of the run that wrote it.
            selector: params; ema (the largest decay, or params without averages); ema=DECAY; or
                width=WIDTH, which is computed from snapshots if the run does not keep that width.
            shardings: Shardings of the weights; the first device if None.
        """
        abstract_params = _abstract_params(run, shardings)
        width = config.Sample(weights=selector).ema_width
        posthoc_width = None if width in run.optimizer.ema_widths else width
        is_posthoc = posthoc_width is not None
        name = None if is_posthoc else resolve_average(selector, run.optimizer.ema_names)
        if not (is_posthoc or name):
            return self._restore_items(step, {"params": abstract_params})["params"]
        # Only the requested average is read, because each is as large as the weights.
        trainable, frozen = split_frozen(abstract_params, run.optimizer.frozen)
        items = ({"ema": {name: trainable}} if name else {}) | (
            {"params": frozen} if frozen else {}
        )
        with ocp.Context(pytree_options=PARTIAL_LOAD):
            restored = self._restore_items(step, items) if items else {}
        if posthoc_width is not None:
            snapshots = Snapshots(self.directory.with_name("averages"))
            average = snapshots.compute_average(run, posthoc_width, trainable)
        else:
            average = restored["ema"][name]
        return merge_params(average, restored["params"]) if frozen else average

    def _restore_items(self, step: int, abstract_items: dict) -> dict:
        """Return items of a checkpoint by name."""
        with _ErrorTranslator(f"The checkpoint of step {step}", self.directory, "read"):
            return self._checkpointer.load_checkpointables(step, abstract_items)

    def wait_and_report(self, report: Callable[[str], None] = print):
        """Wait for the checkpoint that is being written, and report a failure.

        The run continues after a failure and saves a later state. With several hosts, which must
        all do the same, the failure is raised as CheckpointError.
        """
        try:
            self.wait()
        except CheckpointError as error:
            if jax.process_count() > 1:
                raise
            self.last_save_failed = True
            report(f"No checkpoint was written, and training continues. {error}")

    def wait(self):
        """Wait for the checkpoint that is being written; raise CheckpointError if that failed."""
        with _ErrorTranslator("The last checkpoint", self.directory):
            self._checkpointer.wait()

    def close(self):
        """Wait for the checkpoint that is being written, and release the directory."""
        with _ErrorTranslator("The last checkpoint", self.directory):
            self._checkpointer.close()


def find_complete_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a directory, which may not exist."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def find_latest_complete_step(directory: Path) -> int | None:
    """Return the step of the newest complete checkpoint in a directory, which may not exist."""
    return max(find_complete_steps(directory), default=None)


class Snapshots:
    """Snapshots of the averages of `optimizer.ema_widths` at some steps of a run.

    All are kept; averages of other widths are computed from them. A snapshot that cannot be written
    is reported and left out, and the run continues.

    Args:
        directory: Folder of the snapshots.
        report: Prints a line.
    """

    def __init__(self, directory: Path, report: Callable[[str], None] = print):
        self.directory, self.report = Path(directory).absolute(), report
        self._checkpointer = ocp.training.Checkpointer(self.directory)

    @property
    def steps(self) -> list[int]:
        """Steps of all snapshots."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState):
        """Write the averages of `state`, if there is room for them and for a checkpoint."""
        step = int(state.step)
        if step in self.steps:  # written before an interruption, with the same contents
            return
        averages = {
            name: average for name, average in state.ema.items() if name.startswith("width=")
        }
        num_bytes = sum(x.nbytes for x in jax.tree.leaves((averages, _split_state(state))))
        has_space = False
        with self._report_errors(step):
            require_space(self.directory, num_bytes)
            has_space = True
        if jax.process_count() > 1:  # all hosts write, or none
            has_space = bool(multihost_utils.process_allgather(np.array(has_space)).all())
        if not has_space:
            return
        with self._report_errors(step):
            self._checkpointer.save_checkpointables(step, {"averages": averages})

    def compute_average(self, run: config.Config, width: float, abstract_params: Params) -> Params:
        """Return the average of a relative width at the newest snapshot, computed in float32.

        Args:
            run: Config of the run.
            width: Relative width of the average (arXiv 2312.02696).
            abstract_params: Shapes and shardings of the trainable parameters.

        Raises:
            CheckpointError: The snapshots are too few to come within a tenth of that average.
        """
        steps, widths = self.steps, run.optimizer.ema_widths
        snapshots = [(step, snapshot_width) for step in steps for snapshot_width in widths]
        coefficients, relative_error = (
            solve_posthoc_coefficients(snapshots, (steps[-1], width)) if snapshots else ([], 1.0)
        )
        if relative_error > MAX_RELATIVE_ERROR:
            raise CheckpointError(
                f"{self.directory} has {len(steps)} snapshots of the averages of width "
                f"{', '.join(map(str, widths))}, too few for one of width {width:g} (off by "
                f"{relative_error:.0%}): choose a width nearer to those, or train with a smaller "
                "train.snapshot_every."
            )
        coefficients = np.reshape(coefficients, (len(steps), -1))

        def average_leaf(keys: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
            names = [f"width={snapshot_width}" for snapshot_width in widths]
            abstract_items = {"averages": {name: _nest_leaf(keys, x) for name in names}}
            total: Any = 0.0
            for step, step_coefficients in zip(steps, coefficients):
                items = ocp.load_checkpointables(self.directory / str(step), abstract_items)
                leaves = (jax.tree.leaves(items["averages"][name])[0] for name in names)
                total += sum(
                    float(coefficient) * leaf
                    for coefficient, leaf in zip(step_coefficients, leaves)
                )
            return total

        with (
            _ErrorTranslator("A snapshot", self.directory, "read"),
            ocp.Context(pytree_options=PARTIAL_LOAD),
        ):
            return jax.tree_util.tree_map_with_path(average_leaf, abstract_params)

    def close(self):
        """Wait for the snapshot that is being written."""
        with self._report_errors(None):
            self._checkpointer.close()

    @contextmanager
    def _report_errors(self, step: int | None) -> Iterator[None]:
        subject = "The last snapshot" if step is None else f"The snapshot of step {step}"
        try:
            with _ErrorTranslator(subject, self.directory):
                yield
        except (CheckpointError, OutputError) as error:
            self.report(f"No snapshot of the averages, and training continues. {error}")


def _abstract_params(run: config.Config, shardings: Params | None) -> Params:
    """Return shapes and shardings of the parameters that the checkpoints of a run hold."""
    params = (
        jax.eval_shape(lambda: init_state(run)).params
        if run.lora.rank
        else make_abstract_params(run.model)
    )
    if shardings is not None:
        params = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            params,
            shardings,
        )
    return _with_shardings(params)


def _nest_leaf(keys: tuple, leaf: Any) -> Params:
    """Return a tree with one leaf at the path of `keys`."""
    for key in reversed(keys):
        leaf = {key.key: leaf}
    return leaf


def resolve_average(selector: str, names: Iterable[str]) -> str | None:
    """Return the name of the average that a selector means; None for the weights themselves.

    Args:
        selector: params, ema, ema=DECAY or width=WIDTH.
        names: Names of the averages that the run keeps.

    Raises:
        CheckpointError: The run does not keep that average.
    """
    names = list(names)
    decays = [name for name in names if not name.startswith("width=")]
    if selector == "params" or (selector == "ema" and not decays):
        return None
    width = config.Sample(weights=selector).ema_width
    if width is not None:
        name = f"width={width}"
    else:
        name = selector.partition("=")[2] or max(decays, key=float)
    if name not in names:
        choices = (name if name not in decays else f"ema={name}" for name in names)
        raise CheckpointError(
            f"The run has no average {selector!r}: it has params and "
            f"{', '.join(choices) or 'no averages'}."
        )
    return name


def _split_state(state: TrainState) -> dict:
    """Return the items of a checkpoint. Orbax cannot write an empty one, so `ema` may be absent."""
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
    """Return shapes that all have a sharding: this host's first device where none is given.

    Without one, Orbax would restore the sharding of the saved array.
    """
    default_sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default_sharding),
        abstract_tree,
    )


class _ErrorTranslator:
    """Translates an exception of Orbax into a CheckpointError of one sentence."""

    def __init__(self, subject: str, directory: Path, verb: str = "written"):
        self.message, self.verb = f"{subject} in {directory} could not be {verb}", verb

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if not isinstance(error, Exception) or isinstance(error, RadianceError):
            return
        lines = str(error).strip().splitlines()
        reason = lines[0][:300] if lines else error_type.__name__
        if self.verb == "written" and is_disk_full(error):
            reason = f"its disk is full: make room there and run the same command again ({reason})"
        raise CheckpointError(f"{self.message}: {reason}") from error
