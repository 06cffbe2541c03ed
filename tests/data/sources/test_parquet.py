"""Tables of images in Parquet: columns, captions, what is left out, and what cannot be used at all."""

import shutil

import pytest

from radiance import config
from radiance.data.datasets import DataError, open_source
from tests.helpers.toy_shards import fill_parquet, toy_image, images, write_parquet

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def settings(path, directory, **more):
    more = {
        "side": 8,
        "enlarge": 2.0,
        "threads": 2,
        "validation": 1e-9,
        "caption_dropout": 0.0,
    } | more
    return config.Data(source="parquet", path=str(path), cache_dir=str(directory), **more)


def opened(path, directory, **more):
    return open_source(settings(path, directory, **more), "train")


def greys(source):
    return [source.toy_image(i).getpixel((0, 0))[0] for i in range(len(source))]


# --- what is read -------------------------------------------------------------------------------------------------------


def test_the_layout_of_hugging_face(tmp_path):
    source = opened(fill_parquet(tmp_path) / "train-*", tmp_path)
    assert greys(source) == list(range(18))
    assert source.sizes.tolist() == [[12, 10]] * 18
    assert [source.captions(i) for i in range(18)] == [(f"image {i}",) for i in range(18)]
    assert [source.name(i) for i in (5, 6, 8)] == [
        "train-00000-of-00003/5",
        "train-00001-of-00003/0",
        "train-00001-of-00003/2",
    ]
    assert source.skip_counts == {}
    assert len(opened(tmp_path, tmp_path)) == 19


def test_the_dataset_index_has_it_all(tmp_path):
    before = opened(fill_parquet(tmp_path / "in"), tmp_path)
    source = opened(tmp_path / "in", tmp_path)
    shutil.rmtree(tmp_path / "in")
    assert greys(source) == greys(before)
    assert source.fingerprint() == before.fingerprint()


def test_columns_of_other_names_and_kinds(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet",
        jpg=pyarrow.array([toy_image(3), toy_image(4)], pyarrow.large_binary()),
        said=pyarrow.array(
            [["one", " two ", None], ["three"]], pyarrow.list_(pyarrow.large_string())
        ),
        is_tag_based=[True, None],
        loss_weight=[0.5, None],
        width=[12, 12],
        score=pyarrow.array([0.25, None], pyarrow.float32()),
        licence=pyarrow.array(["CC0", "CC BY"]).dictionary_encode(),
        embedding=[[1.0], [2.0]],
        mask=images(2),
    )
    source = opened(path, tmp_path, toy_image="jpg", caption="said")
    assert greys(source) == [3, 4]
    assert [source.captions(i) for i in range(2)] == [
        ("one", "two"),
        ("three",),
    ]
    assert [source.has_tags(i) for i in range(2)] == [
        True,
        False,
    ]
    assert source.loss_weights.tolist() == [0.5, 1]
    assert [source.attributes(i) for i in range(2)] == [
        {"width": 12, "score": 0.25, "licence": "CC0"},
        {"width": 12, "licence": "CC BY"},
    ]


@pytest.mark.parametrize(
    ("labels", "features"),
    [
        ([1, 0], {"_type": "ClassLabel", "names": ["cat", "dog"]}),
        (
            [[1], [0]],
            {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["cat", "dog"]}},
        ),
        ([[1, -1], [0, None]], [{"_type": "ClassLabel", "names": ["cat", "dog"]}]),
    ],
)
def test_class_labels(labels, features, tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet",
        {"image": {"_type": "Image"}, "label": features},
        image=images(2),
        label=labels,
    )
    source = opened(path, tmp_path, caption="label")
    assert [source.captions(i) for i in range(2)] == [("dog",), ("cat",)]


def test_columns_within_columns(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet",
        {"objects": {"feature": {"kind": {"names": ["cat", "dog"]}}}},
        image=images(2),
        all=[
            {"image": toy_image(8), "texts": [{"text": "a"}, {"text": "b"}]},
            {"image": toy_image(9), "texts": [{"text": "c"}]},
        ],
        objects=[[{"kind": 0}, {"kind": 1}], [{"kind": 1}]],
    )
    source = opened(path, tmp_path, toy_image="all/image", caption="all/texts/text")
    assert greys(source) == [8, 9]
    assert [source.captions(i) for i in range(2)] == [
        ("a", "b"),
        ("c",),
    ]
    source = opened(path, tmp_path, caption="objects/kind")
    assert greys(source) == [0, 1]
    assert [source.captions(i) for i in range(2)] == [
        ("cat", "dog"),
        ("dog",),
    ]


def test_what_is_left_out(tmp_path):
    rows = [
        {"bytes": toy_image(5)},
        {"path": "elsewhere.png"},
        None,
        {"bytes": b"no image"},
        {"bytes": toy_image()},
        {"bytes": toy_image()},
    ]
    source = opened(
        write_parquet(
            tmp_path / "x.parquet",
            image=pyarrow.array(rows, images(0).type),
            text=["a", "b", "c", "d", None, "f"],
            loss_weight=[1.0, 1.0, 1.0, 1.0, 1.0, float("nan")],
        ),
        tmp_path,
    )
    assert greys(source) == [5]
    assert source.skip_counts == {
        "loss_weight not above 0": 1,
        "no bytes in the file": 2,
        "no caption": 1,
        "not an image": 1,
    }


# --- what cannot be used ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"image": "img"},
            r"x.parquet has no column data\.image=img: it has image \(struct<.*\), text \(string\), number \(int64\)\.",
        ),
        ({"caption": "text/en"}, r"has no column data\.caption=text/en"),
        ({"image": "number"}, r"data\.image=number holds int64, but files of images are needed"),
        ({"image": "text"}, r"data\.image=text holds string"),
        (
            {"caption": "number"},
            r"data\.caption=number holds int64, but texts are needed, or class labels whose names the file knows",
        ),
        ({"caption": "image"}, r"data\.caption=image holds struct"),
    ],
)
def test_columns_that_are_not_there_or_hold_something_else(settings, told, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", image=images(2), text=["a", "b"], number=[1, 2])
    with pytest.raises(DataError, match=told):
        opened(path, tmp_path, **settings)


def test_a_column_that_the_last_file_lacks_is_told_before_the_first_is_read(tmp_path, monkeypatch):
    fill_parquet(tmp_path)
    write_parquet(tmp_path / "z.parquet", image=images(1))
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(DataError, match=r"z.parquet has no column data\.caption=text"):
        opened(tmp_path, tmp_path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(config.ConfigError, match=r"is no \.parquet file and has none in it"):
        opened(tmp_path, tmp_path)
    path = write_parquet(tmp_path / "x.parquet", image=images(20), text=["a"] * 20)
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with pytest.raises(DataError, match="x.parquet cannot be read as Parquet .* fetch it again"):
        opened(tmp_path, tmp_path)
    path.write_bytes(content[:40] + bytes(600) + content[640:])
    with pytest.raises(DataError, match="x.parquet cannot be read as Parquet"):
        opened(tmp_path, tmp_path)


def test_a_disk_without_room_for_the_images(tmp_path, monkeypatch):
    fill_parquet(tmp_path / "in")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    with pytest.raises(
        DataError, match=r"keeps its images in data\.directory, and .* has 0\.00 GB free"
    ):
        opened(tmp_path / "in", tmp_path / "not" / "there")
