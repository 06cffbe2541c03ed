"""Images of a folder that turn out broken, or go, while they are needed; and a run on such a folder."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.base.images import to_array
from radiance.data.batches import Batches, make_validation_batches
from radiance.data.datasets import DataError, open_source
from radiance.data.decode import UnusableError
from radiance.text.hash_encoder import HashEncoder
from tests.helpers.toy_folders import fill, first_pixels, open_folder, save, settings
from tests.helpers.toy_runs import PLAIN, toy_run, train


def broken_folder(folder):
    """Five images whose pixels say their number; 1, 3 and 4 are cut short behind their heads."""
    draw = np.random.default_rng(0)
    for i in range(5):
        pixels = draw.integers(0, 256, (64, 64, 3), np.uint8)
        pixels[0, 0] = i
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
        if i in (1, 3, 4):
            content = (folder / f"{i}.png").read_bytes()
            (folder / f"{i}.png").write_bytes(content[: len(content) // 2])
    return folder


def numbers_of(source):
    """Each image's number, or the kind of what is wrong with it."""

    def number_of(i):
        try:
            return source.load_image(i).getpixel((0, 0))[0]
        except UnusableError as broken:
            return broken.kind

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(number_of, [*range(5)] * 40))


def test_a_broken_image_is_told_once_and_passed_over(tmp_path, capsys):
    source = open_folder(broken_folder(tmp_path))
    assert len(source) == 5
    assert source.skip_counts == {}
    assert numbers_of(source) == [0, "broken image", 2, "broken image", "broken image"] * 40
    batches = Batches(source, settings(tmp_path, batch_size=5), HashEncoder(8, 6), 0, 20, "one_pad")
    assert [batch["skipped"] for batch in batches.start(0)] == [3] * 20
    told = sorted(capsys.readouterr().err.splitlines())
    assert len(told) == 3
    assert all("cannot be used" in line and "passed over" in line for line in told)
    assert "1.png" in told[0]
    assert any(line.endswith("So far 3 were broken.") for line in told)
    assert batches.broken_images.keys() == {1, 3, 4}


def test_broken_images_have_no_weight_and_keep_their_captions_to_themselves(tmp_path):
    data, encoder = (
        settings(broken_folder(tmp_path), resolution=64, batch_size=5),
        HashEncoder(8, 6),
    )
    source = open_source(data, "train")
    batch = Batches(source, data, encoder, 0, 1, "one_pad")[0]
    numbers = first_pixels(batch)
    assert sorted(zip(batch["weight"], numbers)) == [(0, 128), (0, 128), (0, 128), (1, 0), (1, 2)]
    for row in np.flatnonzero(batch["weight"]):
        assert np.array_equal(
            batch["text"][row, :2], encoder.encode([f"image {numbers[row]}"])[0].rows[:2]
        )
    fixed = make_validation_batches(source, data, encoder, 5, "one_pad")[0]
    assert list(fixed["weight"]) == [1, 0, 1, 0, 0]


def test_too_many_broken_images_end_the_run(tmp_path):
    data = settings(broken_folder(tmp_path), resolution=64, batch_size=5, max_broken_fraction=0.4)
    with pytest.raises(
        DataError, match=r"3 of the 5 images .* data.max_broken_fraction=0.4: put whole ones there"
    ):
        list(
            Batches(open_source(data, "train"), data, HashEncoder(8, 6), 0, 10, "one_pad").start(0)
        )


def test_a_batch_without_any_image_ends_the_run(tmp_path):
    """As where a disk is gone: the limit is a share of all, which takes long to reach."""
    data = settings(fill(tmp_path, 40), batch_size=8, max_broken_fraction=1.0)
    source = open_source(data, "train")
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="None of the 8 images of step 1 can be used"):
        list(Batches(source, data, HashEncoder(8, 6), 0, 10, "one_pad").start(0))


def test_an_orientation_that_cannot_be_read(tmp_path):
    save(tmp_path / "a.png", "a caption", exif=b"Exif\0\0no TIFF", size=(12, 8))
    source = open_folder(tmp_path)
    assert to_array(source.load_image(0), 12, 8).shape == (8, 12, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif"])
def test_no_broken_file_ends_a_run(suffix, tmp_path):
    """Files cut short and with wrong bytes: each is left out, passed over, or is painted from."""
    draw = np.random.default_rng(0)
    exif = {"exif": Image.Exif()} if suffix in (".png", ".jpg", ".webp") else {}
    file = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(
        file, Image.registered_extensions()[suffix], **exif
    )
    whole = file.getvalue()
    for i in range(150):
        content = bytearray(whole[: draw.integers(len(whole))] if i % 3 == 0 else whole)
        for place in draw.integers(0, max(min(len(content), 200), 1), draw.integers(4)):
            content[place : place + 1] = draw.bytes(1)
        (tmp_path / f"{i}{suffix}").write_bytes(content)
        (tmp_path / f"{i}.txt").write_text("a caption")
    source = open_folder(tmp_path)
    whole = 0
    for i in range(len(source)):
        with suppress(UnusableError):
            assert to_array(source.load_image(i), 8, 8).shape == (8, 8, 3)
            whole += 1
    assert whole < len(source) or suffix == ".webp"  # whose head is checked against the whole
    assert 0 < len(source) < 150
    assert sum(source.skip_counts.values()) == 150 - len(source)


def test_a_file_that_goes_while_it_is_needed(tmp_path):
    source = open_folder(fill(tmp_path, 2))
    (tmp_path / "01.png").unlink()
    with pytest.raises(DataError, match="01.png was there at the start and cannot be read now"):
        source.load_image(1)


def test_batches(tmp_path):
    data = settings(fill(tmp_path, 20), batch_size=5)
    batches = Batches(open_source(data, "train"), data, HashEncoder(8, 6), 0, 10, "one_pad")
    ahead = list(batches.start(0))
    assert sorted(np.concatenate([first_pixels(batch) for batch in ahead[:4]])) == list(range(20))
    assert all(np.array_equal(b["image"], batches[i]["image"]) for i, b in enumerate(ahead))


def test_a_file_that_goes_ends_the_run_with_its_sentence(tmp_path):
    data = settings(fill(tmp_path, 8), batch_size=8)
    batches = Batches(open_source(data, "train"), data, HashEncoder(8, 6), 0, 10, "one_pad")
    (tmp_path / "03.png").unlink()
    with pytest.raises(DataError, match="03.png was there at the start"):
        list(batches.start(0))


@pytest.mark.slow
def test_a_run_on_a_folder(tmp_path):
    """It records what it left out, goes on when the folder has moved, and refuses one that has changed."""
    fill(tmp_path / "images")
    save(tmp_path / "images" / "no_caption.png")
    changes = "data.source=folder data.validation_fraction=0.2 data.batch_size=4 train.checkpoint_every=1 train.sample_prompts=[] sample.steps=1 data.max_upscale=2"
    run = toy_run(
        tmp_path,
        str(tmp_path / "prepared"),
        *changes.split(),
        f"data.path={tmp_path / 'images'}",
        "train.steps=2",
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
    with pytest.raises(config.ConfigError, match="other data"):
        train(moved)
