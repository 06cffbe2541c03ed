"""`parquet`: tables as Hugging Face publishes them, an image and its caption in each row.

`data.image_key` names the column of the images' files: bytes, or {bytes, path}, of which the path does not count. `data.caption_key` names
the column of the captions: a text, several, or a class label, whose name it then is; inside of other columns as "captions/text".
`is_tag_based` and `loss_weight` mean what they mean elsewhere (data/records.py); other columns that hold a number or a text are
attributes of the image.

Rows are called FILE/ROW. A row cannot be read without those around it, so the dataset index keeps the images, which takes the space
that the files take. While it is made a few row groups' worth of memory is in use. Splits are files: `data.path=FOLDER/train-*`
leaves the others out.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from radiance import config
from radiance.base.errors import DataError, OutputError
from radiance.base.files import require_space
from radiance.data.decode import UnusableError
from radiance.data.listing import IndexRecord, Unusable, read_image_header
from radiance.data.sources import records
from radiance.data.sources.shards import ShardFile, find_shards, hash_shards, open_shard

ROWS_PER_BATCH = 64  # rows that are unpacked at once
BUFFER_BYTES = 2**20  # bytes of each column that are read at once


class Columns(NamedTuple):
    """What is read of a file."""

    names: tuple[str, ...]
    class_names: (
        tuple[str, ...] | None
    )  # the names of the captions' classes, where the captions are classes
    attributes: tuple[str, ...]


class ParquetListing:
    """Rows in the order of the files' names.

    path: a file, a folder of them, or a pattern. directory: where the dataset index will be. Raises ConfigError when there is no file.
    """

    def __init__(self, path: str, image_key: str, caption_key: str, cache_dir: Path):
        self.shards = find_shards(path, ".parquet")
        self.image_key, self.caption_key, self.cache_dir = image_key, caption_key, cache_dir
        self.identity = hash_shards(self.shards, "parquet", image_key, caption_key)

    def __getstate__(self):
        return {}  # the dataset index has it all

    def scan(self, num_threads: int) -> Iterator[IndexRecord | Unusable]:
        """Raises DataError when a file cannot be read, has not the columns, or the images would fill the disk; ConfigError without pyarrow."""
        all_columns = [
            self._find_columns(shard) for shard in self.shards
        ]  # before an hour is spent on the first files
        try:
            require_space(self.cache_dir, sum(shard.size for shard in self.shards))
        except OutputError as error:
            raise DataError(
                f"data.source=parquet keeps its images in data.cache_dir, and {error}"
            ) from None
        for shard, shard_columns in zip(self.shards, all_columns):
            row_index = 0
            with _open_table(shard) as table:
                for batch in table.iter_batches(ROWS_PER_BATCH, columns=list(shard_columns.names)):
                    for record in batch.to_pylist():
                        yield self._make_record(f"{shard.name}/{row_index}", record, shard_columns)
                        row_index += 1

    def address(self, location: Any) -> None:
        """Return None: an image is a part of a table."""
        return None

    def read_file(self, location: Any) -> bytes:
        raise NotImplementedError("The dataset index keeps these images.")

    def _find_columns(self, shard: ShardFile) -> Columns:
        from pyarrow import types

        with _open_table(shard) as table:
            schema = table.schema_arrow
        column_types = dict(zip(schema.names, schema.types))
        image_type, caption_type = (
            _type_at_path(column_types, column_path)
            for column_path in (self.image_key, self.caption_key)
        )
        for setting, column_path, column_type in (
            ("image", self.image_key, image_type),
            ("caption", self.caption_key, caption_type),
        ):
            if column_type is None:
                available = ", ".join(
                    f"{name} ({column_type})" for name, column_type in column_types.items()
                )
                raise DataError(
                    f"{shard.path} has no column data.{setting}={column_path}: it has {available}."
                )
        if types.is_struct(image_type):
            image_type = _type_at_path({"": image_type}, "/bytes")
        if image_type is None or not _is_binary(image_type):
            raise DataError(
                f"{shard.path}: the column data.image_key={self.image_key} holds {column_types[self.image_key.partition('/')[0]]}, but files of images "
                "are needed, as bytes or as {bytes, path}."
            )
        class_names = (
            _class_names(schema.metadata or {}, self.caption_key)
            if types.is_integer(caption_type)
            else None
        )
        if class_names is None and not _is_text(caption_type):
            raise DataError(
                f"{shard.path}: the column data.caption_key={self.caption_key} holds {caption_type}, but texts are needed, or class labels whose names "
                "the file knows."
            )
        used_columns = {
            self.image_key.partition("/")[0],
            self.caption_key.partition("/")[0],
            "is_tag_based",
            "loss_weight",
        }
        attributes = tuple(
            name
            for name, column_type in column_types.items()
            if name not in used_columns and (_is_text(column_type) or _is_number(column_type))
        )
        return Columns(
            (*sorted(used_columns & column_types.keys()), *attributes), class_names, attributes
        )

    def _make_record(
        self, name: str, record: dict[str, Any], columns: Columns
    ) -> IndexRecord | Unusable:
        try:
            image_value = _value_at_path(record, self.image_key)
            content = image_value.get("bytes") if isinstance(image_value, dict) else image_value
            if not content:
                raise UnusableError("no bytes in the file")
            caption_value = _value_at_path(record, self.caption_key)
            if columns.class_names is not None:
                class_indices = (
                    caption_value if isinstance(caption_value, list) else [caption_value]
                )
                caption_value = [
                    columns.class_names[i]
                    for i in class_indices
                    if i in range(len(columns.class_names))
                ]
            annotation = records.parse_annotation(
                {"text": caption_value}
                | {name: record.get(name) for name in ("is_tag_based", "loss_weight")}
            )
            if not annotation.captions:
                raise UnusableError("no caption")
            captions, weight = (
                records.clean_captions(annotation.captions),
                records.validate_weight(annotation),
            )
            width, height, content_hash = read_image_header(BytesIO(content))
        except UnusableError as error:
            return Unusable(name, error.kind)
        attributes = {name: record[name] for name in columns.attributes if record[name] is not None}
        return IndexRecord(
            name,
            content,
            captions,
            width,
            height,
            annotation.has_tags,
            weight,
            content_hash,
            attributes,
        )


@contextmanager
def _open_table(shard: ShardFile) -> Iterator[Any]:
    """The open file. What cannot be read of it, now or later, raises DataError."""
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
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(
                f"{shard.path} cannot be read as Parquet ({reason}): take it away, or fetch it again."
            ) from None


# --- columns ------------------------------------------------------------------------------------------------------------


def _type_at_path(column_types: Mapping[str, Any], path: str) -> Any:
    """The type of what a path leads to, of a list that of its items; none where it leads nowhere."""
    from pyarrow import types

    column, *fields = path.split("/")
    node_type = column_types.get(column)
    for field in (*fields, None):
        while node_type is not None and (
            types.is_list(node_type)
            or types.is_large_list(node_type)
            or types.is_fixed_size_list(node_type)
        ):
            node_type = node_type.value_type
        if field is not None:
            node_type = (
                node_type.field(field).type
                if node_type is not None
                and types.is_struct(node_type)
                and node_type.get_field_index(field) >= 0
                else None
            )
    return node_type


def _value_at_path(node: Any, path: str) -> Any:
    """What a path leads to in a row; through lists, a list."""
    for field in path.split("/"):
        if isinstance(node, list):
            node = [item.get(field) for item in node if item is not None]
        else:
            node = None if node is None else node.get(field)
    return node


def _class_names(metadata: Mapping[bytes, bytes], path: str) -> tuple[str, ...] | None:
    """The names of a column's classes, as the `datasets` package writes them into its files."""
    try:
        node = json.loads(metadata[b"huggingface"])["info"]["features"]
        for field in (*path.split("/"), "names"):
            while field not in node and (
                isinstance(node, list) or "feature" in node
            ):  # a feature of lists
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
