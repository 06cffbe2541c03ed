"""Public sets of prompts, and the folders of images that their own scorers read: GenEval, DPG-Bench, and COCO-30K for FID and CLIP score.

The prompts are not ours and come from the user; the scorers are their authors' programs.

| suite   | prompts from                                       | images                                                             |
|---------|----------------------------------------------------|----------------------------------------------------------------------|
| geneval | evaluation_metadata.jsonl                          | NUMBER/samples/NUMBER.png, one a seed, beside NUMBER/metadata.jsonl  |
| dpg     | the folder of a .txt for each prompt               | NAME.png, four seeds in a square; its side is the scorer's resolution|
| coco30k | captions_val2014.json, or a part of it so written  | IMAGE.png, one for each image; the seed is its place in the file     |
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from radiance import config
from radiance.base.files import replace_atomically
from radiance.base.images import make_contact_sheet, save_png
from radiance.pipeline import GeneratedImage

COCO_NUM_IMAGES = 30_000  # images, of 40,504: the first captions of the first images, while papers draw theirs at random
METADATA_KEYS = ("prompt", "seed", "size", "settings", "model")  # that a PNG of ours says of itself


class SuitePrompt(NamedTuple):
    name: str
    prompt: str
    seeds: tuple[int, ...]
    metadata_line: str = ""  # of the file of prompts, where the scorer wants it beside the images


class PromptSuite(NamedTuple):
    parse_prompts: Callable[[Path, Sequence[int]], list[SuitePrompt]]
    last_file: Callable[
        [SuitePrompt], str
    ]  # of a prompt's files the one that is written last, below the folder
    write_images: Callable[[Path, SuitePrompt, list[GeneratedImage]], None]
    default_seeds: tuple[int, ...] = ()  # that papers report; none where each prompt has its own
    next_file: Callable[[SuitePrompt], str] | None = (
        None  # the file that the next seed would have, where each has one
    )

    def load_prompts(
        self, suite_name: str, prompts_path: Path, seeds: Sequence[int] | None
    ) -> list[SuitePrompt]:
        """The prompts of a file or folder. Raises ConfigError for one that the suite does not know, and for seeds that it cannot use."""
        if seeds is not None and not self.default_seeds:
            raise config.ConfigError(
                f"Suite {suite_name} gives every prompt a seed of its own: leave --seeds out."
            )
        try:
            suite_prompts = self.parse_prompts(
                prompts_path, tuple(seeds) if seeds is not None else self.default_seeds
            )
        except OSError as error:
            raise config.ConfigError(
                f"{prompts_path} cannot be read ({error.strerror}): give the prompts of suite "
                f"{suite_name}."
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise config.ConfigError(
                f"{prompts_path} is not the file of prompts of suite {suite_name} ({error!r})."
            ) from None
        if not suite_prompts:
            raise config.ConfigError(f"{prompts_path} has no prompts for suite {suite_name}.")
        return suite_prompts

    def find_pending(self, folder: Path, suite_prompts: Sequence[SuitePrompt]) -> list[SuitePrompt]:
        """What has no images yet. Raises ConfigError where an image is of another prompt or seed."""
        pending = []
        for suite_prompt in suite_prompts:
            metadata = read_png_metadata(folder / self.last_file(suite_prompt))
            if metadata is None:
                pending.append(suite_prompt)
            elif metadata.get("prompt") != suite_prompt.prompt or metadata.get("seed") not in (
                suite_prompt.seeds[-1],
                list(suite_prompt.seeds),
            ):
                raise config.ConfigError(
                    f"{folder / self.last_file(suite_prompt)} is of another prompt or seed: give "
                    "another --out."
                )
            elif self.next_file and (folder / self.next_file(suite_prompt)).exists():
                raise config.ConfigError(
                    f"{folder / self.next_file(suite_prompt)} is of more seeds than these, and "
                    "would be scored with them: give another --out."
                )
        return pending


def read_png_metadata(path: Path) -> dict[str, Any] | None:
    """FACTS of a PNG; None where there is no file."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        info = image.info
    return {
        name: info[name] if name in ("prompt", "model") else json.loads(info[name])
        for name in METADATA_KEYS
        if name in info
    }


def check_same_metadata(path: Path, metadata: Mapping[str, Any]):
    """Raises ConfigError where an image was painted with other facts than these, such as another model."""
    existing = read_png_metadata(path) or {}
    if changed_keys := [
        name
        for name, value in metadata.items()
        if existing.get(name) != json.loads(json.dumps(value))
    ]:
        raise config.ConfigError(
            f"{path} was painted with another {' and '.join(changed_keys)}: give another --out."
        )


def _read_geneval(path: Path, seeds: tuple[int, ...]) -> list[SuitePrompt]:
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [
        SuitePrompt(f"{i:05d}", json.loads(line)["prompt"], seeds, line)
        for i, line in enumerate(lines)
    ]


def _geneval_file(suite_prompt: SuitePrompt, index: int) -> str:
    return f"{suite_prompt.name}/samples/{index:05d}.png"


def _write_geneval(folder: Path, suite_prompt: SuitePrompt, outputs: list[GeneratedImage]):
    (folder / suite_prompt.name / "samples").mkdir(parents=True, exist_ok=True)
    with replace_atomically(folder / suite_prompt.name / "metadata.jsonl") as temporary_path:
        temporary_path.write_text(suite_prompt.metadata_line + "\n", "utf-8")
    for i, output in enumerate(outputs):
        _save_image(folder / _geneval_file(suite_prompt, i), output.image, output.metadata)


def _read_dpg(folder: Path, seeds: tuple[int, ...]) -> list[SuitePrompt]:
    if len(seeds) != 4:
        raise config.ConfigError(
            f"DPG-Bench scores squares of four images: give four --seeds, not {len(seeds)}."
        )
    if not folder.is_dir():
        raise config.ConfigError(
            f"{folder} is no folder: DPG-Bench keeps each prompt in a .txt of its own."
        )
    return [
        SuitePrompt(path.stem, path.read_text("utf-8").strip(), seeds)
        for path in sorted(folder.glob("*.txt"))
    ]


def _write_dpg(folder: Path, suite_prompt: SuitePrompt, outputs: list[GeneratedImage]):
    sheet = make_contact_sheet([output.image for output in outputs], columns=2, gap=0)
    _save_image(
        folder / f"{suite_prompt.name}.png",
        sheet,
        outputs[0].metadata | {"seed": list(suite_prompt.seeds)},
    )


def _read_coco(path: Path, seeds: tuple[int, ...]) -> list[SuitePrompt]:
    first_captions: dict[int, str] = {}
    for annotation in json.loads(path.read_text("utf-8"))["annotations"]:
        first_captions.setdefault(
            int(annotation["image_id"]), " ".join(annotation["caption"].split())
        )
    return [
        SuitePrompt(f"{image_id:012d}", caption, (i,))
        for i, (image_id, caption) in enumerate(list(first_captions.items())[:COCO_NUM_IMAGES])
    ]


def _write_coco(folder: Path, suite_prompt: SuitePrompt, outputs: list[GeneratedImage]):
    _save_image(folder / f"{suite_prompt.name}.png", outputs[0].image, outputs[0].metadata)


def _save_image(path: Path, image: Image.Image, metadata: dict[str, Any]):
    with replace_atomically(path) as temporary_path:
        save_png(temporary_path, image, metadata)


SUITES = {
    "geneval": PromptSuite(
        _read_geneval,
        lambda asked: _geneval_file(asked, len(asked.seeds) - 1),
        _write_geneval,
        (0, 1, 2, 3),
        next_file=lambda asked: _geneval_file(asked, len(asked.seeds)),
    ),
    "dpg": PromptSuite(_read_dpg, lambda asked: f"{asked.name}.png", _write_dpg, (0, 1, 2, 3)),
    "coco30k": PromptSuite(_read_coco, lambda asked: f"{asked.name}.png", _write_coco),
}
