"""Check by the loss before the first step whether pretrained weights were read correctly."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from radiance import config
from radiance.flow.timesteps import timestep_quantile
from radiance.training.run_directory import RunDirectory, is_run_directory
from radiance.training.step import VALIDATION_BINS
from radiance.weights import checkpoint
from radiance.weights.opening import open_tensors

MAX_LOSS_RATIO = 1.5  # between the measured loss and the reference


class ReferenceLoss(NamedTuple):
    """The loss that the weights of `init` had before."""

    low: float
    high: float
    source: str
    flow: config.Flow  # whose timestep distribution the loss is a mean over

    def matches(self, loss: float) -> bool:
        """Return whether a loss is near the reference."""
        return self.low / MAX_LOSS_RATIO <= loss <= self.high * MAX_LOSS_RATIO


def find_reference_loss(run: config.Config) -> ReferenceLoss | None:
    """Return the loss that the run or file of `init` records, or that of a published model."""
    if is_run_directory(run.init):
        loss, source = (
            RunDirectory(Path(run.init)).read_last_validation_loss(),
            "the run it comes from",
        )
    else:
        loss = checkpoint.read_validation_loss(open_tensors(run.init))
        source = "the run it was exported from"
    if loss is not None:
        return ReferenceLoss(loss, loss, source, config.Flow(timestep_distribution="uniform"))
    # A file does not record these settings. The loss shows whether those of the run are right.
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
    """Return one or two sentences about the validation loss before the first step.

    A loss far from the reference is measured again with one setting changed at a time. The sentence
    names the change whose loss is near the reference.

    Args:
        run: Config of the run.
        reference: Loss that the weights had before; None if unknown.
        bin_losses: Mean loss in each of the validation's bins of time.
        measure: Returns `bin_losses` under another config.
    """
    if reference is None:
        return f"step 0: validation loss {bin_losses.mean():.4f} of {run.init}."
    bin_weights = timestep_bin_weights(reference.flow, run)
    loss = float(bin_weights @ bin_losses)
    summary = (
        f"step 0: validation loss {loss:.4f} of {run.init}; {reference.source} had "
        f"{reference.low:.4g}"
    )
    summary += "" if reference.high == reference.low else f" to {reference.high:.4g}"
    if reference.matches(loss):
        return f"{summary}: the weights were read correctly."
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
            f"{summary}, which is very different: {best_change} is probably the right setting "
            f"({losses_text})."
        )
    return (
        f"{summary}, which is very different, and no single setting explains it ({losses_text}). "
        "Check that images, captions and text encoder match the checkpoint, and that the file is "
        "intact."
    )


def list_alternatives(run: config.Config) -> Iterator[str]:
    """Yield changes of settings that a file may not record. None of them changes the parameters."""
    model = run.model
    yield f"model.prediction={'velocity' if model.prediction == 'x0' else 'x0'}"
    yield f"model.text_ids={'zero' if model.text_ids == 'sequential' else 'sequential'}"
    maskings = ("one_pad", "off") if model.padding == "learned" else ("one_pad", "strict", "off")
    yield from (f"model.masking={name}" for name in maskings if name != model.masking)
    if run.compute.dtype == "bfloat16":
        yield "compute.dtype=float32"


def timestep_bin_weights(flow: config.Flow, run: config.Config) -> np.ndarray:
    """Return the fraction of a timestep distribution in each of the validation's equal bins."""
    tokens = (run.data.resolution // run.model.patch) ** 2
    quantiles = (np.arange(10_000) + 0.5) / 10_000
    times = np.asarray(timestep_quantile(flow, quantiles, tokens))
    return np.histogram(times, VALIDATION_BINS, (0, 1))[0] / len(times)
