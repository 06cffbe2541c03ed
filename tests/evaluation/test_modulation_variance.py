"""R² against least squares on the model's own vectors, and checkpoints with known results."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from radiance import config
from radiance.base.errors import CheckpointError, DataError
from radiance.cli import main
from radiance.evaluation.modulation_report import format_summary, format_vector_table
from radiance.evaluation.modulation_variance import (
    ConditionGrid,
    ModulationVector,
    count_vectors,
    decompose_variance,
    make_grid,
    measure_variance,
)
from radiance.model.modulation import DOUBLE_VECTOR_NAMES, SINGLE_VECTOR_NAMES
from radiance.model.transformer import bind_model
from radiance.weights.checkpoint import open_checkpoint
from tests.helpers.toy_files import LATENT, published, save, sentence
from tests.helpers.toy_models import toy_model

SCHNELL = toy_model(
    modulation="per_block", pooled_dim=5, head="linear", patch=1, channels=8, masking="off"
)
DEV = replace(SCHNELL, guidance_embed=True)
RNG = np.random.default_rng(0)
SCHNELL_GRID = ConditionGrid(
    np.linspace(0.05, 1, 6, dtype=np.float32),
    RNG.standard_normal((4, 5), np.float32),
    np.zeros(1, np.float32),
    "four",
)
DEV_GRID = SCHNELL_GRID._replace(guidance=np.array([1, 2, 5], np.float32))


def measure(path, model, grid, **changes) -> list[ModulationVector]:
    """Measure a model with random tensors, except those whose name is given a value."""
    tensors = published(model, "float32")
    assert changes.keys() <= tensors.keys()
    tensors |= {name: np.full_like(tensors[name], value) for name, value in changes.items()}
    file = save(path / "flux.safetensors", tensors, model)
    return list(measure_variance(open_checkpoint(file), grid))


def r_squared(values: np.ndarray, *inputs: np.ndarray) -> float:
    """Return R² of the best sum of functions of integer inputs: least squares on indicators."""
    x = np.concatenate([np.eye(indices.max() + 1)[indices] for indices in inputs], axis=1)
    centered = values - values.mean(axis=0)
    residuals = centered - x @ np.linalg.lstsq(x, centered)[0]
    return 1 - np.square(residuals).sum() / np.square(centered).sum()


@pytest.mark.parametrize(
    ("model", "grid"), [(SCHNELL, SCHNELL_GRID), (DEV, DEV_GRID)], ids=["schnell", "dev"]
)
def test_components_agree_with_least_squares_on_the_models_vectors(model, grid, tmp_path):
    vectors = measure(tmp_path, model, grid)
    grid_shape = (len(grid.time), len(grid.pooled), len(grid.guidance))
    indices = np.indices(grid_shape).reshape(3, -1)
    params = open_checkpoint(tmp_path / "flux.safetensors").load_params()
    time, guidance, pooled = (
        jnp.asarray(x[i])
        for x, i in zip((grid.time, grid.guidance, grid.pooled), indices[[0, 2, 1]])
    )
    network = bind_model(model, config.Compute(dtype="float32"), params)
    modulation = network.modulation(time, guidance, pooled)
    expected = {("output", 0, n): modulation.output[:, i] for i, n in enumerate(("shift", "scale"))}
    for block in range(2):
        for i, name in enumerate(DOUBLE_VECTOR_NAMES):
            expected["image", block, name] = modulation.double_image[block, :, i]
            expected["text", block, name] = modulation.double_text[block, :, i]
    for block in range(3):
        for i, name in enumerate(SINGLE_VECTOR_NAMES):
            expected["single", block, name] = modulation.single[block, :, i]
    assert [v[:3] for v in sorted(vectors)] == sorted(expected)
    assert len(vectors) == count_vectors(model) == 35
    for vector in vectors:
        values = np.asarray(expected[vector[:3]], np.float64)
        components = vector.components
        mean = values.mean(0)
        variance = np.square(values - mean).sum(-1).mean()
        assert components.r2_time == pytest.approx(r_squared(values, indices[0]), abs=1e-5)
        assert components.r2_additive == pytest.approx(r_squared(values, *indices), abs=1e-5)
        assert components.constant == pytest.approx(np.square(mean).sum(), rel=1e-4)
        assert components.variance == pytest.approx(variance, rel=1e-4)
        assert 0.02 < components.r2_time < components.r2_additive < 1


def test_components_have_closed_forms():
    t, p, g = (
        x[..., None] for x in np.meshgrid([-1.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, 1.0], indexing="ij")
    )
    values = np.concatenate([3 + 2 * t + 0 * p * g, t * p + 0 * g, p + 3 * g + 0 * t], axis=-1)
    components = decompose_variance(values)
    np.testing.assert_allclose(components, [9, 4, 2 / 3, 9, 2 / 3], atol=1e-12)
    assert components.r2_time == pytest.approx(4 / (13 + 4 / 3))
    assert components.r2_additive == pytest.approx(1 - (2 / 3) / (13 + 4 / 3))


def test_a_model_that_ignores_text_depends_on_time_and_guidance(tmp_path):
    changes = {"vector_in.out_layer.weight": 0}
    for v in measure(tmp_path, SCHNELL, SCHNELL_GRID, **changes):
        assert v.components.r2_time == pytest.approx(1, abs=1e-9)
        assert v.components.r2_additive == pytest.approx(1, abs=1e-9)
    for v in measure(tmp_path, DEV, DEV_GRID, **changes):
        assert v.components.r2_time < 0.99
        assert v.components.pooled == pytest.approx(0, abs=1e-9)


def test_a_model_that_ignores_time_has_no_variance_over_time(tmp_path):
    for v in measure(tmp_path, SCHNELL, SCHNELL_GRID, **{"time_in.out_layer.weight": 0}):
        assert v.components.r2_time == pytest.approx(0, abs=1e-9)
        assert v.components.r2_additive == pytest.approx(1, abs=1e-9)


def test_constant_vectors_have_no_r2(tmp_path):
    """Without its weights, a layer returns its bias."""
    changes = {"single_blocks.1.modulation.lin.weight": 0}
    vectors = measure(tmp_path, SCHNELL, SCHNELL_GRID, **changes)
    constant_vectors = [v for v in vectors if v[:2] == ("single", 1)]
    assert len(constant_vectors) == 3
    for v in constant_vectors:
        assert v.components.variance == 0
        assert np.isnan(v.components.r2_time)
        assert v.components.constant > 0
    assert "3 of the 35 vectors are constant" in format_summary(vectors, SCHNELL_GRID)
    lines = format_vector_table(constant_vectors).splitlines()
    row = next(line.split() for line in lines if "gate" in line)
    assert row == ["single", "gate", "1", "–", "–", "–", "–", "100.0%"]


def test_layers_are_read_one_at_a_time(tmp_path):
    """A layer is read when its vectors are needed, and each of its tensors once."""
    path, read_names = tmp_path / "x.safetensors", []
    checkpoint = open_checkpoint(save(path, published(SCHNELL), SCHNELL))

    def get_tensor(name):
        read_names.append(name)
        return checkpoint.get_tensor(name)

    vectors = measure_variance(replace(checkpoint, get_tensor=get_tensor), SCHNELL_GRID)
    next(vectors)
    layer = "double_blocks.0.img_mod.lin"
    assert {name.partition(".")[0] for name in read_names[:-2]} == {"time_in", "vector_in"}
    assert read_names[-2:] == [f"{layer}.weight", f"{layer}.bias"]
    list(vectors)
    assert len(read_names) == len(set(read_names)) == 8 + 2 * (2 + 2 + 3 + 1)


def test_damaged_weights_are_an_error(tmp_path):
    tensors = published(SCHNELL)
    tensors["double_blocks.1.txt_mod.lin.bias"][7] = np.nan
    checkpoint = open_checkpoint(save(tmp_path / "x.safetensors", tensors, SCHNELL))
    message = r"double_blocks\.1\.txt_mod\.lin\.bias holds values that are not finite"
    with pytest.raises(CheckpointError, match=message) as error:
        list(measure_variance(checkpoint, SCHNELL_GRID))
    sentence(error)


def test_pooled_vectors_of_prompts_come_evenly_from_the_file(tmp_path):
    path = tmp_path / "pooled.safetensors"
    pooled = RNG.standard_normal((1000, 5), np.float32)
    save_file({"pooled": pooled, "tokens": np.zeros((1000, 77), np.int64)}, path)
    grid = make_grid(SCHNELL, path)
    assert grid.pooled_description == f"128 of the 1000 pooled vectors of {path}"
    assert len(grid.pooled) == 128
    assert (grid.pooled[[0, -1]] == pooled[[0, -1]]).all()
    assert len(np.unique(grid.pooled, axis=0)) == 128


def test_random_pooled_vectors_are_reproducible():
    assert (make_grid(DEV).pooled == make_grid(DEV).pooled).all()


@pytest.mark.parametrize(
    ("tensors", "model", "message"),
    [
        ({"x": np.ones((1, 5), np.float32)}, SCHNELL, "0 tensors of shape"),
        (dict.fromkeys("xy", np.ones((9, 5), np.float32)), SCHNELL, "2 tensors of shape"),
        ({"x": np.full((9, 5), np.inf, np.float32)}, SCHNELL, "not finite"),
        ({"x": np.ones((9, 5), np.float32)}, replace(DEV, pooled_dim=0), "reads no pooled vectors"),
    ],
)
def test_other_files_of_pooled_vectors_are_errors(tensors, model, message, tmp_path):
    path = tmp_path / "pooled.safetensors"
    save_file(tensors, path)
    with pytest.raises(DataError, match=message) as error:
        make_grid(model, path)
    sentence(error)


def test_the_command_prints_a_table_and_writes_a_page(tmp_path, capsys):
    file = save(tmp_path / "flux.safetensors", published(DEV), DEV)
    page_path = tmp_path / "page.html"
    assert main(["inspect", str(file), "--modulation", "--write", str(page_path)]) == 0
    output = capsys.readouterr().out
    vectors = list(measure_variance(open_checkpoint(file), make_grid(DEV)))
    mean = np.mean([v.components.r2_time for v in vectors])
    assert f"Mean over 35 vectors: time alone explains {mean:.1%}" in output
    assert "32 Gaussian vectors of norm about 2.2 in place of" in output
    gates = [v for v in vectors if v.layer_type == "single" and v.name == "gate"]
    lowest = min(v.components.r2_time for v in gates)
    lines = output.splitlines()
    row = next(line.split() for line in lines if line.startswith("single  gate"))
    assert row[4] == f"{lowest:.3f}"
    page = page_path.read_text("utf-8")
    assert page.count('<g id="line') >= 5 * 3 * 2
    assert ">block</text>" in page
    assert "<script" not in page
    assert "http" not in page
    assert f"{vectors[-3].components.r2_time:.4f}</td>" in page


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (LATENT, "1 by construction"),
        (replace(SCHNELL, pooled_dim=0), "time is the only input"),
        (toy_model(modulation="none"), "the same at every time"),
    ],
)
def test_the_command_explains_trivial_cases(model, reason, tmp_path, capsys):
    file = save(tmp_path / "x.safetensors", published(model), model)
    assert main(["inspect", str(file), "--modulation"]) == 0
    assert reason in capsys.readouterr().out


def test_error_messages_of_the_command(tmp_path, capsys):
    file = save(tmp_path / "flux.safetensors", published(DEV), DEV)
    shared = toy_model(modulation="shared", pooled_dim=5)
    shared_file = save(tmp_path / "x.safetensors", published(shared), shared)
    for message, arguments in {
        "only per_block": [str(shared_file), "--modulation"],
        "chroma1-base is not one": ["chroma1-base", "--modulation"],
        "x.jsonl is a data set": [str(tmp_path / "x.jsonl"), "--modulation"],
        "give that too": [str(file), "--pooled", "x"],
    }.items():
        assert main(["inspect", *arguments]) == 2
        assert message in capsys.readouterr().err
