"""Changes of a run that is resumed: refused with what to do, or allowed knowingly and recorded."""

import json
import shutil

import pytest

from radiance import config
from radiance.base.errors import OutputError
from radiance.cli import main
from radiance.training import inputs
from radiance.training.initialization import load_pretrained_params
from radiance.training.resumption import check_resumable
from radiance.training.run_directory import RunDirectory
from tests.helpers.toy_runs import (
    PLAIN,
    metrics,
    same,
    state_of,
    toy_run,
    train,
    written_experiment,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_directory):
    run = toy_run(tmp_path_factory.mktemp("trained"), data_directory, "train.steps=4", **PLAIN)
    assert train(run) == 4
    return run


@pytest.fixture
def copied(trained, tmp_path):
    run = config.override(trained, [f"output={tmp_path}"])
    shutil.copytree(trained.run_dir, run.run_dir)
    return run


def refusal(run: config.Config, *allowed: str) -> str:
    before = {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(config.ConfigError) as error:
        train(run, *allowed)
    after = {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}
    assert before == after
    assert "remove" not in str(error.value)
    return str(error.value)


def test_a_refusal_says_what_differs_and_what_to_do(copied):
    message = refusal(config.override(copied, ["optimizer.learning_rate=2e-3", "train.steps=8"]))
    assert message.startswith(
        f"{copied.run_dir} holds another run (optimizer.learning_rate was 0.001, now 0.002): undo "
        f"the change, start a new run from its weights with init={copied.run_dir} name=NEW, or "
        "continue it knowingly with --allow-changes optimizer.learning_rate."
    )


def test_the_offered_commands_work(copied, capsys):
    changed = config.override(copied, ["optimizer.learning_rate=2e-3", "train.steps=6"])
    new = config.override(changed, [f"init={copied.run_dir}", "name=new"])
    assert train(new) == 6
    assert f"from the weights of {copied.run_dir}" in capsys.readouterr().out
    path = written_experiment(changed)
    assert main(["train", str(path)]) == 2
    assert "--allow-changes optimizer.learning_rate." in capsys.readouterr().err
    assert main(["train", str(path), "--allow-changes", "data,optimizer.learning_rate"]) == 0
    assert "resumed from step 4" in capsys.readouterr().out
    starts = json.loads((copied.run_dir / "environment.json").read_text())
    assert starts[-1]["allowed_changes"] == {"optimizer.learning_rate": [0.001, 0.002]}
    assert "allowed_changes" not in starts[0]
    assert RunDirectory(copied.run_dir).read_config().optimizer.learning_rate == 0.002
    assert main(["train", str(path)]) == 0  # the change is part of the run now
    assert main(["train", str(path), "--allow-changes", "optimizer.learning_rates"]) == 2
    assert "did you mean 'optimizer.learning_rate'?" in capsys.readouterr().err


def test_other_data_are_allowed_knowingly(copied, monkeypatch):
    run = config.override(copied, ["train.steps=6", "data.flip_probability=0.5"])
    describe = inputs.describe_source
    monkeypatch.setattr(
        inputs, "describe_source", lambda *arguments: describe(*arguments) | {"hash": "other"}
    )
    message = refusal(run)
    assert "data.flip_probability was 0.0, now 0.5, data.train.hash was '" in message
    assert message.endswith("or continue it knowingly with --allow-changes data.")
    assert "data.train.hash" in refusal(run, ["data.flip_probability"])
    assert train(run, ["data"]) == 6
    changes = json.loads((run.run_dir / "environment.json").read_text())[-1]["allowed_changes"]
    assert set(changes) == {"data.flip_probability", "data.train.hash", "data.validation.hash"}
    assert json.loads((run.run_dir / "data.json").read_text())["train"]["hash"] == "other"


@pytest.mark.parametrize(
    ("change", "has_init"),
    [
        ("model.text_ids=sequential", False),
        ("model.registers=2", False),
        ("optimizer.ema_decays=0.5", True),
        ("optimizer.kind=muon", True),
        ("optimizer.weights_dtype=bfloat16", True),
    ],
)
def test_changes_that_checkpoints_do_not_fit_are_never_allowed(copied, change, has_init):
    section = change.partition(".")[0]
    for allowed in ((), ([section],)):
        message = refusal(config.override(copied, [change]), *allowed)
        assert change.partition("=")[0] in message
        assert "--allow-changes" not in message
        assert ("init=" in message) == has_init
        assert "name=NEW" in message


def test_a_renamed_run_directory_resumes(copied, trained):
    renamed = config.override(copied, ["name=renamed", "train.steps=6"])
    copied.run_dir.rename(renamed.run_dir)
    assert train(renamed) == 6
    straight = config.override(trained, [f"output={copied.output}", "name=straight"])
    shutil.copytree(trained.run_dir, straight.run_dir)
    assert train(config.override(straight, ["train.steps=6"])) == 6
    assert same(state_of(renamed, 6), state_of(straight, 6))
    assert metrics(renamed) == metrics(straight)


def test_folders_of_a_mixture_may_be_renamed():
    def mixture(path: str) -> config.Config:
        return config.Config(
            data=config.Data(
                source="mixture",
                mixture=(config.MixtureSource(path=path), config.MixtureSource("digits")),
            )
        )

    from radiance.training.resumption import find_changes

    assert not find_changes(mixture("old"), mixture("new"))


def test_fewer_steps_than_the_run_has_are_refused(copied):
    assert "has been trained for 4 steps already, and train.steps=3: give at least 4" in refusal(
        config.override(copied, ["train.steps=3"])
    )
    (copied.run_dir / "samples" / "00000004.png").unlink(missing_ok=True)
    assert train(config.override(copied, ["train.steps=4"])) == 4


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 64, b"[]", b"\xff", b"[" * 100_000, b"3", b'{"a"']
)
def test_damaged_files_are_named(copied, content):
    data, start, settings = (
        copied.run_dir / f"{name}.json" for name in ("data", "environment", "config")
    )
    run = config.override(copied, ["train.steps=6"])
    data_before = data.read_bytes()
    data.write_bytes(content)
    with pytest.raises(OutputError, match=r"data.json is damaged .*: restore it, or remove"):
        train(run)
    data.write_bytes(data_before)
    start.write_bytes(content)
    if content != b"[]":
        assert train(run) == 6
        assert len(json.loads(start.read_text())) == 1
        assert (run.run_dir / "damaged" / "environment.json").read_bytes() == content
    settings.write_bytes(content)
    with pytest.raises(OutputError, match=r"config.json is damaged .*: restore it from a copy"):
        train(run)
    with pytest.raises(OutputError, match=r"config.json is damaged"):
        load_pretrained_params(str(run.run_dir), run)


def test_a_run_without_its_config_is_refused(copied):
    (copied.run_dir / "config.json").unlink()
    with pytest.raises(config.ConfigError, match=r"has checkpoints and no config\.json"):
        check_resumable(RunDirectory(copied.run_dir), copied, {})


def test_damaged_metrics_keep_all_other_rows(copied, capsys):
    path = copied.run_dir / "metrics.jsonl"
    before = metrics(copied)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1:1] = [b"\0" * 300 + b"\n", b'{"step": 2, "loss": "high"}\n', b"\0\0" + lines[1]]
    lines[4:5] = []
    path.write_bytes(b"".join(lines) + b'{"step": 4, "lo')
    assert train(config.override(copied, ["train.steps=6"])) == 6
    output = capsys.readouterr().out
    assert "metrics.jsonl is damaged in line 2, 3: all other lines are kept; the file" in output
    rows = metrics(copied)
    assert rows[: len(before)] == before
    assert (copied.run_dir / "damaged" / "metrics.jsonl").read_bytes().startswith(lines[0])
