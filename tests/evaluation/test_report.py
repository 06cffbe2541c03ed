"""The page of a run: well-formed, alone, complete, and safe whatever a run is called."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from radiance import config
from radiance.base.images import save_png
from radiance.cli import main
from radiance.evaluation.charts import (
    MAX_POINTS,
    Line,
    format_number,
    linear_ticks,
    log_ticks,
    render_line_chart,
)
from radiance.evaluation.report import (
    ReportRun,
    _input_wait_percentages,
    _smooth,
    thin_steps,
    write_report,
)
from radiance.training.run_directory import RunDirectory

HOSTILE = "<script>alert('&\"')</script>"


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def lines(self):
        return [len(a["points"].split()) for tag, a in self.tags if tag == "polyline"]


def a_run(folder, name: str, rows=(), images=()):
    path = folder / "run"
    path.mkdir(parents=True)
    (path / "config.json").write_text(
        config.to_json(config.Config(name=name, model=config.Model.from_name("nano")))
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in images:
        save_png(
            path / "samples" / f"{step:08d}.png",
            Image.effect_noise((600, 300), 90),
            {"prompts": [HOSTILE, "two"]},
        )
    return path


def measured(n: int):
    same = {
        "gradient_norm": 2.0,
        "gradient_norms": {HOSTILE: 1.0, "head": 2.0},
        "learning_rate": 1e-4,
        "images_skipped": 1,
    }
    same |= {
        "images_per_second": 256.0,
        "input_wait_seconds": 2.5,
        "tflops_per_device": 1.0,
        "mfu": 0.4,
    }  # 10 steps of 256 images take 10 s
    rows = [{"step": 10 * i, "loss": 1 / i, **same} for i in range(1, n + 1)]
    return [*rows, {"step": 10 * n, "validation_loss": 0.5, "validation_bins": [0.5, 0.25]}]


def test_one_run(tmp_path):
    path = a_run(tmp_path, HOSTILE.replace("/", ""), measured(7), (10, 20))
    (path / "data.json").write_text(
        json.dumps(
            {"train": {"hash": "abc", "skipped": {"no <caption>": 3}}, "text": {"encoder": "hash"}}
        )
    )
    text = write_report(path).read_text()
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.lines() == [
        7,
        7,
        1,
        1,
        1,
        *[7] * 9,
    ]  # raw, smoothed, validation; two bins; norm, two parts, and six of speed and data
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    assert page.text.count(f"{HOSTILE} · two") == 1
    assert "70 of 100000" in page.text
    assert "no <caption>" in page.text
    assert "nano" in page.text


def test_waiting_is_a_share_of_the_time():
    run = ReportRun("", RunDirectory("unused"), config.Config(), measured(3), "")
    assert _input_wait_percentages(run) == [(10, 25.0), (20, 25.0), (30, 25.0)]


def test_several_runs(tmp_path, capsys):
    one, two = (
        a_run(tmp_path / "1", "same", measured(7), (10, 20)),
        a_run(tmp_path / "2", "same", measured(5), (20, 30)),
    )
    out = tmp_path / "both.html"
    assert main(["report", str(one), str(two), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert page.lines()[:6] == [7, 7, 1, 5, 5, 1]
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    assert f"{two}, step 20" in page.text
    assert not (one / "report.html").exists()


def test_a_fresh_run_and_a_broken_one(tmp_path):
    path = a_run(tmp_path, "fresh")
    Page(write_report(path).read_text())
    (path / "data.json").write_text("{")
    (path / "samples").mkdir()
    (path / "samples" / "00000010.png").write_bytes(b"\x89PNG")
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}\n{"st')
    assert Page(write_report(path).read_text()).lines() == [1, 1]
    with pytest.raises(config.ConfigError, match="is not a run directory"):
        write_report(tmp_path)


def test_the_devices_of_a_running_run_are_left_alone(tmp_path):
    command = [
        sys.executable,
        "-m",
        "radiance",
        "report",
        str(a_run(tmp_path, "busy", measured(3))),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "a_device_that_is_taken"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_smoothing_follows_a_short_run_and_calms_a_long_one():
    short = [(i, float(i % 2)) for i in range(20)]
    assert _smooth(short) == short
    long = [(i, float(i % 2)) for i in range(2000)]
    assert all(abs(y - 0.5) < 0.01 for _, y in _smooth(long)[500:])


def test_the_page_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr("radiance.evaluation.report.BYTES", 200_000)
    text = write_report(a_run(tmp_path, "many", images=range(1, 30))).read_text()
    assert text.count("<img") == 10
    assert len(text) < 350_000


def test_charts():
    assert linear_ticks(0, 60) == [0, 20, 40, 60]
    assert log_ticks(0.1, 20) == [0.1, 1, 10]
    assert log_ticks(0.2, 3)[:2] == [0.2, 0.5]
    assert [format_number(x) for x in (0, 5e-5, 20000, 1.5e6)] == ["0", "5e-5", "20k", "1.5M"]
    assert thin_steps(range(100), 4) == [0, 33, 66, 99]
    many = [(i, 9.0 if i == 5001 else 1.0 + i % 2) for i in range(10_000)]
    page = Page(render_line_chart("spike", "x", [Line("", many)]))
    heights = [
        float(p.split(",")[1])
        for tag, a in page.tags
        if tag == "polyline"
        for p in a["points"].split()
    ]
    assert len(heights) <= MAX_POINTS + 2
    assert sorted(heights)[1] - min(heights) > 50
    assert page.lines()
    assert render_line_chart("none", "x", [Line("", [(1, float("nan"))])]) == ""
