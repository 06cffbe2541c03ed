"""`parquet`: tables as Hugging Face publishes them, a picture and its caption in each row.

`data.picture` names the column of the pictures' files: bytes, or {bytes, path}, of which the path does not count. `data.caption` names
the column of the captions: a text, several, or a class label, whose name it then is; inside of other columns as "captions/text".
`is_tag_based` and `loss_weight` mean what they mean elsewhere (data/records.py); other columns that hold a number or a text are
attributes of the picture.

Rows are called FILE/ROW. A row cannot be read without those around it, so the catalogue keeps the pictures, which takes the space
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
from radiance.data import records
from radiance.data.catalogue import DataError, Row, Unfit, head_of
from radiance.data.decode import Broken
from radiance.data.shards import Shard, find, identity, opened
from radiance.weights.files import CheckpointError, require_space

BATCH = 64  # rows that are unpacked at once
BUFFER = 2**20  # bytes of each column that are read at once


class Columns(NamedTuple):
    """What is read of a file."""

    read: tuple[str, ...]
    labels: tuple[str, ...] | None  # the names of the captions' classes, where the captions are classes
    attributes: tuple[str, ...]


class Parquet:
    """Rows in the order of the files' names.

    path: a file, a folder of them, or a pattern. directory: where the catalogue will be. Raises ConfigError when there is no file.
    """

    def __init__(self, path: str, picture: str, caption: str, directory: Path):
        self.shards = find(path, ".parquet")
        self.picture, self.caption, self.directory = picture, caption, directory
        self.identity = identity(self.shards, "parquet", picture, caption)

    def __getstate__(self):
        return {}  # the catalogue has it all

    def rows(self, threads: int) -> Iterator[Row | Unfit]:
        """Raises DataError when a file cannot be read, has not the columns, or the pictures would fill the disk; ConfigError without pyarrow."""
        columns = [self._columns(shard) for shard in self.shards]  # before an hour is spent on the first files
        try:
            require_space(self.directory, sum(shard.size for shard in self.shards))
        except CheckpointError as error:
            raise DataError(f"data.source=parquet keeps its pictures in data.directory, and {error}") from None
        for shard, these in zip(self.shards, columns):
            number = 0
            with _table(shard) as table:
                for batch in table.iter_batches(BATCH, columns=list(these.read)):
                    for record in batch.to_pylist():
                        yield self._row(f"{shard.name}/{number}", record, these)
                        number += 1

    def read(self, place: Any) -> bytes:
        raise NotImplementedError("The catalogue keeps these pictures.")

    def _columns(self, shard: Shard) -> Columns:
        from pyarrow import types

        with _table(shard) as table:
            schema = table.schema_arrow
        kinds = dict(zip(schema.names, schema.types))
        picture, caption = (_inside(kinds, path) for path in (self.picture, self.caption))
        for setting, path, kind in (("picture", self.picture, picture), ("caption", self.caption, caption)):
            if kind is None:
                told = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
                raise DataError(f"{shard.path} has no column data.{setting}={path}: it has {told}.")
        if types.is_struct(picture):
            picture = _inside({"": picture}, "/bytes")
        if picture is None or not _is_binary(picture):
            raise DataError(
                f"{shard.path}: the column data.picture={self.picture} holds {kinds[self.picture.partition('/')[0]]}, but files of pictures "
                "are needed, as bytes or as {bytes, path}."
            )
        labels = _labels(schema.metadata or {}, self.caption) if types.is_integer(caption) else None
        if labels is None and not _is_text(caption):
            raise DataError(
                f"{shard.path}: the column data.caption={self.caption} holds {caption}, but texts are needed, or class labels whose names "
                "the file knows."
            )
        ours = {self.picture.partition("/")[0], self.caption.partition("/")[0], "is_tag_based", "loss_weight"}
        attributes = tuple(name for name, kind in kinds.items() if name not in ours and (_is_text(kind) or _is_number(kind)))
        return Columns((*sorted(ours & kinds.keys()), *attributes), labels, attributes)

    def _row(self, name: str, record: dict[str, Any], columns: Columns) -> Row | Unfit:
        try:
            picture = _value(record, self.picture)
            content = picture.get("bytes") if isinstance(picture, dict) else picture
            if not content:
                raise Broken("no bytes in the file")
            caption = _value(record, self.caption)
            if columns.labels is not None:
                several = caption if isinstance(caption, list) else [caption]
                caption = [columns.labels[i] for i in several if i in range(len(columns.labels))]
            told = records.said({"text": caption} | {name: record.get(name) for name in ("is_tag_based", "loss_weight")})
            if not told.captions:
                raise Broken("no caption")
            captions, weight = records.captions_of(told.captions), records.weight_of(told)
            width, height, digest = head_of(BytesIO(content))
        except Broken as broken:
            return Unfit(name, broken.kind)
        attributes = {name: record[name] for name in columns.attributes if record[name] is not None}
        return Row(name, content, captions, width, height, told.tags, weight, digest, attributes)


@contextmanager
def _table(shard: Shard) -> Iterator[Any]:
    """The open file. What cannot be read of it, now or later, raises DataError."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise config.ConfigError("data.source=parquet needs the pyarrow package: pip install 'radiance[parquet]'.") from None
    with opened(shard) as file:
        try:
            yield ParquetFile(file, pre_buffer=False, buffer_size=BUFFER)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"{shard.path} cannot be read as Parquet ({reason}): take it away, or fetch it again.") from None


# --- columns ------------------------------------------------------------------------------------------------------------


def _inside(kinds: Mapping[str, Any], path: str) -> Any:
    """The type of what a path leads to, of a list that of its items; none where it leads nowhere."""
    from pyarrow import types

    first, *rest = path.split("/")
    kind = kinds.get(first)
    for name in (*rest, None):
        while kind is not None and (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
            kind = kind.value_type
        if name is not None:
            kind = kind.field(name).type if kind is not None and types.is_struct(kind) and kind.get_field_index(name) >= 0 else None
    return kind


def _value(node: Any, path: str) -> Any:
    """What a path leads to in a row; through lists, a list."""
    for name in path.split("/"):
        if isinstance(node, list):
            node = [item.get(name) for item in node if item is not None]
        else:
            node = None if node is None else node.get(name)
    return node


def _labels(metadata: Mapping[bytes, bytes], path: str) -> tuple[str, ...] | None:
    """The names of a column's classes, as the `datasets` package writes them into its files."""
    try:
        node = json.loads(metadata[b"huggingface"])["info"]["features"]
        for name in (*path.split("/"), "names"):
            while name not in node and (isinstance(node, list) or "feature" in node):  # a feature of lists
                node = node[0] if isinstance(node, list) else node["feature"]
            node = node[name]
        return tuple(map(str, node))
    except (LookupError, TypeError, ValueError):
        return None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_number(kind: Any) -> bool:
    from pyarrow import types

    return types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
