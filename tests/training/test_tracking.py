"""TensorBoard and W&B receive numbers and images, and their errors never stop a run."""

import json
import struct
import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from radiance import config
from radiance.cli import main
from radiance.training.loop import train
from radiance.training.run_directory import RunDirectory
from radiance.training.tracking import Loggers, flatten_metrics, require_loggers
from tests.helpers.toy_runs import PLAIN, toy_run


class StandIn(ModuleType):
    """The part of wandb that is used; the function named `broken` raises."""

    def __init__(self, broken: str = ""):
        super().__init__("wandb")
        self.broken, self.starts, self.rows, self.finished = broken, [], [], 0

    def _maybe(self, name: str):
        if name == self.broken:
            raise ConnectionError(f"{name} cannot\nreach the server")

    def init(self, **settings):
        self._maybe("init")
        self.starts.append(settings)
        return self

    def log(self, row, step):
        self._maybe("log")
        self.rows.append((step, row))

    def Image(self, image, caption):
        return image, caption

    def finish(self):
        self._maybe("finish")
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    def install(broken: str = "") -> StandIn:
        module = StandIn(broken)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


def events(folder) -> list[tuple[int, str, object]]:
    """Return (step, tag, value) of TensorBoard's files.

    A record consists of a length, its checksum, an event and its checksum.
    """
    records = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            records += [
                (event.step, v.tag, v.image if v.HasField("image") else v.simple_value)
                for v in event.summary.value
            ]
            data = data[16 + length :]
    return records


@pytest.mark.slow
def test_loggers_receive_the_metrics_of_the_run_directory_also_after_resuming(
    tmp_path, data_directory, wandb
):
    module = wandb()
    run = toy_run(
        tmp_path,
        data_directory,
        "train.steps=4",
        "train.sample_every=4",
        "train.loggers=tensorboard,wandb",
        **PLAIN,
    )
    assert train(run) == 4
    longer = config.override(run, ["train.steps=8"])
    assert train(longer) == 8
    rows = RunDirectory(run.run_dir).read_metrics()
    expected = [
        (row["step"], flatten_metrics({k: v for k, v in row.items() if k != "step"}))
        for row in rows
    ]
    assert "validation_bins/9" in expected[2][1]

    numbers = [(step, row) for step, row in module.rows if "samples" not in row]
    assert numbers == expected
    assert module.finished == 2
    first, second = module.starts
    assert first["id"] == second["id"] == (run.run_dir / "wandb" / "id.txt").read_text().strip()
    assert second["resume"] == "allow"
    assert second["config"]["train"]["steps"] == 8
    assert first["name"] == "toy"
    images_by_step = {step: row["samples"] for step, row in module.rows if "samples" in row}
    for step in (4, 8):
        saved = Image.open(run.run_dir / "samples" / f"{step:08d}.png")
        assert np.array_equal(np.asarray(images_by_step[step][0]), np.asarray(saved))
        assert (
            images_by_step[step][1]
            == "a handwritten one\nthe digit 2"
            == "\n".join(json.loads(saved.text["prompts"]))
        )

    board = events(run.run_dir / "tensorboard")
    scalars = {(step, tag): value for step, tag, value in board if tag != "samples"}
    assert scalars == pytest.approx(
        {(step, name): x for step, row in expected for name, x in row.items()}, rel=1e-6
    )
    images = {step: image for step, tag, image in board if tag == "samples"}
    assert set(images) == {4, 8}
    assert (images[4].width, images[4].height) == images_by_step[4][0].size


@pytest.mark.parametrize(("broken", "calls"), [("init", 0), ("log", 1), ("finish", 1)])
def test_failure_is_printed_once_and_does_not_stop_the_run(tmp_path, capsys, wandb, broken, calls):
    module = wandb(broken)
    loggers = Loggers(toy_run(tmp_path, "", "train.loggers=wandb"), 0)
    for step in (1, 2):
        loggers.write_metrics(step, {"loss": 1.0})
        loggers.write_samples(step, Image.new("RGB", (2, 2)), ["one"])
    loggers.close()
    assert capsys.readouterr().err == (
        f"radiance: wandb failed (ConnectionError: {broken} cannot); "
        "the run continues, and further errors are not printed.\n"
    )
    assert len(module.starts) == calls


def test_missing_package_is_an_error_before_the_run(tmp_path, data_directory, monkeypatch, capsys):
    for module, name in (("tensorboardX", "tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        command = [
            "train",
            "experiments/quickstart.py",
            f"output={tmp_path}",
            f"data.cache_dir={data_directory}",
            f"train.loggers={name}",
        ]
        assert main(command) == 2
        assert f"{module} is not installed: pip install radiance[{name}]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    require_loggers(())


def test_setting_accepts_known_names(tmp_path):
    assert toy_run(tmp_path, "").train.loggers == ()
    run = toy_run(tmp_path, "", "train.loggers=wandb,tensorboard")
    assert run.train.loggers == ("wandb", "tensorboard")
    assert config.from_json(config.Config, config.to_json(run)) == run
    assert config.override(run, ["train.loggers="]).train.loggers == ()
    with pytest.raises(config.ConfigError, match="did you mean 'wandb'"):
        toy_run(tmp_path, "", "train.loggers=wandd")
    with pytest.raises(config.ConfigError, match="twice"):
        toy_run(tmp_path, "", "train.loggers=wandb,wandb")


def test_lists_and_objects_are_flattened():
    numbers = {
        "loss": 1.0,
        "validation_bins": [2.0, 3.0],
        "gradient_norms": {"double": 4.0, "head": 5.0},
    }
    assert flatten_metrics(numbers) == {
        "loss": 1.0,
        "validation_bins/0": 2.0,
        "validation_bins/1": 3.0,
        "gradient_norms/double": 4.0,
        "gradient_norms/head": 5.0,
    }
