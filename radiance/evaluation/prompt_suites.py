"""Sample images for public prompt suites, in the folders that their own scorers read.

The user provides the prompts, and the scorers are programs of the suites' authors.

| suite   | prompts                   | images                                               |
|---------|---------------------------|------------------------------------------------------|
| geneval | evaluation_metadata.jsonl | INDEX/samples/INDEX.png per seed, and metadata.jsonl |
| dpg     | a folder of .txt files    | NAME.png, a 2×2 grid of four seeds                   |
| coco30k | captions_val2014.json     | IMAGE.png; the position of the image is its seed     |

COCO-30K serves FID and CLIP score.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from radiance.base.errors import ConfigError, RadianceError
from radiance.base.files import replace_atomically
from radiance.base.images import make_contact_sheet, save_png
from radiance.base.text_files import check_text, read_lines, read_text
from radiance.pipeline import GeneratedImage

# Of 40,504 images: the first caption of each of the first images; papers draw them at random.
COCO_NUM_IMAGES = 30_000
COCO_ID_DIGITS = 12
METADATA_KEYS = ("prompt", "seed", "size", "settings", "model")  # of our PNG files


class SuitePrompt(NamedTuple):
    """A prompt, and the seeds to sample it with."""

    name: str
    prompt: str
    seeds: tuple[int, ...]
    metadata_line: str = ""  # line of the prompts file that the scorer reads beside the images


class PromptSuite(NamedTuple):
    """How the prompts of a suite are read and its images written.

    Attributes:
        parse_prompts: Read prompts from a file or folder, given the seeds.
        last_file: The file of a prompt that is written last, relative to the folder.
        write_images: Write the images of a prompt into a folder.
        default_seeds: Seeds that papers report; empty if each prompt has its own.
        next_file: The file that one more seed would have, if every seed has a file.
    """

    parse_prompts: Callable[[Path, tuple[int, ...]], list[SuitePrompt]]
    last_file: Callable[[SuitePrompt], str]
    write_images: Callable[[Path, SuitePrompt, list[GeneratedImage]], None]
    default_seeds: tuple[int, ...] = ()
    next_file: Callable[[SuitePrompt], str] | None = None

    def load_prompts(
        self, suite_name: str, prompts_path: Path, seeds: Sequence[int] | None
    ) -> list[SuitePrompt]:
        """Return the prompts of a file or folder.

        Args:
            suite_name: Name of the suite, for messages.
            prompts_path: File or folder of prompts.
            seeds: Seeds of every prompt; the suite's own if None.

        Raises:
            ConfigError: The path has no prompts of the suite, or the suite cannot use such seeds.
            TextError: A prompt is not text in UTF-8.
        """
        if seeds is not None and not self.default_seeds:
            raise ConfigError(f"Suite {suite_name} has a seed for every prompt: leave --seeds out.")
        try:
            suite_prompts = self.parse_prompts(
                prompts_path, self.default_seeds if seeds is None else tuple(seeds)
            )
        except OSError as error:
            raise ConfigError(
                f"{prompts_path} cannot be read ({error.strerror}): give the prompts of suite "
                f"{suite_name}."
            ) from None
        except RadianceError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(
                f"{prompts_path} does not have the format of suite {suite_name} ({error!r}): give "
                "the file of its authors."
            ) from None
        if not suite_prompts:
            raise ConfigError(
                f"{prompts_path} has no prompts for suite {suite_name}: give the file of its "
                "authors."
            )
        return suite_prompts

    def find_pending(self, folder: Path, suite_prompts: Sequence[SuitePrompt]) -> list[SuitePrompt]:
        """Return the prompts that have no images yet.

        Args:
            folder: Folder of the images.
            suite_prompts: All prompts.

        Raises:
            ConfigError: An image in the folder is of another prompt or of other seeds.
        """
        pending = []
        for suite_prompt in suite_prompts:
            path = folder / self.last_file(suite_prompt)
            metadata = read_png_metadata(path)
            if metadata is None:
                pending.append(suite_prompt)
                continue
            expected_seeds = (suite_prompt.seeds[-1], list(suite_prompt.seeds))
            has_prompt = metadata.get("prompt") == suite_prompt.prompt
            if not has_prompt or metadata.get("seed") not in expected_seeds:
                raise ConfigError(f"{path} is of another prompt or seed: give another --out.")
            if self.next_file and (folder / self.next_file(suite_prompt)).exists():
                raise ConfigError(
                    f"{folder / self.next_file(suite_prompt)} is of a further seed and would be "
                    "scored too: give another --out."
                )
        return pending


def read_png_metadata(path: Path) -> dict[str, Any] | None:
    """Return the `METADATA_KEYS` of a PNG file, or None if there is no file.

    Raises:
        ConfigError: The file is damaged, or not one of ours.
    """
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            info = image.info
        return {
            name: info[name] if name in ("prompt", "model") else json.loads(info[name])
            for name in METADATA_KEYS
            if name in info
        }
    # Pillow raises these and SyntaxError for damaged files, and the last one for large images.
    except (
        OSError,
        ValueError,
        TypeError,
        SyntaxError,
        RecursionError,
        Image.DecompressionBombError,
    ) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it.") from None


def check_same_metadata(path: Path, metadata: Mapping[str, Any]):
    """Check that a PNG file was made with the same settings, such as the same model.

    Args:
        path: The file.
        metadata: Expected metadata.

    Raises:
        ConfigError: Some metadata differ.
    """
    existing = read_png_metadata(path) or {}
    changed_keys = [
        name
        for name, value in metadata.items()
        if existing.get(name) != json.loads(json.dumps(value))
    ]
    if changed_keys:
        raise ConfigError(
            f"{path} was sampled with another {' and '.join(changed_keys)}: give another --out."
        )


def _parse_geneval(path: Path, seeds: tuple[int, ...]) -> list[SuitePrompt]:
    lines = [line for line in read_lines(path) if line.strip()]
    return [
        SuitePrompt(f"{i:05d}", _require_text(json.loads(line)["prompt"]), seeds, line)
        for i, line in enumerate(lines)
    ]


def _require_text(value: Any) -> str:
    """Return a prompt of a JSON file. Raise TypeError or TextError if it is not valid text."""
    if not isinstance(value, str):
        raise TypeError(f"a prompt is {type(value).__name__}")
    check_text(value, "The prompt")
    return value


def _geneval_file(suite_prompt: SuitePrompt, index: int) -> str:
    return f"{suite_prompt.name}/samples/{index:05d}.png"


def _write_geneval(folder: Path, suite_prompt: SuitePrompt, outputs: list[GeneratedImage]):
    (folder / suite_prompt.name / "samples").mkdir(parents=True, exist_ok=True)
    with replace_atomically(folder / suite_prompt.name / "metadata.jsonl") as temp_path:
        temp_path.write_text(suite_prompt.metadata_line + "\n", "utf-8", newline="\n")
    for i, output in enumerate(outputs):
        _save_image(folder / _geneval_file(suite_prompt, i), output.image, output.metadata)


def _parse_dpg(folder: Path, seeds: tuple[int, ...]) -> list[SuitePrompt]:
    if len(seeds) != 4:
        raise ConfigError(
            f"DPG-Bench scores grids of four images: give four --seeds, not {len(seeds)}."
        )
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder: give DPG-Bench's folder with a .txt file per prompt."
        )
    return [
        SuitePrompt(path.stem, read_text(path).strip(), seeds)
        for path in sorted(folder.glob("*.txt"))
    ]


def _write_dpg(folder: Path, suite_prompt: SuitePrompt, outputs: list[GeneratedImage]):
    sheet = make_contact_sheet([output.image for output in outputs], columns=2, gap=0)
    metadata = outputs[0].metadata | {"seed": list(suite_prompt.seeds)}
    _save_image(folder / _make_file_name(suite_prompt), sheet, metadata)


def _parse_coco(path: Path, seeds: tuple[int, ...]) -> list[SuitePrompt]:
    first_captions: dict[int, str] = {}
    for annotation in json.loads(read_text(path))["annotations"]:
        caption = " ".join(_require_text(annotation["caption"]).split())
        image_id = annotation["image_id"]
        if type(image_id) is not int or not 0 <= image_id < 10**COCO_ID_DIGITS:
            raise ValueError(f"image_id={str(image_id)[:40]}")
        first_captions.setdefault(image_id, caption)
    return [
        SuitePrompt(f"{image_id:0{COCO_ID_DIGITS}d}", caption, (i,))
        for i, (image_id, caption) in enumerate(list(first_captions.items())[:COCO_NUM_IMAGES])
    ]


def _write_coco(folder: Path, suite_prompt: SuitePrompt, outputs: list[GeneratedImage]):
    _save_image(folder / _make_file_name(suite_prompt), outputs[0].image, outputs[0].metadata)


def _make_file_name(suite_prompt: SuitePrompt) -> str:
    return f"{suite_prompt.name}.png"


def _save_image(path: Path, image: Image.Image, metadata: dict[str, Any]):
    with replace_atomically(path) as temp_path:
        save_png(temp_path, image, metadata)


SUITES = {
    "geneval": PromptSuite(
        _parse_geneval,
        lambda suite_prompt: _geneval_file(suite_prompt, len(suite_prompt.seeds) - 1),
        _write_geneval,
        default_seeds=(0, 1, 2, 3),
        next_file=lambda suite_prompt: _geneval_file(suite_prompt, len(suite_prompt.seeds)),
    ),
    "dpg": PromptSuite(_parse_dpg, _make_file_name, _write_dpg, default_seeds=(0, 1, 2, 3)),
    "coco30k": PromptSuite(_parse_coco, _make_file_name, _write_coco),
}
