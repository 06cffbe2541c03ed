"""Validation losses and image samples during training."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from radiance import config
from radiance.base.errors import SamplingError
from radiance.base.images import make_contact_sheet
from radiance.data.batches import Batch
from radiance.data.captions import first_caption
from radiance.data.source import Source
from radiance.distributed.sharding import gather_array, put_global
from radiance.flow.distillation import Teacher
from radiance.model.transformer import Params
from radiance.pipeline import Pipeline
from radiance.text.encoder import TextEncoder
from radiance.training.checkpoint_reader import resolve_average
from radiance.training.metric_writer import MetricWriter, NullMetricWriter
from radiance.training.parameter_groups import merge_params, split_frozen
from radiance.training.shared_programs import share_validation
from radiance.training.step import TrainState, assemble_params

NUM_DEFAULT_PROMPTS = 16  # samples during training, if the config names no prompts


class Validator:
    """Computes the mean validation losses of weights in each bin of time.

    Args:
        run: Config whose objective, masking and seed are used.
        batches: Validation batches, complete on every host.
        mesh: Mesh of the weights.
        teacher: Teacher of a distilled run.
    """

    def __init__(
        self,
        run: config.Config,
        batches: Sequence[Batch],
        mesh: jax.sharding.Mesh,
        teacher: Teacher | None = None,
    ):
        self._batches, self._mesh = batches, mesh
        compute_losses = jax.jit(share_validation(run))
        self._compute_losses = partial(compute_losses, teacher=teacher)

    def __call__(self, params: Params) -> np.ndarray:
        """Return the mean losses [bins] of the weights."""
        return compute_mean_losses(self._compute_losses, params, self._batches, self._mesh)


def select_params(run: config.Config, state: TrainState, base: Params | None) -> Params:
    """Return the weights of `sample.weights`, with which a run is validated and sampled.

    Args:
        run: Config of the run.
        state: State of the run, or a stacked state of several seeds.
        base: Weights that a LoRA run adds to, else None.
    """
    name = resolve_average(run.sample.weights, state.ema)
    params = state.params if name is None else select_average(run, state, name)
    return assemble_params(run, params, base)


def select_average(run: config.Config, state: TrainState, name: str) -> Params:
    """Return an average of a state by its name, with the frozen parameters."""
    return merge_params(state.ema[name], split_frozen(state.params, run.optimizer.frozen)[1])


def compute_mean_losses(
    compute_losses: Callable,
    params: Params,
    batches: Iterable[Batch],
    mesh: jax.sharding.Mesh,
) -> np.ndarray:
    """Return the mean loss in every bin of time.

    Args:
        compute_losses: Compiled `compute_validation_losses` of a run.
        params: Weights of the network.
        batches: Validation batches, complete on every host.
        mesh: Mesh of the weights.
    """
    total: Any = 0.0
    weight = 0.0
    for seed, batch in enumerate(batches):
        losses = gather_array(compute_losses(params, put_global(batch, mesh), jnp.int32(seed)))
        total, weight = total + batch["weight"] @ losses, weight + batch["weight"].sum()
    return total / weight


def choose_prompts(run: config.Config, source: Source, encoder: TextEncoder) -> tuple[str, ...]:
    """Return prompts for samples: the first captions that fit the encoder's limit."""
    captions = (first_caption(source, i, run.data) for i in range(len(source)))
    fitting = (
        caption for caption in captions if encoder.count_tokens(caption) <= encoder.max_length
    )
    return tuple(islice(fitting, NUM_DEFAULT_PROMPTS)) or ("",)


def sample_gallery(
    run: config.Config,
    encoder: TextEncoder,
    prompts: Sequence[str],
    params: Params,
    step: int,
    metric_writer: MetricWriter | NullMetricWriter,
    report_warning: Callable[[str], object],
):
    """Sample the prompts with seeds 0, 1, … and write a contact sheet. Latent models have none.

    Args:
        run: Config of the run.
        encoder: Text encoder of the run.
        prompts: Prompt of each image.
        params: Weights of the network.
        step: Number of steps done.
        metric_writer: Writer of the run directory.
        report_warning: Called with a line instead if an image is not finite.
    """
    if run.model.channels != 3:
        return
    try:
        samples = list(Pipeline(run, params, encoder=encoder).generate(prompts))
    except SamplingError as error:  # the training may recover
        report_warning(f"step {step}: no samples are written. {error}")
        return
    sheet = make_contact_sheet([s.image for s in samples], columns=min(len(samples), 10))
    metadata = {"seeds": list(range(len(prompts))), "settings": config.to_dict(run.sample)}
    metric_writer.write_samples(step, sheet, prompts, metadata)
