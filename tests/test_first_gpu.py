"""The first measurements on a GPU: limits, failures and commands of the parts."""

import json
import math
import sys

import pytest

from benchmarks import attention, first_gpu, sampling, training
from benchmarks.first_gpu import Part
from radiance import cli

MODULES = {
    "benchmarks.attention": attention,
    "benchmarks.sampling": sampling,
    "benchmarks.training": training,
}
TABLE = "print('| | seconds |\\n|---|---:|\\n| ours | 0.5 |', flush=True)"


def make_part(name: str, seconds: float, program: str) -> Part:
    return Part(name, seconds, (sys.executable, "-c", program))


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(first_gpu, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(first_gpu, "GRACE_SECONDS", 0.5)
    parts = [
        make_part("fails", 20, "raise SystemExit('no memory')"),
        make_part("hangs", 3, f"{TABLE}\nimport time\ntime.sleep(60)"),
        Part("absent", 20, ("/no/such/program",)),
        make_part("works", 20, TABLE),
    ]
    last_parts = [
        make_part("until the end", math.inf, "import time\ntime.sleep(60)"),
        make_part("late", 20, TABLE),
    ]
    returned = first_gpu.run_parts(parts, 300, tmp_path)
    page = (tmp_path / "first_gpu.md").read_text()
    returned += first_gpu.run_parts(last_parts, 1, tmp_path)
    written = [json.loads(x) for x in (tmp_path / "first_gpu.jsonl").read_text().splitlines()]
    assert written == returned
    assert {record["part"]: record["status"] for record in written} == {
        "fails": "failed",
        "hangs": "stopped at its limit",
        "absent": "failed",
        "works": "done",
        "until the end": "stopped at its limit",
        "late": "not started",
    }
    rows = [{"row": "ours", "seconds": "0.5"}]
    assert [record["tables"] for record in written] == [[], [rows], [], [rows], [], []]
    assert "no memory" in written[0]["output"]
    assert "| hangs | stopped at its limit |" in page
    assert "| ours | 0.5 |" in page


class Parsed(Exception):
    """The arguments of a command are valid."""


@pytest.mark.parametrize(
    "part", first_gpu.make_parts() + first_gpu.make_toy_parts(), ids=lambda part: part.name
)
def test_commands_of_parts_are_valid(part, monkeypatch):
    def stop(*_):
        raise Parsed

    monkeypatch.setattr(first_gpu, "format_golden_errors", stop)
    for module in MODULES.values():
        monkeypatch.setattr(module, "Report", stop)
    words = [word.replace(first_gpu.MINUTES, "1") for word in part.command[3:]]
    if part.command[2] == "radiance":
        assert cli.parse_arguments(words)
        return
    with pytest.raises(Parsed):
        MODULES.get(part.command[2], first_gpu).main(words)


def test_unknown_parts_are_an_error(capsys):
    with pytest.raises(SystemExit):
        first_gpu.main(["--parts", "nothing"])
    assert "There is no part 'nothing': the parts are verify, bfloat16," in capsys.readouterr().err


def test_the_error_of_bfloat16_is_small(monkeypatch):
    files = first_gpu.list_golden_files()
    monkeypatch.setattr(first_gpu, "list_golden_files", lambda: files[:1])
    (rows,) = first_gpu.parse_tables(first_gpu.format_golden_errors())
    assert [row["output"] for row in rows] == ["velocity"]
    assert 1e-4 < float(rows[0]["error in bfloat16"]) < 5e-2


def test_lengths_of_rows_differ():
    inputs = attention.make_inputs((3, 10, 1, 2), 4)
    assert inputs.lengths.tolist() == [6, 2, 1]
    assert not inputs.weights[1, 2:].any()
    assert inputs.weights[1, :2].all()
