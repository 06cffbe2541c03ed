"""What a run starts from: its own newest checkpoint, else the weights of `init`, else fresh ones. And whether `init` arrived well."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from radiance import config
from radiance.base.trees import flatten_tree
from radiance.distributed.sharding import host_shardings
from radiance.flow.timesteps import timestep_quantile
from radiance.model.paths import is_always_float32
from radiance.model.transformer import Params, make_abstract_params
from radiance.training.checkpoints import Checkpoints
from radiance.training.run_directory import RunDirectory, is_run_directory
from radiance.training.step import VALIDATION_BINS, TrainState, init_state
from radiance.weights import checkpoint
from radiance.weights.opening import open_tensors

MAX_LOSS_RATIO = 1.5  # times more or less than is known


def initialize_state(
    run: config.Config, checkpoints: Checkpoints, abstract_state: TrainState, shardings: TrainState
) -> tuple[int, TrainState, str]:
    """Step and state to go on from, and what they are."""
    latest_step = checkpoints.latest_step
    if latest_step is not None:
        return (
            latest_step,
            checkpoints.restore(latest_step, abstract_state),
            f"going on from step {latest_step}",
        )
    init_fresh_state = jax.jit(partial(init_state, run), out_shardings=shardings)
    if not run.init:
        return 0, init_fresh_state(), "from scratch"
    if run.lora.rank:
        return 0, init_fresh_state(), f"a LoRA of rank {run.lora.rank} for {run.init}"
    params = load_pretrained_params(run.init, run, shardings.params)
    return 0, init_fresh_state(params), f"from the weights of {run.init}"


def load_pretrained_params(
    path: str, run: config.Config, shardings: Params | None = None
) -> Params:
    """Weights to start from: of a checkpoint file, or the averaged ones of a run directory. They must be of `run.model`."""
    if not is_run_directory(path):
        return checkpoint.read_checkpoint(path, run.model, shardings)[1]
    source_run, checkpoints = _open_source_run(path, run)
    return checkpoints.restore_params(
        checkpoints.latest_step, source_run, source_run.sample.weights, shardings
    )


def load_base_params(run: config.Config, shardings: Params | None = None) -> Params:
    """The weights that a LoRA run adds to, stored as `run.lora` says."""
    return load_frozen_params(
        run.init,
        run,
        run.lora.dtype,
        None if run.lora.weight_format == "none" else run.lora.weight_format,
        shardings,
    )


def load_frozen_params(
    path: str,
    run: config.Config,
    dtype: str,
    weight_format: str | None = None,
    shardings: Params | None = None,
) -> Params:
    """Weights that are not trained, in as little memory as they may take: of `load_weights`, in `dtype` but for the parts that must stay precise."""
    if not is_run_directory(path):
        return checkpoint.open_checkpoint(path, run.model).load_params(
            dtype, weight_format, shardings
        )
    if weight_format:
        return checkpoint.checkpoint_from_params(
            run.model,
            load_pretrained_params(path, run, host_shardings(make_abstract_params(run.model))),
            path,
        ).load_params(dtype, weight_format, shardings)
    params = load_pretrained_params(path, run, shardings)  # in parts, where there are places
    leaves = [
        x if is_always_float32(path) else x.astype(dtype)
        for path, x in flatten_tree(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def check_pretrained_params(path: str, run: config.Config):
    """Raises ConfigError or CheckpointError when `load_weights` would, as far as can be told without reading them."""
    if is_run_directory(path):
        _open_source_run(path, run)
    else:
        checkpoint.open_checkpoint(path, run.model)


def identify_weights(path: str, run: config.Config) -> str:
    """What tells the weights of a file or of a run directory from others: a LoRA goes on with none but its own, and a student with its teacher."""
    if not is_run_directory(path):
        return open_tensors(path).fingerprint()
    source_run, checkpoints = _open_source_run(path, run)
    losses = [
        row["loss"]
        for row in RunDirectory(Path(path)).read_metrics()
        if "loss" in row and row["step"] <= checkpoints.latest_step
    ]
    loss_text = (
        f" loss {losses[-1]}" if losses else ""
    )  # in all its digits: another run of that name has another
    return (
        f"{source_run.name} step {checkpoints.latest_step}{loss_text} {source_run.sample.weights}"
    )


def _open_source_run(path: str, run: config.Config) -> tuple[config.Config, Checkpoints]:
    """A run directory to start from: its config, which must be of the same model, and its checkpoints, of which it must have one."""
    run_dir = RunDirectory(Path(path))
    source_run = run_dir.read_config()
    if changes := config.differences(source_run.model, run.model, "model."):
        changes_text = ", ".join(
            f"{key} is {old!r} there, {new!r} here" for key, (old, new) in changes.items()
        )
        raise config.ConfigError(
            f"{path} is a run of another model ({changes_text}): make the models equal."
        )
    if source_run.lora.rank:
        raise config.ConfigError(
            f"{path} has a LoRA and no weights: give a file that `radiance convert {path} FILE` merges them into."
        )
    checkpoints = Checkpoints(run_dir.checkpoint_dir)
    if checkpoints.latest_step is None:
        raise config.ConfigError(f"{path} has no checkpoint yet: train it first.")
    return source_run, checkpoints


# --- did the weights arrive well? -------------------------------------------------------------------------------------


class ReferenceLoss(NamedTuple):
    """The loss that the weights of `init` had before."""

    low: float
    high: float
    source: str
    flow: config.Flow  # of the times that it is a mean over

    def matches(self, loss: float) -> bool:
        return self.low / MAX_LOSS_RATIO <= loss <= self.high * MAX_LOSS_RATIO


def find_reference_loss(run: config.Config) -> ReferenceLoss | None:
    """From the run or the file that `init` names, or from what is known of the published models."""
    if is_run_directory(run.init):
        loss, source = RunDirectory(Path(run.init)).last_validation_loss(), "the run it comes from"
    else:
        loss, source = (
            checkpoint.read_validation_loss(open_tensors(run.init)),
            "the run it was exported from",
        )
    if loss is not None:
        return ReferenceLoss(loss, loss, source, config.Flow(timestep_distribution="uniform"))
    # Whatever the run says of what a file may not say: that is what the loss is to tell.
    free_settings = {
        name: getattr(run.model, name) for name in ("text_ids", "prediction", "masking")
    }
    if run.model == replace(config.MODELS["chroma1-radiance-x0"], **free_settings):
        return ReferenceLoss(
            0.058,
            0.063,
            "the published x0 model on its authors' images",
            config.Flow(timestep_distribution="logistic"),
        )
    return None


def diagnose_loss(
    run: config.Config,
    reference: ReferenceLoss | None,
    bin_losses: np.ndarray,
    measure: Callable[[config.Config], np.ndarray],
) -> str:
    """What the validation loss before the first step says of the weights, in one or two sentences.

    bins: mean loss in each of the validation's bins of time. measure: the same under another config. A loss far from what is
    known is measured again with one setting changed at a time, and the change that mends it is named.
    """
    if reference is None:
        return f"step 0: validation loss {bin_losses.mean():.4f} of {run.init}."
    bin_weights = timestep_bin_weights(reference.flow, run)
    loss = float(bin_weights @ bin_losses)
    summary = f"step 0: validation loss {loss:.4f} of {run.init}; {reference.source} had {reference.low:.4g}"
    summary += "" if reference.high == reference.low else f" to {reference.high:.4g}"
    if reference.matches(loss):
        return f"{summary}: the weights arrived well."
    losses = {
        change: float(bin_weights @ measure(config.override(run, [change])))
        for change in list_alternatives(run)
    }
    best_change = min(
        losses,
        key=lambda change: abs(math.log(losses[change] ** 2 / (reference.low * reference.high))),
    )
    losses_text = ", ".join(f"{change} gives {value:.4f}" for change, value in losses.items())
    if reference.matches(losses[best_change]):
        return (
            f"{summary}, which is far off: {best_change} is probably what is wrong ({losses_text})."
        )
    return f"{summary}, which is far off, and no one change mends it ({losses_text}): the images, captions or text encoder are others, or the file is damaged."


def list_alternatives(run: config.Config) -> Iterator[str]:
    """Changes of what a file may not say of itself: variant, masking and precision. None of them changes the parameters."""
    model = run.model
    yield f"model.prediction={'velocity' if model.prediction == 'x0' else 'x0'}"
    yield f"model.text_ids={'zero' if model.text_ids == 'sequential' else 'sequential'}"
    maskings = ("one_pad", "off") if model.padding == "learned" else ("one_pad", "strict", "off")
    yield from (f"model.masking={name}" for name in maskings if name != model.masking)
    if run.compute.dtype == "bfloat16":
        yield "compute.dtype=float32"


def timestep_bin_weights(flow: config.Flow, run: config.Config) -> np.ndarray:
    """The share of a time law in each of the validation's equal bins."""
    tokens = (run.data.resolution // run.model.patch) ** 2
    quantiles = (np.arange(10_000) + 0.5) / 10_000
    times = np.asarray(timestep_quantile(flow, quantiles, tokens))
    return np.histogram(times, VALIDATION_BINS, (0, 1))[0] / len(times)
