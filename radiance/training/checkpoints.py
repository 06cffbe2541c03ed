"""Checkpoints of a run, written in the background and atomically.

Parameters, averages, optimizer state and progress are separate items. An interrupted save leaves a
temporary directory that nothing reads, and the checkpoint before it stays valid.
"""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from radiance.base.errors import CheckpointError
from radiance.base.files import require_space
from radiance.training.checkpoint_errors import ErrorTranslator
from radiance.training.checkpoint_reader import CheckpointReader, split_state
from radiance.training.run_directory import find_free_path
from radiance.training.step import TrainState


class Checkpoints(CheckpointReader):
    """The checkpoints of one run directory.

    Args:
        directory: Folder of the checkpoints, which may not exist yet.
        max_to_keep: Number of newest checkpoints to keep.

    Attributes:
        last_save_failed: Whether the last save failed, and the next one must succeed.
    """

    def __init__(self, directory: Path, max_to_keep: int = 1):
        super().__init__(directory)
        self._checkpointer = ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=ocp.training.preservation_policies.LatestN(max_to_keep),
        )
        self.last_save_failed = False
        # Orbax keeps a thread and an event loop for a save until its result is taken.
        self._pending_save: ocp.AsyncResponse[bool] | None = None

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
    def damaged_dir(self) -> Path:
        """Folder beside the checkpoints where damaged ones are kept."""
        return self.directory.with_name("damaged")

    def restore_newest(self, abstract_state: TrainState) -> tuple[int, TrainState] | None:
        """Return the newest step that can be restored, and its state; None without checkpoints.

        Damaged checkpoints after it are reported and kept in `damaged_dir`.
        """

        def report(line: str):
            print(f"{line} The damaged one is kept in {self.damaged_dir}.", flush=True)

        newest = self.read_newest(lambda step: self.restore(step, abstract_state), report)
        if newest is not None:
            self.set_aside_after(newest[0])
        return newest

    def set_aside_after(self, step: int):
        """Move checkpoints after a step to `damaged_dir`: training repeats their steps."""
        later_steps = [later for later in self.complete_steps if later > step]
        if not later_steps:
            return
        if jax.process_index() == 0:
            self.damaged_dir.mkdir(exist_ok=True)
            for later in later_steps:
                os.replace(
                    self.directory / str(later), find_free_path(self.damaged_dir / str(later))
                )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints")
        self._checkpointer.reload()

    def save(self, state: TrainState, report: Callable[[str], None] = print):
        """Start to write `state`, which may be donated at once.

        Raises:
            CheckpointError: Two saves in a row failed.
            OutputError: There is no room for the checkpoint.
        """
        items = split_state(state)
        self.wait_and_report(report)
        require_space(self.directory, sum(x.nbytes for x in jax.tree.leaves(items)))
        with ErrorTranslator(f"The checkpoint of step {int(state.step)}", self.directory):
            self._pending_save = self._checkpointer.save_checkpointables_async(
                int(state.step), items, force=True
            )
            if self.last_save_failed:  # a second failure must stop the run
                self._wait()
                self.last_save_failed = False

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
        with ErrorTranslator("The last checkpoint", self.directory):
            self._wait()

    def close(self):
        """Wait for the checkpoint that is being written, and release the directory."""
        with ErrorTranslator("The last checkpoint", self.directory), closing(self._checkpointer):
            self._wait()

    def _wait(self):
        """Wait for the checkpoint that is being written, and release what its save holds."""
        pending_save, self._pending_save = self._pending_save, None
        if pending_save is not None:
            pending_save.result()
        self._checkpointer.wait()
