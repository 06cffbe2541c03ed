"""R² against least squares on the model's own vectors, and checkpoints of which the answer is known."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.cli import main
from radiance.data.datasets import DataError
from radiance.evaluation import modulation_variance
from radiance.evaluation.modulation_variance import (
    ConditionGrid,
    ModulationVector,
    decompose_variance,
    measure_variance,
)
from radiance.model.transformer import bind_model
from radiance.weights.checkpoint import open_checkpoint
from tests.helpers.toy_files import LATENT, published, save, sentence
from tests.helpers.toy_models import toy_model

FLUX = toy_model(
    modulation="per_block", pooled_dim=5, head="linear", patch=1, channels=8, masking="off"
)
DEV = replace(FLUX, guidance_embed=True)
DRAW = np.random.default_rng(0)
GRID = ConditionGrid(
    np.linspace(0.05, 1, 6, dtype=np.float32),
    DRAW.standard_normal((4, 5), np.float32),
    np.zeros(1, np.float32),
    "four",
)
GRIDS = {FLUX: GRID, DEV: GRID._replace(guidance=np.array([1, 2, 5], np.float32))}


def measured(path, model, grid, **changed) -> list[ModulationVector]:
    """Of random tensors, some of which are changed by name."""
    tensors = published(model, "float32")
    assert changed.keys() <= tensors.keys()
    tensors |= {name: np.full_like(tensors[name], value) for name, value in changed.items()}
    return list(
        measure_variance(open_checkpoint(save(path / "flux.safetensors", tensors, model)), grid)
    )


def r_squared(values: np.ndarray, *columns: np.ndarray) -> float:
    """Of the best functions of what numbers the columns: least squares with a column of zeros and ones for each number."""
    x = np.concatenate([np.eye(column.max() + 1)[column] for column in columns], axis=1)
    centred = values - values.mean(axis=0)
    return (
        1 - np.square(centred - x @ np.linalg.lstsq(x, centred)[0]).sum() / np.square(centred).sum()
    )


@pytest.mark.parametrize("model", [FLUX, DEV], ids=["schnell", "dev"])
def test_least_squares_on_what_the_model_makes(model, tmp_path):
    found, grid = measured(tmp_path, model, GRIDS[model]), GRIDS[model]
    at = np.indices((len(grid.time), len(grid.pooled), len(grid.guidance))).reshape(3, -1)
    params = open_checkpoint(tmp_path / "flux.safetensors").load_params()
    arguments = [
        jnp.asarray(x[i]) for x, i in zip((grid.time, grid.guidance, grid.pooled), at[[0, 2, 1]])
    ]
    made = bind_model(model, config.Compute(dtype="float32"), params).modulation(*arguments)
    expected = {
        **{
            ("image", block, name): made.double_image[block, :, i]
            for block in range(2)
            for i, name in enumerate(modulation_variance.DOUBLE_VECTOR_NAMES)
        },
        **{
            ("text", block, name): made.double_text[block, :, i]
            for block in range(2)
            for i, name in enumerate(modulation_variance.DOUBLE_VECTOR_NAMES)
        },
        **{
            ("single", block, name): made.single[block, :, i]
            for block in range(3)
            for i, name in enumerate(modulation_variance.SINGLE_VECTOR_NAMES)
        },
        **{("output", 0, name): made.output[:, i] for i, name in enumerate(("shift", "scale"))},
    }
    assert [v[:3] for v in sorted(found)] == sorted(expected)
    assert len(found) == modulation_variance.count_vectors(model) == 35
    for vector in found:
        values = np.asarray(expected[vector[:3]], np.float64)
        assert vector.components.r2_time == pytest.approx(r_squared(values, at[0]), abs=1e-5)
        assert vector.components.r2_additive == pytest.approx(r_squared(values, *at), abs=1e-5)
        assert vector.components.constant == pytest.approx(
            np.square(values.mean(0)).sum(), rel=1e-4
        )
        assert vector.components.variance == pytest.approx(
            np.square(values - values.mean(0)).sum(-1).mean(), rel=1e-4
        )
        assert 0.02 < vector.components.r2_time < vector.components.r2_additive < 1


def test_closed_forms():
    t, p, g = (
        x[..., None] for x in np.meshgrid([-1.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, 1.0], indexing="ij")
    )
    both = np.concatenate([3 + 2 * t + 0 * p * g, t * p + 0 * g, p + 3 * g + 0 * t], axis=-1)
    found = decompose_variance(both)
    np.testing.assert_allclose(found, [9, 4, 2 / 3, 9, 2 / 3], atol=1e-12)
    assert found.r2_time == pytest.approx(4 / (13 + 4 / 3))
    assert found.r2_additive == pytest.approx(1 - (2 / 3) / (13 + 4 / 3))


def test_a_model_that_ignores_text_is_a_function_of_time(tmp_path):
    """And under guidance, which is not time, it is not."""
    ignoring = {"vector_in.out_layer.weight": 0}
    for v in measured(tmp_path, FLUX, GRID, **ignoring):
        assert v.components.r2_time == pytest.approx(1, abs=1e-9)
        assert v.components.r2_additive == pytest.approx(1, abs=1e-9)
    for v in measured(tmp_path, DEV, GRIDS[DEV], **ignoring):
        assert v.components.r2_time < 0.99
        assert v.components.pooled == pytest.approx(0, abs=1e-9)


def test_a_model_that_ignores_time(tmp_path):
    for v in measured(tmp_path, FLUX, GRID, **{"time_in.out_layer.weight": 0}):
        assert v.components.r2_time == pytest.approx(0, abs=1e-9)
        assert v.components.r2_additive == pytest.approx(1, abs=1e-9)


def test_a_constant_has_no_share(tmp_path):
    """Here those of one layer, whose bias alone is left."""
    found = measured(tmp_path, FLUX, GRID, **{"single_blocks.1.modulation.lin.weight": 0})
    still = [v for v in found if v[:2] == ("single", 1)]
    assert all(
        v.components.variance == 0 and np.isnan(v.components.r2_time) and v.components.constant > 0
        for v in still
    )
    assert len(still) == 3
    assert "3 of the 35 vectors are constant" in modulation_variance.format_summary(found, GRID)
    row = next(
        line.split()
        for line in modulation_variance.format_vector_table(still).splitlines()
        if "gate" in line
    )
    assert row == ["single", "gate", "1", "–", "–", "–", "–", "100.0%"]


def test_layer_by_layer(tmp_path):
    """A layer is read when its vectors are asked for, and nothing else of the file is."""
    checkpoint, read = open_checkpoint(save(tmp_path / "x.safetensors", published(FLUX), FLUX)), []
    vectors = measure_variance(
        replace(
            checkpoint, get_tensor=lambda name: read.append(name) or checkpoint.get_tensor(name)
        ),
        GRID,
    )
    next(vectors)
    assert {name.partition(".")[0] for name in read[:-2]} == {"time_in", "vector_in"}
    assert read[-2:] == ["double_blocks.0.img_mod.lin.weight", "double_blocks.0.img_mod.lin.bias"]
    list(vectors)
    assert len(read) == len(set(read)) == 8 + 2 * (2 + 2 + 3 + 1)
    tensors = published(FLUX)
    tensors["double_blocks.1.txt_mod.lin.bias"][7] = np.nan
    with pytest.raises(
        CheckpointError, match="double_blocks.1.txt_mod.lin.bias holds values that are not finite"
    ) as error:
        list(
            measure_variance(open_checkpoint(save(tmp_path / "x.safetensors", tensors, FLUX)), GRID)
        )
    sentence(error)


def test_the_vectors_of_prompts(tmp_path):
    path = tmp_path / "pooled.safetensors"
    pooled = DRAW.standard_normal((1000, 5), np.float32)
    save_file({"pooled": pooled, "tokens": np.zeros((1000, 77), np.int64)}, path)
    grid = modulation_variance.make_grid(FLUX, path)
    assert grid.pooled_description == f"128 of the 1000 pooled vectors of {path}"
    assert len(grid.pooled) == 128
    assert (grid.pooled[[0, -1]] == pooled[[0, -1]]).all()
    assert len(np.unique(grid.pooled, axis=0)) == 128
    assert (
        modulation_variance.make_grid(DEV).pooled == modulation_variance.make_grid(DEV).pooled
    ).all()
    for tensors, model, said in (
        ({"x": pooled[:1]}, FLUX, "0 tensors of shape"),
        ({"x": pooled, "y": pooled}, FLUX, "2 tensors of shape"),
        ({"x": pooled * np.inf}, FLUX, "not finite"),
        ({"x": pooled}, replace(DEV, pooled_dim=0), "reads no pooled vectors"),
    ):
        save_file(tensors, path)
        with pytest.raises(DataError, match=said) as error:
            modulation_variance.make_grid(model, path)
        sentence(error)


def test_the_command(tmp_path, capsys):
    """Table and page agree with what is measured; what has no such layers is told why."""
    file = save(tmp_path / "flux.safetensors", published(DEV), DEV)
    assert main(["inspect", str(file), "--modulation", "--write", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    found = list(measure_variance(open_checkpoint(file), modulation_variance.make_grid(DEV)))
    mean = np.mean([v.components.r2_time for v in found])
    assert f"explains {mean:.1%} in the mean over 35 vectors" in out
    assert "32 Gaussian vectors of norm about 2.2 in place of" in out
    lowest = min(
        v.components.r2_time for v in found if v.layer_type == "single" and v.name == "gate"
    )
    assert (
        next(line.split() for line in out.splitlines() if line.startswith("single  gate"))[4]
        == f"{lowest:.3f}"
    )
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<polyline") == 5 * 3 * 2
    assert ">block</text>" in page
    assert "<script" not in page
    assert "http" not in page
    assert (
        f"<td>single</td><td>2</td><td>gate</td><td>{found[-3].components.r2_time:.4f}</td>" in page
    )

    for model, said in (
        (LATENT, "1 by construction"),
        (replace(FLUX, pooled_dim=0), "nothing but time"),
        (toy_model(modulation="none"), "same"),
    ):
        assert (
            main(
                [
                    "inspect",
                    str(save(tmp_path / "x.safetensors", published(model), model)),
                    "--modulation",
                ]
            )
            == 0
        )
        assert said in capsys.readouterr().out
    shared = toy_model(modulation="shared", pooled_dim=5)
    wrong = {
        "only per_block": [
            str(save(tmp_path / "x.safetensors", published(shared), shared)),
            "--modulation",
        ],
        "is none": ["chroma1-base", "--modulation"],
        "is data": [str(tmp_path / "x.jsonl"), "--modulation"],
        "give that too": [str(file), "--pooled", "x"],
    }
    for expected, arguments in wrong.items():
        assert main(["inspect", *arguments]) == 2
        assert expected in capsys.readouterr().err
