"""Data sets in shards, for tests."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def toy_image(grey: int = 0, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    """The file of an image of one grey."""
    file = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as shard:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, grey: int = 0) -> dict[str, bytes | str]:
    """An image and its record."""
    return {f"{key}.png": toy_image(grey), f"{key}.json": json.dumps({"caption": f"image {grey}"})}


def fill_tar(folder: Path) -> Path:
    """Three shards of six images each, of greys from 0 on."""
    for shard in range(3):
        numbers = range(6 * shard, 6 * shard + 6)
        write_tar(
            folder / f"{shard:04d}.tar",
            {name: file for i in numbers for name, file in sample(f"{i:06d}", i).items()},
        )
    return folder


def images(count: int, first: int = 0):
    """A column of images, of greys from `first` on."""
    import pyarrow

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array(
        [{"bytes": toy_image(i), "path": f"{i}.png"} for i in range(first, first + count)], kind
    )


def write_parquet(path: Path, features=None, rows: int = 2, **columns) -> Path:
    """A file with so many rows in each group. features: what the `datasets` package notes of them."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    parquet.write_table(table, path, row_group_size=rows)
    return path


def fill_parquet(folder: Path) -> Path:
    """A training split of three files with six images each, of greys from 0 on, and another split."""
    for shard in range(3):
        captions = [f"image {i}" for i in range(6 * shard, 6 * shard + 6)]
        write_parquet(
            folder / f"train-{shard:05d}-of-00003.parquet",
            image=images(6, 6 * shard),
            text=captions,
        )
    write_parquet(folder / "test-00000-of-00001.parquet", image=images(1), text=["another split"])
    return folder
