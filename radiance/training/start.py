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
from radiance.flow import time_quantile
from radiance.model.transformer import Params, abstract
from radiance.sharding import on_host
from radiance.training.checkpoints import Checkpoints
from radiance.training.directory import RunDirectory, is_run
from radiance.training.step import VALIDATION_BINS, State, init_state
from radiance.weights import checkpoint, native
from radiance.weights.files import open_tensors

FAR = 1.5  # times more or less than is known


def start(run: config.Config, checkpoints: Checkpoints, like: State, places: State) -> tuple[int, State, str]:
    """Step and state to go on from, and what they are."""
    latest = checkpoints.latest
    if latest is not None:
        return latest, checkpoints.restore(latest, like), f"going on from step {latest}"
    fresh = jax.jit(partial(init_state, run), out_shardings=places)
    if not run.init:
        return 0, fresh(), "from scratch"
    if run.lora.rank:
        return 0, fresh(), f"a LoRA of rank {run.lora.rank} for {run.init}"
    params = load_weights(run.init, run, places.params)
    return 0, fresh(params), f"from the weights of {run.init}"


def load_weights(path: str, run: config.Config, places: Params | None = None) -> Params:
    """Weights to start from: of a checkpoint file, or the averaged ones of a run directory. They must be of `run.model`."""
    if not is_run(path):
        return checkpoint.read(path, run.model, places)[1]
    their, checkpoints = _other_run(path, run)
    return checkpoints.restore_weights(checkpoints.latest, their, their.sample.weights, places)


def load_base(run: config.Config, places: Params | None = None) -> Params:
    """The weights that a LoRA run adds to, stored as `run.lora` says."""
    return load_still(run.init, run, run.lora.dtype, None if run.lora.store == "none" else run.lora.store, places)


def load_still(path: str, run: config.Config, dtype: str, store: str | None = None, places: Params | None = None) -> Params:
    """Weights that are not trained, in as little memory as they may take: of `load_weights`, in `dtype` but for the parts that must stay precise."""
    if not is_run(path):
        return checkpoint.open_checkpoint(path, run.model).params(dtype, store, places)
    if store:
        return checkpoint.of_params(run.model, load_weights(path, run, on_host(abstract(run.model))), path).params(dtype, store, places)
    weights = load_weights(path, run, places)  # in parts, where there are places
    leaves = [x if path.startswith(checkpoint.PRECISE) else x.astype(dtype) for path, x in native.flatten(weights).items()]
    return jax.tree.unflatten(jax.tree.structure(weights), leaves)


def check_weights(path: str, run: config.Config):
    """Raises ConfigError or CheckpointError when `load_weights` would, as far as can be told without reading them."""
    if is_run(path):
        _other_run(path, run)
    else:
        checkpoint.open_checkpoint(path, run.model)


def identity_of(path: str, run: config.Config) -> str:
    """What tells the weights of a file or of a run directory from others: a LoRA goes on with none but its own, and a student with its teacher."""
    if not is_run(path):
        return open_tensors(path).fingerprint()
    their, checkpoints = _other_run(path, run)
    losses = [row["loss"] for row in RunDirectory(Path(path)).read_metrics() if "loss" in row and row["step"] <= checkpoints.latest]
    last = f" loss {losses[-1]}" if losses else ""  # in all its digits: another run of that name has another
    return f"{their.name} step {checkpoints.latest}{last} {their.sample.weights}"


def _other_run(path: str, run: config.Config) -> tuple[config.Config, Checkpoints]:
    """A run directory to start from: its config, which must be of the same model, and its checkpoints, of which it must have one."""
    other = RunDirectory(Path(path))
    their = other.read_config()
    if changed := config.differences(their.model, run.model, "model."):
        told = ", ".join(f"{key} is {old!r} there, {new!r} here" for key, (old, new) in changed.items())
        raise config.ConfigError(f"{path} is a run of another model ({told}): make the models equal.")
    if their.lora.rank:
        raise config.ConfigError(f"{path} has a LoRA and no weights: give a file that `radiance convert {path} FILE` merges them into.")
    checkpoints = Checkpoints(other.checkpoints)
    if checkpoints.latest is None:
        raise config.ConfigError(f"{path} has no checkpoint yet: train it first.")
    return their, checkpoints


# --- did the weights arrive well? -------------------------------------------------------------------------------------


class Known(NamedTuple):
    """The loss that the weights of `init` had before."""

    low: float
    high: float
    source: str
    law: config.Flow  # of the times that it is a mean over

    def fits(self, loss: float) -> bool:
        return self.low / FAR <= loss <= self.high * FAR


def known_loss(run: config.Config) -> Known | None:
    """From the run or the file that `init` names, or from what is known of the published models."""
    if is_run(run.init):
        loss, source = RunDirectory(Path(run.init)).plain_loss(), "the run it comes from"
    else:
        loss, source = checkpoint.noted_loss(open_tensors(run.init)), "the run it was exported from"
    if loss is not None:
        return Known(loss, loss, source, config.Flow(time_law="uniform"))
    # Whatever the run says of what a file may not say: that is what the loss is to tell.
    untold = {name: getattr(run.model, name) for name in ("text_ids", "prediction", "masking")}
    if run.model == replace(config.MODELS["chroma1-radiance-x0"], **untold):
        return Known(0.058, 0.063, "the published x0 model on its authors' pictures", config.Flow(time_law="logistic"))
    return None


def verdict(run: config.Config, known: Known | None, bins: np.ndarray, measure: Callable[[config.Config], np.ndarray]) -> str:
    """What the validation loss before the first step says of the weights, in one or two sentences.

    bins: mean loss in each of the validation's bins of time. measure: the same under another config. A loss far from what is
    known is measured again with one setting changed at a time, and the change that mends it is named.
    """
    if known is None:
        return f"step 0: validation loss {bins.mean():.4f} of {run.init}."
    shares = bin_shares(known.law, run)
    loss = float(shares @ bins)
    here = f"step 0: validation loss {loss:.4f} of {run.init}; {known.source} had {known.low:.4g}"
    here += "" if known.high == known.low else f" to {known.high:.4g}"
    if known.fits(loss):
        return f"{here}: the weights arrived well."
    tried = {change: float(shares @ measure(config.override(run, [change]))) for change in alternatives(run)}
    best = min(tried, key=lambda change: abs(math.log(tried[change] ** 2 / (known.low * known.high))))
    told = ", ".join(f"{change} gives {value:.4f}" for change, value in tried.items())
    if known.fits(tried[best]):
        return f"{here}, which is far off: {best} is probably what is wrong ({told})."
    return f"{here}, which is far off, and no one change mends it ({told}): the pictures, captions or text encoder are others, or the file is damaged."


def alternatives(run: config.Config) -> Iterator[str]:
    """Changes of what a file may not say of itself: variant, masking and precision. None of them changes the parameters."""
    model = run.model
    yield f"model.prediction={'velocity' if model.prediction == 'x0' else 'x0'}"
    yield f"model.text_ids={'zero' if model.text_ids == 'sequential' else 'sequential'}"
    maskings = ("one_pad", "off") if model.padding == "learned" else ("one_pad", "strict", "off")
    yield from (f"model.masking={name}" for name in maskings if name != model.masking)
    if run.compute.dtype == "bfloat16":
        yield "compute.dtype=float32"


def bin_shares(law: config.Flow, run: config.Config) -> np.ndarray:
    """The share of a time law in each of the validation's equal bins."""
    tokens = (run.data.side // run.model.patch) ** 2
    uniform = (np.arange(10_000) + 0.5) / 10_000
    times = np.asarray(time_quantile(law, uniform, tokens))
    return np.histogram(times, VALIDATION_BINS, (0, 1))[0] / len(times)
