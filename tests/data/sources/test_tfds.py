"""The data source `tfds`: features, splits, versions, and datasets that cannot be read."""

import json
import pickle
import shutil
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets import features as f

from radiance import config
from radiance.base.errors import DataError
from radiance.data.datasets import open_source
from radiance.data.sources.tfds import TfdsListing
from radiance.data.sources.tfds_preparation import (
    FILE_FORMAT,
    find_or_prepare_dataset,
    prepare_dataset,
)
from tests.helpers.toy_shards import gray_values, shard_settings, toy_image


class Toy(tfds.core.GeneratorBasedBuilder):
    """A dataset with every kind of feature. Gray values of its validation split start at 100."""

    VERSION = tfds.core.Version("1.1.0")
    SPLITS: ClassVar = {"train": range(12), "validation": range(100, 104), "test": range(200, 201)}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,
            features=f.FeaturesDict(
                {
                    "image": f.Image(shape=(None, None, 3), encoding_format="png"),
                    "text": f.Text(),
                    "captions": f.Sequence({"id": np.int64, "text": f.Text()}),
                    "label": f.ClassLabel(names=["cat", "dog"]),
                    "labels": f.Sequence(f.ClassLabel(names=["cat", "dog"])),
                    "nested": {
                        "image": f.Image(encoding_format="png"),
                        "score": f.Scalar(np.float32),
                    },
                    "score": f.Scalar(np.float32),
                    "array": f.Tensor(shape=(2,), dtype=np.float32),
                    "images": f.Sequence(f.Image(encoding_format="png")),
                    "texts": f.Dataset({"text": f.Text()}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(indices) for split, indices in self.SPLITS.items()}

    def _generate_examples(self, indices):
        for i in indices:
            yield (
                i,
                {
                    "image": BytesIO(toy_image(i)),
                    "text": f"image {i}" if i != 3 else " ",
                    "captions": [{"id": 10 * i + k, "text": f"{k} of {i}"} for k in range(i % 3)],
                    "label": -1 if i == 11 else i % 2,
                    "labels": ["cat", "dog"][: i % 3],
                    "nested": {"image": BytesIO(toy_image(i + 1, (20, 10))), "score": 0.5},
                    "score": i / 4,
                    "array": [0, 1],
                    "images": [BytesIO(toy_image(i)), BytesIO(toy_image(i))],
                    "texts": [{"text": "one"}, {"text": "two"}],
                },
            )


class TrainOnly(Toy):
    """A dataset without a validation split."""

    SPLITS: ClassVar = {"train": range(40)}


class Offline(Toy):
    def _split_generators(self, dl_manager):
        raise ConnectionError("storage.example cannot be resolved")


class WithoutTrain(Toy):
    SPLITS: ClassVar = {"test": range(2)}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(autouse=True)
def no_other_datasets(monkeypatch, cache_dir):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(cache_dir / "nobody"))


def open_dataset(path, cache_dir, split="train", **changes):
    changes = {"validation_fraction": 0.05} | changes
    return open_source(shard_settings("tfds", path, cache_dir, **changes), split)


# --- unusable examples ----------------------------------------------------------------------------


def test_texts_that_are_not_utf_8_leave_out_their_example(cache_dir, monkeypatch):
    read_example = TfdsListing._read_example

    def read_damaged(listing, split, index, features):
        example = read_example(listing, split, index, features)
        return example | ({"text": b"caf\xe9"} if index == 5 else {})

    listing = TfdsListing(find_or_prepare_dataset("toy", cache_dir), "image", "text")
    other_listing = TfdsListing(listing.folder, "image", "captions/text")
    monkeypatch.setattr(TfdsListing, "_read_example", read_damaged)
    for damaged_listing in (listing, other_listing):
        kinds = {item.name: getattr(item, "kind", None) for item in damaged_listing.scan(1)}
        assert kinds["train/5"] == "text not in UTF-8"
        assert kinds["train/4"] is None


@pytest.mark.parametrize("damage", [bytes(2000), None])
def test_a_damaged_dataset_is_an_error(damage, tmp_path):
    folder = find_or_prepare_dataset("toy", tmp_path)
    listing = TfdsListing(folder, "image", "text")
    for path in folder.glob(f"*.{FILE_FORMAT}-*"):
        content = path.read_bytes()
        path.write_bytes(content[:1000] if damage is None else damage + content[2000:])
    with pytest.raises(DataError, match=r"cannot be read .*: prepare it again"):
        list(listing.scan(1))


# --- features and splits --------------------------------------------------------------------------


def test_splits_are_those_of_the_dataset(cache_dir):
    source = open_dataset("toy", cache_dir)
    assert gray_values(source) == [i for i in range(12) if i != 3]
    assert source.skip_counts == {"no caption": 1}
    assert gray_values(open_dataset("toy", cache_dir, "validation")) == [100, 101, 102, 103]
    assert source.captions(4) == ("image 5",)
    assert source.name(4) == "train/5"
    assert source.sizes.tolist() == [[12, 10]] * 11
    assert source.attributes(4) == {"label": 1, "score": 1.25}


def test_names_decide_splits_without_a_validation_split(cache_dir):
    train, validation = (
        gray_values(open_dataset("train_only", cache_dir, split, validation_fraction=0.3))
        for split in ("train", "validation")
    )
    assert sorted(train + validation) == [i for i in range(40) if i != 3]
    assert 4 <= len(validation) <= 20


@pytest.mark.parametrize(
    ("caption_key", "expected"),
    [
        ("captions/text", {1: ("0 of 1",), 2: ("0 of 2", "1 of 2")}),
        ("label", {0: ("cat",), 1: ("dog",), 2: ("cat",), 3: ("dog",)}),
        ("texts/text", {i: ("one", "two") for i in range(4)}),
        ("labels", {1: ("cat",), 2: ("cat", "dog")}),
    ],
)
def test_captions_are_texts_or_labels(caption_key, expected, cache_dir):
    source = open_dataset("toy", cache_dir, caption_key=caption_key)
    captions = {gray: source.captions(i) for i, gray in enumerate(gray_values(source))}
    assert {i: captions[i] for i in range(4) if i in captions} == expected


def test_examples_without_a_label_are_counted(cache_dir):
    source = open_dataset("toy", cache_dir, caption_key="label")
    assert gray_values(source) == list(range(11))
    assert source.skip_counts == {"no caption": 1}


def test_an_image_can_be_within_a_feature(cache_dir):
    source = open_dataset("toy", cache_dir, image_key="nested/image")
    assert gray_values(source)[:3] == [1, 2, 3]
    assert source.sizes[0].tolist() == [20, 10]


def test_images_are_not_decoded_for_the_index(cache_dir, monkeypatch):
    folder = find_or_prepare_dataset("toy", cache_dir)
    monkeypatch.setattr(f.Image, "decode_example_np", None)
    listing = TfdsListing(folder, "image", "text")
    records = list(listing.scan(2))
    assert len(records) == 16
    assert listing.read_file(records[5].location) == toy_image(5)


def test_the_newest_matching_version_is_found(cache_dir, monkeypatch):
    newest = find_or_prepare_dataset("toy", cache_dir)
    assert newest == cache_dir / "toy" / "1.1.0"
    older = Path(shutil.copytree(newest, newest.with_name("1.0.9")))
    assert (
        find_or_prepare_dataset("toy", cache_dir)
        == find_or_prepare_dataset("toy:1.*.*", cache_dir)
        == newest
    )
    assert (
        find_or_prepare_dataset("toy:1.0.9", cache_dir)
        == find_or_prepare_dataset("toy:1.0.*", cache_dir)
        == older
    )
    elsewhere = cache_dir / "elsewhere"
    monkeypatch.setenv("TFDS_DATA_DIR", str(cache_dir))
    assert find_or_prepare_dataset("toy", elsewhere) == newest
    monkeypatch.setenv("TFDS_DATA_DIR", str(elsewhere))
    assert (
        find_or_prepare_dataset("train_only", cache_dir / "third")
        == elsewhere / "train_only" / "1.1.0"
    )


def test_the_identity_depends_on_examples_and_features(cache_dir):
    folder = prepare_dataset(Toy, cache_dir)
    same, other = (
        TfdsListing(folder, "image", "text"),
        TfdsListing(prepare_dataset(TrainOnly, cache_dir), "image", "text"),
    )
    assert len({same.identity, other.identity, TfdsListing(folder, "image", "label").identity}) == 3
    assert same.identity == TfdsListing(folder, "image", "text").identity


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_key": "img"},
            r"toy/1\.1\.0 has no feature data\.image_key=img: did you mean 'image'\? "
            r"It has .*label \(ClassLabel\)",
        ),
        (
            {"caption_key": "captions/test"},
            r"has no feature data\.caption_key=captions/test: did you mean 'text'\?",
        ),
        ({"caption_key": "text/en"}, r"has no feature data\.caption_key=text/en\. It has"),
        (
            {"image_key": "text"},
            r"data\.image_key=text of toy/1\.1\.0 is a feature of type Text: "
            r"name a feature with images",
        ),
        (
            {"image_key": "array"},
            r"data\.image_key=array of .* is a feature of type Tensor: name a feature with images",
        ),
        (
            {"image_key": "images"},
            r"data\.image_key=images of .* is in a list: name a feature with one image",
        ),
        (
            {"caption_key": "array"},
            r"data\.caption_key=array of .* is a feature of type Tensor: "
            r"name a feature with texts or class labels",
        ),
        ({"caption_key": "image"}, r"is a feature of type Image: name a feature with texts"),
        ({"caption_key": "score"}, r"is a feature of type Scalar: name a feature with texts"),
    ],
)
def test_missing_and_wrong_features_are_errors(changes, message, cache_dir):
    with pytest.raises(config.ConfigError, match=message):
        open_dataset("toy", cache_dir, **changes)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "mnits",
            r"data\.path=mnits is not a known TensorFlow Dataset: did you mean 'mnist'\? "
            r"Prepared datasets are searched in",
        ),
        ("toy/a/b", r"data\.path=toy/a/b is not the name of a TensorFlow Dataset: use NAME"),
        (
            "toy:9.0.0",
            r"data\.path=toy:9\.0\.0: Dataset toy cannot be loaded at version 9\.0\.0, "
            r"only: 1\.1\.0",
        ),
        ("toy/large", r"data\.path=toy/large: "),
        ("without_train", r"without_train/1\.1\.0 has no split named train, only test"),
    ],
)
def test_unknown_data_sets_are_errors(path, message, cache_dir):
    with pytest.raises(config.ConfigError, match=message):
        open_dataset(path, cache_dir)


def test_a_dataset_that_cannot_be_prepared_is_an_error(cache_dir):
    with pytest.raises(
        DataError,
        match=r"offline is not in .* cannot be prepared there \(storage\.example .*\): "
        r"prepare it on a machine with TensorFlow .*`tfds build offline",
    ):
        open_dataset("offline", cache_dir)


def test_a_dataset_in_another_format_is_an_error(tmp_path):
    folder = prepare_dataset(TrainOnly, tmp_path)
    for path in folder.glob(f"*.{FILE_FORMAT}-*"):
        path.rename(path.with_name(path.name.replace(FILE_FORMAT, "tfrecord")))
    with pytest.raises(
        DataError,
        match=rf"train_only is in {folder} in a format that only TensorFlow reads.*"
        r"tfds convert_format",
    ):
        open_dataset("train_only", tmp_path)


def test_a_dataset_with_videos_is_an_error(tmp_path):
    features_file = prepare_dataset(TrainOnly, tmp_path) / "features.json"
    features = json.loads(features_file.read_text())
    features["featuresDict"]["features"]["images"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {"shape": {"dimensions": ["-1", "4", "4", "3"]}},
    }
    features_file.write_text(json.dumps(features))
    with pytest.raises(
        DataError,
        match=r"has videos, audio or other features that cannot be read without TensorFlow",
    ):
        open_dataset("train_only", tmp_path)


def test_a_dataset_that_vanishes_is_an_error(tmp_path):
    source = open_dataset("toy", tmp_path)
    source = pickle.loads(pickle.dumps(source))  # as a worker that starts now
    for path in Path(tmp_path, "toy", "1.1.0").glob(f"*.{FILE_FORMAT}-*"):
        path.unlink()
    with pytest.raises(DataError, match=r"existed at the start and cannot be read now"):
        source.load_image(0)
