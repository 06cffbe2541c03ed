"""Finding a trained model by what the user calls it."""

from pathlib import Path

from radiance import config
from radiance.pipeline import Pipeline
from radiance.training.checkpoints import Checkpoints
from radiance.training.directory import RunDirectory


def load(model: str | Path, weights: str | None = None) -> Pipeline:
    """The pipeline of a run directory, at its newest checkpoint.

    weights: params, ema or ema=DECAY; the run's own choice when None. Raises ConfigError or CheckpointError when there is none.
    """
    directory = RunDirectory(Path(model))
    run = directory.read_config()
    checkpoints = Checkpoints(directory.checkpoints)
    if checkpoints.latest is None:
        raise config.ConfigError(f"{model} has no checkpoint yet: train it for at least train.checkpoint_every steps.")
    which = weights or run.sample.weights
    params = checkpoints.restore_weights(checkpoints.latest, run, which)
    return Pipeline(run, params, f"{run.name} step {checkpoints.latest} {which}")
