"""Callbacks of the trainer: what happens after a step, each at its own interval."""

from collections.abc import Sequence

import jax
import numpy as np

from radiance import config
from radiance.distributed.hardware import find_device_spec
from radiance.model.flops import training_flops
from radiance.training.checks import check_finite
from radiance.training.optimizer import make_lr_schedule
from radiance.training.snapshots import Snapshots
from radiance.training.step import Metrics
from radiance.training.trainer import Trainer
from radiance.training.validation import sample_gallery


class Callback:
    """An action after every `every` steps, and after the last one."""

    every: int

    def after_step(self, trainer: Trainer, metrics: Metrics):
        """Act on the state after a step.

        Args:
            trainer: The training, whose `step` counts the steps done.
            metrics: Metrics of the step on the devices. Several seeds are on a leading axis.
        """
        raise NotImplementedError

    def close(self):
        """Wait for what is being written."""


def make_callbacks(trainer: Trainer) -> list[Callback]:
    """Return the callbacks in the order in which they act after a step.

    A snapshot comes before the checkpoint, because a start from the checkpoint does not repeat the
    step. Samples come after it, because a step is worth more than an image.
    """
    run = trainer.run
    callbacks: list[Callback] = [
        FiniteCheckCallback(),
        LogCallback(run),
        ProgressCallback(),
    ]
    if trainer.inputs.has_validation:
        callbacks.append(ValidationCallback(run))
    if run.optimizer.ema_widths:
        callbacks.append(SnapshotCallback(trainer))
    return [*callbacks, CheckpointCallback(run), SampleCallback(run)]


class FiniteCheckCallback(Callback):
    """Stops a run whose loss stays non-finite. Seeds of a group do not stop each other."""

    every = 1

    def __init__(self):
        self._last_metrics: Metrics | None = None

    def after_step(self, trainer: Trainer, metrics: Metrics):
        """Check the step before, so that the device always has the next step to do."""
        if self._last_metrics is not None and not trainer.is_group:
            check_finite(trainer.run, self._last_metrics, trainer.step - 1, trainer.checkpoints)
        self._last_metrics = metrics


class LogCallback(Callback):
    """Writes a row of metrics."""

    def __init__(self, run: config.Config):
        self.every = run.train.log_every
        self._lr_schedule = make_lr_schedule(run.optimizer, run.train.steps)

    def after_step(self, trainer: Trainer, metrics: Metrics):
        """Write loss, gradient norms, learning rate, counts and throughput of each seed."""
        feed, images_per_second = trainer.feed, trainer.progress.images_per_second
        throughput = {
            "images_per_second": images_per_second,
            "input_wait_seconds": feed.wait_seconds,
        } | compute_throughput(trainer.run, images_per_second / trainer.mesh.size, feed.shapes)
        if trainer.seconds_to_first_step is not None:
            throughput["seconds_to_first_step"] = trainer.seconds_to_first_step
            trainer.seconds_to_first_step = None
        rows = []
        for index, writer in enumerate(trainer.writers):
            seed_metrics = trainer.seed_metrics(metrics, index)
            skipped_steps = int(seed_metrics["skipped_steps"])
            norms = {part: float(norm) for part, norm in seed_metrics["gradient_norms"].items()}
            row = {
                "loss": float(seed_metrics["loss"]),
                "gradient_norm": float(seed_metrics["gradient_norm"]),
                "gradient_norms": norms,
                "learning_rate": float(
                    np.asarray(self._lr_schedule(trainer.step - 1 - skipped_steps))
                ),
                "skipped_steps": skipped_steps,
                "captions_cut": feed.num_cut_captions[index],
                "images_skipped": feed.num_skipped_images[index],
            }
            if "fake_loss" in seed_metrics:
                row["fake_loss"] = float(seed_metrics["fake_loss"])
            writer.write_metrics(trainer.step, row | throughput)
            rows.append(row)
        feed.reset_counts()
        trainer.shown_metrics = {
            name: float(np.mean([row[name] for row in rows])) for name in ("loss", "gradient_norm")
        }


class ProgressCallback(Callback):
    """Shows the steps done and the newest metrics on the terminal."""

    every = 1

    def after_step(self, trainer: Trainer, metrics: Metrics):
        """Update the progress bar, and leave the first step, which compiles, out of the rate."""
        if trainer.step == trainer.first_step + 1:  # the first step compiles
            jax.block_until_ready(metrics)
            trainer.progress.reset_rate(trainer.step)
        trainer.progress.update(trainer.step, trainer.shown_metrics)


class ValidationCallback(Callback):
    """Computes and writes validation losses."""

    def __init__(self, run: config.Config):
        self.every = run.train.validate_every

    def after_step(self, trainer: Trainer, metrics: Metrics):
        """Write the losses of each seed and print their means."""
        losses = trainer.write_validation_losses()
        means = ", ".join(f"{seed_losses.mean():.4f}" for seed_losses in losses)
        trainer.progress.print_line(f"step {trainer.step}: validation loss {means}")


class SnapshotCallback(Callback):
    """Writes snapshots of the averages, from which those of other widths are computed later."""

    def __init__(self, trainer: Trainer):
        self.every = trainer.run.train.snapshot_every
        self._snapshots = [
            Snapshots(directory.average_dir, trainer.progress.print_line)
            for directory in trainer.inputs.directories
        ]

    def after_step(self, trainer: Trainer, metrics: Metrics):
        """Write a snapshot of each seed."""
        # With several hosts, two saves at once would wait for each other.
        trainer.checkpoints.wait_and_report(trainer.progress.print_line)
        for index, snapshots in enumerate(self._snapshots):
            snapshots.save(trainer.seed_state(index))

    def close(self):
        """Wait for the snapshots that are being written."""
        for snapshots in self._snapshots:
            snapshots.close()


class CheckpointCallback(Callback):
    """Saves the state."""

    def __init__(self, run: config.Config):
        self.every = run.train.checkpoint_every

    def after_step(self, trainer: Trainer, metrics: Metrics):
        """Start to write a checkpoint, unless the loss stays non-finite."""
        if not trainer.is_group:
            check_finite(trainer.run, metrics, trainer.step, trainer.checkpoints)
        trainer.save_checkpoint()


class SampleCallback(Callback):
    """Samples images of the same prompts and seeds, as the model learns."""

    def __init__(self, run: config.Config):
        self.every = run.train.sample_every

    def after_step(self, trainer: Trainer, metrics: Metrics | None = None):
        """Write a contact sheet of each seed."""
        inputs = trainer.inputs
        for index, (run, writer) in enumerate(zip(inputs.runs, trainer.writers)):
            params = trainer.seed_params(index)
            sample_gallery(
                run,
                inputs.encoder,
                inputs.prompts,
                params,
                trainer.step,
                writer,
                trainer.progress.print_line,
            )


def compute_throughput(
    run: config.Config, images_per_second: float, shapes: Sequence[tuple[int, int, int]]
) -> dict[str, float]:
    """Return TFLOP/s of a device, and the fraction of its peak (MFU) if that is known.

    The result is empty where a teacher works in every step, which is not counted.

    Args:
        run: Config of the run.
        images_per_second: Images per second of one device.
        shapes: Height, width and text tokens of an image, step by step.
    """
    if run.distill.has_guided_targets:
        return {}
    flops_per_image = [training_flops(run.model, *shape, run.lora.rank > 0) for shape in shapes]
    flops = images_per_second * float(np.mean(flops_per_image))
    device = find_device_spec(jax.devices()[0].device_kind)
    mfu = {"mfu": flops / device.flops_per_second} if device else {}
    return {"tflops_per_device": flops / 1e12} | mfu
