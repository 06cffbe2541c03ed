"""The report of a run is well-formed, self-contained and complete, whatever the run is called."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from radiance import config
from radiance.base.images import save_png
from radiance.cli import main
from radiance.evaluation.report import thin_steps, write_report
from radiance.evaluation.run_curves import ReportRun, compute_input_wait_percentages, smooth_points
from radiance.training.run_directory import RunDirectory

HOSTILE_NAME = "<script>alert('&\"')</script>"


class Page(HTMLParser):
    """A parsed page whose elements are all closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open_tags, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data

    @property
    def num_images(self) -> int:
        return sum(tag == "img" for tag, _ in self.tags)

    @property
    def line_lengths(self) -> list[int]:
        """Number of points of each plotted line: each is a group with an id, followed by a path."""
        lengths = []
        for (_, attributes), (_, next_attributes) in zip(self.tags, self.tags[1:]):
            name, _, number = attributes.get("id", "").partition("line")
            if not name and number.isdecimal():
                path = next_attributes.get("d", "")
                lengths.append(path.count("M") + path.count("L"))
        return lengths


def make_run_directory(folder, name: str, rows=(), sheet_steps=()):
    path = folder / "run"
    path.mkdir(parents=True)
    settings = config.Config(name=name, model=config.Model.from_name("nano"))
    (path / "config.json").write_text(config.to_json(settings))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in sheet_steps:
        sheet = Image.effect_noise((600, 300), 90)
        save_png(path / "samples" / f"{step:08d}.png", sheet, {"prompts": [HOSTILE_NAME, "two"]})
    return path


def make_measurements(count: int):
    """Rows of metrics.jsonl: 10 steps of 256 images take 10 s."""
    rows = [
        {
            "step": 10 * i,
            "loss": 1 / i,
            "gradient_norm": 2.0 + i,
            "gradient_norms": {HOSTILE_NAME: 1.0 + i, "head": 2.0 + i},
            "learning_rate": 1e-4 * i,
            "images_skipped": i,
            "images_per_second": 256.0,
            "input_wait_seconds": 2.5,
            "tflops_per_device": 1.0 + i,
            "mfu": 0.4 + i / 100,
        }
        for i in range(1, count + 1)
    ]
    return [*rows, {"step": 10 * count, "validation_loss": 0.5, "validation_bins": [0.5, 0.25]}]


def test_report_of_one_run_shows_everything_and_escapes_names(tmp_path):
    path = make_run_directory(
        tmp_path, HOSTILE_NAME.replace("/", ""), make_measurements(7), (10, 20)
    )
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
    # Loss (raw, smoothed, validation), two bins, gradient norm, two parts, and four of speed and
    # data; throughput and the time of waiting never change.
    assert page.line_lengths == [7, 7, 1, 1, 1, *[7] * 7]
    assert "Throughput" not in page.text
    assert text.index("<h2>Samples") < text.index("<h2>Curves")
    assert page.num_images == 2
    assert page.text.count(f"{HOSTILE_NAME} · two") == 1
    assert "70 of 100000" in page.text
    assert "no <caption>" in page.text
    assert "nano" in page.text


def test_the_same_run_gives_the_same_report(tmp_path):
    path = make_run_directory(tmp_path, "run", make_measurements(3))
    assert write_report(path).read_bytes() == write_report(path).read_bytes()


def test_waiting_for_input_is_a_percentage_of_the_time():
    run = ReportRun("", RunDirectory(Path("unused")), config.Config(), make_measurements(3), "")
    assert compute_input_wait_percentages(run) == [(10, 25.0), (20, 25.0), (30, 25.0)]


def test_report_of_several_runs_shows_common_steps(tmp_path):
    one = make_run_directory(tmp_path / "1", "same", make_measurements(7), (10, 20))
    two = make_run_directory(tmp_path / "2", "same", make_measurements(5), (20, 30))
    out = tmp_path / "both.html"
    assert main(["report", str(one), str(two), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert page.line_lengths[:6] == [7, 7, 1, 5, 5, 1]
    assert page.num_images == 2
    assert f"{two}, step 20" in page.text
    assert not (one / "report.html").exists()


def test_report_of_a_fresh_run_and_of_a_damaged_one(tmp_path):
    path = make_run_directory(tmp_path, "fresh")
    Page(write_report(path).read_text())
    (path / "data.json").write_text("{")
    (path / "samples").mkdir()
    (path / "samples" / "00000010.png").write_bytes(b"\x89PNG")
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}\n{"st')
    assert Page(write_report(path).read_text()).line_lengths == [1, 1]
    with pytest.raises(config.ConfigError, match="is not a run directory"):
        write_report(tmp_path)


def test_report_leaves_the_devices_to_the_run(tmp_path):
    path = make_run_directory(tmp_path, "busy", make_measurements(3))
    process = subprocess.run(
        [sys.executable, "-m", "radiance", "report", str(path)],
        env=os.environ | {"JAX_PLATFORMS": "a_device_that_is_taken"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


def test_smoothing_keeps_a_short_run_and_averages_a_long_one():
    short = [(i, float(i % 2)) for i in range(20)]
    assert smooth_points(short) == short
    long = [(i, float(i % 2)) for i in range(2000)]
    assert all(abs(y - 0.5) < 0.01 for _, y in smooth_points(long)[500:])


def test_images_of_a_report_have_a_total_size(tmp_path, monkeypatch):
    monkeypatch.setattr("radiance.evaluation.report.MAX_IMAGE_BYTES", 200_000)
    path = make_run_directory(tmp_path, "many", sheet_steps=range(1, 30))
    text = write_report(path).read_text()
    assert text.count("<img") == 10
    assert len(text) < 350_000


def test_thinned_steps_keep_both_ends():
    assert thin_steps(range(100), 4) == [0, 33, 66, 99]
    assert thin_steps([3, 5], 4) == [3, 5]
