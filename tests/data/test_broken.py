"""Images of a folder that turn out broken or disappear during training."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.base.images import to_array
from radiance.data.batches import Batches, make_validation_batches
from radiance.data.datasets import open_source
from radiance.data.unusable import UnusableError
from radiance.text.hash_encoder import HashEncoder
from tests.helpers.toy_folders import fill, first_pixels, open_folder, save, settings
from tests.helpers.toy_runs import PLAIN, toy_run, train


def fill_broken(folder):
    """Write five images with their index in the first pixel; 1, 3 and 4 are truncated."""
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        pixels[0, 0] = i
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"image {i}")
        if i in (1, 3, 4):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
    return folder


def make_batches(data, num_steps=10):
    return Batches(open_source(data, "train"), data, HashEncoder(8, 6), 0, num_steps, "one_pad")


def load_in_threads(source):
    """Return the index in each image's first pixel, or the kind of its error, many times."""

    def load(i):
        try:
            return source.load_image(i).getpixel((0, 0))[0]
        except UnusableError as error:
            return error.kind

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(load, [*range(5)] * 40))


def test_broken_images_are_reported_once_and_skipped(tmp_path, capsys):
    source = open_folder(fill_broken(tmp_path))
    assert len(source) == 5
    assert source.skip_counts == {}
    kinds = [0, "broken image", 2, "broken image", "broken image"]
    assert load_in_threads(source) == kinds * 40
    batches = make_batches(settings(tmp_path, batch_size=5), 20)
    assert [batch["skipped"] for batch in batches.start(0)] == [3] * 20
    lines = sorted(capsys.readouterr().err.splitlines())
    assert len(lines) == 3
    assert all("cannot be used" in line and "is skipped" in line for line in lines)
    assert "1.png" in lines[0]
    assert any(line.endswith("Broken images so far: 3.") for line in lines)
    assert batches.broken_images.keys() == {1, 3, 4}


def test_broken_images_have_no_weight_and_change_no_other_row(tmp_path):
    data = settings(fill_broken(tmp_path), resolution=64, batch_size=5)
    batches = make_batches(data, 1)
    batch = batches[0]
    indices = first_pixels(batch)
    expected = [(0, 128), (0, 128), (0, 128), (1, 0), (1, 2)]
    assert sorted(zip(batch["weight"], indices)) == expected
    for row in np.flatnonzero(batch["weight"]):
        (embedding,) = batches.encoder.encode([f"image {indices[row]}"])
        assert np.array_equal(batch["text"][row, :2], embedding.rows[:2])
    (validation,) = make_validation_batches(batches.source, data, batches.encoder, 5, "one_pad")
    assert list(validation["weight"]) == [1, 0, 1, 0, 0]


def test_too_many_broken_images_stop_the_run(tmp_path):
    data = settings(fill_broken(tmp_path), resolution=64, batch_size=5, max_broken_fraction=0.4)
    message = r"3 of the 5 images .* data\.max_broken_fraction=0\.4: replace them"
    with pytest.raises(DataError, match=message):
        list(make_batches(data).start(0))


def test_a_batch_without_any_image_stops_the_run(tmp_path):
    """The limit is a fraction of all images, which a lost disk takes long to reach."""
    data = settings(fill(tmp_path, 40), batch_size=8, max_broken_fraction=1.0)
    batches = make_batches(data)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="None of the 8 images of step 1 can be used"):
        list(batches.start(0))


def test_an_unreadable_orientation_is_ignored(tmp_path):
    save(tmp_path / "a.png", "a caption", exif=b"Exif\0\0no TIFF", size=(12, 8))
    source = open_folder(tmp_path)
    assert to_array(source.load_image(0), 12, 8).shape == (8, 12, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif"])
def test_no_broken_file_stops_a_run(suffix, tmp_path):
    """Truncated files, and files with wrong bytes, are left out, skipped or decoded."""
    rng = np.random.default_rng(0)
    exif = {"exif": Image.Exif()} if suffix in (".png", ".jpg", ".webp") else {}
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(
        file, Image.registered_extensions()[suffix], **exif
    )
    intact = file.getvalue()
    for i in range(150):
        content = bytearray(intact[: rng.integers(len(intact))] if i % 3 == 0 else intact)
        for position in rng.integers(0, max(min(len(content), 200), 1), rng.integers(4)):
            content[position : position + 1] = rng.bytes(1)
        (tmp_path / f"{i}{suffix}").write_bytes(content)
        (tmp_path / f"{i}.txt").write_text("a caption")
    source = open_folder(tmp_path)
    num_decoded = 0
    for i in range(len(source)):
        with suppress(UnusableError):
            assert to_array(source.load_image(i), 8, 8).shape == (8, 8, 3)
            num_decoded += 1
    # The header of a WebP file is checked against the complete file.
    assert num_decoded < len(source) or suffix == ".webp"
    assert 0 < len(source) < 150
    assert sum(source.skip_counts.values()) == 150 - len(source)


def test_a_file_that_disappears_raises_an_error(tmp_path):
    source = open_folder(fill(tmp_path, 2))
    (tmp_path / "01.png").unlink()
    with pytest.raises(DataError, match=r"01\.png existed at the start and cannot be read now"):
        source.load_image(1)


def test_batches_of_a_folder_have_every_image_once_an_epoch(tmp_path):
    batches = make_batches(settings(fill(tmp_path, 20), batch_size=5))
    read_ahead = list(batches.start(0))
    indices = np.concatenate([first_pixels(batch) for batch in read_ahead[:4]])
    assert sorted(indices) == list(range(20))
    assert all(np.array_equal(b["image"], batches[i]["image"]) for i, b in enumerate(read_ahead))


def test_a_file_that_disappears_stops_the_run_with_its_message(tmp_path):
    batches = make_batches(settings(fill(tmp_path, 8), batch_size=8))
    (tmp_path / "03.png").unlink()
    with pytest.raises(DataError, match=r"03\.png existed at the start and cannot be read now"):
        list(batches.start(0))


@pytest.mark.slow
def test_a_run_records_its_data_and_resumes_only_on_the_same(tmp_path):
    """It resumes when the folder has moved, and refuses a folder that has changed."""
    fill(tmp_path / "images")
    save(tmp_path / "images" / "no_caption.png")
    run = toy_run(
        tmp_path,
        str(tmp_path / "prepared"),
        "data.source=folder",
        f"data.path={tmp_path / 'images'}",
        "data.validation_fraction=0.2",
        "data.batch_size=4",
        "data.max_upscale=2",
        "train.steps=2",
        "train.checkpoint_every=1",
        "train.sample_prompts=[]",
        "sample.steps=1",
        **PLAIN,
    )
    assert train(run) == 2
    data = json.loads((run.run_dir / "data.json").read_text())
    assert data["train"]["count"] + data["validation"]["count"] == 40
    assert data["train"]["skipped"] | data["validation"]["skipped"] == {"no caption": 1}
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = config.override(
        run, [f"data.path={tmp_path / 'moved'}", "data.max_broken_fraction=0.5", "train.steps=3"]
    )
    assert train(moved) == 3
    save(tmp_path / "moved" / "new.png", "a new one")
    with pytest.raises(config.ConfigError, match=r"data\.train\.count was 33, now 34"):
        train(moved)
