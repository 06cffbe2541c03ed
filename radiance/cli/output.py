"""Where `radiance sample` writes its images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from radiance import config
from radiance.base.errors import TextError
from radiance.base.files import replace_atomically
from radiance.base.text_files import read_text, split_lines

if TYPE_CHECKING:
    from PIL import Image

    from radiance.pipeline import GeneratedImage

MAX_SHEET_IMAGES = 400  # no contact sheet is written of more images
NUMBERED_NAME = re.compile(r"(\d{5,})_(?:seed\d+|sheet)\.png")


class SampleJob(NamedTuple):
    """One image to sample."""

    image_index: int  # among the images of a command
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the PNG file in a folder without other images."""
        return f"{self.image_index:05d}_seed{self.seed}.png"


@runtime_checkable
class Writer(Protocol):
    """Writes sampled images into a folder."""

    folder: Path

    def find_pending(self, jobs: Sequence[SampleJob]) -> list[SampleJob]:
        """Return the jobs of this host whose images must be sampled."""
        ...

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Raise ConfigError if existing images have other metadata than new ones would have."""
        ...

    def write(self, job: SampleJob, result: GeneratedImage) -> None:
        """Write an image."""
        ...

    def finish(self, sheet_columns: int, metadata: Mapping[str, Any]) -> str:
        """Write the contact sheet, if any, and return the end of the message for the user."""
        ...


class OutputFolder:
    """A folder of images for people to look at, with a contact sheet.

    Images of one host get the first numbers that the folder does not have, so that a second command
    adds to it. Those of several hosts, which do not see each other's files, need a new folder.

    Args:
        folder: The folder.
        num_images: Number of images of all hosts.
        num_hosts: Number of hosts.

    Raises:
        ConfigError: The folder holds a data set.
    """

    def __init__(self, folder: Path, num_images: int, num_hosts: int):
        self.folder = folder
        self._num_images, self._num_hosts = num_images, num_hosts
        self._has_sheet = num_hosts == 1 and num_images <= MAX_SHEET_IMAGES
        self._images: list[Image.Image] = []
        names = _list_names(folder)
        if caption_name := _find_caption(names):
            raise config.ConfigError(
                f"{folder} is a data set (it contains {caption_name}), and samples do not belong "
                "there: give another --out."
            )
        numbers = [int(match[1]) for name in names if (match := NUMBERED_NAME.match(name))]
        self._first_number = max(numbers, default=-1) + 1 if num_hosts == 1 else 0

    def find_pending(self, jobs: Sequence[SampleJob]) -> list[SampleJob]:
        """Return all jobs. Raise ConfigError if an image of several hosts exists."""
        if self._num_hosts > 1 and any((self.folder / job.name).exists() for job in jobs):
            raise config.ConfigError(
                f"{self.folder} contains images already, and several hosts cannot add to them: "
                "give another --out."
            )
        return list(jobs)

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Accept any metadata: the folder may hold images of several models."""

    def write(self, job: SampleJob, result: GeneratedImage) -> None:
        """Write an image, and remember it for the contact sheet."""
        if self._has_sheet:
            self._images.append(result.image)
        name = f"{self._first_number + job.image_index:05d}_seed{job.seed}.png"
        _write_png(self.folder / name, result.image, result.metadata)

    def finish(self, sheet_columns: int, metadata: Mapping[str, Any]) -> str:
        """Write the contact sheet."""
        from radiance.base.images import make_contact_sheet

        if not self._images:
            return f" of {self._num_images}"
        sheet = make_contact_sheet(self._images, sheet_columns)
        name = f"{self._first_number:05d}_sheet.png"
        _write_png(self.folder / name, sheet, metadata)
        return f" and {name}"


class DatasetFolder:
    """A data set for data.source=folder: images with their prompts in text files.

    The same command continues an interrupted one.

    Args:
        folder: The folder.
        jobs: The jobs of all hosts.

    Raises:
        ConfigError: When the folder was started with other prompts or seeds.
    """

    def __init__(self, folder: Path, jobs: Sequence[SampleJob]):
        self.folder, self._num_images = folder, len(jobs)
        prompts = {job.name: job.prompt for job in jobs}
        conflicts = {
            name for name in _list_names(folder) if _has_image_suffix(name)
        } - prompts.keys()
        for name, prompt in prompts.items():
            caption_path = (folder / name).with_suffix(".txt")
            if caption_path.is_file():
                try:
                    caption = read_text(caption_path).removesuffix("\n")
                except TextError:
                    caption = None
                if caption != _join_lines(prompt):
                    conflicts.add(caption_path.name)
        if conflicts:
            raise config.ConfigError(
                f"{folder} was started with other prompts or seeds (it contains "
                f"{min(conflicts)}): give another --folder."
            )
        self._finished_paths = sorted(
            folder / name for name in prompts if (folder / name).is_file()
        )

    def find_pending(self, jobs: Sequence[SampleJob]) -> list[SampleJob]:
        """Return the jobs whose images do not exist."""
        return [job for job in jobs if not (self.folder / job.name).is_file()]

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Raise ConfigError if existing images have other metadata than new ones would have."""
        from radiance.evaluation.prompt_suites import check_same_metadata

        if self._finished_paths:
            check_same_metadata(self._finished_paths[0], metadata)

    def write(self, job: SampleJob, result: GeneratedImage) -> None:
        """Write a caption, then its image: an image that exists has its caption."""
        path = self.folder / job.name
        with replace_atomically(path.with_suffix(".txt")) as temp_path:
            temp_path.write_text(_join_lines(job.prompt) + "\n", "utf-8", newline="\n")
        _write_png(path, result.image, result.metadata)

    def finish(self, sheet_columns: int, metadata: Mapping[str, Any]) -> str:
        """Write nothing more."""
        return f" of {self._num_images}"


def _write_png(path: Path, image: Image.Image, metadata: Mapping[str, Any]):
    from radiance.base.images import save_png

    with replace_atomically(path) as temp_path:
        save_png(temp_path, image, metadata)


def _list_names(folder: Path) -> list[str]:
    """Return the names of a folder's files, in order; none if it does not exist."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _has_image_suffix(name: str) -> bool:
    from radiance.data.sources.folder import IMAGE_SUFFIXES

    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _find_caption(names: Sequence[str]) -> str | None:
    """Return the name of a file that holds captions of images in its folder, if any."""
    from radiance.data.sources.folder import METADATA_FILE

    stems = {Path(name).stem for name in names if _has_image_suffix(name)}
    captions = (x for x in names if Path(x).suffix == ".txt" and Path(x).stem in stems)
    return METADATA_FILE if METADATA_FILE in names else next(captions, None)


def _join_lines(prompt: str) -> str:
    """Return a prompt as one line, because every line of a caption file is a caption."""
    return " ".join(split_lines(prompt))
