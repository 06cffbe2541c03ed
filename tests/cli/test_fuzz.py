"""Files that verbs are given are read or rejected in one sentence, whatever they contain.

    RADIANCE_FUZZ=100000 python -m pytest tests/cli/test_fuzz.py

tests that many files instead of two thousand; the first ones of each target are the same.
RADIANCE_FUZZ_SEED=1 makes others.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radiance.base.errors import RadianceError
from radiance.base.images import save_png
from radiance.cli.arguments import read_prompts
from radiance.config.experiments import load_experiment
from radiance.evaluation.features import PixelExtractor, load_or_extract_features
from radiance.evaluation.prompt_suites import SUITES, read_png_metadata
from radiance.text.tokenizers import open_tokenizer
from tests.helpers.toy_t5 import train_tokenizer

NUM_INPUTS = int(os.environ.get("RADIANCE_FUZZ", "2000"))
SEED = [int(x) for x in os.environ.get("RADIANCE_FUZZ_SEED", "").split()]
MAX_SECONDS = 5.0  # for one input; more is a hang

WORDS = [
    *(b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\r\n", b"\n\n", b"\t"),
    *("\u2028".encode(), "\x85".encode(), b"\f", "\ufdd0".encode(), "🐈".encode(), b"\x1b[31m"),
    *(b"null", b"true", b"[]", b"{}", b'""', b"NaN", b"-1", b"1e999", b"9" * 5000, b"[" * 9999),
    *(b'"prompt"', b'"caption"', b'{"a":' * 9999, b"\\ud800", b'"', b"'", b"\\", b"(", b"=", b":"),
    *(b"1/0", b"None", b"lambda: 0", b"def config(", b"raise ValueError()", b"    ", b"x = y"),
]


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Make one to four changes: insert, replace, remove and repeat."""
    out = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at, other = (int(x) for x in rng.integers(0, len(out) + 1, 2))
        length = int(rng.integers(1, 40))
        word = WORDS[rng.integers(len(WORDS))]
        match rng.integers(0, 6):
            case 0:
                out[at:at] = word
            case 1:
                out[at : at + len(word)] = word
            case 2:
                out[at : at + length] = b""
            case 3:
                out[at:at] = out[other : other + length]
            case 4:
                out[at : at + 1] = bytes([rng.integers(256)])
            case _:
                out = out[:at]
    return bytes(out)


EXPERIMENT = """
from radiance import config as c

VARIANTS = {"small": ["data.batch_size=8", "train.steps=10"]}


def config() -> c.Config:
    return c.Config(name="fuzz", train=c.Train(steps=20), text=c.Text(max_length=8))
"""
PROMPTS = ["a cat", "two dogs and a café", "", "猫と犬 🐈", "the end"]
COCO = {"annotations": [{"image_id": i % 3, "caption": text} for i, text in enumerate(PROMPTS)]}
IMAGES = np.zeros((3, 8, 8, 3), np.float32)


def load_suite(name: str):
    return lambda path: SUITES[name].load_prompts(name, path, None)


def load_dpg(path: Path):
    return SUITES["dpg"].load_prompts("dpg", path.parent, None)


def load_features(path: Path):
    """Damaged features are computed again, never used."""
    features = load_or_extract_features(path.parent, PixelExtractor(), "images", 3, [IMAGES])
    assert features.shape == (3, 768)
    assert np.isfinite(features).all()


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict:
    """Return (name and content of a valid file, its reader) by target."""
    folder = tmp_path_factory.mktemp("valid")
    save_png(folder / "x.png", Image.new("RGB", (8, 8)), {"prompt": "a", "seed": 3, "size": [8, 8]})
    load_or_extract_features(folder / "features", PixelExtractor(), "images", 3, [IMAGES])
    (features,) = (folder / "features").iterdir()
    return {
        "prompts": ("x.txt", "\n".join(PROMPTS).encode(), read_prompts),
        "geneval": (
            "x.jsonl",
            "\n".join(json.dumps({"prompt": text, "tag": "one"}) for text in PROMPTS).encode(),
            load_suite("geneval"),
        ),
        "dpg": ("x.txt", "\n".join(PROMPTS).encode(), load_dpg),
        "coco30k": ("x.json", json.dumps(COCO).encode(), load_suite("coco30k")),
        "image": ("x.png", (folder / "x.png").read_bytes(), read_png_metadata),
        "features": (features.name, features.read_bytes(), load_features),
        "experiment": (
            "x.py",
            EXPERIMENT.encode(),
            lambda path: load_experiment(f"{path}:small"),
        ),
        "tokenizer": (
            "spiece.model",
            train_tokenizer(folder / "spiece.model").read_bytes(),
            lambda path: open_tokenizer(path)("a red cat"),
        ),
    }


TARGETS = [
    *("prompts", "geneval", "dpg", "coco30k", "image", "features", "experiment", "tokenizer"),
]


@pytest.mark.parametrize("target", TARGETS)
def test_files_are_read_or_rejected(target, targets, tmp_path):
    name, valid_content, read = targets[target]
    path = tmp_path / name
    path.write_bytes(valid_content)
    read(path)
    rng = np.random.default_rng([TARGETS.index(target), *SEED])
    for _ in range(NUM_INPUTS // len(TARGETS)):
        content = mutate(valid_content, rng)
        path.write_bytes(content)
        start_time, message = time.monotonic(), "a sentence of one line"
        try:
            read(path)
        except (RadianceError, ImportError) as error:
            message = str(error)
        assert 20 < len(message) < 4000, content
        assert message.isprintable(), content
        assert time.monotonic() - start_time < MAX_SECONDS, content
