"""Diagnosis of pretrained weights by their loss, and coordination of hosts."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors.numpy import save_file

from radiance import config
from radiance.base import errors
from radiance.base.errors import DataError
from radiance.training import coordination
from radiance.training.checkpoints import Checkpoints
from radiance.training.loss_diagnosis import diagnose_loss, find_reference_loss, list_alternatives

PUBLISHED = config.MODELS["chroma1-radiance-x0"]


@pytest.fixture
def file(tmp_path):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    return str(tmp_path / "x.safetensors")


def diagnose(file, model, loss, truth=None):
    """Diagnose weights with `loss` in every bin, and 0.06 with the model settings `truth`."""
    run = config.Config(model=model, init=file)
    bins = np.full(10, loss)
    return diagnose_loss(
        run,
        find_reference_loss(run),
        bins,
        lambda other: np.full(10, 0.06) if other.model == truth else bins,
    )


@pytest.mark.parametrize("text_ids", ["zero", "sequential"])
def test_a_loss_near_the_published_one_is_accepted(file, text_ids):
    assert "0.058 to 0.063: the weights were read correctly" in diagnose(
        file, replace(PUBLISHED, text_ids=text_ids), 0.07
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(masking="off"),
        dict(masking="strict"),
        dict(prediction="velocity"),
        dict(text_ids="sequential"),
    ],
)
@pytest.mark.parametrize("loss", [0.2, 0.02])
def test_each_wrong_setting_is_named(file, changes, loss):
    ((name, _),) = changes.items()
    line = diagnose(file, replace(PUBLISHED, **changes), loss, truth=PUBLISHED)
    assert f"model.{name}={getattr(PUBLISHED, name)} is probably the right setting" in line


def test_a_loss_that_no_setting_explains_is_reported(file):
    assert "no single setting explains it" in diagnose(file, PUBLISHED, 0.5)
    assert len(list(list_alternatives(config.Config(model=PUBLISHED)))) == 5
    learned = config.Config(model=replace(PUBLISHED, padding="learned"))
    assert all(config.override(learned, [change]) for change in list_alternatives(learned))


def test_hosts_with_different_data_are_refused(monkeypatch):
    ours = {"train": {"count": 3}, "text": {"identity": "x"}}
    monkeypatch.setattr(coordination.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        coordination.multihost_utils, "process_allgather", lambda x: np.stack([x, x])
    )
    coordination.check_hosts_agree(ours)
    monkeypatch.setattr(
        coordination.multihost_utils,
        "process_allgather",
        lambda x: np.stack([x, np.stack([x[0] + 1, x[1]])]),
    )
    with pytest.raises(config.ConfigError, match=r"do not see the same data \(train\)"):
        coordination.check_hosts_agree(ours)


def test_an_error_of_one_host_ends_its_process_at_once(monkeypatch, capsys):
    """An ordinary exit would wait for the others. An error of all hosts is raised."""
    exits = []
    monkeypatch.setattr(coordination.os, "_exit", exits.append)
    for hosts, error, raised in (
        (1, DataError, True),
        (2, errors.TrainingError, True),
        (2, DataError, False),
    ):
        monkeypatch.setattr(coordination.jax, "process_count", lambda hosts=hosts: hosts)
        with (
            pytest.raises(error) if raised else nullcontext(),
            coordination.exit_if_host_fails(Mock(Checkpoints, latest_complete_step=7)),
        ):
            raise error("an image is gone")
    error_output = capsys.readouterr().err
    assert exits == [1]
    assert error_output.count("start all hosts again") == 1
    assert "(an image is gone)" in error_output
    assert "from step 7." in error_output
    with coordination.exit_if_host_fails(Mock(Checkpoints, latest_complete_step=None)):
        raise AssertionError  # without a message
    assert "(AssertionError): start all hosts again" in capsys.readouterr().err


def test_other_models_have_no_reference_loss(file):
    assert (
        find_reference_loss(
            config.Config(model=replace(PUBLISHED, hidden=1536, heads=12), init=file)
        )
        is None
    )
