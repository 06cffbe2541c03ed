"""Samples during training."""

import jax
import jax.numpy as jnp

from radiance.text.factory import make_encoder
from radiance.training.metric_writer import NullMetricWriter
from radiance.training.validation import sample_gallery
from tests.helpers.toy_models import toy_params
from tests.helpers.toy_runs import PLAIN, toy_run


def test_samples_that_are_not_finite_are_a_line_of_the_log():
    """The training goes on: its loss decides whether it stops."""
    run = toy_run("unused", "unused", **PLAIN)
    params = jax.tree.map(lambda x: x * jnp.nan, toy_params(run.model))
    encoder, lines = make_encoder(run.text, run.model.text_dim), []
    sample_gallery(run, encoder, ["a one"], params, 8, NullMetricWriter(), lines.append)
    (line,) = lines
    assert line.startswith("step 8: no samples are written. The image of 'a one' with seed 0 is")
