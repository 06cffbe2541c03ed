"""The run directory's journal."""

import json

import pytest

from radiance.training.directory import Journal, RunDirectory


def test_nested_numbers_are_told_to_tensorboard_by_part(tmp_path, monkeypatch):
    board = pytest.importorskip("tensorboardX")
    told = {}
    monkeypatch.setattr(board.SummaryWriter, "add_scalar", lambda self, name, value, step: told.update({name: (value, step)}))
    directory = RunDirectory(tmp_path)
    journal = Journal(directory, 0)
    row = {"loss": 0.5, "gradient_norms": {"double": 1.5, "head": 0.25}, "validation_bins": [3.0, 4.0]}
    journal.write(7, row)
    journal.close()
    assert told == {
        "loss": (0.5, 7), "gradient_norms/double": (1.5, 7), "gradient_norms/head": (0.25, 7),
        "validation_bins/0": (3.0, 7), "validation_bins/1": (4.0, 7),
    }  # fmt: skip
    assert json.loads(directory.metrics.read_text()) == {"step": 7, **row}
