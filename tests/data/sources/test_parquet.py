"""The data source `parquet`: columns, captions, unusable rows and unusable files."""

import shutil

import pytest

from radiance import config
from radiance.base.errors import DataError
from radiance.data.datasets import open_source
from tests.helpers.toy_shards import (
    fill_parquet,
    gray_values,
    image_column,
    shard_settings,
    toy_image,
    write_parquet,
)

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def open_table(path, cache_dir, **changes):
    return open_source(shard_settings("parquet", path, cache_dir, **changes), "train")


# --- columns --------------------------------------------------------------------------------------


def test_the_layout_of_hugging_face_is_read(tmp_path):
    source = open_table(fill_parquet(tmp_path) / "train-*", tmp_path)
    assert gray_values(source) == list(range(18))
    assert source.sizes.tolist() == [[12, 10]] * 18
    assert [source.captions(i) for i in range(18)] == [(f"image {i}",) for i in range(18)]
    assert [source.name(i) for i in (5, 6, 8)] == [
        "train-00000-of-00003/5",
        "train-00001-of-00003/0",
        "train-00001-of-00003/2",
    ]
    assert source.skip_counts == {}
    assert len(open_table(tmp_path, tmp_path)) == 19


def test_the_dataset_index_stores_everything(tmp_path):
    before = open_table(fill_parquet(tmp_path / "in"), tmp_path)
    source = open_table(tmp_path / "in", tmp_path)
    shutil.rmtree(tmp_path / "in")
    assert gray_values(source) == gray_values(before)
    assert source.fingerprint() == before.fingerprint()


def test_columns_can_have_other_names_and_types(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet",
        jpg=pyarrow.array([toy_image(3), toy_image(4)], pyarrow.large_binary()),
        captions=pyarrow.array(
            [["one", " two ", None], ["three"]], pyarrow.list_(pyarrow.large_string())
        ),
        is_tag_based=[True, None],
        loss_weight=[0.5, None],
        width=[12, 12],
        score=pyarrow.array([0.25, None], pyarrow.float32()),
        license=pyarrow.array(["CC0", "CC BY"]).dictionary_encode(),
        embedding=[[1.0], [2.0]],
        mask=image_column(2),
    )
    source = open_table(path, tmp_path, image_key="jpg", caption_key="captions")
    assert gray_values(source) == [3, 4]
    assert [source.captions(i) for i in range(2)] == [("one", "two"), ("three",)]
    assert [source.has_tags(i) for i in range(2)] == [True, False]
    assert source.loss_weights.tolist() == [0.5, 1]
    assert [source.attributes(i) for i in range(2)] == [
        {"width": 12, "score": 0.25, "license": "CC0"},
        {"width": 12, "license": "CC BY"},
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
def test_class_labels_become_captions(labels, features, tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet",
        {"image": {"_type": "Image"}, "label": features},
        image=image_column(2),
        label=labels,
    )
    source = open_table(path, tmp_path, caption_key="label")
    assert [source.captions(i) for i in range(2)] == [("dog",), ("cat",)]


def test_columns_can_be_within_columns(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet",
        {"objects": {"feature": {"kind": {"names": ["cat", "dog"]}}}},
        image=image_column(2),
        all=[
            {"image": toy_image(8), "texts": [{"text": "a"}, {"text": "b"}]},
            {"image": toy_image(9), "texts": [{"text": "c"}]},
        ],
        objects=[[{"kind": 0}, {"kind": 1}], [{"kind": 1}]],
    )
    source = open_table(path, tmp_path, image_key="all/image", caption_key="all/texts/text")
    assert gray_values(source) == [8, 9]
    assert [source.captions(i) for i in range(2)] == [("a", "b"), ("c",)]
    source = open_table(path, tmp_path, caption_key="objects/kind")
    assert gray_values(source) == [0, 1]
    assert [source.captions(i) for i in range(2)] == [("cat", "dog"), ("dog",)]


@pytest.mark.parametrize("make_type", [pyarrow.list_, pyarrow.large_list])
@pytest.mark.parametrize("is_struct", [True, False])
def test_the_only_image_of_a_list_is_read(make_type, is_struct, tmp_path):
    item_type = image_column(0).type if is_struct else pyarrow.binary()
    images = [[toy_image(1)], [], None, [toy_image(2), toy_image(3)], [None, toy_image(4)], [None]]
    if is_struct:
        images = [
            row and [image and {"bytes": image, "path": "x"} for image in row] for row in images
        ]
    path = write_parquet(
        tmp_path / "x.parquet", images=pyarrow.array(images, make_type(item_type)), text=["a"] * 6
    )
    source = open_table(path, tmp_path, image_key="images")
    assert gray_values(source) == [1, 4]
    assert source.skip_counts == {"no image bytes": 3, "several images in a row": 1}


@pytest.mark.parametrize("column", ["text", "license", "texts"])
def test_a_text_that_is_not_utf_8_leaves_out_its_row(column, tmp_path):
    """pyarrow checks texts only when they are converted."""
    texts = [b"a", b"caf\xe9", b"c", b"d"]
    invalid = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    if column == "texts":
        invalid = pyarrow.ListArray.from_arrays([0, 1, 2, 3, 4], invalid)
    columns = {"text": ["a", "b", "c", "d"]} | {column: invalid}
    path = write_parquet(tmp_path / "x.parquet", row_group_size=4, image=image_column(4), **columns)
    caption_key = "texts" if column == "texts" else "text"
    source = open_table(path, tmp_path, caption_key=caption_key)
    assert gray_values(source) == [0, 2, 3]
    assert source.skip_counts == {"text not in UTF-8": 1}


def test_a_file_that_repeats_its_images_too_often_is_an_error(tmp_path):
    image = toy_image(5, (90, 90), "BMP")
    path = write_parquet(
        tmp_path / "x.parquet",
        row_group_size=10**6,
        image=pyarrow.array([image] * 1500).dictionary_encode().cast(pyarrow.binary()),
        text=["a"] * 1500,
    )
    with pytest.raises(DataError, match=r"x\.parquet repeats images .* write each image once"):
        open_table(path, tmp_path)


def test_a_value_that_all_rows_repeat_fits_into_memory(tmp_path, monkeypatch):
    """The file states it once, in a dictionary: 64 rows of it would take 3 GB."""
    batch_sizes, iter_batches = [], parquet.ParquetFile.iter_batches

    def record_batches(table, num_rows, *args, **kwargs):
        for batch in iter_batches(table, num_rows, *args, **kwargs):
            batch_sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", record_batches)
    monkeypatch.setattr("radiance.data.sources.parquet.MAX_BATCH_BYTES", 200_000_000)
    dictionary = pyarrow.array([toy_image() + bytes(50_000_000)])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64), dictionary)
    table = pyarrow.table({"image": column, "text": ["a"] * 64})
    parquet.write_table(
        table,
        tmp_path / "x.parquet",
        compression="zstd",
        dictionary_pagesize_limit=2**30,
        store_schema=False,
    )
    with pytest.raises(DataError, match="repeats images"):
        open_table(tmp_path / "x.parquet", tmp_path)
    assert 100_000_000 < batch_sizes[0] < 201_000_000


def test_lists_of_too_many_values_are_an_error(tmp_path):
    texts = pyarrow.array([["a"], [None] * 30_000])
    path = write_parquet(tmp_path / "x.parquet", image=image_column(2), text=texts)
    with pytest.raises(DataError, match=r"x\.parquet has more than 10000 values in a row"):
        open_table(path, tmp_path)


def test_the_marker_of_tags_may_be_a_text_or_a_number(tmp_path):
    for marker in (["false", "True", None], [0, 1, 0], [False, True, False], [0.0, 1.0, None]):
        path = write_parquet(
            tmp_path / "x.parquet", image=image_column(3), text=["a"] * 3, is_tag_based=marker
        )
        source = open_table(path, tmp_path)
        assert [source.has_tags(i) for i in range(3)] == [False, True, False]


def test_unusable_rows_are_counted(tmp_path):
    rows = [
        {"bytes": toy_image(5)},
        {"path": "elsewhere.png"},
        None,
        {"bytes": b"no image"},
        {"bytes": toy_image()},
        {"bytes": toy_image()},
    ]
    source = open_table(
        write_parquet(
            tmp_path / "x.parquet",
            image=pyarrow.array(rows, image_column(0).type),
            text=["a", "b", "c", "d", None, "f"],
            loss_weight=[1.0, 1.0, 1.0, 1.0, 1.0, float("nan")],
        ),
        tmp_path,
    )
    assert gray_values(source) == [5]
    assert source.skip_counts == {
        "loss_weight not above 0": 1,
        "no image bytes": 2,
        "no caption": 1,
        "not an image": 1,
    }


# --- unusable files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_key": "img"},
            r"x.parquet has no column data\.image_key=img: "
            r"it has image \(struct<.*\), text \(string\), number \(int64\)\.",
        ),
        ({"caption_key": "text/en"}, r"has no column data\.caption_key=text/en"),
        (
            {"image_key": "number"},
            r"data\.image_key=number has type int64: it must contain image files",
        ),
        ({"image_key": "text"}, r"data\.image_key=text has type string"),
        (
            {"caption_key": "number"},
            r"data\.caption_key=number has type int64: it must contain texts, or class labels",
        ),
        ({"caption_key": "image"}, r"data\.caption_key=image has type struct"),
    ],
)
def test_missing_and_wrong_columns_are_errors(changes, message, tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet", image=image_column(2), text=["a", "b"], number=[1, 2]
    )
    with pytest.raises(DataError, match=message):
        open_table(path, tmp_path, **changes)


def test_two_columns_of_one_name_are_an_error(tmp_path):
    columns = [image_column(1), pyarrow.array(["one"]), pyarrow.array(["two"])]
    table = pyarrow.Table.from_arrays(columns, ["image", "text", "text"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"two columns of one name \(image, text, text\): rename"):
        open_table(tmp_path / "x.parquet", tmp_path)


def test_columns_of_all_files_are_checked_before_reading(tmp_path, monkeypatch):
    fill_parquet(tmp_path)
    write_parquet(tmp_path / "z.parquet", image=image_column(1))
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(DataError, match=r"z.parquet has no column data\.caption_key=text"):
        open_table(tmp_path, tmp_path)


def test_missing_and_broken_files_are_errors(tmp_path):
    with pytest.raises(config.ConfigError, match=r"is not a \.parquet file and contains none"):
        open_table(tmp_path, tmp_path)
    path = write_parquet(tmp_path / "x.parquet", image=image_column(20), text=["a"] * 20)
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with pytest.raises(
        DataError, match=r"x.parquet cannot be read as Parquet .* download it again"
    ):
        open_table(tmp_path, tmp_path)
    path.write_bytes(content[:40] + bytes(600) + content[640:])
    with pytest.raises(DataError, match=r"x.parquet cannot be read as Parquet"):
        open_table(tmp_path, tmp_path)


def test_a_disk_without_space_for_the_images_is_an_error(tmp_path, monkeypatch):
    fill_parquet(tmp_path / "in")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    with pytest.raises(
        DataError, match=r"stores its images in data\.cache_dir, and .* has 0\.00 GB free"
    ):
        open_table(tmp_path / "in", tmp_path / "not" / "there")
