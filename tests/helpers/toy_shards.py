"""Toy datasets in shards, and settings that read them."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from radiance import config


def toy_image(gray: int = 0, size: tuple[int, int] = (12, 10), image_format: str = "PNG") -> bytes:
    """Return the file of an image of one gray value."""
    file = io.BytesIO()
    Image.new("RGB", size, (gray, gray, gray)).save(file, image_format)
    return file.getvalue()


def gray_values(source) -> list[int]:
    """Return the gray value of each image of a source."""
    return [source.load_image(i).getpixel((0, 0))[0] for i in range(len(source))]


def shard_settings(source: str, path, cache_dir, **changes) -> config.Data:
    """Return settings of a dataset in shards; nearly every image is for training."""
    defaults = {
        "resolution": 8,
        "max_upscale": 2.0,
        "num_threads": 2,
        "validation_fraction": 0.0,
        "caption_dropout": 0.0,
    }
    return config.Data(
        source=source, path=str(path), cache_dir=str(cache_dir), **defaults | changes
    )


def write_tar(
    path: Path, files: dict[str, bytes | str], tar_format: int = tarfile.PAX_FORMAT
) -> Path:
    """Write a tar file of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as shard:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def tar_sample(key: str, gray: int = 0) -> dict[str, bytes | str]:
    """Return the files of a sample: an image and its annotation."""
    annotation = json.dumps({"caption": f"image {gray}"})
    return {f"{key}.png": toy_image(gray), f"{key}.json": annotation}


def fill_tar(folder: Path) -> Path:
    """Write three shards of six images each, whose gray values are 0 to 17."""
    for shard in range(3):
        indices = range(6 * shard, 6 * shard + 6)
        samples = [tar_sample(f"{i:06d}", i) for i in indices]
        files = {name: file for sample in samples for name, file in sample.items()}
        write_tar(folder / f"{shard:04d}.tar", files)
    return folder


def image_column(num_images: int, first: int = 0):
    """Return a column of images, whose gray values start at `first`."""
    import pyarrow

    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = [{"bytes": toy_image(i), "path": f"{i}.png"} for i in range(first, first + num_images)]
    return pyarrow.array(values, struct)


def write_parquet(path: Path, features=None, row_group_size: int = 2, **columns) -> Path:
    """Write a Parquet file.

    Args:
        path: The file.
        features: Descriptions of columns, as the `datasets` package writes them.
        row_group_size: Number of rows in each group.
        columns: Values by column.
    """
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if features:
        metadata = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def fill_parquet(folder: Path) -> Path:
    """Write a training split of three files of six images each, and a test split.

    The gray values of the training split are 0 to 17.
    """
    for shard in range(3):
        write_parquet(
            folder / f"train-{shard:05d}-of-00003.parquet",
            image=image_column(6, 6 * shard),
            text=[f"image {i}" for i in range(6 * shard, 6 * shard + 6)],
        )
    write_parquet(
        folder / "test-00000-of-00001.parquet", image=image_column(1), text=["another split"]
    )
    return folder
