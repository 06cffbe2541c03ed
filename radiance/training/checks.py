"""Checks of a run before and during training."""

from pathlib import Path

import jax

from radiance import config
from radiance.base.errors import TrainingError
from radiance.distributed.sharding import check_divisible
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import make_abstract_params
from radiance.training.checkpoint_reader import resolve_average
from radiance.training.checkpoints import Checkpoints
from radiance.training.seed_checkpoints import SeedCheckpoints
from radiance.training.step import Metrics
from radiance.training.tracking import require_loggers

PATH_SOURCES = ("folder", "jsonl", "tfds", "tar", "parquet")


def check_inputs_given(run: config.Config) -> None:
    """Raise ConfigError if several inputs of a run are missing, with all of them in one message.

    A single one has a message of its own where it is opened.

    Args:
        run: Config to check.
    """
    missing = []
    if any(not source.path and source.source in PATH_SOURCES for source in run.data.sources):
        missing.append("images and captions (data.path=LOCATION)")
    if run.text.encoder == "t5" and not run.text.file and not run.text.cache:
        missing.append("T5 (text.file=FILE, or text.cache=FOLDER filled by `radiance encode`)")
    for name, meaning, path in (
        ("init", "weights to start from", run.init),
        ("distill.teacher", "the teacher", run.distill.teacher),
    ):
        if path and not Path(path).expanduser().exists():
            missing.append(f"{meaning} ({name}={path} does not exist)")
    if len(missing) > 1:
        raise config.ConfigError(f"{run.name} lacks {', '.join(missing)}: give them all.")


def check_run(run: config.Config, mesh: jax.sharding.Mesh):
    """Raise ConfigError or CheckpointError if settings do not fit each other or the mesh.

    Args:
        run: Config to check.
        mesh: Mesh that the run will use.
    """
    require_loggers(run.train.loggers)
    num_microbatches = run.optimizer.gradient_accumulation_steps
    divisor = mesh.shape["data"] * mesh.shape["fsdp"] * num_microbatches
    if run.data.batch_size % divisor:
        raise config.ConfigError(
            f"data.batch_size={run.data.batch_size} is not a multiple of {divisor} (mesh data × "
            "fsdp × optimizer.gradient_accumulation_steps): change one of them."
        )
    if run.mesh.uneven == "error":
        check_divisible(make_abstract_params(run.model), mesh)
    if run.model.channels != 3 and run.distill.reads_images:
        raise config.ConfigError(
            f"model.channels={run.model.channels}, but {run.data.source} has images of 3 channels: "
            "train a pixel model."
        )
    # Raises for a width that is computed from snapshots after the run.
    resolve_average(run.sample.weights, run.optimizer.ema_names)
    for sample in (run.sample, run.distill.sample):
        # Raises for a schedule that has no distinct times.
        make_time_schedule(sample, (run.data.resolution // run.model.patch) ** 2)
    if run.model.pooled_dim:
        raise config.ConfigError(
            f"model.pooled_dim={run.model.pooled_dim}, but the {run.text.encoder} encoder gives no "
            "pooled vector: set it to 0."
        )


def check_finite(
    run: config.Config, metrics: Metrics, step: int, checkpoints: Checkpoints | SeedCheckpoints
):
    """Raise TrainingError after too many steps in a row whose loss or gradient is not finite.

    Args:
        run: Config of the run.
        metrics: Metrics of a step.
        step: Number of that step.
        checkpoints: Checkpoints of the run, for the message.
    """
    if int(metrics["consecutive_skipped_steps"]) < run.train.max_nonfinite_steps:
        return
    latest = checkpoints.latest_step
    saved = (
        "No checkpoint was written."
        if latest is None
        else f"The checkpoint of step {latest} is good."
    )
    raise TrainingError(
        f"The loss or its gradient was not finite in the {run.train.max_nonfinite_steps} steps up "
        f"to {step}: lower optimizer.learning_rate or look at the data. {saved}"
    )
