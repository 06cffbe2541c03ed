"""Snapshots of a run's averages, from which averages of other widths are computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from radiance import config
from radiance.base.errors import CheckpointError, OutputError
from radiance.base.files import require_space
from radiance.model.transformer import Params
from radiance.training.checkpoint_errors import ErrorTranslator
from radiance.training.ema import solve_posthoc_coefficients
from radiance.training.run_directory import find_complete_steps
from radiance.training.step import TrainState

# Some leaves of a tree may be read alone.
PARTIAL_LOAD = ocp.options.PyTreeOptions(
    loading=ocp.options.PyTreeOptions.Loading(partial_load=True)
)
MAX_RELATIVE_ERROR = 0.1  # of a post-hoc average, relative to the requested one


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

    @cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        """The writer, which creates the folder."""
        return ocp.training.Checkpointer(str(self.directory))

    @property
    def steps(self) -> list[int]:
        """Steps of all snapshots."""
        return find_complete_steps(self.directory)

    def save(self, state: TrainState):
        """Write the averages of `state`, if there is room for them and for a checkpoint."""
        step = int(state.step)
        if step in self.steps:  # written before an interruption, with the same contents
            return
        averages = {
            name: average for name, average in state.ema.items() if name.startswith("width=")
        }
        num_bytes = sum(x.nbytes for x in jax.tree.leaves((averages, state)))
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
                items = ocp.load_checkpointables(str(self.directory / str(step)), abstract_items)
                leaves = (jax.tree.leaves(items["averages"][name])[0] for name in names)
                total += sum(
                    float(coefficient) * leaf
                    for coefficient, leaf in zip(step_coefficients, leaves)
                )
            return total

        with (
            ErrorTranslator("A snapshot", self.directory, "read"),
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
            with ErrorTranslator(subject, self.directory):
                yield
        except (CheckpointError, OutputError) as error:
            self.report(f"No snapshot of the averages, and training continues. {error}")


def _nest_leaf(keys: tuple, leaf: Any) -> Params:
    """Return a tree with one leaf at the path of `keys`."""
    for key in reversed(keys):
        leaf = {key.key: leaf}
    return leaf
