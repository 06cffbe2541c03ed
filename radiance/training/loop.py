"""The trainer. Inputs come from `inputs.prepare`; actions after a step are in `callbacks`.

A run directory holds a run. The same command resumes it, bit for bit as without an interruption.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import jax
import numpy as np

from radiance import config
from radiance.base.compilation import report_compilation
from radiance.data.batches import make_validation_batches
from radiance.training.callbacks import SampleCallback, make_callbacks
from radiance.training.coordination import (
    exit_if_host_fails,
    handle_signals,
    is_any_host_stopping,
    lock_run_directory,
)
from radiance.training.inputs import RunInputs, prepare
from radiance.training.loss_diagnosis import diagnose_loss
from radiance.training.shared_programs import share_step
from radiance.training.step import TrainState
from radiance.training.trainer import Trainer
from radiance.training.validation import Validator


def train(run: config.Config, allowed_changes: Sequence[str] = ()) -> int:
    """Train a run in its directory, or resume it, and return the step that it reached.

    That is less than `train.steps` after SIGTERM or Ctrl-C.

    Args:
        run: The run.
        allowed_changes: What may differ when it resumes; see `resumption.check_resumable`.

    Raises:
        ConfigError, DataError, TextError, CheckpointError, OutputError: An input does not fit. This
            is found before any work.
        TrainingError: The loss stays non-finite.
    """
    with lock_run_directory(run.run_dir):
        step, _ = fit(prepare([run], allowed_changes=allowed_changes))
    return step


def fit(
    inputs: RunInputs, should_stop: Callable[[], bool] = lambda: False
) -> tuple[int, TrainState]:
    """Train one run, or several seeds together, and return the step reached and the state.

    Args:
        inputs: Inputs of the training.
        should_stop: Called after every step; training stops and is saved when it returns true.
    """
    run, trainer = inputs.run, Trainer(inputs)
    is_sample_missing = trainer.is_sample_missing()
    if trainer.step >= run.train.steps and not is_sample_missing:
        trainer.checkpoints.close()
        return trainer.step, trainer.state

    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(inputs.mesh))
        stop_event = stack.enter_context(handle_signals())
        trainer.open(stack)
        callbacks = make_callbacks(trainer)
        for callback in callbacks:
            stack.enter_context(closing(callback))
        stack.enter_context(exit_if_host_fails(trainer.checkpoints))

        if trainer.first_step == 0 and run.init:
            trainer.progress.print_line(_check_initial_loss(trainer))
        if is_sample_missing:
            SampleCallback(run).after_step(trainer)
        trainer.feed.skip_done()
        train_step = _compile_step(inputs)
        while trainer.step < run.train.steps:
            if is_any_host_stopping(stop_event, trainer.step, run.train.log_every):
                break
            if trainer.step > trainer.first_step and should_stop():
                break
            trainer.profiler.before_step(trainer.step)
            batch = next(trainer.feed)
            with _report_first_step(trainer):
                trainer.state, metrics = train_step(
                    trainer.state, batch, trainer.base, trainer.seeds, trainer.teacher
                )
            trainer.step += 1
            for callback in callbacks:
                if trainer.is_due(callback.every):
                    callback.after_step(trainer, metrics)
        if trainer.step > trainer.saved_step:
            trainer.save_checkpoint()
    return trainer.step, trainer.state


def _compile_step(inputs: RunInputs) -> Callable:
    """Return the compiled step: (state, batch, base, seeds, teacher) → (state, metrics)."""
    shardings = jax.tree.map(lambda x: x.sharding, inputs.abstract_state)
    return jax.jit(
        share_step(inputs.run, len(inputs.seeds)),
        in_shardings=(shardings, None, None, None, None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


@contextmanager
def _report_first_step(trainer: Trainer) -> Iterator[None]:
    """Report that the first step is compiled inside the block, and measure the time until then."""
    if trainer.step > trainer.first_step:
        yield
        return
    with report_compilation("the training step", report=trainer.progress.print_line):
        yield
        jax.block_until_ready(trainer.state.params)
    trainer.seconds_to_first_step = time.monotonic() - trainer.start_time


def _check_initial_loss(trainer: Trainer) -> str:
    """Write the loss of the weights of `init`, and return a diagnosis of it."""
    inputs, run = trainer.inputs, trainer.run
    if not inputs.has_validation:
        reason = "no image is held out" if run.distill.reads_images else "no image is read"
        return f"step 0: {reason}, so the loss of the weights cannot be checked."
    with report_compilation("the validation loss", report=trainer.progress.print_line):
        losses = trainer.write_validation_losses()

    def measure(other: config.Config) -> np.ndarray:
        # Batches with all of their text also show what the masking of the run hides.
        batches = make_validation_batches(
            inputs.sources["validation"],
            run.data,
            inputs.encoder,
            run.train.validation_images,
            "off",
        )
        return Validator(other, batches, trainer.mesh)(trainer.seed_params(0))

    return diagnose_loss(run, inputs.reference_loss, losses[0], measure)
