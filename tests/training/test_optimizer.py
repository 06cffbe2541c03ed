"""Schedules, AdamW, parameter groups, and stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from radiance import config
from radiance.training.adam import scale_by_adam
from radiance.training.optimizer import make_lr_schedule, make_optimizer
from radiance.training.parameter_groups import merge_params, split_frozen
from radiance.training.stochastic_rounding import cast_params, hash_indexes, stochastic_round

TREE = {
    "a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "b": {"c": {"scale": jnp.ones(4)}, "d": {"kernel": jnp.full(2, 5.0)}},
}


def test_the_learning_rate_warms_up_and_then_is_constant_or_falls():
    constant = make_lr_schedule(config.Optimizer(learning_rate=1.0, warmup_steps=4), 100)
    assert [float(constant(i)) for i in (0, 1, 3, 4, 99)] == pytest.approx([0.2, 0.4, 0.8, 1, 1])
    cosine = make_lr_schedule(
        config.Optimizer(learning_rate=1.0, warmup_steps=4, lr_schedule="cosine"), 104
    )
    assert [float(cosine(i)) for i in (4, 54, 104)] == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_adamw_equals_numpy():
    settings = config.Optimizer(
        learning_rate=0.1, warmup_steps=0, beta1=0.8, beta2=0.9, weight_decay=0.3, clip_norm=2.0
    )
    optimizer, draw = make_optimizer(settings, 10), np.random.default_rng(0)
    params = {
        "x": {"kernel": jnp.asarray(draw.normal(size=5)), "bias": jnp.asarray(draw.normal(size=2))}
    }
    ours, state = params, optimizer.init(params)
    theirs = {k: np.asarray(v, np.float64) for k, v in params["x"].items()}
    m, v = ({k: np.zeros_like(x) for k, x in theirs.items()} for _ in range(2))
    for t in range(1, 5):
        g = {k: 3 * draw.normal(size=x.shape) for k, x in theirs.items()}
        updates, state = optimizer.update({"x": jax.tree.map(jnp.asarray, g)}, state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for k in theirs:
            clipped = g[k] * min(1, 2.0 / norm)
            m[k], v[k] = 0.8 * m[k] + 0.2 * clipped, 0.9 * v[k] + 0.1 * clipped**2
            step = (m[k] / (1 - 0.8**t)) / (np.sqrt(v[k] / (1 - 0.9**t)) + 1e-8)
            theirs[k] = theirs[k] - 0.1 * (step + (0.3 * theirs[k] if k == "kernel" else 0))
    for k in theirs:
        np.testing.assert_allclose(ours["x"][k], theirs[k], rtol=1e-4)


def test_frozen_parameters_are_split_and_merged():
    trained, frozen = split_frozen(TREE, ("b/c", "a/bias"))
    assert set(trained) == {"a", "b"}
    assert set(trained["b"]) == {"d"}
    assert set(trained["a"]) == {"kernel"}
    assert set(frozen["b"]) == {"c"}
    assert set(frozen["a"]) == {"bias"}
    assert jax.tree.structure(merge_params(trained, frozen)) == jax.tree.structure(TREE)
    assert split_frozen(TREE, ()) == (TREE, {})


def test_frozen_paths_match_complete_names():
    with pytest.raises(
        config.ConfigError, match=r"optimizer\.frozen names b/cc, .* not in the model"
    ):
        split_frozen(TREE, ("b/c", "b/cc"))
    with pytest.raises(config.ConfigError, match="nothing to train"):
        split_frozen(TREE, ("a", "b"))


def test_multipliers_of_the_longest_prefix_scale_the_step():
    scaled = config.Optimizer(
        lr_multipliers=("b=0.1", "b/d=4", "a/kernel=2"),
        learning_rate=0.1,
        warmup_steps=0,
        weight_decay=0.5,
    )
    gradients = jax.tree.map(lambda x: jnp.linspace(-1, 1, x.size).reshape(x.shape), TREE)
    steps = []
    for settings in (config.Optimizer(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), scaled):
        optimizer = make_optimizer(settings, 10)
        steps.append(optimizer.update(gradients, optimizer.init(TREE), TREE)[0])
    factors = {"a": {"kernel": 2, "bias": 1}, "b": {"c": {"scale": 0.1}, "d": {"kernel": 4}}}
    jax.tree.map(
        lambda plain, scaled, f: np.testing.assert_allclose(scaled, f * plain, rtol=1e-6),
        *steps,
        factors,
    )


def test_wrong_multipliers_are_an_error():
    with pytest.raises(
        config.ConfigError,
        match=r"optimizer\.lr_multipliers names b/cc, which is not among .*: use a, b",
    ):
        make_optimizer(config.Optimizer(lr_multipliers=("b/cc=2", "a=3")), 10).init(TREE)
    for multipliers, message in (
        (("head",), "PATH=FACTOR"),
        (("=2",), "PATH=FACTOR"),
        (("head=x",), "PATH=FACTOR"),
        (("head=-1",), "are positive"),
        (("a=1", "a=2"), "twice"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            config.Optimizer(lr_multipliers=multipliers)


# --- stochastic rounding --------------------------------------------------------------------------


def test_values_are_rounded_to_a_neighbor_and_are_right_on_average():
    x = jnp.asarray([1.0, 1.001, -1.006, 3e-39, 255.3, 1e30, -0.0])
    like = {"x": x.astype(jnp.bfloat16)}
    draws = jax.jit(
        jax.vmap(lambda key: stochastic_round(key, {"x": x}, like)["x"].astype(jnp.float32))
    )(jax.random.split(jax.random.key(1), 4000))
    draws = np.asarray(draws, np.float64)
    below = np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000  # towards 0
    above = below + np.where(np.asarray(x, np.float32).view(np.uint32) == below, 0, 0x10000).astype(
        np.uint32
    )
    neighbors = np.stack([below.astype(np.uint32).view(np.float32), above.view(np.float32)])
    assert all(set(draws[:, i]) <= set(neighbors[:, i].astype(np.float64)) for i in range(len(x)))
    error = np.abs(draws.mean(axis=0) - np.asarray(x, np.float64))
    spread = np.abs(np.diff(neighbors.astype(np.float64), axis=0))[0]
    assert (error <= 5 * spread / 2 / np.sqrt(4000)).all()
    bad = stochastic_round(
        jax.random.key(0), {"x": jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])}, like
    )["x"]
    assert np.array_equal(np.asarray(bad, np.float32), [np.inf, -np.inf, np.nan], equal_nan=True)
    assert stochastic_round(jax.random.key(0), {"x": x}, {"x": x})["x"] is x


def test_bits_for_rounding_are_uniform_and_uncorrelated():
    shape = (2, 256, 256)
    keys = [jax.random.fold_in(jax.random.key(0), step) for step in range(4)]
    draws = np.stack([np.asarray(hash_indexes(key, shape)).ravel() >> 16 for key in keys])
    count = draws.shape[1]
    # Standard normal: the counts of the upper byte of neighbors, and of their lower bytes.
    for bytes_of_draws in (draws >> 8, draws & 255):
        pairs = bytes_of_draws[:, 1:] // 16 * 16 + bytes_of_draws[:, :-1] // 16
        for row in pairs:
            excess = (np.bincount(row, minlength=256) - len(row) / 256) ** 2 / (len(row) / 256)
            assert abs(excess.sum() - 255) < 6 * np.sqrt(2 * 255)
    # Correlations between elements, along both axes, and between steps.
    centered = (draws / 2**16 - 0.5) * np.sqrt(12)
    for lag in (1, 2, 256, 65536):
        correlation = (centered[:, lag:] * centered[:, :-lag]).mean(axis=1)
        assert (np.abs(correlation) < 5 / np.sqrt(count - lag)).all()
    correlation = centered @ centered.T / count - np.eye(4)
    assert (np.abs(correlation[~np.eye(4, dtype=bool)]) < 5 / np.sqrt(count)).all()


def test_small_changes_add_up_in_bfloat16():
    """Rounding to nearest would never change this second moment."""
    optimizer = scale_by_adam(
        config.Optimizer(beta2=0.999, mu_dtype="bfloat16", nu_dtype="bfloat16")
    )
    params = {"kernel": jnp.ones(4000)}
    state = optimizer.init(params)
    assert state.mu["kernel"].dtype == state.nu["kernel"].dtype == jnp.bfloat16
    state = state._replace(nu={"kernel": jnp.ones(4000, jnp.bfloat16)})
    step = jax.jit(lambda state: optimizer.update({"kernel": jnp.full(4000, 2.0)}, state)[1])
    for _ in range(100):  # each changes it by 3e-3, and the last digit is 8e-3
        state = step(state)
    expected = 4 - 3 * 0.999**100
    assert float(state.nu["kernel"].astype(jnp.float32).mean()) == pytest.approx(expected, rel=2e-3)
    nearest = jnp.ones((), jnp.bfloat16)
    for _ in range(100):
        nearest = (nearest.astype(jnp.float32) * 0.999 + 0.001 * 4).astype(jnp.bfloat16)
    assert float(nearest) == 1  # with rounding to nearest


def test_vectors_and_the_pixel_embedder_stay_float32():
    tree = {
        "head": {
            "embedder": {"kernel": jnp.ones(2)},
            "linear": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
        },
        "registers": jnp.ones(2),
    }
    kinds = jax.tree.map(lambda x: x.dtype.name, cast_params(tree, "bfloat16"))
    assert kinds["head"]["embedder"] == {"kernel": "float32"}
    assert kinds["head"]["linear"] == {"kernel": "bfloat16", "bias": "float32"}
    assert kinds["registers"] == "float32"
