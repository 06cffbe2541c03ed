"""The network against an independent implementation in float64, and its masking and gradients."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.model import transformer
from tests.helpers.toy_models import (
    FLOAT32,
    VARIANTS,
    apply,
    gradients,
    rows_of,
    toy_inputs,
    toy_model,
    toy_params,
)

# --- the reference: float64, one sample at a time, text first, mask of all pairs ----------------


def sinusoid(x, width):
    """Round the large angles to float32, as the published code does."""
    half = width // 2
    rounded = np.exp(
        ((np.float32(-np.log(1e4)) * np.arange(half, dtype=np.float32)) / np.float32(half)).astype(
            np.float64
        )
    ).astype(np.float32)
    angles = (np.float32(1000) * np.float32(x) * rounded).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)])


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rms(x, p):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * p["scale"]


def modulate(x, shift, scale):
    x = x - x.mean(axis=-1, keepdims=True)
    return (1 + scale) * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) + shift


def dense(x, p):
    return x @ p["kernel"].reshape(x.shape[-1], -1) + np.ravel(p.get("bias", 0))


def mlp(x, p, act=gelu):
    return dense(act(dense(x, p["linear_in"])), p["linear_out"])


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def reference_vectors(model, p, time, guidance, pooled):
    doubles, singles = model.double_blocks, model.single_blocks
    if model.modulation in ("none", "shared"):
        p = {
            name: np.zeros((0, n, model.hidden))
            for name, n in (("double_image", 6), ("double_text", 6), ("single", 3))
        } | p
    if model.modulation == "none":
        return SimpleNamespace(
            image=p["double_image"], text=p["double_text"], single=p["single"], output=p["output"]
        )
    if model.modulation == "approximator":
        k = model.approximator_dim
        condition = np.concatenate([sinusoid(time, k // 4), sinusoid(guidance, k // 4)])
        rows = []
        for index in range(model.num_modulation_vectors):
            x = dense(np.concatenate([condition, sinusoid(index, k // 2)]), p["proj_in"])
            for i in range(model.approximator_depth):
                layer = at(p["layers"], i)
                x = x + mlp(rms(x, layer["norm"]), layer, silu)
            rows.append(dense(x, p["proj_out"]))
        cuts = np.cumsum([3 * singles, 6 * doubles, 6 * doubles])
        single, image, text, output = np.split(np.stack(rows), cuts)
        return SimpleNamespace(
            image=image.reshape(doubles, 6, -1),
            text=text.reshape(doubles, 6, -1),
            single=single.reshape(singles, 3, -1),
            output=output,
        )
    x = mlp(sinusoid(time, 256), p["condition"]["time"], silu)
    if model.guidance_embed:
        x = x + mlp(sinusoid(guidance, 256), p["condition"]["guidance"], silu)
    if model.pooled_dim:
        x = x + mlp(pooled, p["condition"]["pooled"], silu)
    x = silu(x)
    if model.modulation == "shared":
        image, text, single, output = np.split(dense(x, p["linear"]).reshape(17, -1), [6, 12, 15])
        return SimpleNamespace(
            image=image + p["double_image"],
            text=text + p["double_text"],
            single=single + p["single"],
            output=output,
        )

    def vectors_of(name, num_vectors, num_blocks):
        return [dense(x, at(p[name], i)).reshape(num_vectors, -1) for i in range(num_blocks)]

    return SimpleNamespace(
        image=vectors_of("double_image", 6, doubles),
        text=vectors_of("double_text", 6, doubles),
        single=vectors_of("single", 3, singles),
        output=dense(x, p["output"]).reshape(2, -1) if "output" in p else None,
    )


def reference_sample(  # noqa: C901 (the specification in one place)
    model, p, image, text, length, time, guidance, pooled
):
    v = reference_vectors(model, p["modulation"], time, guidance, pooled)
    size, (height, width, channels) = model.patch, image.shape
    grid = [(r, c) for r in range(height // size) for c in range(width // size)]

    def patches(image, size):
        return np.stack(
            [
                image[r * size : (r + 1) * size, c * size : (c + 1) * size].reshape(-1)
                for r, c in grid
            ]
        )

    values = (
        patches(image[::2, ::2], size // 2)
        if model.patch_embed == "conv_half"
        else patches(image, size)
    )
    x = (
        mlp(values, p["patch_embed"], lambda z: z)
        if model.patch_embed == "bottleneck"
        else dense(values, p["patch_embed"])
    )
    if model.padding == "learned":
        text = np.concatenate(
            [text[: int(length)], np.tile(p["padding"], (len(text) - int(length), 1))]
        )
    y = dense(text, p["text_embed"])
    visible = {
        "one_pad": np.arange(len(y)) <= length,
        "strict": np.arange(len(y)) < length,
        "off": np.full(len(y), True),
    }[model.masking]
    ids = [(j if model.text_ids == "sequential" else 0, 0, 0) for j in range(len(y))]
    if model.registers:
        y, visible, ids = (
            np.concatenate([p["registers"], y]),
            np.r_[[True] * model.registers, visible],
            [(0, 0, 0)] * model.registers + ids,
        )
    num_text = len(y)
    ids, visible = np.array(ids + [(0, r, c) for r, c in grid]), np.r_[visible, [True] * len(x)]
    angles = [
        np.outer(ids[:, a], model.rope_theta ** (-np.arange(0, s, 2) / s))
        for a, s in enumerate(model.rope_axes)
    ]
    rotations = np.exp(1j * np.concatenate(angles, axis=1))[:, None]

    def rotate(x):
        z = (x[..., ::2] + 1j * x[..., 1::2]) * rotations[: len(x)]
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    def project(x, p):
        q, k, v = dense(x, p["qkv"]).reshape(len(x), 3, model.heads, -1).swapaxes(0, 1)
        return rms(q, p["query_norm"]), rms(k, p["key_norm"]), v

    def attention(q, k, v):
        """Attend in the joint sequence, or in the text alone, which comes first."""
        logits = np.einsum("qhk,shk->hqs", rotate(q), rotate(k)) / np.sqrt(model.head_dim)
        weights = np.where(np.outer(visible, visible)[: len(q), : len(q)], np.exp(logits), 0)
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
        return np.einsum("hqs,shk->qhk", weights, v).reshape(len(q), -1)

    for i in range(model.text_refiner_blocks):
        s = at(p["refiner"], i)
        y = y + dense(
            attention(*project(modulate(y, 0, 0), s["attention"])), s["attention"]["proj"]
        )
        y = y + mlp(modulate(y, 0, 0), s["mlp"])
    for i in range(model.double_blocks):
        streams, m = (
            (at(p["double"]["text"], i), at(p["double"]["image"], i)),
            (v.text[i], v.image[i]),
        )
        qkv = [
            project(modulate(z, w[0], w[1]), s["attention"]) for z, w, s in zip((y, x), m, streams)
        ]
        a = attention(*(np.concatenate(pair) for pair in zip(*qkv)))
        y, x = (
            z + w[2] * dense(z_a, s["attention"]["proj"])
            for z, z_a, w, s in zip((y, x), (a[:num_text], a[num_text:]), m, streams)
        )
        y, x = (
            z + w[5] * mlp(modulate(z, w[3], w[4]), s["mlp"]) for z, w, s in zip((y, x), m, streams)
        )
    joint = np.concatenate([y, x])
    for i in range(model.single_blocks):
        s, w = at(p["single"], i), v.single[i]
        z = modulate(joint, w[0], w[1])
        joint = joint + w[2] * (
            dense(attention(*project(z, s["attention"])), s["attention"]["proj"]) + mlp(z, s["mlp"])
        )
    tokens, head = joint[num_text:], p["head"]

    out = np.empty_like(image)
    if model.head == "linear":
        pixels_by_token = dense(modulate(tokens, *v.output), head["linear"]).reshape(
            len(grid), size, size, channels
        )
    else:
        axis, f = np.linspace(0, 1, size), np.arange(model.nerf_freqs)

        def feature(r, c, fx, fy):
            return np.cos(np.pi * fx * axis[c]) * np.cos(np.pi * fy * axis[r]) / (1 + fx * fy)

        features = np.array(
            [
                [feature(r, c, fx, fy) for fx in f for fy in f]
                for r in range(size)
                for c in range(size)
            ]
        )
        pixels_by_token = []
        for token, pixels in zip(
            tokens, patches(image, size).reshape(len(grid), size * size, channels)
        ):
            n = dense(np.concatenate([pixels, features], axis=1), head["embedder"])
            for i in range(model.nerf_depth):
                block, inner = at(head["blocks"], i), model.nerf_hidden * model.nerf_mlp_ratio
                generated = dense(token, block["param_generator"]).reshape(3, -1)
                gate, value, output = (
                    g.reshape(s)
                    for g, s in zip(
                        generated, 2 * [(model.nerf_hidden, inner)] + [(inner, model.nerf_hidden)]
                    )
                )
                gate, value, output = (
                    g / np.maximum(np.linalg.norm(g, axis=0), 1e-12) for g in (gate, value, output)
                )
                z = rms(n, block["norm"])
                n = n + (silu(z @ gate) * (z @ value)) @ output
            pixels_by_token.append(rms(n, head["norm"]).reshape(size, size, -1))
        out = np.empty((height, width, model.nerf_hidden))
    for (r, c), patch in zip(grid, pixels_by_token):
        out[r * size : (r + 1) * size, c * size : (c + 1) * size] = patch
    if model.head == "nerf_linear":
        out = dense(out, head["linear"])
    if model.head == "nerf_conv":
        padded = np.pad(out, [(1, 1), (1, 1), (0, 0)])
        windows = (
            (i, j, padded[i : i + height, j : j + width]) for i in range(3) for j in range(3)
        )
        out = (
            sum(window @ head["conv"]["kernel"][i, j] for i, j, window in windows)
            + head["conv"]["bias"]
        )
    return out if model.prediction == "velocity" else (image - out) / time


def reference(model, params, inputs):
    p, inputs = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, inputs))
    b = len(inputs["time"])
    guidance = np.zeros(b) if inputs["guidance"] is None else inputs["guidance"]
    pooled = [None] * b if inputs["pooled"] is None else inputs["pooled"]
    rows = zip(*(inputs[k] for k in ("image", "text", "lengths", "time")), guidance, pooled)
    return np.stack([reference_sample(model, p, *row) for row in rows])


def assert_near(ours, expected, tolerance=1e-5):
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_equals_the_reference(variant):
    model = toy_model(**VARIANTS[variant])
    inputs = toy_inputs(model)
    ours = apply(model, toy_params(model), inputs)
    assert ours.shape == inputs["image"].shape
    assert ours.dtype == jnp.float32
    assert_near(ours, reference(model, toy_params(model), inputs), 2e-5)


# --- text lengths ---------------------------------------------------------------------------------

MASKED = [
    "one_pad",
    "strict",
    "registers",
    "sequential",
    "linear",
    "per_block",
    "bottleneck",
    "refiner",
]


def hidden_text(model, inputs):
    """Return the mask [b, l] of hidden text tokens."""
    return np.arange(inputs["text"].shape[1]) >= inputs["lengths"][:, None] + (
        model.masking == "one_pad"
    )


@pytest.mark.parametrize("variant", MASKED)
def test_samples_do_not_depend_on_the_rest_of_the_batch(variant):
    model = toy_model(**VARIANTS[variant])
    inputs = toy_inputs(model)
    together = apply(model, toy_params(model), inputs)
    for i in range(len(together)):
        assert_near(apply(model, toy_params(model), rows_of(inputs, [i, i, i]))[0], together[i])


@pytest.mark.parametrize("variant", MASKED)
def test_hidden_text_has_no_influence(variant):
    model = toy_model(**VARIANTS[variant])
    params, inputs = toy_params(model), toy_inputs(model, lengths=(1, 3, 4))
    hidden = hidden_text(model, inputs)
    before = np.asarray(apply(model, params, inputs))
    for garbage in (0, 1e30, np.nan, np.inf):
        text = np.where(hidden[..., None], np.float32(garbage), inputs["text"])
        np.testing.assert_array_equal(apply(model, params, inputs | dict(text=text)), before)
    longest = int((~hidden).sum(axis=1).max())
    assert longest == (5 if model.masking == "one_pad" else 4)
    assert_near(apply(model, params, inputs | dict(text=inputs["text"][:, :longest])), before)
    # The last visible row has an influence; with one_pad it is the padding token.
    text = inputs["text"].copy()
    text[np.arange(3), (~hidden).sum(axis=1) - 1] += 1
    change = np.abs(apply(model, params, inputs | dict(text=text)) - before).max(axis=(1, 2, 3))
    assert (change > 1e-4).all()


def test_padding_has_an_influence_without_masking():
    model = toy_model(**VARIANTS["flux"])
    inputs = toy_inputs(model)
    before = apply(model, toy_params(model), inputs)
    text = np.where((np.arange(6) >= inputs["lengths"][:, None] + 1)[..., None], 0, inputs["text"])
    change = np.abs(apply(model, toy_params(model), inputs | dict(text=text)) - before).max(
        axis=(1, 2, 3)
    )
    assert (change[:2] > 1e-3).all()
    assert change[2] == 0
    np.testing.assert_array_equal(
        apply(model, toy_params(model), inputs | dict(lengths=np.full(3, 6, np.int32))), before
    )


def test_a_learned_vector_replaces_the_padding():
    """The encoder's padding has no influence, and a text of length 0 consists of that vector."""
    model = toy_model(**VARIANTS["learned"])
    params, inputs = toy_params(model), toy_inputs(model, lengths=(0, 3, 6))
    padded = (np.arange(6) >= inputs["lengths"][:, None])[..., None]
    before = apply(model, params, inputs)
    assert_near(before, reference(model, params, inputs), 2e-5)
    for garbage in (0, 1e30, np.nan):
        dirty = inputs | dict(text=np.where(padded, np.float32(garbage), inputs["text"]))
        np.testing.assert_array_equal(apply(model, params, dirty), before)
    change = apply(model, params | dict(padding=params["padding"] + 1), inputs) - before
    assert (np.abs(change).max(axis=(1, 2, 3)) > 1e-4).tolist() == [True, True, False]


@pytest.mark.parametrize("registers", [0, 1])
def test_an_empty_text_has_no_influence(registers):
    """This holds in the text refiner blocks too, and no value becomes NaN."""
    model = toy_model(**VARIANTS["refiner"], registers=registers)
    params, inputs = toy_params(model), toy_inputs(model, lengths=(0, 2, 6))
    if not registers:  # a softmax over nothing could have gradients of NaN
        loss, (to_params, _, to_text) = gradients(model, params, inputs, weights_of(inputs))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, to_params, to_text)))
        assert (np.asarray(to_text)[0] == 0).all()
    before = apply(model, params, inputs)
    assert_near(before, reference(model, params, inputs), 2e-5)
    np.testing.assert_array_equal(
        apply(model, params, inputs | dict(text=inputs["text"][::-1]))[0], before[0]
    )


FULL = dict(registers=2, text_ids="sequential")
SMALL = dict(masking="strict", head="linear", modulation="none")
REFINED = dict(SMALL, text_refiner_blocks=1, patch_embed="bottleneck", bottleneck=7)
LEARNED = dict(VARIANTS["learned"], text_refiner_blocks=1, patch_embed="bottleneck", bottleneck=7)


@pytest.mark.parametrize("changes", [FULL, SMALL, REFINED])
def test_hidden_text_has_no_gradient(changes):
    model = toy_model(**changes)
    params, inputs = toy_params(model), toy_inputs(model)
    hidden, weights = hidden_text(model, inputs), weights_of(inputs)
    loss, (to_params, to_image, to_text) = gradients(model, params, inputs, weights)
    assert (np.asarray(to_text)[hidden] == 0).all()
    assert (np.abs(np.asarray(to_text)[~hidden]).max(axis=-1) > 0).all()
    dirty = inputs | dict(text=np.where(hidden[..., None], np.float32(np.nan), inputs["text"]))
    loss_dirty, again = gradients(model, params, dirty, weights)
    assert loss == loss_dirty
    jax.tree.map(np.testing.assert_array_equal, again[:2], (to_params, to_image))
    assert (np.asarray(again[2])[hidden] == 0).all()


# --- gradients ------------------------------------------------------------------------------------


def weights_of(inputs):
    return np.random.default_rng(5).standard_normal(inputs["image"].shape, np.float32)


@pytest.mark.parametrize("changes", [FULL, SMALL, LEARNED])
def test_gradients_equal_finite_differences_of_the_reference(changes):
    """Compare random directions in each subtree of the parameters, in the image and in the text."""
    model = toy_model(**changes)
    params, inputs = toy_params(model), toy_inputs(model)
    weights = weights_of(inputs)
    _, (to_params, to_image, to_text) = gradients(model, params, inputs, weights)
    tree = dict(params=params, image=inputs["image"], text=inputs["text"])
    slopes = dict(params=to_params, image=to_image, text=to_text)
    rng, h = np.random.default_rng(6), 1e-4

    def loss(tree):
        return np.vdot(
            weights,
            reference(model, tree["params"], inputs | dict(image=tree["image"], text=tree["text"])),
        )

    def compare_slopes(part):
        def sample_direction(path, x):
            return rng.standard_normal(x.shape) * (tuple(k.key for k in path)[: len(part)] == part)

        def loss_at(step):
            return loss(
                jax.tree.map(lambda x, d: np.asarray(x, np.float64) + step * d, tree, direction)
            )

        direction = jax.tree_util.tree_map_with_path(sample_direction, tree)
        ours = sum(
            np.vdot(np.asarray(g, np.float64), d)
            for g, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(direction))
        )
        return ours, (loss_at(h) - loss_at(-h)) / (2 * h)

    for part in [("params", name) for name in params] + [("image",), ("text",)]:
        ours, expected = compare_slopes(part)
        assert abs(expected) > 1e-2, part
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3, err_msg=str(part))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialization_does_not_change_gradients(remat):
    model = toy_model(**REFINED)
    inputs = toy_inputs(model)
    arguments = model, toy_params(model), inputs, weights_of(inputs)
    expected, ours = gradients(*arguments), gradients(*arguments, replace(FLOAT32, remat=remat))
    jax.tree.map(lambda x, y: assert_near(x, y, 1e-4), ours, expected)


# --- how it is run --------------------------------------------------------------------------------


def count_instructions(lowered):
    return sum(" = " in line for line in lowered.as_text().splitlines())


@pytest.mark.parametrize("function", ["init", "gradient"])
def test_the_number_of_instructions_does_not_depend_on_depth(function):
    def count(doubles, singles):
        model = toy_model(double_blocks=doubles, single_blocks=singles)
        inputs, params = toy_inputs(model), transformer.make_abstract_params(model)
        if function == "init":
            return count_instructions(transformer.init_params.lower(model, jax.random.key(0)))
        return count_instructions(
            gradients.lower(model, params, inputs, inputs["image"], replace(FLOAT32, remat="full"))
        )

    shallow, deep = count(2, 4), count(19, 38)
    assert shallow > 100
    assert deep <= 1.2 * shallow


def test_initial_parameters():
    model = toy_model(head="linear")
    init = jax.jit(transformer.init_params.__wrapped__, static_argnames="model")
    # rbg compiles faster
    params, again, other = (init(model, jax.random.key(seed, impl="rbg")) for seed in (0, 0, 1))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal((*x.shape, x.dtype), (*y.shape, y.dtype)),
        params,
        transformer.make_abstract_params(model),
    )
    jax.tree.map(np.testing.assert_array_equal, params, again)
    kernel = params["single"]["attention"]["qkv"]["kernel"]
    assert (kernel[0] != kernel[1]).all()
    assert (kernel != other["single"]["attention"]["qkv"]["kernel"]).all()
    # Outputs have unit variance.
    np.testing.assert_allclose(kernel.std() * np.sqrt(model.hidden), 1, rtol=0.05)
    assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert (np.asarray(apply(model, params, toy_inputs(model))) == 0).all()


@pytest.mark.parametrize("modulation", ["approximator", "per_block", "shared", "none"])
@pytest.mark.parametrize("absent", ["double_blocks", "single_blocks"])
def test_a_kind_of_block_may_be_absent(modulation, absent):
    model = toy_model(modulation=modulation, **{absent: 0})
    params, inputs = transformer.make_abstract_params(model), toy_inputs(model)
    assert absent.split("_")[0] not in params
    assert all(x.size for x in jax.tree.leaves(params))  # checkpoints cannot hold an empty array
    out = jax.eval_shape(
        lambda params, inputs: transformer.bind_model(model, FLOAT32, params)(**inputs),
        params,
        inputs,
    )
    assert out.shape == inputs["image"].shape


def test_given_modulation_vectors_equal_computed_ones():
    model = toy_model(head="linear")
    params, inputs = toy_params(model), toy_inputs(model)
    inputs |= dict(time=np.full(3, 0.6, np.float32), guidance=np.full(3, 2, np.float32))

    @jax.jit
    def apply_with_vectors(params, inputs):
        module = transformer.bind_model(model, FLOAT32, params)
        vectors = module.modulation(
            jnp.asarray(inputs["time"][:1]), jnp.asarray(inputs["guidance"][:1]), None
        )
        return module(**(inputs | dict(time=jnp.full(3, 0.1), guidance=None)), vectors=vectors)

    assert_near(apply_with_vectors(params, inputs), apply(model, params, inputs))


def test_x0_models_divide_by_time_or_by_the_given_divisor():
    model = toy_model(head="linear", prediction="x0")
    params, inputs = toy_params(model), toy_inputs(model)
    image = apply(replace(model, prediction="velocity"), params, inputs)
    time = inputs["time"][:, None, None, None]
    assert_near(apply(model, params, inputs), (inputs["image"] - image) / time)
    divisor = np.array([0.5, 1.5, 1.0], np.float32)
    ours = jax.jit(
        lambda inputs: transformer.bind_model(model, FLOAT32, params)(
            **inputs, divisor=jnp.asarray(divisor)
        )
    )(inputs)
    assert_near(ours, (inputs["image"] - image) / divisor[:, None, None, None])


@pytest.mark.parametrize(("height", "width"), [(8, 10), (6, 8)])
def test_an_image_that_does_not_divide_into_patches_is_an_error(height, width):
    model = toy_model()
    inputs = toy_inputs(model) | dict(image=np.zeros((3, height, width, 3), np.float32))
    with pytest.raises(ValueError, match=f"{width}×{height} .* patches of 4") as error:
        jax.eval_shape(
            lambda inputs: transformer.bind_model(
                model, FLOAT32, transformer.make_abstract_params(model)
            )(**inputs),
            inputs,
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant", ["one_pad", "linear"])
def test_bfloat16_is_near_float32(variant):
    model = toy_model(**VARIANTS[variant])
    params, inputs = toy_params(model), toy_inputs(model)
    exact, ours = (
        apply(model, params, inputs),
        apply(model, params, inputs, config.Compute(dtype="bfloat16")),
    )
    assert ours.dtype == jnp.float32
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.06
