"""The emoji dataset, from packages of a toy size, and the ranks of samples."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments.emoji import fetch, rank
from radiance.cli import main
from radiance.evaluation.features import PixelExtractor

NAMES = [
    {"label": "red apple", "hexcode": "1F34E", "tags": ["apple", "fruit"], "group": 4},
    {"label": "heart", "hexcode": "2764-FE0F", "tags": [], "group": 0},
    {"label": "circle", "hexcode": "2B55", "group": 8},
    {"label": "circle again", "hexcode": "2B56", "group": 8},
    {"label": "flag: Chad", "hexcode": "1F1F9-1F1E9", "group": 9},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
    {"label": "not drawn", "hexcode": "1FAE9", "group": 0},
]
COLORS = {
    "1f34e": "red",
    "2764-fe0f": "pink",
    "2b55": "blue",
    "2b56": "blue",
    "1f1f9-1f1e9": "gold",
    "1f1e6": "gray",
}


def png(color, size=64):
    buffer = io.BytesIO()
    Image.new("RGBA", (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Write toy packages whose hashes are accepted, and return their folder."""
    folder = tmp_path / "packages"
    folder.mkdir()
    contents = {fetch.NAMES: {"package/en/data.json": json.dumps(NAMES).encode()}}
    for package in fetch.STYLES.values():
        vendor = package.name.rpartition("-")[2]
        contents[package] = {
            f"package/img/{vendor}/64/{code}.png": png(color) for code, color in COLORS.items()
        } | {f"package/img/{vendor}/sheets/64.png": png("white"), "package/../x.png": png("red")}
    known = {}
    for package, files in contents.items():
        write_tar(folder / package.file_name, files)
        digest = hashlib.sha256((folder / package.file_name).read_bytes()).hexdigest()
        known[package] = package._replace(sha256=digest)
    monkeypatch.setattr(fetch, "NAMES", known[fetch.NAMES])
    monkeypatch.setattr(fetch, "STYLES", {k: known[p] for k, p in fetch.STYLES.items()})
    return folder


def test_packages_become_a_folder_of_captioned_images(packages, tmp_path, capsys):
    out = tmp_path / "images"
    assert fetch.main(["--packages", str(packages), "--out", str(out)]) == 0
    records = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    names = [f"{style}/{code}.png" for style in fetch.STYLES for code in ("1f34e", "2764", "2b55")]
    assert [record["file_name"] for record in records] == names
    assert records[0]["text"] == [
        "noto red apple",
        "red apple",
        "noto red apple, fruit",
        "red apple, fruit",
    ]
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.png")) == sorted(names)
    assert "Apache-2.0" in (out / "SOURCES.json").read_text()
    assert "6 images" in capsys.readouterr().out
    assert fetch.main(["--out", str(out)]) == 0  # without a download
    assert "is kept" in capsys.readouterr().out


def test_changed_and_missing_packages_are_errors(packages, tmp_path, capsys):
    first, *_ = sorted(packages.iterdir())
    first.write_bytes(first.read_bytes() + b"\0")
    command = ["--packages", str(packages), "--out", str(tmp_path / "images")]
    assert fetch.main(command) == 2
    assert "is not the file that was tested" in capsys.readouterr().err
    first.unlink()
    assert fetch.main(command) == 2
    assert "does not exist" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def make_drawings(num_concepts, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rank.Drawing(f"{i:x}", style, f"{style} {i}", rng.integers(0, 256, (8, 8, 3), np.uint8))
        for style in ("noto", "twemoji")
        for i in range(num_concepts)
    ]


def test_true_drawings_have_rank_zero_and_others_are_at_chance():
    drawings = make_drawings(100)
    true_images = rank._to_batch(drawings)
    extractor = PixelExtractor(8)
    assert not rank.measure_ranks(true_images, drawings, drawings, extractor).any()
    others = rank._to_batch(make_drawings(100, seed=1))
    ranks = rank.measure_ranks(others, drawings, drawings, extractor)
    assert abs(ranks.mean() - 49.5) < 5 * 100 / np.sqrt(12 * 200)
    noisy = true_images + 0.1 * np.random.default_rng(2).standard_normal(true_images.shape)
    assert not rank.measure_ranks(noisy.astype(np.float32), drawings, drawings, extractor).any()


def test_ranks_count_closer_drawings():
    references = np.array([[0.0], [1.0], [3.0]], np.float32)
    queries = np.array([[0.9], [0.9], [9.0]], np.float32)
    ranks = rank.rank_true_drawings(queries, references, np.array([0, 1, 0]))
    assert ranks.tolist() == [1, 0, 2]


@pytest.mark.slow
def test_a_toy_model_is_trained_and_ranked(packages, tmp_path, capsys, monkeypatch):
    many = [
        {"label": f"thing {i}", "hexcode": f"1F{i:03X}", "tags": [], "group": 4} for i in range(40)
    ]
    out = tmp_path / "images"
    concepts = fetch.read_concepts(json.dumps(many).encode())
    out.mkdir()
    lines = []
    for style in fetch.STYLES:
        (out / style).mkdir()
        for i, (code, concept) in enumerate(concepts.items()):
            (out / style / f"{code}.png").write_bytes(png((6 * i, len(style), 0), 32))
            record = {"file_name": f"{style}/{code}.png", "text": concept.captions(style)}
            lines.append(json.dumps(record) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines))
    changes = [
        f"output={tmp_path}",
        f"data.path={out}",
        "data.validation_fraction=0.2",
        "data.batch_size=4",
        "train.sample_every=4",
        "train.sample_prompts=noto thing 1",
        "train.validate_every=4",
        "train.validation_images=2",
        "train.checkpoint_every=4",
        "sample.steps=2",
    ]
    assert main(["train", "experiments/emoji/experiment.py:toy", *changes]) == 0
    assert rank.main([str(tmp_path / "emoji-toy"), "--images", "4"]) == 0
    printed = capsys.readouterr().out
    assert "4 held-out drawings" in printed
    results = json.loads((tmp_path / "emoji-toy" / "rank.json").read_text())["results"]
    assert [r["top_1"] for r in results if r["image"] == "true drawing"] == [1.0, 1.0]
    assert Image.open(tmp_path / "emoji-toy" / "rank.png").size == (16 * 98 + 2, 3 * 98 + 2)
