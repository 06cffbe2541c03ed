"""Read the checkpoints of a run, also while it is trained."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.model.transformer import Params, make_abstract_params
from radiance.training.checkpoint_errors import DamagedCheckpointError, ErrorTranslator
from radiance.training.parameter_groups import merge_params, split_frozen
from radiance.training.run_directory import find_complete_steps
from radiance.training.snapshots import PARTIAL_LOAD, Snapshots
from radiance.training.step import TrainState, init_state

MAX_ATTEMPTS = 10  # reads of a run that replaces its checkpoints faster than they can be read
T = TypeVar("T")


def read_newest(
    list_steps: Callable[[], list[int]],
    read: Callable[[int], T],
    report: Callable[[str], None] = print,
) -> tuple[int, T] | None:
    """Return the newest step that can be read, and what was read; None without checkpoints.

    A training may remove a checkpoint while it is read; then the one that replaced it is read.
    Damaged checkpoints are passed over. All hosts read the same step.

    Args:
        list_steps: Returns the steps of the complete checkpoints in rising order.
        read: Reads the checkpoint of a step.
        report: Prints a line about a damaged checkpoint.

    Raises:
        CheckpointError: No checkpoint can be read.
    """
    damaged: dict[int, CheckpointError] = {}
    last_error = None
    for _ in range(MAX_ATTEMPTS):
        all_steps = list_steps()
        steps = [step for step in all_steps if step not in damaged]
        if not steps:
            break
        try:
            result = _read_on_all_hosts(read, steps[-1])
        except CheckpointError as error:
            last_error = error
            if list_steps()[-1:] != all_steps[-1:]:
                continue  # it was removed, or is being removed
            if not isinstance(error, DamagedCheckpointError):
                raise
            damaged[steps[-1]] = error
            continue
        for step, error in damaged.items():
            if step > steps[-1]:
                report(f"{error}. Step {steps[-1]} is used instead.")
        return steps[-1], result
    if damaged:
        raise CheckpointError(
            f"{damaged[max(damaged)]}. No other checkpoint is complete: restore one from a copy, "
            "or train again with another name=."
        )
    if last_error is not None:
        raise last_error
    return None


def _read_on_all_hosts(read: Callable[[int], T], step: int) -> T:
    """Read a step; where a host fails, all hosts raise an error."""
    result, error = None, None
    try:
        result = read(step)
    except CheckpointError as read_error:
        error = read_error
    if jax.process_count() > 1:
        severity = 0 if error is None else 1 if isinstance(error, DamagedCheckpointError) else 2
        severities = multihost_utils.process_allgather(np.array(severity))
        if error is None and severities.any():
            kind = DamagedCheckpointError if severities.max() == 1 else CheckpointError
            error = kind(f"Another host could not read the checkpoint of step {step}")
    if error is not None:
        raise error
    return cast(T, result)


class CheckpointReader:
    """Reads the checkpoints in a directory, which may not exist, and changes nothing.

    Args:
        directory: Folder of the checkpoints.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).absolute()

    @property
    def complete_steps(self) -> list[int]:
        """Steps of the checkpoints that are complete on disk, in rising order."""
        return find_complete_steps(self.directory)

    @property
    def latest_complete_step(self) -> int | None:
        """Step of the newest checkpoint that is complete on disk."""
        return max(self.complete_steps, default=None)

    def read_newest(
        self, read: Callable[[int], T], report: Callable[[str], None] = print
    ) -> tuple[int, T] | None:
        """Return the newest step that can be read, and what was read; see `read_newest`."""
        return read_newest(lambda: self.complete_steps, read, report)

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Return the state of a step, with the shapes and shardings of `abstract_state`."""
        items = self._restore_items(step, split_state(_fill_shardings(abstract_state)))
        return TrainState(
            params=items["params"],
            ema=items.get("ema", {}),
            optimizer_state=items["optimizer"],
            fake_score=items.get("fake_score"),
            **items["progress"],
        )

    def restore_params(
        self, step: int, run: config.Config, selector: str, shardings: Params | None = None
    ) -> Params:
        """Return only the weights, which are the adapters in a LoRA run.

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
        with ErrorTranslator(f"The checkpoint of step {step}", self.directory, "read"):
            return ocp.load_checkpointables(str(self.directory / str(step)), abstract_items)


def split_state(state: TrainState) -> dict:
    """Return the items of a checkpoint. Orbax cannot write an empty one, so some may be absent."""
    progress = {
        "step": state.step,
        "skipped_steps": state.skipped_steps,
        "consecutive_skipped_steps": state.consecutive_skipped_steps,
    }
    averages = {"ema": state.ema} if state.ema else {}
    fake_score = {"fake_score": state.fake_score} if state.fake_score else {}
    return {
        "params": state.params,
        **averages,
        "optimizer": state.optimizer_state,
        **fake_score,
        "progress": progress,
    }


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
    return _fill_shardings(params)


def _fill_shardings(abstract_tree):
    """Return shapes that all have a sharding: this host's first device where none is given.

    Without one, Orbax would restore the sharding of the saved array.
    """
    default_sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default_sharding),
        abstract_tree,
    )
