"""TensorFlow Datasets: which features are images and captions, how splits are made, and what is told of those that cannot be read."""

import json
import pickle
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets import features as f

from radiance import config
from radiance.data.datasets import DataError, open_source
from radiance.data.sources.tfds import (
    FILE_FORMAT,
    TfdsListing,
    find_or_prepare_dataset,
    prepare_dataset,
)
from tests.helpers.toy_shards import toy_image


class Toy(tfds.core.GeneratorBasedBuilder):
    """Of every kind of feature one. Its validation split has greys from 100 on."""

    VERSION = tfds.core.Version("1.1.0")
    SPLITS = {"train": range(12), "validation": range(100, 104), "test": range(200, 201)}

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
                    "within": {
                        "view": f.Image(encoding_format="png"),
                        "score": f.Scalar(np.float32),
                    },
                    "score": f.Scalar(np.float32),
                    "array": f.Tensor(shape=(2,), dtype=np.float32),
                    "many": f.Sequence(f.Image(encoding_format="png")),
                    "told": f.Dataset({"text": f.Text()}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(numbers) for split, numbers in self.SPLITS.items()}

    def _generate_examples(self, numbers):
        for i in numbers:
            yield (
                i,
                {
                    "image": BytesIO(toy_image(i)),
                    "text": f"image {i}" if i != 3 else " ",
                    "captions": [{"id": 10 * i + k, "text": f"{k} of {i}"} for k in range(i % 3)],
                    "label": -1 if i == 11 else i % 2,
                    "labels": ["cat", "dog"][: i % 3],
                    "within": {"view": BytesIO(toy_image(i + 1, (20, 10))), "score": 0.5},
                    "score": i / 4,
                    "array": [0, 1],
                    "many": [BytesIO(toy_image(i)), BytesIO(toy_image(i))],
                    "told": [{"text": "one"}, {"text": "two"}],
                },
            )


class Plain(Toy):
    """Without a validation split."""

    SPLITS = {"train": range(40)}


class Offline(Toy):
    def _split_generators(self, dl_manager):
        raise ConnectionError("storage.example cannot be resolved")


class Elsewhere(Toy):
    SPLITS = {"test": range(2)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(autouse=True)
def no_other_directory(monkeypatch, directory):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(directory / "nobody"))


def settings(path, directory, **more):
    more = {"side": 8, "enlarge": 2.0, "threads": 2, "caption_dropout": 0.0} | more
    return config.Data(source="tfds", path=path, cache_dir=str(directory), **more)


def opened(path, directory, split="train", **more):
    return open_source(settings(path, directory, **more), split)


def greys(source):
    return [source.toy_image(i).getpixel((0, 0))[0] for i in range(len(source))]


# --- what is read -------------------------------------------------------------------------------------------------------


def test_splits(directory):
    source = opened("toy", directory)
    assert greys(source) == [i for i in range(12) if i != 3]
    assert source.skip_counts == {"no caption": 1}
    assert greys(opened("toy", directory, "validation")) == [100, 101, 102, 103]
    assert source.captions(4) == ("image 5",)
    assert source.name(4) == "train/5"
    assert source.sizes.tolist() == [[12, 10]] * 11
    assert source.attributes(4) == {"label": 1, "score": 1.25}


def test_without_a_validation_split_the_names_decide(directory):
    train, validation = (
        greys(opened("plain", directory, split, validation=0.3))
        for split in ("train", "validation")
    )
    assert sorted(train + validation) == [i for i in range(40) if i != 3]
    assert 4 <= len(validation) <= 20


@pytest.mark.parametrize(
    ("caption", "captions"),
    [
        ("captions/text", {1: ("0 of 1",), 2: ("0 of 2", "1 of 2")}),
        ("label", {0: ("cat",), 1: ("dog",), 2: ("cat",), 3: ("dog",)}),
        ("told/text", {i: ("one", "two") for i in range(4)}),
        ("labels", {1: ("cat",), 2: ("cat", "dog")}),
    ],
)
def test_captions(caption, captions, directory):
    source = opened("toy", directory, caption=caption)
    seen = {grey: source.captions(i) for i, grey in enumerate(greys(source))}
    assert {grey: seen.get(grey) for grey in range(4)} == {
        grey: captions.get(grey) for grey in range(4)
    }


def test_examples_without_a_label(directory):
    source = opened("toy", directory, caption="label")
    assert greys(source) == list(range(11))
    assert source.skip_counts == {"no caption": 1}


def test_a_image_within_a_feature(directory):
    source = opened("toy", directory, toy_image="within/view")
    assert greys(source)[:3] == [1, 2, 3]
    assert source.sizes[0].tolist() == [20, 10]


def test_nothing_is_decoded_but_what_is_asked_for(directory, monkeypatch):
    folder = find_or_prepare_dataset("toy", directory)
    monkeypatch.setattr(f.Image, "decode_example_np", None)
    listing = TfdsListing(folder, "image", "text")
    rows = list(listing.scan(2))
    assert len(rows) == 16
    assert listing.read_file(rows[5].location) == toy_image(5)


def test_versions_and_where_they_are_looked_for(directory, monkeypatch):
    newest = find_or_prepare_dataset("toy", directory)
    assert newest == directory / "toy" / "1.1.0"
    older = Path(shutil.copytree(newest, newest.with_name("1.0.9")))
    assert (
        find_or_prepare_dataset("toy", directory)
        == find_or_prepare_dataset("toy:1.*.*", directory)
        == newest
    )
    assert (
        find_or_prepare_dataset("toy:1.0.9", directory)
        == find_or_prepare_dataset("toy:1.0.*", directory)
        == older
    )
    elsewhere = directory / "elsewhere"
    monkeypatch.setenv("TFDS_DATA_DIR", str(directory))
    assert find_or_prepare_dataset("toy", elsewhere) == newest
    monkeypatch.setenv("TFDS_DATA_DIR", str(elsewhere))
    assert find_or_prepare_dataset("plain", directory / "third") == elsewhere / "plain" / "1.1.0"


def test_other_examples_are_another_listing(directory):
    folder = prepare_dataset(Toy, directory)
    same, other = (
        TfdsListing(folder, "image", "text"),
        TfdsListing(prepare_dataset(Plain, directory), "image", "text"),
    )
    assert len({same.identity, other.identity, TfdsListing(folder, "image", "label").identity}) == 3
    assert same.identity == TfdsListing(folder, "image", "text").identity


# --- what cannot be used ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"image": "img"},
            r"toy/1\.1\.0 has no feature data\.image=img: did you mean 'image'\? It has .*label \(ClassLabel\)",
        ),
        (
            {"caption": "captions/test"},
            r"has no feature data\.caption=captions/test: did you mean 'text'\?",
        ),
        ({"caption": "text/en"}, r"has no feature data\.caption=text/en\. It has"),
        (
            {"image": "text"},
            r"data\.image=text of toy/1\.1\.0 is a feature of kind Text, but images are needed",
        ),
        (
            {"image": "array"},
            r"data\.image=array of .* is a feature of kind Tensor, but images are needed",
        ),
        (
            {"image": "many"},
            r"data\.image=many of .* lies in a list: one image an example is needed",
        ),
        (
            {"caption": "array"},
            r"data\.caption=array of .* is a feature of kind Tensor, but texts or class labels are needed",
        ),
        ({"caption": "image"}, r"is a feature of kind Image, but texts"),
        ({"caption": "score"}, r"is a feature of kind Scalar, but texts"),
    ],
)
def test_features_that_are_not_there_or_are_something_else(changes, told, directory):
    with pytest.raises(config.ConfigError, match=told):
        opened("toy", directory, **changes)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (
            "mnits",
            r"data\.path=mnits is no TensorFlow Dataset that is known here: did you mean 'mnist'\? Prepared ones are looked for in",
        ),
        ("toy/a/b", r"data\.path=toy/a/b is no name of a TensorFlow Dataset: write NAME"),
        (
            "toy:9.0.0",
            r"data\.path=toy:9\.0\.0: Dataset toy cannot be loaded at version 9\.0\.0, only: 1\.1\.0",
        ),
        ("toy/large", r"data\.path=toy/large: "),
        ("elsewhere", r"elsewhere/1\.1\.0 has no split named train: it has test"),
    ],
)
def test_names_of_nothing(path, told, directory):
    with pytest.raises(config.ConfigError, match=told):
        opened(path, directory)


def test_a_data_set_that_cannot_be_prepared(directory):
    with pytest.raises(
        DataError,
        match=r"offline is not in .* cannot be prepared there \(storage\.example .*\): prepare it where .*`tfds build offline",
    ):
        opened("offline", directory)


def test_a_data_set_in_another_format(tmp_path):
    folder = prepare_dataset(Plain, tmp_path)
    for path in folder.glob(f"*.{FILE_FORMAT}-*"):
        path.rename(path.with_name(path.name.replace(FILE_FORMAT, "tfrecord")))
    with pytest.raises(
        DataError,
        match=rf"plain lies in {folder} in a format that only TensorFlow reads.*tfds convert_format",
    ):
        opened("plain", tmp_path)


def test_a_data_set_with_films(tmp_path):
    features = prepare_dataset(Plain, tmp_path) / "features.json"
    told = json.loads(features.read_text())
    told["featuresDict"]["features"]["many"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {"shape": {"dimensions": ["-1", "4", "4", "3"]}},
    }
    features.write_text(json.dumps(told))
    with pytest.raises(
        DataError, match="has films, sounds or other features that are not read without TensorFlow"
    ):
        opened("plain", tmp_path)


def test_a_data_set_that_goes_while_it_is_needed(tmp_path):
    source = opened("toy", tmp_path)
    source = pickle.loads(pickle.dumps(source))  # as a worker that begins now
    for path in Path(tmp_path, "toy", "1.1.0").glob(f"*.{FILE_FORMAT}-*"):
        path.unlink()
    with pytest.raises(DataError, match="was there at the start and cannot be read now"):
        source.toy_image(0)
