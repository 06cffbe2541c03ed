"""Images are where the scorers of GenEval, DPG-Bench and COCO look for them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from radiance.cli import main
from radiance.pipeline import Pipeline
from tests.helpers.toy_runs import PLAIN, toy_run, train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, data_directory):
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


def load_pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def list_files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class SuiteCommand:
    """`radiance sample RUN --suite NAME` with small images."""

    def __init__(self, capsys, run_dir, suite: str, prompts, out):
        self.capsys, self.run_dir = capsys, run_dir
        self.options = ["--suite", suite, "--prompts", prompts, "--size", "8", "--out", out]

    def _main(self, *arguments) -> int:
        return main([str(argument) for argument in ("sample", self.run_dir, *arguments)])

    def run(self) -> str:
        """Run the command; return its output."""
        assert self._main(*self.options) == 0
        return self.capsys.readouterr().out

    def error_of(self, *arguments, settings=()) -> str:
        """Return the error message with further arguments."""
        assert self._main(*settings, *self.options, *arguments) == 2
        return self.capsys.readouterr().err

    def sample(self, prompt: str, seeds: str, out):
        """Sample a prompt without a suite."""
        arguments = ["--prompt", prompt, "--seeds", seeds, "--size", "8", "--out", out]
        assert self._main(*arguments) == 0


def test_geneval_has_a_folder_per_prompt(run_dir, tmp_path, capsys, monkeypatch):
    lines = [
        '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}',
        '{"prompt": "a red dog"}',
    ]
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(lines) + "\n")
    command = SuiteCommand(capsys, run_dir, "geneval", prompts, out)
    command.run()
    samples = [f"samples/{i:05d}.png" for i in range(4)]
    assert list_files(out) == sorted(
        f"{i:05d}/{name}" for i in range(2) for name in ("metadata.jsonl", *samples)
    )
    assert [(out / f"{i:05d}/metadata.jsonl").read_text().strip() for i in range(2)] == lines
    path = out / "00001/samples/00002.png"
    assert Image.open(path).info["prompt"] == "a red dog"
    command.sample("a red dog", "2", tmp_path / "plain")
    assert np.array_equal(load_pixels(path), load_pixels(tmp_path / "plain/00000_seed2.png"))

    # Only missing images are sampled.
    shutil.rmtree(out / "00001")
    sampled_prompts, generate = [], Pipeline.generate

    def record_prompts(self, prompts, *args, **kwargs):
        sampled_prompts.extend(prompts)
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "generate", record_prompts)
    command.run()
    assert sampled_prompts == ["a red dog"] * 4
    command.run()
    assert sampled_prompts == ["a red dog"] * 4

    # Images of other seeds or settings are errors.
    assert "another prompt or seed" in command.error_of("--seeds", "4-7")
    assert "00002.png is of a further seed" in command.error_of("--seeds", "0-1")
    (out / "00001/samples/00003.png").unlink()
    assert "sampled with another settings" in command.error_of(settings=["steps=2"])


def test_dpg_has_a_grid_of_four_seeds_per_prompt(run_dir, tmp_path, capsys):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    (prompts / "partiprompts12.txt").write_text("a seven\n")
    command = SuiteCommand(capsys, run_dir, "dpg", prompts, out)
    command.run()
    assert list_files(out) == ["partiprompts12.png"]
    grid = load_pixels(out / "partiprompts12.png")
    command.sample("a seven", "0-3", tmp_path / "plain")
    for seed, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        image = load_pixels(tmp_path / f"plain/{seed:05d}_seed{seed}.png")
        assert np.array_equal(grid[row : row + 8, column : column + 8], image)
    modification_time = (out / "partiprompts12.png").stat().st_mtime_ns
    command.run()
    assert (out / "partiprompts12.png").stat().st_mtime_ns == modification_time
    assert "four --seeds, not 2" in command.error_of("--seeds", "0-1")
    file = prompts / "partiprompts12.txt"
    assert "is not a folder" in SuiteCommand(capsys, run_dir, "dpg", file, out).error_of()


def test_coco_has_an_image_per_first_caption(run_dir, tmp_path, capsys):
    captions = [(7, "a cat\n"), (7, "another  cat"), (3, "a dog")]
    annotations = [
        {"image_id": image_id, "id": i, "caption": caption}
        for i, (image_id, caption) in enumerate(captions)
    ]
    prompts, out = tmp_path / "captions.json", tmp_path / "out"
    prompts.write_text(json.dumps({"annotations": annotations}))
    command = SuiteCommand(capsys, run_dir, "coco30k", prompts, out)
    command.run()
    assert list_files(out) == ["000000000003.png", "000000000007.png"]
    metadata = [Image.open(out / name).info for name in list_files(out)]
    assert [(x["prompt"], x["seed"]) for x in metadata] == [("a dog", "1"), ("a cat", "0")]
    assert "leave --seeds out" in command.error_of("--seeds", "1")
    prompts.write_text("{}")
    message = "does not have the format of suite coco30k (KeyError('annotations'))"
    assert message in command.error_of()
    prompts.write_text('{"annotations": []}')
    assert "has no prompts" in command.error_of()


def test_a_suite_takes_no_single_prompt(run_dir, capsys):
    assert main(["sample", str(run_dir), "--suite", "dpg", "--prompt", "a seven"]) == 2
    assert "--prompts PATH" in capsys.readouterr().err
