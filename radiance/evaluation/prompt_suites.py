"""Public sets of prompts, and the folders of pictures that their own scorers read: GenEval, DPG-Bench, and COCO-30K for FID and CLIP score.

The prompts are not ours and come from the user; the scorers are their authors' programs.

| suite   | prompts from                                       | pictures                                                             |
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
from radiance.pictures import contact_sheet, save_png
from radiance.pipeline import Picture
from radiance.weights.files import replacing

COCO = 30_000  # images, of 40,504: the first captions of the first images, while papers draw theirs at random
FACTS = ("prompt", "seed", "size", "settings", "model")  # that a PNG of ours says of itself


class Asked(NamedTuple):
    name: str
    prompt: str
    seeds: tuple[int, ...]
    line: str = ""  # of the file of prompts, where the scorer wants it beside the pictures


class PromptSuite(NamedTuple):
    read: Callable[[Path, Sequence[int]], list[Asked]]
    last: Callable[[Asked], str]  # of a prompt's files the one that is written last, below the folder
    write: Callable[[Path, Asked, list[Picture]], None]
    seeds: tuple[int, ...] = ()  # that papers report; none where each prompt has its own
    behind: Callable[[Asked], str] | None = None  # the file that the next seed would have, where each has one

    def asked(self, name: str, prompts: Path, seeds: Sequence[int] | None) -> list[Asked]:
        """The prompts of a file or folder. Raises ConfigError for one that the suite does not know, and for seeds that it cannot use."""
        if seeds is not None and not self.seeds:
            raise config.ConfigError(f"Suite {name} gives every prompt a seed of its own: leave --seeds out.")
        try:
            found = self.read(prompts, tuple(seeds) if seeds is not None else self.seeds)
        except OSError as error:
            raise config.ConfigError(f"{prompts} cannot be read ({error.strerror}): give the prompts of suite {name}.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise config.ConfigError(f"{prompts} is not the file of prompts of suite {name} ({error!r}).") from None
        if not found:
            raise config.ConfigError(f"{prompts} has no prompts for suite {name}.")
        return found

    def left(self, folder: Path, asked: Sequence[Asked]) -> list[Asked]:
        """What has no pictures yet. Raises ConfigError where a picture is of another prompt or seed."""
        found = []
        for one in asked:
            facts = facts_of(folder / self.last(one))
            if facts is None:
                found.append(one)
            elif facts.get("prompt") != one.prompt or facts.get("seed") not in (one.seeds[-1], list(one.seeds)):
                raise config.ConfigError(f"{folder / self.last(one)} is of another prompt or seed: give another --out.")
            elif self.behind and (folder / self.behind(one)).exists():
                raise config.ConfigError(
                    f"{folder / self.behind(one)} is of more seeds than these, and would be scored with them: give another --out."
                )
        return found


def facts_of(path: Path) -> dict[str, Any] | None:
    """FACTS of a PNG; None where there is no file."""
    if not path.is_file():
        return None
    with Image.open(path) as opened:
        told = opened.info
    return {name: told[name] if name in ("prompt", "model") else json.loads(told[name]) for name in FACTS if name in told}


def check_like(path: Path, facts: Mapping[str, Any]):
    """Raises ConfigError where a picture was painted with other facts than these, such as another model."""
    theirs = facts_of(path) or {}
    if other := [name for name, ours in facts.items() if theirs.get(name) != json.loads(json.dumps(ours))]:
        raise config.ConfigError(f"{path} was painted with another {' and '.join(other)}: give another --out.")


def _geneval(file: Path, seeds: tuple[int, ...]) -> list[Asked]:
    lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    return [Asked(f"{i:05d}", json.loads(line)["prompt"], seeds, line) for i, line in enumerate(lines)]


def _sample(asked: Asked, number: int) -> str:
    return f"{asked.name}/samples/{number:05d}.png"


def _write_geneval(folder: Path, asked: Asked, pictures: list[Picture]):
    (folder / asked.name / "samples").mkdir(parents=True, exist_ok=True)
    with replacing(folder / asked.name / "metadata.jsonl") as part:
        part.write_text(asked.line + "\n", "utf-8")
    for i, picture in enumerate(pictures):
        _save(folder / _sample(asked, i), picture.image, picture.facts)


def _dpg(folder: Path, seeds: tuple[int, ...]) -> list[Asked]:
    if len(seeds) != 4:
        raise config.ConfigError(f"DPG-Bench scores squares of four pictures: give four --seeds, not {len(seeds)}.")
    if not folder.is_dir():
        raise config.ConfigError(f"{folder} is no folder: DPG-Bench keeps each prompt in a .txt of its own.")
    return [Asked(path.stem, path.read_text("utf-8").strip(), seeds) for path in sorted(folder.glob("*.txt"))]


def _write_dpg(folder: Path, asked: Asked, pictures: list[Picture]):
    square = contact_sheet([picture.image for picture in pictures], columns=2, gap=0)
    _save(folder / f"{asked.name}.png", square, pictures[0].facts | {"seed": list(asked.seeds)})


def _coco(file: Path, seeds: tuple[int, ...]) -> list[Asked]:
    first: dict[int, str] = {}
    for annotation in json.loads(file.read_text("utf-8"))["annotations"]:
        first.setdefault(int(annotation["image_id"]), " ".join(annotation["caption"].split()))
    return [Asked(f"{image:012d}", caption, (i,)) for i, (image, caption) in enumerate(list(first.items())[:COCO])]


def _write_coco(folder: Path, asked: Asked, pictures: list[Picture]):
    _save(folder / f"{asked.name}.png", pictures[0].image, pictures[0].facts)


def _save(path: Path, image: Image.Image, facts: dict[str, Any]):
    with replacing(path) as part:
        save_png(part, image, facts)


SUITES = {
    "geneval": PromptSuite(
        _geneval,
        lambda asked: _sample(asked, len(asked.seeds) - 1),
        _write_geneval,
        (0, 1, 2, 3),
        behind=lambda asked: _sample(asked, len(asked.seeds)),
    ),
    "dpg": PromptSuite(_dpg, lambda asked: f"{asked.name}.png", _write_dpg, (0, 1, 2, 3)),
    "coco30k": PromptSuite(_coco, lambda asked: f"{asked.name}.png", _write_coco),
}
