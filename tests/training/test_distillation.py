"""Distillation targets against NumPy, separate calls of the models, and closed forms."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.flow import distillation, objective
from radiance.flow.distillation import make_segment_batch
from radiance.flow.sampler import sample_noise
from radiance.model.transformer import Transformer
from radiance.training import step
from radiance.training.step import add_noise_and_times, compute_validation_losses
from tests.helpers.distilled_runs import close, distilling, pulled, pulled_to, teacher_of, wide
from tests.helpers.toy_models import apply, toy_params
from tests.helpers.toy_runs import PLAIN, batch_of, same, toy_run

# --- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
def test_guidance_targets_follow_their_formulas(prediction):
    """Rows with a dropped caption have the target without guidance."""
    changes = ["distill.sample.guidance_scale=3", "flow.loss_weighting=x0"]
    runs = {
        rule: distilling(
            "guidance", *changes, f"distill.guidance_target={rule}", **PLAIN, prediction=prediction
        )
        for rule in ("prediction", "image")
    }
    run = runs["prediction"]
    model, params, teacher, dropped = (
        run.model,
        toy_params(run.model),
        teacher_of(run),
        np.array([True, False, False, True]),
    )
    batch = add_noise_and_times(
        run, batch_of(run) | {"dropped": jnp.asarray(dropped)}, jax.random.key(3)
    )
    image, noise, time = (np.asarray(batch[name]) for name in ("image", "noise", "time"))
    noisy = (1 - wide(time)) * image + wide(time) * noise
    inputs = dict(
        image=noisy, text=batch["text"], lengths=batch["lengths"], time=time, divisor=time + 0.05
    )
    nothing = inputs | dict(
        text=np.repeat(teacher.negative_condition.text, 4, axis=0),
        lengths=np.repeat(teacher.negative_condition.lengths, 4),
    )
    plain = (noisy - image) / wide(time + 0.05) if prediction == "x0" else noise - image

    of_teacher, without = (np.asarray(apply(model, teacher.params, x)) for x in (inputs, nothing))
    own = np.asarray(apply(model, params, nothing))
    expected = {
        "prediction": np.where(wide(dropped), of_teacher, without + 3 * (of_teacher - without)),
        "image": np.where(wide(dropped), plain, own + 3 * (plain - own)),
    }
    scale = np.ones(4, np.float32) if prediction == "x0" else (time / (time + 0.05)) ** 2
    for rule, target in expected.items():
        given = teacher if rule == "prediction" else teacher._replace(params=None)
        result = pulled(runs[rule], params, batch, given, jnp.ones(4))
        close(result, pulled_to(model, params, inputs, target, scale))


def test_without_dropped_captions_all_targets_are_guided():
    run = distilling(
        "guidance", "distill.guidance_target=image", "distill.sample.guidance_scale=3", **PLAIN
    )
    plain, own, time = (
        jnp.full((4, 8, 8, 3), 2.0),
        jnp.full((4, 8, 8, 3), 0.5),
        jnp.linspace(0.1, 1, 4),
    )
    inputs_seen = []

    def student(noisy, text, lengths, time, divisor):
        inputs_seen.append((text.shape, np.asarray(lengths), np.asarray(divisor)))
        return own

    model = Mock(Transformer, side_effect=student)
    batch = {"time": time}
    result = distillation.compute_guidance_target(
        run, model, batch, plain, plain, teacher_of(run, words=5)
    )
    np.testing.assert_allclose(result, 0.5 + 3 * 1.5)
    ((shape, lengths, divisor),) = inputs_seen
    assert shape == (4, 5, 16)
    assert lengths.tolist() == [2] * 4
    np.testing.assert_allclose(divisor, time + 0.05)
    remaining = distillation.compute_guidance_target(
        run,
        Mock(Transformer, side_effect=student),
        batch | {"dropped": jnp.ones(4, bool)},
        plain,
        plain,
        teacher_of(run),
    )
    assert np.array_equal(remaining, plain)


def test_a_guidance_scale_of_one_needs_one_evaluation():
    run = distilling("guidance", "distill.sample.guidance_scale=1", **PLAIN)
    calls = []
    batch = batch_of(run) | {"time": jnp.ones(4)}

    def predict(*arguments, divisor):
        calls.append(arguments)
        return arguments[0]

    result = distillation.predict_guided_velocity(
        run,
        Mock(Transformer, side_effect=predict),
        batch,
        batch["image"],
        jnp.ones(4),
        teacher_of(run).negative_condition,
    )
    assert np.array_equal(result, batch["image"])
    assert len(calls) == 1
    assert calls[0][1] is batch["text"]


# --- segments -------------------------------------------------------------------------------------

SEGMENTS = [
    "distill.sample.steps=12",
    "distill.sample.schedule=shifted",
    "distill.sample.shift=0.8",
    "flow.noise_scale=1.5",
]


def sample_trajectories(run, count):
    """Sample a batch of trajectories."""
    draw = np.random.default_rng(0)
    points = draw.normal(size=(count, run.distill.segments, 8, 8, 3)).astype(np.float16)
    return {
        "image": jnp.asarray(points),
        "seed": jnp.arange(5, 5 + count, dtype=jnp.uint32),
        "text": jnp.zeros((count, 2, 16)),
        "lengths": jnp.ones(count, jnp.int32),
        "weight": jnp.ones(count),
    }


def complete_trajectories(batch, scale):
    """Return [b, segments + 1, …]: the noise of each seed, and the stored points."""
    noise = [
        scale * np.asarray(jax.random.normal(jax.random.key(int(seed)), (8, 8, 3)))
        for seed in batch["seed"]
    ]
    return np.concatenate(
        [np.stack(noise)[:, None], np.asarray(batch["image"], np.float64)], axis=1
    )


def boundary_times(segments):
    u = np.linspace(1, 0, 13)[:-1]
    return np.append(np.exp(0.8) / (np.exp(0.8) + 1 / u - 1), 0)[:: 12 // segments]


def test_lines_pass_through_the_ends_of_segments():
    run = distilling("trajectories", "distill.segments=3", *SEGMENTS, **PLAIN)
    batch, segment, position = (
        sample_trajectories(run, 6),
        np.array([0, 1, 2, 2, 1, 0]),
        np.float32([0, 1, 0, 1, 0.25, 0.7]),
    )
    result = make_segment_batch(run, batch, jnp.asarray(segment), jnp.asarray(position))
    trajectory, times = complete_trajectories(batch, 1.5), boundary_times(3)
    rows = np.arange(6)
    begin, end, later, sooner = (
        trajectory[rows, segment],
        trajectory[rows, segment + 1],
        times[segment],
        times[segment + 1],
    )
    np.testing.assert_allclose(result["time"], sooner + (later - sooner) * position, rtol=1e-6)
    np.testing.assert_allclose(
        objective.mix(result["image"], result["noise"], result["time"]),
        end + wide(position) * (begin - end),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        result["noise"] - result["image"], (begin - end) / wide(later - sooner), atol=1e-5
    )
    assert all(result[name] is batch[name] for name in ("text", "lengths", "weight"))


def test_one_segment_is_the_pair_of_noise_and_image():
    run = distilling("trajectories", *SEGMENTS, **PLAIN)
    batch = sample_trajectories(run, 4)
    result = make_segment_batch(run, batch, jnp.zeros(4, int), jnp.linspace(0, 1, 4))
    assert np.array_equal(result["image"], batch["image"][:, 0].astype(jnp.float32))
    np.testing.assert_allclose(
        result["noise"], 1.5 * sample_noise(batch["seed"], (8, 8, 3)), atol=1e-6
    )
    np.testing.assert_allclose(result["time"], np.linspace(0, 1, 4), atol=1e-7)


def test_float16_trajectories_are_exact_enough():
    """The error of a pixel near [-1, 1] is a sixteenth of one of 256 levels."""
    values = np.linspace(-2, 2, 100_001, dtype=np.float32)
    lost = np.abs(values.astype(np.float16).astype(np.float32) - values).max()
    assert lost <= 2 / 255 / 16 < 1.01 * lost


def test_segments_are_uniform_and_times_follow_the_distribution():
    run = distilling(
        "trajectories",
        "distill.segments=4",
        "flow.timestep_distribution=uniform",
        *SEGMENTS,
        **PLAIN,
    )
    batch, times = sample_trajectories(run, 500), boundary_times(4)
    sampled = add_noise_and_times(run, batch, jax.random.key(1))
    time = np.asarray(sampled["time"], np.float64)
    segment = 4 - np.searchsorted(times[::-1], time)
    counts = np.bincount(segment, minlength=4)
    assert len(counts) == 4
    assert np.abs(counts - 125).max() < 5 * np.sqrt(500 * 3 / 16)
    position = (time - times[segment + 1]) / (times[segment] - times[segment + 1])
    assert np.abs(np.sort(position) - (np.arange(500) + 0.5) / 500).max() < 0.08
    assert abs(np.corrcoef(position, segment)[0, 1]) < 0.2
    # The line passes through the ends of that segment.
    trajectory, rows = complete_trajectories(batch, 1.5), np.arange(500)
    secant = (trajectory[rows, segment] - trajectory[rows, segment + 1]) / wide(
        times[segment] - times[segment + 1]
    )
    np.testing.assert_allclose(sampled["noise"] - sampled["image"], secant, atol=1e-4)
    again = add_noise_and_times(run, batch, jax.random.key(1))
    assert same(again, sampled)

    begins = add_noise_and_times(
        config.override(run, ["flow.timestep_distribution=pure_noise"]), batch, jax.random.key(1)
    )
    np.testing.assert_allclose(begins["time"], times[segment], rtol=1e-6)


def test_validation_covers_all_segments_and_times(monkeypatch):
    run = distilling(
        "trajectories",
        "distill.segments=3",
        "flow.timestep_distribution=uniform",
        *SEGMENTS,
        **PLAIN,
    )
    monkeypatch.setattr(
        step, "compute_image_losses", lambda run, params, batch, teacher=None: batch["time"]
    )
    batch, times = sample_trajectories(run, 7), boundary_times(3)
    later, sooner = times[np.arange(7) % 3], times[np.arange(7) % 3 + 1]
    result = np.asarray(compute_validation_losses(run, {}, batch, jnp.int32(0)))
    position = (result - sooner[:, None]) / (later - sooner)[:, None]
    assert (np.floor(position * 10) == np.arange(10)).all()
    assert len(np.unique(np.round(position * 10 % 1, 4))) > 60, "every image has its own position"
    noise = np.asarray(
        compute_validation_losses(
            config.override(run, ["flow.timestep_distribution=pure_noise"]), {}, batch, jnp.int32(0)
        )
    )
    np.testing.assert_allclose(noise, np.repeat(later[:, None], 10, axis=1), rtol=1e-6)


# --- errors of settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("distill.kind=trajectories distill.segments=0", "segments=0 must be at least 1"),
        (
            "distill.kind=trajectories distill.num_trajectories=0",
            "trajectories=0 must be at least 1",
        ),
        (
            "distill.kind=trajectories distill.segments=3",
            "steps=10 does not divide into distill.segments=3",
        ),
        (
            "distill.kind=guidance distill.segments=2",
            "segments is for distill.kind=trajectories and distribution_matching, not for guidance",
        ),
        ("distill.trajectory_dir=somewhere", "is for distill.kind=trajectories, not for none"),
        (
            "distill.teacher=somewhere",
            "teacher=somewhere is set but distill.kind=none: set distill.kind",
        ),
        (
            "flow.timestep_distribution=pure_noise",
            "timestep_distribution=pure_noise .* distill.kind=none",
        ),
        (
            "distill.kind=guidance distill.teacher=x flow.timestep_distribution=pure_noise",
            "timestep_distribution=pure_noise",
        ),
        ("distill.kind=guidance", "kind=guidance needs a teacher: set distill.teacher"),
        ("distill.kind=mean_flow", "kind=mean_flow needs a teacher"),
        (
            "distill.kind=mean_flow init=x distill.sample.unguided_steps=1",
            "learns the same guidance for all times",
        ),
        (
            "distill.kind=guidance init=x distill.sample.guidance_interval=0,0.9",
            "learns the same guidance for all times",
        ),
        ("distill.kind=trajectories", "kind=trajectories needs a teacher"),
        (
            "distill.kind=trajectories init=x flow.coupling=optimal_transport",
            "has its own pairs and times",
        ),
        (
            "distill.kind=mean_flow init=x flow.timestep_distribution=uniform "
            "flow.timestep_weighting=parabola",
            "has its own pairs and times",
        ),
        (
            "distill.kind=trajectories init=x data.extra_resolutions=16",
            "only squares of data.resolution",
        ),
        ("distill.kind=trajectories init=x data.bucket_step=8", "only squares of data.resolution"),
        (
            "distill.kind=guidance init=x distill.sample.unconditional=masked",
            "distill.sample.unconditional=masked leaves no text token",
        ),
        (
            "distill.kind=mean_flow init=x distill.finite_difference=0 compute.attention=cudnn",
            "forward-mode differentiation, which compute.attention=cudnn",
        ),
        (
            "distill.kind=mean_flow init=x distill.finite_difference=0 compute.attention=auto",
            "forward-mode differentiation",
        ),
        (
            "distill.kind=mean_flow init=x distill.finite_difference=1",
            "difference=1.0 must be at least 0 and less than 1",
        ),
        (
            "distill.kind=mean_flow init=x model.modulation=none compute.attention=xla",
            "distill.kind=mean_flow .* guidance",
        ),
        (
            "distill.kind=mean_flow init=x model.modulation=per_block compute.attention=xla",
            "distill.kind=mean_flow .* guidance",
        ),
    ],
)
def test_wrong_settings_are_an_error(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        toy_run("unused", "unused", *changes.split())


@pytest.mark.parametrize(
    "changes",
    [
        "distill.kind=guidance distill.guidance_target=image",
        "distill.kind=guidance init=x flow.coupling=optimal_transport "
        "flow.timestep_distribution=uniform flow.timestep_weighting=parabola",
        "distill.kind=trajectories init=x flow.timestep_distribution=pure_noise "
        "distill.segments=5 distill.trajectory_dir=somewhere",
        "distill.kind=mean_flow init=x compute.attention=auto model.modulation=shared "
        "model.guidance_embed=true",
        "distill.kind=mean_flow init=x distill.finite_difference=0 compute.attention=chunked",
    ],
)
def test_allowed_settings(changes):
    toy_run("unused", "unused", *changes.split())
