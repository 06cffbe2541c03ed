"""Validation losses and sample galleries of a running training."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from radiance import config
from radiance.base.images import make_contact_sheet
from radiance.data.captions import first_caption
from radiance.data.source import Source
from radiance.distributed.sharding import gather_array, put_global
from radiance.model.transformer import Params
from radiance.pipeline import Pipeline
from radiance.text.encoder import TextEncoder
from radiance.training.checkpoints import resolve_average
from radiance.training.parameter_groups import merge_params, split_frozen
from radiance.training.run_directory import MetricWriter, NullMetricWriter
from radiance.training.step import TrainState, assemble_params, compute_validation_losses

NUM_DEFAULT_PROMPTS = 16  # images of a gallery, where the config names no prompts


def select_params(run: config.Config, state: TrainState, base: Params | None) -> Params:
    """The weights that the run samples and is validated with."""
    decay = resolve_average(run.sample.weights, state.ema)
    params = (
        state.params
        if decay is None
        else merge_params(state.ema[decay], split_frozen(state.params, run.optimizer.frozen)[1])
    )
    return assemble_params(run, params, base)


def compute_mean_losses(
    validate: Callable,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: jax.sharding.Mesh,
) -> np.ndarray:
    """Mean loss in every time bin. validate: `validation_losses` of a run, compiled."""
    total, weight = 0.0, 0.0
    for seed, batch in enumerate(batches):
        losses = gather_array(validate(params, put_global(batch, mesh), jnp.int32(seed)))
        total, weight = total + batch["weight"] @ losses, weight + batch["weight"].sum()
    return total / weight


def validate_with_config(
    run: config.Config, *, params: Params, batches: Callable[[], list], mesh: jax.sharding.Mesh
) -> np.ndarray:
    """The same under another config, which may show what the run's own masking hides: `batches` makes them with all of their text."""
    return compute_mean_losses(
        jax.jit(partial(compute_validation_losses, run)), params, batches(), mesh
    )


def choose_prompts(run: config.Config, source: Source, encoder: TextEncoder) -> tuple[str, ...]:
    """Prompts for the images on the way: the first captions that are not over the encoder's limit."""
    captions = (first_caption(source, i, run.data) for i in range(len(source)))
    return tuple(
        islice(
            (
                caption
                for caption in captions
                if encoder.count_tokens(caption) <= encoder.max_length
            ),
            NUM_DEFAULT_PROMPTS,
        )
    ) or ("",)


def sample_gallery(
    run: config.Config,
    encoder: TextEncoder,
    prompts: Sequence[str],
    params: Params,
    step: int,
    metric_writer: MetricWriter | NullMetricWriter,
):
    """The same prompts and seeds, painted as the model learns. Latents are no images yet."""
    if run.model.channels != 3:
        return
    pictures = list(Pipeline(run, params, encoder=encoder).generate(prompts))
    sheet = make_contact_sheet([p.image for p in pictures], columns=min(len(pictures), 10))
    metric_writer.write_samples(
        step,
        sheet,
        prompts,
        {"seeds": list(range(len(prompts))), "settings": config.to_dict(run.sample)},
    )
