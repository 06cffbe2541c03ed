"""`radiance evaluate` at toy size, compared with its parts computed by other means."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from radiance import config
from radiance.base.images import to_signed
from radiance.cli import main
from radiance.data.batches import make_validation_batches
from radiance.data.datasets import open_source
from radiance.evaluation.evaluate import SampleMetrics, evaluate_samples, select_images
from radiance.evaluation.features import PixelExtractor
from radiance.evaluation.metrics import compare_features
from radiance.loading import load
from radiance.pipeline import Pipeline
from radiance.shapes import scoring
from radiance.text.hash_encoder import HashEncoder
from radiance.training.step import compute_validation_losses
from tests.helpers.toy_runs import PLAIN, toy_run, train, written_experiment

CHANGES = (
    "data.source=shapes",
    "data.shapes.max_tokens=20",
    "data.shapes.num_images=30",
    "text.max_length=20",
    "data.resolution=16",
    "train.steps=1",
    "train.log_every=1",
    "train.checkpoint_every=1",
    "sample.batch_size=8",
    "sample.guidance_scale=1",
    "sample.weights=params",
    "flow.timestep_distribution=logit_normal",
    "flow.logit_mean=0.8",
)


pytestmark = pytest.mark.slow  # a run is trained and sampled


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    run = toy_run(folder, str(folder / "data"), *CHANGES, **PLAIN)
    assert train(run) == 1
    return run


@pytest.fixture(scope="module")
def result(run):
    """What the command measured."""
    assert (
        main(
            [
                "evaluate",
                str(run.run_dir),
                "sample.steps=1",
                "--validate",
                "10",
                "--images",
                "21",
                "--features",
                "pixels16",
            ]
        )
        == 0
    )
    return json.loads((run.run_dir / "evaluation.json").read_text())


def test_the_loss_is_that_of_the_fixed_images(run, result):
    """Over uniform time, whatever the run was trained on."""
    plain = config.override(run, ["flow.timestep_distribution=uniform", "flow.logit_mean=none"])
    pipeline, measure = (
        load(run.run_dir),
        jax.jit(partial(compute_validation_losses, plain, num_bins=16)),
    )
    total = np.zeros(16)
    for seed, batch in enumerate(
        make_validation_batches(
            open_source(run.data, "validation"), run.data, pipeline.encoder, 10, "one_pad"
        )
    ):
        total += batch["weight"] @ np.asarray(measure(pipeline.params, batch, seed))
    np.testing.assert_allclose(result["validation"]["bins"], total / 10, rtol=1e-4)
    assert result["validation"]["loss"] == pytest.approx(np.mean(total / 10), rel=1e-4)
    assert result["validation"]["images"] == 10


def test_the_samples_are_those_of_radiance_sample(run, result):
    source, pipeline = open_source(run.data, "validation"), load(run.run_dir, changes=["steps=1"])
    samples = pipeline([source.captions(i)[0] for i in range(21)])
    ours = np.stack([to_signed(np.asarray(image.image)) for image in samples])
    real = np.stack([to_signed(np.asarray(source.load_image(i, (16, 16)))) for i in range(21)])
    numbers = result["sampling"]["metrics"]
    for name, value in compare_features(
        PixelExtractor()(ours), PixelExtractor()(real), "pixels16"
    ).items():
        assert numbers[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    descriptions = [source.attributes(i)["described"] for i in range(21)]
    assert (
        result["sampling"]["scenes"]["count"]
        == scoring.score_readings(scoring.read_pixels(ours), descriptions).count
    )
    assert set(result["sampling"]["scenes by chance"]) == set(result["sampling"]["scenes"])
    assert numbers["seam score of real images"] > 0
    assert len(result["sampling"]["spectrum error (dB)"]) == 8


def test_captions_are_sampled_with_the_prefix_of_the_run(run, monkeypatch):
    framed, source = (
        config.override(run, ["data.caption_prefix=oh "]),
        open_source(run.data, "validation"),
    )
    pipeline, seen = load(run.run_dir, run=framed), []

    def values(prompts, *_):
        seen.extend(prompts)
        raise InterruptedError

    monkeypatch.setattr(pipeline, "generate_arrays", values)
    with pytest.raises(InterruptedError):
        evaluate_samples(pipeline, source, range(21), [PixelExtractor()])
    assert seen == [f"oh {source.captions(i)[0]}" for i in range(21)]
    longest = max(pipeline.encoder.count_tokens(source.captions(i)[0]) for i in range(21))
    tight = HashEncoder(16, longest)
    assert (
        0
        < len(select_images(source, framed.data, tight, 21))
        < len(select_images(source, run.data, tight, 21))
        == 21
    )


def test_the_result_contains_all_that_reproduces_it(run, result):
    assert result["config"]["sample"]["steps"] == 1
    assert result["model"] == "toy step 1 params"
    assert result["data"]["hash"] == open_source(run.data, "validation").fingerprint()
    assert result["sampling"]["extractors"] == {"pixels16": PixelExtractor().identity}
    assert result["sampling"]["seeds"] == [0, 20]
    assert result["sampling"]["captions_too_long"] == 0
    assert {"command", "environment", "config_hash", "text"} <= result.keys()
    assert result["environment"]["packages"]["jax"]


def test_features_of_real_images_are_cached(run, result):
    remaining = list((run.run_dir.parent / "data" / "features").glob("pixels16-*.safetensors"))
    assert len(remaining) == 1
    before = remaining[0].stat().st_mtime_ns
    arguments = [
        "sample.steps=1",
        "--validate",
        "2",
        "--images",
        "21",
        "--features",
        "pixels16",
        "--out",
        str(run.run_dir / "again.json"),
    ]
    assert main(["evaluate", str(run.run_dir), *arguments]) == 0
    assert remaining[0].stat().st_mtime_ns == before
    again = json.loads((run.run_dir / "again.json").read_text())
    assert again["sampling"]["metrics"] == result["sampling"]["metrics"]
    assert again["validation"]["images"] == 2
    assert json.loads((run.run_dir / "evaluation.json").read_text()) == result


class Perfect(Pipeline):
    """A pipeline whose samples are the real images."""

    pixels_per_token = 4

    def __init__(self, run, source):
        self.run, self.source = run, source

    def generate_arrays(self, prompts, seeds, width, height, settings):
        for i in seeds:
            yield to_signed(np.asarray(self.source.load_image(i, (width, height))))[None]


def test_a_perfect_model_is_perfect(tmp_path):
    run = config.override(
        config.Config(),
        [
            "data.source=shapes",
            "data.shapes.num_images=24",
            "data.resolution=64",
            f"data.cache_dir={tmp_path}",
        ],
    )
    source = open_source(run.data, "validation")
    result = evaluate_samples(Perfect(run, source), source, range(24), [PixelExtractor()])
    numbers, scenes = result["metrics"], result["scenes"]
    assert abs(numbers["FD(pixels16)"]) < 1e-6
    assert numbers["precision(pixels16)"] == numbers["recall(pixels16)"] == 1
    assert numbers["log spectral distance (dB)"] < 1e-9
    assert numbers["clipping fraction"] == 0
    assert numbers["seam score"] == pytest.approx(numbers["seam score of real images"])
    assert scenes["exact"] == scenes["f1"] == 1
    assert result["scenes by chance"]["exact"] < 0.2


def test_clipped_values_are_counted():
    samples = SampleMetrics(["a", "b"], [], None, False, 4)
    values = np.zeros((1, 8, 8, 3), np.float32)
    values[:, :2] = 1.5
    samples.add(values)
    assert samples.clipping_sum == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "3"], "a comparison needs 20"),
        (["--validate", "0"], "at least 1"),
        (["model.double_blocks=3"], "other parameters than model.double_blocks would need"),
        (["--clip", "clip"], "give --images"),
        (["--experiment", "experiments/quickstart.py"], "do not give --experiment"),
    ],
)
def test_impossible_options_are_reported_before_any_work(run, capsys, arguments, message):
    assert main(["evaluate", str(run.run_dir), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_is_evaluated_with_an_experiment(run, result, tmp_path, capsys):
    file, out = tmp_path / "toy.safetensors", tmp_path / "out.json"
    assert main(["convert", str(run.run_dir), str(file), "--dtype", "fp32"]) == 0
    assert main(["evaluate", str(file), "--out", str(out)]) == 2
    assert "give --experiment" in capsys.readouterr().err
    name = str(written_experiment(run, tmp_path))
    assert main(["evaluate", str(file), "--experiment", name]) == 2
    assert "give --out" in capsys.readouterr().err
    assert (
        main(["evaluate", str(file), "--experiment", name, "--validate", "10", "--out", str(out)])
        == 0
    )
    np.testing.assert_allclose(
        json.loads(out.read_text())["validation"]["bins"], result["validation"]["bins"], rtol=1e-4
    )
