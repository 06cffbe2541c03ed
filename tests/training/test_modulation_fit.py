"""Fit an approximator to FLUX's modulation with the command line; check its errors in NumPy."""

from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.cli import main
from radiance.evaluation import modulation_variance as layers_of
from radiance.model.modulation import join_vectors, sinusoid_frequencies, vector_names
from radiance.model.transformer import bind_modulation
from radiance.training import modulation_fit
from radiance.weights.checkpoint import Checkpoint, open_checkpoint
from radiance.weights.detect import detect_model
from radiance.weights.surgery import fix_pooled_vector, make_approximator_model, replace_modulation
from tests.helpers.toy_files import published, save, stored
from tests.helpers.toy_models import FLOAT32, apply, toy_inputs, toy_model

# The NeRF head reads no vectors, so the last two vectors are unused.
FLUX = toy_model(
    modulation="per_block",
    pooled_dim=5,
    guidance_embed=True,
    hidden=16,
    rope_axes=(0, 4, 4),
    double_blocks=1,
    single_blocks=2,
    approximator_hidden=64,
    approximator_depth=1,
)
STEPS = 600
GUIDANCES = (0, 2, 4, 6)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """Write random layers that respond little to high frequencies, as trained layers do.

    Scales and gates are around 1.
    """
    tensors = published(FLUX, "float32")
    for name in ("time_in", "guidance_in"):
        tensors[f"{name}.in_layer.weight"] *= np.tile(
            10 / (1 + 10_000 * sinusoid_frequencies(128)), 2
        )
    return save(tmp_path_factory.mktemp("flux") / "flux.safetensors", tensors, FLUX)


@pytest.fixture(scope="module")
def converted(flux):
    """Return the file that the command writes, and its output."""
    out, printed = flux.with_name("chroma.safetensors"), StringIO()
    with redirect_stdout(printed):
        assert (
            main(
                [
                    "convert",
                    str(flux),
                    str(out),
                    "--modulation",
                    "approximator",
                    "--modulation-steps",
                    str(STEPS),
                ]
            )
            == 0
        )
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def fixed(flux):
    return fix_pooled_vector(open_checkpoint(flux), np.zeros(5), "zero")


@pytest.fixture(scope="module")
def fit(fixed):
    return modulation_fit.fit_modulation(fixed, STEPS)


def relative_errors(flux, approximator) -> dict[tuple[str, int, str], float]:
    """Return the error of each vector; the layers of `flux` are applied in NumPy."""
    checkpoint, model = open_checkpoint(flux), open_checkpoint(approximator).model
    time = (
        (np.arange(modulation_fit.NUM_EVALUATION_TIMES) + 0.5) / modulation_fit.NUM_EVALUATION_TIMES
    ).astype(np.float32)
    grid = layers_of.ConditionGrid(
        time, np.zeros((1, 5), np.float32), np.array(GUIDANCES, np.float32), "zero"
    )
    x = layers_of.embed_conditions(checkpoint, grid)[:, 0]  # [t, g, d]
    network = bind_modulation(
        model, FLOAT32, open_checkpoint(approximator).load_params()["modulation"]
    )
    predictions = [
        join_vectors(network(jnp.asarray(time), jnp.full(len(time), g, jnp.float32), None))
        for g in GUIDANCES
    ]
    predictions = dict(
        zip(
            vector_names(model),
            np.stack(predictions, axis=1).astype(np.float64).transpose(2, 0, 1, 3),
        )
    )
    errors = {}
    for layers, block, native, names in layers_of._iterate_layers(checkpoint.model):
        weight, bias = (
            checkpoint.get_tensor(f"{native}.{kind}").astype(np.float64)
            for kind in ("weight", "bias")
        )
        for name, target in zip(names, np.split(x @ weight.T + bias, len(names), axis=-1)):
            errors[layers, block, name] = np.sqrt(
                np.square(predictions[layers, block, name] - target).mean()
                / np.square(target).mean()
            )
    return errors


def test_errors_agree_with_numpy(flux, converted, fit):
    out, printed = converted
    errors = relative_errors(flux, out)
    assert fit.report.names == vector_names(FLUX)[:-2]
    assert sorted(errors) == sorted(fit.report.names)
    expected = np.array([errors[name] for name in fit.report.names])
    np.testing.assert_allclose(fit.report.relative_error, expected, rtol=1e-3)
    assert (
        f"{expected.mean():.2%} in the mean over 18 vectors, {expected.max():.2%} in the worst"
        in printed
    )
    gates = {block: errors["single", block, "gate"] for block in range(2)}
    worst = max(gates, key=gates.get)
    row = next(line.split() for line in printed.splitlines() if line.startswith("single  gate"))
    assert row == [
        "single",
        "gate",
        "2",
        f"{np.mean([*gates.values()]):.2%}",
        f"{gates[worst]:.2%}",
        str(worst),
    ]
    assert "pooled text vector is zero" in printed
    assert "Chroma's tools set it to 0" in printed


def test_the_fit_is_close(fit):
    """The fit is closer than any constant: the variance is the error of the mean."""
    report = fit.report
    assert np.sqrt(report.variance / report.mean_square).mean() > 0.3
    assert np.sqrt(report.mean_squared_error / report.variance).mean() < 0.4
    assert np.sqrt(report.mean_squared_error / report.variance).max() < 0.6


def test_outputs_change_little(fixed, converted):
    out = open_checkpoint(converted[0])
    inputs = toy_inputs(fixed.model)
    expected, output = (np.asarray(apply(x.model, x.load_params(), inputs)) for x in (fixed, out))
    change = np.sqrt(np.square(output - expected).mean() / np.square(expected).mean())
    other = replace_modulation(
        fixed, jax.tree.map(lambda x: 0 * x, out.load_params()["modulation"])
    )
    without = np.asarray(apply(out.model, other.load_params(), inputs))
    assert change < 0.3 * np.sqrt(np.square(without - expected).mean() / np.square(expected).mean())


def test_other_tensors_do_not_change(flux, converted):
    before, after = stored(flux), stored(converted[0])
    removed = {
        name
        for name in before
        if "_mod." in name
        or ".modulation." in name
        or name.startswith(("time_in", "guidance_in", "vector_in"))
    }
    assert {name: after[name] for name in before.keys() - removed} == {
        name: before[name] for name in before.keys() - removed
    }
    assert all(
        name.startswith("distilled_guidance_layer.") for name in after.keys() - before.keys()
    )
    assert not removed & after.keys()
    shapes = {name: shape for name, (_, shape, _) in after.items()}
    expected = replace(FLUX, modulation="approximator", pooled_dim=0, guidance_embed=False)
    assert open_checkpoint(converted[0]).model == expected
    assert detect_model(shapes, rope_axes=FLUX.rope_axes) == expected  # without metadata


def test_seed_determines_the_fit(fixed, converted, fit):
    file = open_checkpoint(converted[0]).load_params()["modulation"]
    assert all(
        (x == y).all() for x, y in zip(jax.tree.leaves(file), jax.tree.leaves(fit.modulation))
    )
    other = modulation_fit.fit_modulation(fixed, STEPS, seed=1).modulation
    assert (other["proj_out"]["kernel"] != fit.modulation["proj_out"]["kernel"]).mean() > 0.99


def test_number_of_steps_per_call_does_not_matter(fixed, monkeypatch):
    fits = []
    for steps_per_call in (2, 4):
        monkeypatch.setattr(modulation_fit, "STEPS_PER_CALL", steps_per_call)
        counts = []
        fits.append(modulation_fit.fit_modulation(fixed, 4, on_progress=counts.append).modulation)
        assert counts == [steps_per_call] * (4 // steps_per_call)
    for x, y in zip(*map(jax.tree.leaves, fits)):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_vector_of_zeros_has_no_relative_error(fixed, monkeypatch):
    def get_tensor(name):
        array = fixed.get_tensor(name).copy()
        if name.startswith("single_blocks.1.modulation.lin."):
            array[2 * FLUX.hidden :] = 0
        return array

    monkeypatch.setattr(modulation_fit, "STEPS_PER_CALL", 4)
    result = modulation_fit.fit_modulation(replace(fixed, get_tensor=get_tensor), 4)
    zero_index = result.report.names.index(("single", 1, "gate"))
    assert [i for i, x in enumerate(result.report.relative_error) if np.isnan(x)] == [zero_index]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.modulation))
    row = next(
        line.split() for line in str(result.report).splitlines() if line.startswith("single  gate")
    )
    assert row[2] == "1"
    assert row[3] == row[4]
    assert row[5] == "0"


def test_zero_modulation_is_an_error(fixed):
    zeros = replace(fixed, get_tensor=lambda name: 0 * fixed.get_tensor(name))
    with pytest.raises(CheckpointError, match=r"is zero at every time.*nothing to fit"):
        modulation_fit.fit_modulation(zeros, 4)


def test_only_modulation_layers_are_read(tmp_path):
    """They stay in bfloat16."""
    model = replace(FLUX, pooled_dim=0)
    checkpoint, read = (
        open_checkpoint(save(tmp_path / "half.safetensors", published(model), model)),
        [],
    )
    layers = modulation_fit.read_modulation_layers(
        replace(
            checkpoint, get_tensor=lambda name: read.append(name) or checkpoint.get_tensor(name)
        )
    )
    assert {name.partition(".")[0] for name in read} == {
        "time_in",
        "guidance_in",
        "double_blocks",
        "single_blocks",
    }
    assert not [name for name in read if "attn" in name or "mlp" in name or "linear" in name]
    assert {x.dtype.name for x in jax.tree.leaves(layers)} == {"bfloat16"}
    weight = checkpoint.get_tensor("single_blocks.1.modulation.lin.weight")
    np.testing.assert_array_equal(np.asarray(layers["single"]["kernel"][1]), weight.T)


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        (dict(modulation="approximator"), (), "has an approximator already"),
        (
            dict(modulation="shared", pooled_dim=5),
            (),
            "has model.modulation=shared, without modulation layers in the blocks",
        ),
        (
            dict(modulation="none"),
            (),
            "has model.modulation=none, without modulation layers in the blocks",
        ),
        (dict(), ("--pooled", "zero"), "reads no pooled text vector"),
        (dict(), ("--dtype", "int9"), "no type 'int9'"),
        (dict(), ("--to", "torch"), "exists already"),
        (dict(), ("--to", "peft"), "writes a LoRA"),
    ],
)
def test_invalid_arguments_are_errors_before_the_fit(
    changes, flags, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(modulation_fit, "fit_modulation", lambda *_: pytest.fail("the fit started"))
    model = toy_model(**(dict(modulation="per_block") | changes))
    file, out = (
        save(tmp_path / "in.safetensors", published(model), model),
        tmp_path / "out.safetensors",
    )
    out.write_text("mine")
    assert main(["convert", str(file), str(out), "--modulation", "approximator", *flags]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert out.read_text() == "mine"


def test_schnell_becomes_chroma():
    """All settings but masking, which does not concern weights, become those of Chroma."""
    schnell = Checkpoint(
        config.MODELS["flux1-schnell"], {}, lambda name: pytest.fail("read"), {}, "schnell"
    )
    assert make_approximator_model(fix_pooled_vector(schnell, np.zeros(768), "zero")) == replace(
        config.MODELS["chroma1-base"], masking="off"
    )
