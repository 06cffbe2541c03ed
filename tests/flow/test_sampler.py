"""The sampler with a network, from noise and from images, against a loop in float64."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance.config import Compute, Model, Sample
from radiance.flow.sampler import InitImageBatch, TextCondition, sample_from_noise
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import bind_model, make_abstract_params
from radiance.text.encoder import round_up_length
from tests.helpers.reference_sampling import (
    each_solver,
    guide_float64,
    integrate_float64,
    sample_images,
)

TINY = dict(
    patch=4, hidden=32, heads=2, rope_axes=(4, 6, 6), double_blocks=1, single_blocks=1, text_dim=8,
    head="linear", approximator_dim=16, approximator_hidden=32, approximator_depth=1,
)  # fmt: skip
COMPUTE = Compute(dtype="float32")

# Many small programs that run once: XLA's optimizations cost more time than they save.
quick_jit = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@lru_cache
def make_network(**changes):
    """Make a tiny model with parameters that are not 0, in NumPy: compiling takes seconds."""
    model, rng = Model(**TINY | changes), np.random.RandomState(1)

    def sample_leaf(path, x):
        noise = 0.1 * rng.standard_normal(x.shape)
        if path[-1].key == "kernel":
            return np.float32(noise + rng.standard_normal(x.shape) / np.sqrt(x.shape[-2]))
        return np.float32(noise + (path[-1].key == "scale"))

    return model, jax.tree.map_with_path(sample_leaf, make_abstract_params(model))


@partial(quick_jit, static_argnames="model")
def predict(model, params, x, condition, t):
    """Call the model, which computes its own modulation."""
    return bind_model(model, COMPUTE, params)(
        x, condition.text, condition.lengths, jnp.full(len(x), t), None, condition.pooled
    )


def make_condition(seed, lengths, max_length=16, pooled=0):
    """Sample embeddings, also for the padding, which the model must hide."""
    rng = np.random.RandomState(seed)
    text = jnp.float32(rng.standard_normal((len(lengths), max_length, 8)))
    return TextCondition(
        text,
        jnp.int32(lengths),
        jnp.float32(rng.standard_normal((len(lengths), pooled))) if pooled else None,
    )


POSITIVE, NEGATIVE = make_condition(2, (3, 9, 1)), make_condition(3, (1, 2, 1))


@partial(quick_jit, static_argnames=("model", "settings"))
def sample_jitted(model, params, noise, settings, positive, negative=None):
    return sample_from_noise(
        bind_model(model, COMPUTE, params),
        noise,
        make_time_schedule(settings, 4),
        settings,
        positive,
        negative,
    )


def sample_in_loop(model, params, noise, settings, positive, negative=None):
    """Sample with two calls of the model for a guided evaluation, and one for others."""
    low, high = settings.guidance_interval

    def velocity(x, t, step):
        def evaluate(c):
            return np.float64(predict(model, params, jnp.float32(x), c, jnp.float32(t)))

        if (
            settings.guidance_scale == 1
            or step < settings.unguided_steps
            or not np.float32(low) <= t <= np.float32(high)
        ):
            return evaluate(positive)
        return guide_float64(
            evaluate(positive),
            evaluate(negative),
            settings.guidance_scale,
            settings.guidance_rescale,
        )

    def clamped_velocity(x, t, step):  # x0 models divide by no less than the minimum divisor
        return velocity(x, t, step) * t / max(t, settings.min_divisor)

    return integrate_float64(
        clamped_velocity, noise, make_time_schedule(settings, 4), settings.solver
    )


def assert_close(x, expected, tolerance=1e-5):
    np.testing.assert_allclose(x, expected, atol=tolerance * np.abs(expected).max())


# On four uniform steps the times are 1, 0.75, 0.5, 0.25, 0. "early" and "late" have steps of heun
# that are guided at one end only.
GUIDANCE = {
    "everywhere": dict(guidance_scale=3.5),
    "late": dict(
        guidance_scale=3.5, guidance_rescale=0.7, unguided_steps=1, guidance_interval=(0.0, 0.5)
    ),
    "early": dict(guidance_scale=3.5, unguided_steps=1, guidance_interval=(0.5, 0.9)),
    "nowhere": dict(guidance_scale=1.0),
    "min_divisor": dict(guidance_scale=3.5, guidance_interval=(0.4, 1.0), min_divisor=0.6),
}


@pytest.mark.parametrize(
    ("solver", "where"),
    [
        *(("heun", where) for where in GUIDANCE),
        ("euler", "everywhere"),
        ("euler", "early"),
        ("euler", "min_divisor"),
        ("dpmpp_2m", "everywhere"),
        ("dpmpp_2m", "early"),
    ],
)
def test_sampling_equals_a_loop_of_model_calls(solver, where):
    settings = Sample(solver=solver, steps=4, **GUIDANCE[where])
    inputs = (
        *make_network(prediction="x0"),
        sample_images(5),
        settings,
        POSITIVE,
        None if where == "nowhere" else NEGATIVE,
    )
    assert_close(sample_jitted(*inputs), sample_in_loop(*inputs))


@pytest.mark.parametrize(
    "changes",
    [dict(modulation="per_block", pooled_dim=5), dict(modulation="none")],
    ids=["pooled", "timeless"],
)
def test_sampling_with_other_modulations(changes):
    """With pooled text every image has its own modulation; without time all share one."""
    pooled = changes.get("pooled_dim", 0)
    positive, negative = (
        make_condition(2, (3, 9, 1), pooled=pooled),
        make_condition(3, (1, 2, 1), pooled=pooled),
    )
    inputs = (
        *make_network(**changes),
        sample_images(5),
        Sample(steps=4, **GUIDANCE["early"]),
        positive,
        negative,
    )
    assert_close(sample_jitted(*inputs), sample_in_loop(*inputs))


def test_the_last_step_of_an_x0_model_returns_its_prediction():
    """As a velocity model the same network returns the output of its last layer, which is x0."""
    (model, params), times = make_network(prediction="x0"), np.float32([0.4, 0])
    settings = Sample(steps=1, guidance_scale=1.0)
    x = quick_jit(
        lambda params, x: sample_from_noise(
            bind_model(model, COMPUTE, params), x, times, settings, POSITIVE
        )
    )(params, sample_images(5))
    assert_close(x, predict(*make_network(), sample_images(5), POSITIVE, 0.4), 1e-6)


def test_guidance_settings_change_the_result():
    """The settings of the test against loops give different images."""
    inputs = (*make_network(prediction="x0"), sample_images(5))
    runs = [
        sample_jitted(
            *inputs, Sample(solver="heun", steps=4, **GUIDANCE[where]), POSITIVE, NEGATIVE
        )
        for where in GUIDANCE
    ]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            assert np.abs(a - b).max() > 1e-2 * np.abs(a).max()


def test_the_negative_condition_is_needed_only_for_guidance():
    model, noise, times = (
        bind_model(make_network()[0], COMPUTE, make_network()[1]),
        sample_images(5),
        make_time_schedule(Sample(steps=4), 4),
    )
    for settings in (
        Sample(steps=4, guidance_scale=2.0),
        Sample(steps=4, guidance_scale=2.0, unguided_steps=3),
    ):
        with pytest.raises(ValueError, match="negative"):
            sample_from_noise(model, noise, times, settings, POSITIVE)
    inputs = (
        *make_network(prediction="x0"),
        noise,
        Sample(solver="heun", steps=4, guidance_scale=2.0, unguided_steps=4),
        POSITIVE,
    )
    assert_close(sample_jitted(*inputs), sample_in_loop(*inputs))


def test_images_do_not_depend_on_the_rest_of_the_batch():
    settings = Sample(solver="heun", steps=4, **GUIDANCE["late"])
    inputs = (sample_images(5), POSITIVE, NEGATIVE)
    together = sample_jitted(*make_network(prediction="x0"), inputs[0], settings, *inputs[1:])
    for i in range(3):
        noise, positive, negative = jax.tree.map(lambda x, i=i: x[i : i + 1], inputs)
        assert_close(
            sample_jitted(*make_network(prediction="x0"), noise, settings, positive, negative)[0],
            together[i],
        )


@pytest.mark.parametrize("modulation", ["approximator", "per_block"])
def test_given_modulation_vectors_equal_computed_ones(modulation):
    model, params = make_network(modulation=modulation)

    @quick_jit
    def predict_with_vectors(x, t):
        network = bind_model(model, COMPUTE, params)
        vectors = network.modulation(jnp.full((1,), t), None, None)
        # A velocity model with given vectors must not read the time.
        return network(x, POSITIVE.text, POSITIVE.lengths, jnp.zeros(3), vectors=vectors)

    early, late = (predict(model, params, sample_images(5), POSITIVE, t) for t in (0.7, 0.2))
    assert_close(predict_with_vectors(sample_images(5), 0.7), early, 1e-6)
    assert np.abs(early - late).max() > 1e-2


@pytest.mark.parametrize(
    ("masking", "padding", "text_ids"), [("one_pad", 1, "sequential"), ("strict", 0, "zero")]
)
def test_cutting_text_behind_the_visible_tokens_changes_nothing(masking, padding, text_ids):
    """The longest text must fit, and its padding token if that is visible."""
    inputs = (*make_network(masking=masking, text_ids=text_ids), sample_images(5))
    for longest in (15, 16):
        text = make_condition(4, (3, longest, 1), max_length=48)
        visible = longest + padding
        assert round_up_length(visible, 48) == (32 if visible > 16 else 16)
        full = predict(*inputs, text, 0.7)
        assert_close(
            predict(*inputs, text._replace(text=text.text[:, : round_up_length(visible, 48)]), 0.7),
            full,
            3e-6,
        )
    cut = TextCondition(text.text[:, : visible - 1], jnp.minimum(text.lengths, visible - 1))
    change = np.abs(predict(*inputs, cut, 0.7) - full).max(axis=(1, 2, 3))
    # Only the longest prompt lost a visible token.
    assert (change > 1e-4).tolist() == [False, True, False]


# --- from images --------------------------------------------------------------------------------


def test_times_start_at_the_strength():
    all_times = make_time_schedule(Sample(steps=4), 4)
    assert make_time_schedule(Sample(steps=4), 4, 0.6).tolist() == [np.float32(0.6), 0.5, 0.25, 0]
    assert make_time_schedule(Sample(steps=4), 4, 0.5).tolist() == [0.5, 0.25, 0]
    assert make_time_schedule(Sample(steps=4), 4, 0.1).tolist() == [np.float32(0.1), 0]
    assert np.array_equal(make_time_schedule(Sample(steps=4), 4, 1.0), all_times)


@partial(quick_jit, static_argnames=("model", "settings", "strength"))
def sample_from_image(model, params, noise, init_images, settings, strength, positive, negative):
    times = make_time_schedule(settings, 4, strength)
    return sample_from_noise(
        bind_model(model, COMPUTE, params),
        noise,
        times,
        settings,
        positive,
        negative,
        init_images=init_images,
    )


@each_solver
def test_masked_pixels_are_kept_and_seen_with_noise(solver):
    """The reference restores the noisy image under the mask for every evaluation."""
    (model, params), noise, image = (
        make_network(prediction="x0"),
        sample_images(5),
        np.tanh(sample_images(6)),
    )
    mask = np.zeros((3, 8, 8, 1), np.float32)
    mask[:, 2:7, :5] = 1
    settings = Sample(solver=solver, steps=4, guidance_scale=3.5)
    x = sample_from_image(
        model, params, noise, InitImageBatch(image, mask), settings, 0.8, POSITIVE, NEGATIVE
    )
    times = make_time_schedule(settings, 4, 0.8)

    def restore_masked(x, t):
        return mask * x + (1 - mask) * np.float64((1 - t) * image + t * noise)

    def velocity(x, t, step):
        velocities = (
            np.float64(predict(model, params, jnp.float32(restore_masked(x, t)), c, jnp.float32(t)))
            for c in (POSITIVE, NEGATIVE)
        )
        return guide_float64(*velocities, 3.5, 0)

    expected = integrate_float64(
        velocity, np.float64((1 - times[0]) * image + times[0] * noise), times, solver
    )
    assert_close(x, restore_masked(expected, 0), 2e-5)
    assert np.abs(mask * (x - image)).max() > 0.1


def test_a_mask_of_ones_samples_from_the_mixture():
    (model, params), noise, image = (
        make_network(prediction="x0"),
        sample_images(5),
        np.tanh(sample_images(6)),
    )
    settings, ones = Sample(steps=4, guidance_scale=3.5), np.ones((3, 8, 8, 1), np.float32)
    assert_close(
        sample_from_image(
            model, params, noise, InitImageBatch(image, ones), settings, 1.0, POSITIVE, NEGATIVE
        ),
        sample_jitted(model, params, noise, settings, POSITIVE, NEGATIVE),
    )
    weak = sample_from_image(
        model, params, noise, InitImageBatch(image, ones), settings, 0.01, POSITIVE, NEGATIVE
    )
    times = make_time_schedule(settings, 4, 0.01)
    x = np.float32(0.99) * image + np.float32(0.01) * noise
    velocities = [
        predict(model, params, jnp.float32(x), c, jnp.float32(times[0]))
        for c in (POSITIVE, NEGATIVE)
    ]
    assert_close(weak, x - times[0] * guide_float64(*velocities, 3.5, 0))
