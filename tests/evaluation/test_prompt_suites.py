"""Images where the scorers of GenEval, DPG-Bench and COCO look for them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from radiance.cli import main
from radiance.pipeline import Pipeline
from tests.helpers.toy_runs import PLAIN, toy_run, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_directory):
    run = toy_run(
        tmp_path_factory.mktemp("suites"),
        data_directory,
        "train.steps=1",
        "sample.steps=1",
        "sample.guidance_scale=1",
        **PLAIN,
    )
    assert train(run) == 1
    return run.run_dir


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def told(capsys, *command) -> str:
    assert main([str(part) for part in command]) == 2
    return capsys.readouterr().err


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_geneval(trained, tmp_path, capsys, monkeypatch):
    lines = [
        '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}',
        '{"prompt": "a red dog"}',
    ]
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(lines) + "\n")
    command = [
        "sample",
        trained,
        "--suite",
        "geneval",
        "--prompts",
        prompts,
        "--size",
        "8",
        "--out",
        out,
    ]
    assert main([str(part) for part in command]) == 0
    samples = [f"samples/{i:05d}.png" for i in range(4)]
    assert files(out) == sorted(
        f"{i:05d}/{name}" for i in range(2) for name in ("metadata.jsonl", *samples)
    )
    assert [(out / f"{i:05d}/metadata.jsonl").read_text().strip() for i in range(2)] == lines
    assert Image.open(out / "00001/samples/00002.png").text["prompt"] == "a red dog"
    assert (
        main(
            [
                str(part)
                for part in [
                    "sample",
                    trained,
                    "--prompt",
                    "a red dog",
                    "--seeds",
                    "2",
                    "--size",
                    "8",
                    "--out",
                    tmp_path / "plain",
                ]
            ]
        )
        == 0
    )
    assert np.array_equal(
        pixels(out / "00001/samples/00002.png"), pixels(tmp_path / "plain/00000_seed2.png")
    )

    shutil.rmtree(out / "00001")
    painted = []
    paint = Pipeline.generate
    monkeypatch.setattr(
        Pipeline,
        "generate_images",
        lambda self, prompts, *rest, **named: (
            painted.extend(prompts) or paint(self, prompts, *rest, **named)
        ),
    )
    assert main([str(part) for part in command]) == 0
    assert painted == ["a red dog"] * 4
    assert main([str(part) for part in command]) == 0
    assert "Nothing is left" in capsys.readouterr().out
    assert "another prompt or seed" in told(capsys, *command, "--seeds", "4-7")
    assert "00002.png is of more seeds than these" in told(capsys, *command, "--seeds", "0-1")
    (out / "00001/samples/00003.png").unlink()
    assert "painted with another settings" in told(capsys, *command[:2], "steps=2", *command[2:])


def test_dpg(trained, tmp_path, capsys):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    (prompts / "partiprompts12.txt").write_text("a seven\n")
    command = [
        "sample",
        trained,
        "--suite",
        "dpg",
        "--prompts",
        prompts,
        "--size",
        "8",
        "--out",
        out,
    ]
    assert main([str(part) for part in command]) == 0
    assert files(out) == ["partiprompts12.png"]
    square = pixels(out / "partiprompts12.png")
    assert (
        main(
            [
                str(part)
                for part in [
                    "sample",
                    trained,
                    "--prompt",
                    "a seven",
                    "--seeds",
                    "0-3",
                    "--size",
                    "8",
                    "--out",
                    tmp_path / "plain",
                ]
            ]
        )
        == 0
    )
    for seed, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        assert np.array_equal(
            square[row : row + 8, column : column + 8],
            pixels(tmp_path / f"plain/{seed:05d}_seed{seed}.png"),
        )
    assert "Nothing is left" in (main([str(part) for part in command]), capsys.readouterr().out)[1]
    assert "four --seeds, not 2" in told(capsys, *command, "--seeds", "0-1")
    assert "is no folder" in told(
        capsys, *command[:5], prompts / "partiprompts12.txt", *command[6:]
    )


def test_coco(trained, tmp_path, capsys):
    said = [(7, "a cat\n"), (7, "another  cat"), (3, "a dog")]
    prompts, out = tmp_path / "captions.json", tmp_path / "out"
    prompts.write_text(
        json.dumps(
            {
                "annotations": [
                    {"image_id": image, "id": i, "caption": text}
                    for i, (image, text) in enumerate(said)
                ]
            }
        )
    )
    command = [
        "sample",
        trained,
        "--suite",
        "coco30k",
        "--prompts",
        prompts,
        "--size",
        "8",
        "--out",
        out,
    ]
    assert main([str(part) for part in command]) == 0
    assert files(out) == [
        "000000000003.png",
        "000000000007.png",
    ]
    facts = [Image.open(out / name).text for name in files(out)]
    assert [(each["prompt"], each["seed"]) for each in facts] == [("a dog", "1"), ("a cat", "0")]
    assert "leave --seeds out" in told(capsys, *command, "--seeds", "1")
    prompts.write_text("{}")
    assert "not the file of prompts of suite coco30k (KeyError('annotations'))" in told(
        capsys, *command
    )
    prompts.write_text('{"annotations": []}')
    assert "has no prompts" in told(capsys, *command)
    assert "takes its prompts from --prompts PATH" in told(
        capsys, "sample", trained, "--suite", "dpg", "--prompt", "a seven"
    )
