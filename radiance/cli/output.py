"""Where `radiance sample` writes its images."""

from __future__ import annotations

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
SHEET_NAME = "sheet.png"


class SampleJob(NamedTuple):
    """One image to sample."""

    name: str  # of the PNG file
    prompt: str
    seed: int


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

    Args:
        folder: The folder, which must not hold images of the same names.
        num_images: Number of images of all hosts.
        has_sheet: Whether a contact sheet is written, if there are not too many images.
    """

    def __init__(self, folder: Path, num_images: int, has_sheet: bool):
        self.folder = folder
        self._num_images = num_images
        self._has_sheet = has_sheet and num_images <= MAX_SHEET_IMAGES
        self._images: list[Image.Image] = []

    def find_pending(self, jobs: Sequence[SampleJob]) -> list[SampleJob]:
        """Return all jobs. Raise ConfigError if one of the images exists."""
        if any((self.folder / name).exists() for name in (*(job.name for job in jobs), SHEET_NAME)):
            raise config.ConfigError(f"{self.folder} contains images already: give another --out.")
        return list(jobs)

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Accept any metadata: there are no images yet."""

    def write(self, job: SampleJob, result: GeneratedImage) -> None:
        """Write an image, and remember it for the contact sheet."""
        if self._has_sheet:
            self._images.append(result.image)
        _write_png(self.folder / job.name, result.image, result.metadata)

    def finish(self, sheet_columns: int, metadata: Mapping[str, Any]) -> str:
        """Write the contact sheet."""
        from radiance.base.images import make_contact_sheet

        if not self._images:
            return f" of {self._num_images}"
        sheet = make_contact_sheet(self._images, sheet_columns)
        _write_png(self.folder / SHEET_NAME, sheet, metadata)
        return f" and {SHEET_NAME}"


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
        conflicts = {path.name for path in folder.glob("*.png")} - prompts.keys()
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


def _join_lines(prompt: str) -> str:
    """Return a prompt as one line, because every line of a caption file is a caption."""
    return " ".join(split_lines(prompt))
