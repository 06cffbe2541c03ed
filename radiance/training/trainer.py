"""The state of a training in progress, on which the training loop and its callbacks act."""

import time
from contextlib import ExitStack, closing

import jax
import numpy as np
from jax.experimental import multihost_utils

from radiance.base.trees import count_params
from radiance.distributed.sharding import make_shardings
from radiance.model.transformer import Params, make_abstract_params
from radiance.training.feed import BatchFeed
from radiance.training.initialization import initialize_state, load_base_params, make_teacher
from radiance.training.inputs import RunInputs
from radiance.training.metric_writer import MetricWriter, NullMetricWriter
from radiance.training.progress import Progress, StepProfiler
from radiance.training.seed_checkpoints import open_checkpoints
from radiance.training.seeds import select_seed
from radiance.training.step import Metrics, TrainState
from radiance.training.tracking import Loggers
from radiance.training.validation import Validator, select_params


class Trainer:
    """The state of a training of one run, or of several seeds on a leading axis.

    The state starts from the newest checkpoint, else from the weights of `init`, else from random
    weights, and is sharded from the start.

    Args:
        inputs: Inputs of the training.

    Attributes:
        step: Number of steps done.
        first_step: Number of steps done before this start.
        saved_step: Step of the last checkpoint.
        state: State after `step`. Several seeds are on a leading axis.
        base: Weights that a LoRA run adds to, else None.
        teacher: Teacher of every step, else None.
        seeds: Seed of each run, if there are several; else None.
        shown_metrics: Metrics on the progress bar.
        start_time: Time of the monotonic clock when the training began.
        seconds_to_first_step: From then to the first step, with its compilation; None before, and
            after it is written.
        feed: Batches, after `open`.
        progress: Progress bar, after `open`.
        profiler: Profiler of some steps, after `open`.
        writers: Writer of each run directory, after `open`.
    """

    feed: BatchFeed
    progress: Progress
    profiler: StepProfiler
    writers: list[MetricWriter | NullMetricWriter]

    def __init__(self, inputs: RunInputs):
        self.start_time = time.monotonic()
        self.seconds_to_first_step: float | None = None
        self.inputs, self.run, self.mesh = inputs, inputs.run, inputs.mesh
        self.is_group = len(inputs.runs) > 1
        if _is_first_host():
            for directory in inputs.directories:
                directory.remove_partial_files()
        self.checkpoints = open_checkpoints(
            [directory.checkpoint_dir for directory in inputs.directories],
            self.run.train.max_to_keep,
        )
        init_params = inputs.feed.init_params if inputs.feed else None
        self.first_step, self.state, origin = initialize_state(
            self.run, inputs.seeds, self.checkpoints, inputs.abstract_state, self.mesh, init_params
        )
        self.step = self.saved_step = self.first_step
        self.base = None
        if self.run.lora.rank:
            shardings = make_shardings(make_abstract_params(self.run.model), self.mesh)
            self.base = load_base_params(self.run, shardings)
        self.teacher = make_teacher(self.run, inputs.encoder, self.mesh, self.base)
        self._validators = [
            Validator(run, inputs.validation_batches, self.mesh, self.teacher)
            for run in inputs.runs
        ]
        self.seeds = np.array(inputs.seeds, np.uint32) if self.is_group else None
        self.shown_metrics: dict[str, float] = {}
        if _is_first_host():
            for run, directory, changes in zip(inputs.runs, inputs.directories, inputs.changes):
                directory.write_metadata(run, inputs.data, self.first_step, changes)
        self._print_start(origin)

    def _print_start(self, origin: str):
        paths = ", ".join(str(directory.path) for directory in self.inputs.directories)
        num_params = count_params(self.inputs.abstract_state.params) // len(self.inputs.runs)
        print(
            f"{paths}: {num_params / 1e6:.1f} M parameters, {self.inputs.num_images} images, "
            f"{self.mesh.size} device(s), {origin}.",
            flush=True,
        )

    def open(self, stack: ExitStack):
        """Open the batches, the run directories and the progress bar; `stack` closes them."""
        inputs, num_images = self.inputs, self.run.data.batch_size * len(self.inputs.runs)
        self.feed = stack.enter_context(closing(BatchFeed(inputs, self.first_step)))
        stack.enter_context(closing(self.checkpoints))
        self.writers = [
            stack.enter_context(
                closing(
                    MetricWriter(directory, self.first_step, Loggers(run, self.first_step))
                    if _is_first_host()
                    else NullMetricWriter()
                )
            )
            for run, directory in zip(inputs.runs, inputs.directories)
        ]
        self.progress = stack.enter_context(
            closing(Progress(self.first_step, self.run.train.steps, num_images))
        )
        profile_dir, num_steps = (
            inputs.directories[0].path / "profile",
            self.run.train.profile_steps,
        )
        self.profiler = stack.enter_context(
            closing(StepProfiler(profile_dir, self.first_step, num_steps))
        )

    def is_due(self, every: int) -> bool:
        """Return whether an action with an interval is due after `step`; all are after the last."""
        return self.step % every == 0 or self.step == self.run.train.steps

    def seed_metrics(self, metrics: Metrics, index: int) -> Metrics:
        """Return the metrics of one seed."""
        return jax.tree.map(lambda x: x[index], metrics) if self.is_group else metrics

    def seed_state(self, index: int) -> TrainState:
        """Return the state of one seed."""
        return select_seed(self.state, index) if self.is_group else self.state

    def seed_params(self, index: int) -> Params:
        """Return the weights with which the run of one seed is validated and sampled."""
        return select_params(self.run, self.seed_state(index), self.base)

    def validate(self) -> np.ndarray:
        """Return the mean validation losses [seeds, bins]."""
        if self.inputs.feed:
            return self.inputs.feed.validate(select_params(self.run, self.state, self.base))
        return np.stack(
            [validate(self.seed_params(i)) for i, validate in enumerate(self._validators)]
        )

    def write_validation_losses(self) -> np.ndarray:
        """Compute the mean validation losses [seeds, bins], write them, and return them."""
        losses = self.validate()
        for writer, seed_losses in zip(self.writers, losses):
            row = {
                "validation_loss": float(seed_losses.mean()),
                "validation_bins": [float(x) for x in seed_losses],
            }
            writer.write_metrics(self.step, row)
        return losses

    def save_checkpoint(self):
        """Start to write a checkpoint of every seed."""
        self.checkpoints.save(self.state, self.progress.print_line)
        self.saved_step = self.step

    def is_sample_missing(self) -> bool:
        """Return whether an interruption prevented the samples after the newest checkpoint."""
        is_missing = (
            self.step > 0
            and self.run.model.channels == 3
            and self.is_due(self.run.train.sample_every)
            and not all(d.sample_path(self.step).is_file() for d in self.inputs.directories)
        )
        return bool(multihost_utils.broadcast_one_to_all(np.array(is_missing)))


def _is_first_host() -> bool:
    """Return whether this host writes for all."""
    return jax.process_index() == 0
