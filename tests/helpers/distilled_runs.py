"""Runs of students and their teachers, and gradients of their losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from radiance import config
from radiance.flow.distillation import Teacher
from radiance.flow.sampler import TextCondition
from radiance.model.transformer import bind_model
from radiance.training.step import compute_image_losses
from tests.helpers.toy_models import toy_params
from tests.helpers.toy_runs import toy_run


def distilling(kind, *changes, **model):
    return toy_run(
        "unused",
        "unused",
        f"distill.kind={kind}",
        "distill.teacher=another",
        "data.batch_size=4",
        "compute.attention=xla",
        *changes,
        **model,
    )


def teacher_of(run, words=8):
    """Return a teacher with other weights and a negative text."""
    text = np.random.default_rng(8).normal(size=(1, words, run.model.text_dim)).astype(np.float32)
    return Teacher(toy_params(run.model, 7), TextCondition(jnp.asarray(text), jnp.array([2])))


def wide(t):
    return np.asarray(t)[:, None, None, None]


@partial(jax.jit, static_argnames="run")
def pulled(run, params, batch, teacher, pulls):
    """Return the losses, and the gradient of their sum weighted by `pulls`."""

    def total(params):
        losses = compute_image_losses(run, params, batch, teacher)
        return pulls @ losses, losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return losses, gradient


@partial(jax.jit, static_argnames="model")
def pulled_to(model, params, inputs, target, scale):
    """Return scaled squared errors of a velocity from a constant, and the gradient of their sum."""

    def total(params):
        losses = scale * jnp.square(
            bind_model(model, config.Compute(dtype="float32"), params)(**inputs) - target
        ).mean(axis=(1, 2, 3))
        return losses.sum(), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return losses, gradient


def close(result, expected, rtol=1e-3):
    """Assert that two trees are close, relative to the largest number of each leaf."""
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(np.abs(y).max()) + 1e-7)
