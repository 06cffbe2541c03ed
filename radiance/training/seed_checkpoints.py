"""Checkpoints of seeds that are trained together."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax

from radiance.base.errors import CheckpointError
from radiance.training.checkpoint_reader import read_newest
from radiance.training.checkpoints import Checkpoints
from radiance.training.run_directory import find_complete_steps
from radiance.training.seeds import select_abstract_seed, select_seed, stack_states
from radiance.training.step import TrainState


class SeedCheckpoints:
    """The checkpoints of seeds that are trained together, each in its own run directory.

    Each directory keeps at least two, so that all have a common one at any moment.

    Args:
        directories: Folder of the checkpoints of each seed.
        max_to_keep: Number of newest checkpoints to keep in each.
    """

    def __init__(self, directories: Sequence[Path], max_to_keep: int = 1):
        self._seeds = [Checkpoints(directory, max(max_to_keep, 2)) for directory in directories]

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that all seeds have."""
        steps = set.intersection(*(set(checkpoints.steps) for checkpoints in self._seeds))
        return max(steps, default=None)

    @property
    def complete_steps(self) -> list[int]:
        """Steps of the checkpoints that are complete on disk for all seeds, in rising order."""
        return sorted(set.intersection(*(set(seed.complete_steps) for seed in self._seeds)))

    @property
    def latest_complete_step(self) -> int | None:
        """Step of the newest checkpoint that is complete on disk for all seeds."""
        return max(self.complete_steps, default=None)

    def save(self, state: TrainState, report: Callable[[str], None] = print):
        """Start to write the state of each seed, which may be donated at once.

        Seeds whose last save failed come first, and are waited for: until then the others keep the
        newest checkpoint that all have.
        """
        self.wait_and_report(report)
        for index in sorted(
            range(len(self._seeds)), key=lambda index: not self._seeds[index].last_save_failed
        ):
            self._seeds[index].save(select_seed(state, index), report)

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Return the stacked state of a step, with the shapes and shardings of `abstract_state`."""
        abstract = select_abstract_seed(abstract_state)
        states = [checkpoints.restore(step, abstract) for checkpoints in self._seeds]
        return stack_states(states, jax.tree.map(lambda x: x.sharding, abstract_state))

    def restore_newest(self, abstract_state: TrainState) -> tuple[int, TrainState] | None:
        """Return the newest step that all seeds can restore, and the stacked state.

        Damaged checkpoints after it are reported, and all seeds keep theirs in `damaged_dir`.
        """

        def report(line: str):
            print(f"{line} The later ones of all seeds are kept in damaged/.", flush=True)

        newest = read_newest(
            lambda: self.complete_steps, lambda step: self.restore(step, abstract_state), report
        )
        if newest is not None:
            for checkpoints in self._seeds:
                checkpoints.set_aside_after(newest[0])
        return newest

    def wait_and_report(self, report: Callable[[str], None] = print):
        """Wait for the checkpoints that are being written, and report failures."""
        for checkpoints in self._seeds:
            checkpoints.wait_and_report(report)

    def close(self):
        """Wait for the checkpoints that are being written, and release the directories."""
        with ExitStack() as stack:  # closes all, even if one fails
            for checkpoints in self._seeds:
                stack.callback(checkpoints.close)


def open_checkpoints(
    directories: Sequence[Path], max_to_keep: int
) -> Checkpoints | SeedCheckpoints:
    """Return the checkpoints of one run, or of several seeds that are trained together.

    Checkpoints of a seed that others do not have are removed: training repeats their steps.

    Raises:
        CheckpointError: No checkpoint is common to all, and not because the first save was
            interrupted. Nothing is removed.
    """
    if len(directories) == 1:
        return Checkpoints(directories[0], max_to_keep)
    steps = [set(find_complete_steps(directory)) for directory in directories]
    common = set.intersection(*steps)
    if not common:
        _check_lost_checkpoints(directories, steps)
    if jax.process_index() == 0:
        for directory, seed_steps in zip(directories, steps):
            for step in seed_steps - common:
                shutil.rmtree(directory / str(step))
    return SeedCheckpoints(directories, max_to_keep)


def _check_lost_checkpoints(directories: Sequence[Path], steps: Sequence[set[int]]):
    """Raise CheckpointError if seeds without a common checkpoint have lost one.

    An interrupted first save leaves at most one checkpoint in a directory, and all directories
    exist: the trainer creates them before the first step.
    """
    is_missing = any(steps) and not all(directory.is_dir() for directory in directories)
    if is_missing or any(len(seed_steps) > 1 for seed_steps in steps):
        steps_text = "; ".join(
            f"{directory} has {', '.join(map(str, sorted(seed_steps))) or 'none'}"
            for directory, seed_steps in zip(directories, steps)
        )
        raise CheckpointError(
            f"The seeds have no checkpoint of the same step ({steps_text}): restore the missing "
            "ones, or remove all run directories of the group to train it from the beginning."
        )
