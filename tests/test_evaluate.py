"""`radiance evaluate` at toy size: what it says is what the parts say, measured by other means."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from runs import PLAIN, toy_run, train, written_experiment

from radiance import config
from radiance.cli import main
from radiance.data.datasets import open_source
from radiance.data.pipeline import fixed_batches
from radiance.evaluation import reader
from radiance.evaluation.compare import compare_features
from radiance.evaluation.features import Pixels
from radiance.evaluation.measure import Painted, captioned, sampling
from radiance.models import load
from radiance.pictures import to_signed
from radiance.text.encoders import HashEncoder
from radiance.training.step import validation_losses

CHANGES = (
    "data.source=shapes", "data.shapes.limit=20", "data.shapes.count=30", "text.length=20", "data.side=16", "train.steps=1", "train.log_every=1",
    "train.checkpoint_every=1", "sample.batch=8", "sample.guidance=1", "sample.weights=params", "flow.time_law=logit_normal", "flow.time_mean=0.8",
)  # fmt: skip


pytestmark = pytest.mark.slow  # a run is trained and sampled


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    run = toy_run(folder, str(folder / "data"), *CHANGES, **PLAIN)
    assert train(run) == 1
    return run


@pytest.fixture(scope="module")
def found(run):
    """What the command measured."""
    assert main(["evaluate", str(run.directory), "sample.steps=1", "--validate", "10", "--pictures", "21", "--features", "pixels16"]) == 0
    return json.loads((run.directory / "evaluation.json").read_text())


def test_the_loss_is_that_of_the_fixed_pictures(run, found):
    """Over uniform time, whatever the run was trained on."""
    plain = config.override(run, ["flow.time_law=uniform", "flow.time_mean=none"])
    pipeline, measure = load(run.directory), jax.jit(partial(validation_losses, plain, bins=16))
    total = np.zeros(16)
    for seed, batch in enumerate(fixed_batches(open_source(run.data, "validation"), run.data, pipeline.encoder, 10, "one_pad")):
        total += batch["weight"] @ np.asarray(measure(pipeline.params, batch, seed))
    np.testing.assert_allclose(found["validation"]["bins"], total / 10, rtol=1e-4)
    assert found["validation"]["loss"] == pytest.approx(np.mean(total / 10), rel=1e-4) and found["validation"]["pictures"] == 10


def test_the_pictures_are_those_that_sample_paints(run, found):
    source, pipeline = open_source(run.data, "validation"), load(run.directory, changes=["steps=1"])
    painted = pipeline([source.captions(i)[0] for i in range(21)])
    ours = np.stack([to_signed(np.asarray(picture.image)) for picture in painted])
    real = np.stack([to_signed(np.asarray(source.picture(i, (16, 16)))) for i in range(21)])
    numbers = found["sampling"]["numbers"]
    for name, value in compare_features(Pixels()(ours), Pixels()(real), "pixels16").items():
        assert numbers[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    told = [source.attributes(i)["told"] for i in range(21)]
    assert found["sampling"]["scenes"]["count"] == reader.score(reader.read(ours), told).count
    assert set(found["sampling"]["scenes by chance"]) == set(found["sampling"]["scenes"])
    assert numbers["seam score of real pictures"] > 0 and len(found["sampling"]["spectrum error (dB)"]) == 8


def test_captions_are_painted_as_the_run_begins_them(run, monkeypatch):
    framed, source = config.override(run, ["data.prefix=oh "]), open_source(run.data, "validation")
    pipeline, seen = load(run.directory, run=framed), []

    def values(prompts, *_):
        seen.extend(prompts)
        raise InterruptedError

    monkeypatch.setattr(pipeline, "values", values)
    with pytest.raises(InterruptedError):
        sampling(pipeline, source, range(21), [Pixels()])
    assert seen == [f"oh {source.captions(i)[0]}" for i in range(21)]
    longest = max(pipeline.encoder.count(source.captions(i)[0]) for i in range(21))
    tight = HashEncoder(16, longest)
    assert 0 < len(captioned(source, framed.data, tight, 21)) < len(captioned(source, run.data, tight, 21)) == 21


def test_all_that_it_takes_to_do_it_again_is_written(run, found):
    assert found["config"]["sample"]["steps"] == 1 and found["model"] == "toy step 1 params"
    assert found["data"]["hash"] == open_source(run.data, "validation").fingerprint()
    assert found["sampling"]["extractors"] == {"pixels16": Pixels().identity}
    assert found["sampling"]["seeds"] == [0, 20] and found["sampling"]["captions_too_long"] == 0
    assert {"command", "environment", "config_hash", "text"} <= found.keys() and found["environment"]["packages"]["jax"]


def test_features_of_real_pictures_are_kept(run, found):
    kept = list((run.directory.parent / "data" / "features").glob("pixels16-*.safetensors"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    arguments = [
        "sample.steps=1",
        "--validate",
        "2",
        "--pictures",
        "21",
        "--features",
        "pixels16",
        "--out",
        str(run.directory / "again.json"),
    ]
    assert main(["evaluate", str(run.directory), *arguments]) == 0
    assert kept[0].stat().st_mtime_ns == before
    again = json.loads((run.directory / "again.json").read_text())
    assert again["sampling"]["numbers"] == found["sampling"]["numbers"]
    assert again["validation"]["pictures"] == 2 and json.loads((run.directory / "evaluation.json").read_text()) == found


class Perfect:
    """A pipeline that paints the pictures themselves."""

    side = 4

    def __init__(self, run, source):
        self.run, self.source = run, source

    def values(self, prompts, seeds, width, height, settings):
        for i in seeds:
            yield to_signed(np.asarray(self.source.picture(i, (width, height))))[None]


def test_a_perfect_model_is_perfect(tmp_path):
    run = config.override(config.Config(), ["data.source=shapes", "data.shapes.count=24", "data.side=64", f"data.directory={tmp_path}"])
    source = open_source(run.data, "validation")
    found = sampling(Perfect(run, source), source, range(24), [Pixels()])
    numbers, scenes = found["numbers"], found["scenes"]
    assert abs(numbers["FD(pixels16)"]) < 1e-6 and numbers["precision(pixels16)"] == numbers["recall(pixels16)"] == 1
    assert numbers["log spectral distance (dB)"] < 1e-9 and numbers["clipping fraction"] == 0
    assert numbers["seam score"] == pytest.approx(numbers["seam score of real pictures"])
    assert scenes["exact"] == scenes["f1"] == 1 and found["scenes by chance"]["exact"] < 0.2


def test_what_a_file_would_clip_is_counted_and_what_is_not_finite_refused():
    painted = Painted(["a", "b"], [], None, False, 4)
    values = np.zeros((1, 8, 8, 3), np.float32)
    values[:, :2] = 1.5
    painted.add(values)
    assert painted.clipped == 0.25
    with pytest.raises(ValueError, match="Picture 1 has values that are not finite"):
        painted.add(values * np.nan)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--pictures", "3"], "comparing takes 20"),
        (["--validate", "0"], "at least 1"),
        (["model.double_blocks=3"], "another network than model.double_blocks would make"),
        (["--clip", "clip"], "give --pictures"),
        (["--experiment", "experiments/quickstart.py"], "leave --experiment out"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(run, capsys, arguments, told):
    assert main(["evaluate", str(run.directory), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_file_is_measured_with_an_experiment(run, found, tmp_path, capsys):
    file, out = tmp_path / "toy.safetensors", tmp_path / "out.json"
    assert main(["convert", str(run.directory), str(file), "--dtype", "fp32"]) == 0
    assert main(["evaluate", str(file), "--out", str(out)]) == 2
    assert "give --experiment" in capsys.readouterr().err
    name = str(written_experiment(run, tmp_path))
    assert main(["evaluate", str(file), "--experiment", name]) == 2
    assert "give --out" in capsys.readouterr().err
    assert main(["evaluate", str(file), "--experiment", name, "--validate", "10", "--out", str(out)]) == 0
    np.testing.assert_allclose(json.loads(out.read_text())["validation"]["bins"], found["validation"]["bins"], rtol=1e-4)
