"""Whole runs of the sampler with a network, from noise and from an image, against a plain loop of model calls in float64."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance.config import Compute, Model, Sample
from radiance.flow.sampler import StartImage, TextCondition, sample_from_noise
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import bind_model, make_abstract_params
from radiance.text.encoder import round_up_length
from tests.helpers.reference_sampling import each_solver, guided64, sample_images, plain

TINY = dict(
    patch=4, hidden=32, heads=2, rope_axes=(4, 6, 6), double_blocks=1, single_blocks=1, text_dim=8, head="linear",
    approximator_dim=16, approximator_hidden=32, approximator_depth=1,
)  # fmt: skip
COMPUTE = Compute(dtype="float32")


# Many small programs that run once: XLA's optimizations cost more than they give.
quick_jit = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@lru_cache
def network(**changes):
    """A tiny model, and parameters under which nothing is zero (drawn in NumPy, as compiling `init` takes seconds)."""
    model, random = Model(**TINY | changes), np.random.RandomState(1)

    def draw(path, x):
        noise = 0.1 * random.standard_normal(x.shape)
        if path[-1].key == "kernel":
            return np.float32(noise + random.standard_normal(x.shape) / np.sqrt(x.shape[-2]))
        return np.float32(noise + (path[-1].key == "scale"))

    return model, jax.tree.map_with_path(draw, make_abstract_params(model))


@partial(quick_jit, static_argnames="model")
def predict(model, params, x, condition, t):
    """One call of the model, which computes its own modulation."""
    return bind_model(model, COMPUTE, params)(
        x, condition.text, condition.lengths, jnp.full(len(x), t), None, condition.pooled
    )


def condition(seed, lengths, room=16, pooled=0):
    """Random text, in the padding too: the model must hide it."""
    random = np.random.RandomState(seed)
    text = jnp.float32(random.standard_normal((len(lengths), room, 8)))
    return TextCondition(
        text,
        jnp.int32(lengths),
        jnp.float32(random.standard_normal((len(lengths), pooled))) if pooled else None,
    )


POSITIVE, NEGATIVE = condition(2, (3, 9, 1)), condition(3, (1, 2, 1))


@partial(quick_jit, static_argnames=("model", "settings"))
def sampled(model, params, noise, settings, positive, negative=None):
    return sample_from_noise(
        bind_model(model, COMPUTE, params),
        noise,
        make_time_schedule(settings, 4),
        settings,
        positive,
        negative,
    )


def looped(model, params, noise, settings, positive, negative=None):
    """What `sampled` should give: two calls of the model in a guided step, one in another."""
    low, high = settings.guidance_interval

    def velocity(x, t, step):
        def half(c):
            return np.float64(predict(model, params, jnp.float32(x), c, jnp.float32(t)))

        if (
            settings.guidance == 1
            or step < settings.unguided_steps
            or not np.float32(low) <= t <= np.float32(high)
        ):
            return half(positive)
        return guided64(
            half(positive), half(negative), settings.guidance, settings.guidance_rescale
        )

    def floored(x, t, step):  # what an x0 model divides by is no less than the floor
        return velocity(x, t, step) * t / max(t, settings.floor)

    return plain(floored, noise, make_time_schedule(settings, 4), settings.solver)


def close(x, expected, tolerance=1e-5):
    np.testing.assert_allclose(x, expected, atol=tolerance * np.abs(expected).max())


# On four uniform steps the times are 1, 0.75, 0.5, 0.25, 0. "early" and "late" leave heun steps that are guided at one end only.
GUIDANCE = {
    "everywhere": dict(guidance=3.5),
    "late": dict(
        guidance=3.5, guidance_rescale=0.7, unguided_steps=1, guidance_interval=(0.0, 0.5)
    ),
    "early": dict(guidance=3.5, unguided_steps=1, guidance_interval=(0.5, 0.9)),
    "nowhere": dict(guidance=1.0),
    "floor": dict(guidance=3.5, guidance_interval=(0.4, 1.0), floor=0.6),
}


@pytest.mark.parametrize(
    ("solver", "where"),
    [
        *(("heun", where) for where in GUIDANCE),
        ("euler", "everywhere"),
        ("euler", "early"),
        ("euler", "floor"),
        ("dpmpp_2m", "everywhere"),
        ("dpmpp_2m", "early"),
    ],
)
def test_sample_is_a_loop_of_model_calls(solver, where):
    settings = Sample(solver=solver, steps=4, **GUIDANCE[where])
    inputs = (
        *network(prediction="x0"),
        sample_images(5),
        settings,
        POSITIVE,
        None if where == "nowhere" else NEGATIVE,
    )
    close(sampled(*inputs), looped(*inputs))


@pytest.mark.parametrize(
    "changes",
    [dict(modulation="per_block", pooled_dim=5), dict(modulation="none")],
    ids=["pooled", "timeless"],
)
def test_sample_with_other_modulations(changes):
    """A pooled text makes the modulation differ from image to image; without time it is one for all."""
    pooled = changes.get("pooled_dim", 0)
    positive, negative = (
        condition(2, (3, 9, 1), pooled=pooled),
        condition(3, (1, 2, 1), pooled=pooled),
    )
    inputs = (
        *network(**changes),
        sample_images(5),
        Sample(steps=4, **GUIDANCE["early"]),
        positive,
        negative,
    )
    close(sampled(*inputs), looped(*inputs))


def test_last_step_of_an_x0_model_gives_its_image():
    """An x0 model's last layer puts out the image; as a velocity model the same network returns that output as it is."""
    (model, params), times = network(prediction="x0"), np.float32([0.4, 0])
    settings = Sample(steps=1, guidance_scale=1.0)
    x = quick_jit(
        lambda params, x: sample_from_noise(
            bind_model(model, COMPUTE, params), x, times, settings, POSITIVE
        )
    )(params, sample_images(5))
    close(x, predict(*network(), sample_images(5), POSITIVE, 0.4), 1e-6)


def test_settings_of_guidance_matter():
    """The runs compared with loops above are runs with different results."""
    inputs = (*network(prediction="x0"), sample_images(5))
    runs = [
        sampled(*inputs, Sample(solver="heun", steps=4, **GUIDANCE[where]), POSITIVE, NEGATIVE)
        for where in GUIDANCE
    ]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            assert np.abs(a - b).max() > 1e-2 * np.abs(a).max()


def test_negative_is_needed_only_for_guidance():
    model, noise, times = (
        bind_model(network()[0], COMPUTE, network()[1]),
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
        *network(prediction="x0"),
        noise,
        Sample(solver="heun", steps=4, guidance_scale=2.0, unguided_steps=4),
        POSITIVE,
    )
    close(sampled(*inputs), looped(*inputs))


def test_images_do_not_depend_on_their_neighbours():
    settings = Sample(solver="heun", steps=4, **GUIDANCE["late"])
    inputs = (sample_images(5), POSITIVE, NEGATIVE)
    together = sampled(*network(prediction="x0"), inputs[0], settings, *inputs[1:])
    for i in range(3):
        noise, positive, negative = jax.tree.map(lambda x, i=i: x[i : i + 1], inputs)
        close(
            sampled(*network(prediction="x0"), noise, settings, positive, negative)[0], together[i]
        )


@pytest.mark.parametrize("modulation", ["approximator", "per_block"])
def test_modulation_at_hand_is_the_modulation_computed(modulation):
    model, params = network(modulation=modulation)

    @quick_jit
    def at_hand(x, t):
        network = bind_model(model, COMPUTE, params)
        vectors = network.modulation(jnp.full((1,), t), None, None)
        # The time given beside the vectors must not matter to a velocity model.
        return network(x, POSITIVE.text, POSITIVE.lengths, jnp.zeros(3), vectors=vectors)

    early, late = (predict(model, params, sample_images(5), POSITIVE, t) for t in (0.7, 0.2))
    close(at_hand(sample_images(5), 0.7), early, 1e-6)
    assert np.abs(early - late).max() > 1e-2


@pytest.mark.parametrize(
    ("masking", "padding", "text_ids"), [("one_pad", 1, "sequential"), ("strict", 0, "zero")]
)
def test_cutting_text_to_a_bucket_changes_nothing(masking, padding, text_ids):
    """The bucket must hold the visible tokens: the longest text, and its one padding token where that is seen."""
    inputs = (*network(masking=masking, text_ids=text_ids), sample_images(5))
    for longest in (15, 16):
        text = condition(4, (3, longest, 1), room=48)
        visible = longest + padding
        assert round_up_length(visible, 48) == (32 if visible > 16 else 16)
        whole = predict(*inputs, text, 0.7)
        close(
            predict(*inputs, text._replace(text=text.text[:, : round_up_length(visible, 48)]), 0.7),
            whole,
            3e-6,
        )
    cut = TextCondition(text.text[:, : visible - 1], jnp.minimum(text.lengths, visible - 1))
    change = np.abs(predict(*inputs, cut, 0.7) - whole).max(axis=(1, 2, 3))
    assert (change > 1e-4).tolist() == [
        False,
        True,
        False,
    ]  # one token fewer is another prompt, for the one it was cut from


# --- from an image -----------------------------------------------------------------------------------------------------


def test_times_from_a_strength():
    whole = make_time_schedule(Sample(steps=4), 4)
    assert make_time_schedule(Sample(steps=4), 4, 0.6).tolist() == [np.float32(0.6), 0.5, 0.25, 0]
    assert make_time_schedule(Sample(steps=4), 4, 0.5).tolist() == [
        0.5,
        0.25,
        0,
    ]
    assert make_time_schedule(Sample(steps=4), 4, 0.1).tolist() == [
        np.float32(0.1),
        0,
    ]
    assert np.array_equal(make_time_schedule(Sample(steps=4), 4, 1.0), whole)


@partial(quick_jit, static_argnames=("model", "settings", "strength"))
def continued(model, params, noise, known, settings, strength, positive, negative):
    times = make_time_schedule(settings, 4, strength)
    return sample_from_noise(
        bind_model(model, COMPUTE, params),
        noise,
        times,
        settings,
        positive,
        negative,
        start_image=known,
    )


@each_solver
def test_what_a_mask_hides_stays_and_the_rest_sees_it_noisy(solver):
    """Against a plain loop that puts the noisy image back where the mask hides it, after every step of the solver and inside it."""
    (model, params), noise, image = network(prediction="x0"), sample_images(5), np.tanh(sample_images(6))
    mask = np.zeros((3, 8, 8, 1), np.float32)
    mask[:, 2:7, :5] = 1
    settings = Sample(solver=solver, steps=4, guidance_scale=3.5)
    x = continued(model, params, noise, StartImage(image, mask), settings, 0.8, POSITIVE, NEGATIVE)
    times = make_time_schedule(settings, 4, 0.8)

    def put_back(x, t):
        return mask * x + (1 - mask) * np.float64((1 - t) * image + t * noise)

    def velocity(x, t, step):
        halves = (
            np.float64(predict(model, params, jnp.float32(put_back(x, t)), c, jnp.float32(t)))
            for c in (POSITIVE, NEGATIVE)
        )
        return guided64(*halves, 3.5, 0)

    painted = plain(velocity, np.float64((1 - times[0]) * image + times[0] * noise), times, solver)
    close(x, put_back(painted, 0), 2e-5)
    assert np.abs(mask * (x - image)).max() > 0.1


def test_a_mask_of_ones_is_painting_from_the_mixture():
    (model, params), noise, image = network(prediction="x0"), sample_images(5), np.tanh(sample_images(6))
    settings, ones = Sample(steps=4, guidance_scale=3.5), np.ones((3, 8, 8, 1), np.float32)
    close(
        continued(model, params, noise, StartImage(image, ones), settings, 1.0, POSITIVE, NEGATIVE),
        sampled(model, params, noise, settings, POSITIVE, NEGATIVE),
    )
    weak = continued(
        model, params, noise, StartImage(image, ones), settings, 0.01, POSITIVE, NEGATIVE
    )
    times = make_time_schedule(settings, 4, 0.01)
    x = np.float32(0.99) * image + np.float32(0.01) * noise
    halves = [
        predict(model, params, jnp.float32(x), c, jnp.float32(times[0]))
        for c in (POSITIVE, NEGATIVE)
    ]
    close(weak, x - times[0] * guided64(*halves, 3.5, 0))
