"""The data source `parquet`: tables as Hugging Face publishes them, with an image in each row.

`data.image_key` names the column of the images' files: bytes, or {bytes, path}, of which the path
is ignored, or a list with one of them. `data.caption_key` names the column of the captions: a text,
several, or a class label, whose name is the caption. A column within others is written as
"captions/text". `is_tag_based` and `loss_weight` have the same meaning as in other sources
(data/sources/records.py). Other columns of numbers or texts become attributes of the image.

Rows are named FILE/ROW. A row cannot be read without its neighbors, so the dataset index stores the
images, which takes as much space as the files. Building it needs the memory of a few row groups.
Splits are files: `data.path=FOLDER/train-*` selects one.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from radiance import config
from radiance.base.errors import DataError, OutputError
from radiance.base.files import require_space
from radiance.data.listing import IndexRecord, UnusableRecord, read_image_header
from radiance.data.sources.records import Annotation, make_record, parse_annotation
from radiance.data.sources.shards import ShardFile, find_shards, hash_shards, open_shard
from radiance.data.unusable import UnusableError

ROWS_PER_BATCH = 64  # rows that are decoded at once
MAX_BATCH_BYTES = 2**30  # the same in bytes, if every row repeats the longest value
MAX_VALUES_PER_ROW = 10_000  # of a list, on average of a row group
# Bytes of the images of a file, relative to its size. Rows may share an image, which is stored once
# in the file and once for each row in the dataset index.
MAX_REPETITION = 100
BUFFER_BYTES = 2**20  # bytes of each column that are read at once
ANNOTATION_COLUMNS = ("is_tag_based", "loss_weight")


class Columns(NamedTuple):
    """The columns of a file that are read."""

    names: tuple[str, ...]
    class_names: tuple[str, ...] | None  # if the captions are class labels
    attributes: tuple[str, ...]


class ParquetListing:
    """Rows in the order of the files' names.

    Args:
        path: A file, a folder of files, or a pattern.
        image_key: Column of the images, possibly within other columns ("a/b").
        caption_key: Column of the captions, possibly within other columns.
        cache_dir: Folder where the dataset index will be written.

    Raises:
        ConfigError: There is no such file.
    """

    def __init__(self, path: str, image_key: str, caption_key: str, cache_dir: Path):
        self.shards = find_shards(path, ".parquet")
        self.image_key, self.caption_key, self.cache_dir = image_key, caption_key, cache_dir
        self.identity = hash_shards(self.shards, "parquet", image_key, caption_key)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # the dataset index has everything

    def scan(self, num_threads: int) -> Iterator[IndexRecord | UnusableRecord]:
        """Yield a record for each row.

        Args:
            num_threads: Not used: pyarrow allocates the size that a page states, up to 2 GiB, so
                pages are read one after the other.

        Raises:
            DataError: A file cannot be read, lacks the columns, or the disk is too small.
            ConfigError: The pyarrow package is missing.
        """
        # Check all files before spending an hour on the first ones.
        all_columns = [self._find_columns(shard) for shard in self.shards]
        try:
            require_space(self.cache_dir, sum(shard.size for shard in self.shards))
        except OutputError as error:
            raise DataError(
                f"data.source=parquet stores its images in data.cache_dir, and {error}"
            ) from None
        for shard, columns in zip(self.shards, all_columns):
            num_bytes = 0
            for row_index, row in enumerate(_iter_rows(shard, columns)):
                record = self._make_record(f"{shard.name}/{row_index}", row, columns)
                if isinstance(record, IndexRecord):
                    num_bytes += len(record.location)
                if num_bytes > MAX_REPETITION * shard.size:
                    raise DataError(
                        f"{shard.path} repeats images until they take more than {MAX_REPETITION} "
                        "times its size: remove it, or write each image once."
                    )
                yield record

    def address(self, location: Any) -> None:
        """Return None: an image is a part of a table."""
        return None

    def read_file(self, location: Any) -> bytes:
        """Raise NotImplementedError: the dataset index stores these images."""
        raise NotImplementedError("The dataset index stores these images.")

    def _find_columns(self, shard: ShardFile) -> Columns:
        with _open_table(shard) as table:
            schema = table.schema_arrow
        column_types = dict(zip(schema.names, schema.types))
        if len(column_types) < len(schema.names):
            raise DataError(
                f"{shard.path} has two columns of one name ({', '.join(schema.names)}): "
                "rename one of them."
            )
        self._check_image_column(shard, column_types)
        class_names = self._check_caption_column(shard, column_types, schema.metadata or {})
        # Read the outermost columns of the image and the caption, and the attributes.
        used_columns = {_top_column(self.image_key), _top_column(self.caption_key)}
        used_columns |= set(ANNOTATION_COLUMNS)
        attributes = tuple(
            name
            for name, column_type in column_types.items()
            if name not in used_columns and (_is_text(column_type) or _is_number(column_type))
        )
        names = (*sorted(used_columns & column_types.keys()), *attributes)
        return Columns(names, class_names, attributes)

    def _check_image_column(self, shard: ShardFile, column_types: Mapping[str, Any]):
        from pyarrow import types

        image_type = _require_type(shard, column_types, "image_key", self.image_key)
        if types.is_struct(image_type):
            image_type = _type_at_path({"": image_type}, "/bytes")
        if image_type is None or not _is_binary(image_type):
            column_type = column_types[_top_column(self.image_key)]
            raise DataError(
                f"{shard.path}: the column data.image_key={self.image_key} has type "
                f"{column_type}: it must contain image files, as bytes or as {{bytes, path}}."
            )

    def _check_caption_column(
        self, shard: ShardFile, column_types: Mapping[str, Any], metadata: Mapping[bytes, bytes]
    ) -> tuple[str, ...] | None:
        """Return the names of the classes if the captions are class labels."""
        from pyarrow import types

        caption_type = _require_type(shard, column_types, "caption_key", self.caption_key)
        class_names = None
        if types.is_integer(caption_type):
            class_names = _class_names(metadata, self.caption_key)
        if class_names is None and not _is_text(caption_type):
            raise DataError(
                f"{shard.path}: the column data.caption_key={self.caption_key} has type "
                f"{caption_type}: it must contain texts, or class labels with names in the file."
            )
        return class_names

    def _make_record(
        self, name: str, row: dict[str, Any] | None, columns: Columns
    ) -> IndexRecord | UnusableRecord:
        if row is None:
            return UnusableRecord(name, "text not in UTF-8")
        contents = list(_iter_images(_value_at_path(row, self.image_key)))
        if len(contents) != 1:
            return UnusableRecord(name, "several images in a row" if contents else "no image bytes")
        (content,) = contents
        return make_record(
            name,
            content,
            partial(self._read_annotation, row, columns.class_names),
            lambda: read_image_header(BytesIO(content)),
            {key: row[key] for key in columns.attributes if row[key] is not None},
        )

    def _read_annotation(
        self, row: dict[str, Any], class_names: tuple[str, ...] | None
    ) -> Annotation:
        captions = _value_at_path(row, self.caption_key)
        if class_names is not None:
            class_indices = captions if isinstance(captions, list) else [captions]
            captions = [class_names[i] for i in class_indices if i in range(len(class_names))]
        fields = {column: row.get(column) for column in ANNOTATION_COLUMNS}
        annotation = parse_annotation({"text": captions, **fields})
        if not annotation.captions:
            raise UnusableError("no caption")
        return annotation


@contextmanager
def _open_table(shard: ShardFile) -> Iterator[Any]:
    """Open a file. Errors of reading it, now or later, become DataError."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise config.ConfigError(
            "data.source=parquet needs the pyarrow package: pip install 'radiance[parquet]'."
        ) from None
    with open_shard(shard) as file:
        try:
            yield ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise DataError(
                f"{shard.path} cannot be read as Parquet ({reason}): "
                "remove it, or download it again."
            ) from None


def _iter_rows(shard: ShardFile, columns: Columns) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a file; None in place of a row whose texts are not UTF-8."""
    with _open_table(shard) as table:
        for group in range(table.num_row_groups):
            num_rows = _choose_batch_rows(shard, table.metadata.row_group(group))
            names = list(columns.names)
            for batch in table.iter_batches(num_rows, [group], names, use_threads=False):
                try:
                    yield from batch.to_pylist()
                except UnicodeDecodeError:
                    yield from (_convert_row(batch, index) for index in range(batch.num_rows))


def _choose_batch_rows(shard: ShardFile, row_group: Any) -> int:
    """Return how many rows of a group are read at once.

    Rows may share a value of the column's dictionary, so each row may be as large as the column.
    """
    column_chunks = [row_group.column(index) for index in range(row_group.num_columns)]
    num_values = max((chunk.num_values for chunk in column_chunks), default=0)
    if num_values > MAX_VALUES_PER_ROW * max(row_group.num_rows, 1):
        raise DataError(
            f"{shard.path} has more than {MAX_VALUES_PER_ROW} values in a row: remove that column."
        )
    max_bytes = max((chunk.total_uncompressed_size for chunk in column_chunks), default=0)
    return min(ROWS_PER_BATCH, max(1, MAX_BATCH_BYTES // max(max_bytes, 1)))


def _convert_row(batch: Any, index: int) -> dict[str, Any] | None:
    try:
        (row,) = batch.slice(index, 1).to_pylist()
    except UnicodeDecodeError:
        return None
    return row


def _iter_images(value: Any) -> Iterator[bytes]:
    """Yield the files of the images in a row: none, one, or those of a list."""
    if isinstance(value, list):
        for item in value:
            yield from _iter_images(item)
    elif isinstance(value, dict):
        yield from _iter_images(value.get("bytes"))
    elif value:
        yield value


# --- columns --------------------------------------------------------------------------------------


def _top_column(path: str) -> str:
    """Return the outermost column of a path."""
    return path.partition("/")[0]


def _require_type(
    shard: ShardFile, column_types: Mapping[str, Any], setting: str, path: str
) -> Any:
    """Return the type of the column that a setting names."""
    column_type = _type_at_path(column_types, path)
    if column_type is None:
        available = ", ".join(f"{name} ({kind})" for name, kind in column_types.items())
        raise DataError(f"{shard.path} has no column data.{setting}={path}: it has {available}.")
    return column_type


def _type_at_path(column_types: Mapping[str, Any], path: str) -> Any:
    """Return the type at a path, for a list the type of its items; None if nothing is there."""
    column, *fields = path.split("/")
    node_type = _item_type(column_types.get(column))
    for field in fields:
        node_type = _item_type(_field_type(node_type, field))
    return node_type


def _item_type(node_type: Any) -> Any:
    """Return the type of the items of lists, which may be nested; other types as they are."""
    from pyarrow import types

    while node_type is not None and (
        types.is_list(node_type)
        or types.is_large_list(node_type)
        or types.is_fixed_size_list(node_type)
    ):
        node_type = node_type.value_type
    return node_type


def _field_type(node_type: Any, field: str) -> Any:
    """Return the type of a field of a struct; None if there is no such field."""
    from pyarrow import types

    if node_type is None or not types.is_struct(node_type):
        return None
    return node_type.field(field).type if node_type.get_field_index(field) >= 0 else None


def _value_at_path(node: Any, path: str) -> Any:
    """Return the value at a path in a row, a list if the path leads through lists."""
    for field in path.split("/"):
        if isinstance(node, list):
            node = [item.get(field) for item in node if item is not None]
        else:
            node = None if node is None else node.get(field)
    return node


def _class_names(metadata: Mapping[bytes, bytes], path: str) -> tuple[str, ...] | None:
    """Return the names of a column's classes, as the `datasets` package writes them into files."""
    try:
        node = json.loads(metadata[b"huggingface"])["info"]["features"]
        for field in (*path.split("/"), "names"):
            # Features of lists are lists of one feature, or have a field "feature".
            while field not in node and (isinstance(node, list) or "feature" in node):
                node = node[0] if isinstance(node, list) else node["feature"]
            node = node[field]
        return tuple(map(str, node))
    except (LookupError, TypeError, ValueError):
        return None


def _is_text(arrow_type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return (
        types.is_string(arrow_type)
        or types.is_large_string(arrow_type)
        or types.is_string_view(arrow_type)
    )


def _is_binary(arrow_type: Any) -> bool:
    from pyarrow import types

    return (
        types.is_binary(arrow_type)
        or types.is_large_binary(arrow_type)
        or types.is_binary_view(arrow_type)
    )


def _is_number(arrow_type: Any) -> bool:
    from pyarrow import types

    return (
        types.is_boolean(arrow_type)
        or types.is_integer(arrow_type)
        or types.is_floating(arrow_type)
    )
