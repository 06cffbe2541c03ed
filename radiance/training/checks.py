"""Checks of a run before and during training."""

import jax

from radiance import config
from radiance.base.errors import TrainingError
from radiance.distributed.sharding import check_divisible
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import make_abstract_params
from radiance.training.checkpoints import Checkpoints, resolve_average
from radiance.training.step import Metrics
from radiance.training.tracking import require_loggers


def check_run(run: config.Config, mesh: jax.sharding.Mesh):
    require_loggers(run.train.loggers)
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * run.optimizer.gradient_accumulation_steps
    if run.data.batch_size % parts:
        raise config.ConfigError(
            f"data.batch_size={run.data.batch_size} does not divide into {parts} parts (mesh data × fsdp × optimizer.gradient_accumulation_steps): change one of them."
        )
    if run.mesh.uneven == "error":
        check_divisible(make_abstract_params(run.model), mesh)
    if run.model.channels != 3 and run.distill.kind != "trajectories":
        raise config.ConfigError(
            f"model.channels={run.model.channels}, but {run.data.source} has images of 3 channels: train a pixel model."
        )
    resolve_average(
        run.sample.weights, run.optimizer.ema_names
    )  # raises for a width that is made of snapshots after the run
    for sample in (run.sample, run.distill.sample):
        make_time_schedule(
            sample, (run.data.resolution // run.model.patch) ** 2
        )  # raises when the schedule cannot be
    if run.model.pooled_dim:
        raise config.ConfigError(
            f"model.pooled_dim={run.model.pooled_dim}, but the {run.text.encoder} encoder gives no pooled vector: set it to 0."
        )


def check_finite(run: config.Config, metrics: Metrics, step: int, checkpoints: Checkpoints):
    if int(metrics["consecutive_skipped_steps"]) < run.train.max_nonfinite_steps:
        return
    latest = checkpoints.latest_step
    raise TrainingError(
        f"The loss or its gradient was not finite in the {run.train.max_nonfinite_steps} steps up to {step}: lower optimizer.learning_rate or look at the "
        f"data. {'No checkpoint was written.' if latest is None else f'The checkpoint of step {latest} is good.'}"
    )
