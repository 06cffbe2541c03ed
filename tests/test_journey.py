"""Fine-tuning at toy size, from a checkpoint file and a folder of images to a PyTorch export."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import radiance
from radiance import config
from radiance.cli import main
from radiance.flow.sampler import sample_from_noise
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import bind_model
from radiance.text.prompts import encode_prompts
from radiance.weights import checkpoint
from tests.helpers.toy_models import toy_model, toy_params
from tests.helpers.toy_t5 import CAPTIONS, TOY, toy_folder

pytestmark = pytest.mark.slow

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "finetune.py"
MODEL = toy_model(
    prediction="x0",
    hidden=32,
    rope_axes=(4, 6, 6),
    double_blocks=1,
    single_blocks=1,
    text_dim=TOY.hidden,
)
TOY_RUN = [
    *(
        f"model.{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in config.to_dict(MODEL).items()
    ),
    "compute.dtype=float32", "compute.remat=none", "text.dtype=float32", "text.max_length=16",
    "data.resolution=16", "data.batch_size=4", "data.num_threads=1",
    "data.validation_fraction=0.3", "optimizer.gradient_accumulation_steps=1",
    "optimizer.ema_decays=0.9999,0.5", "optimizer.learning_rate=1e-3", "train.steps=4",
    "train.validate_every=4", "train.validation_images=2", "train.sample_every=4",
    "train.checkpoint_every=4", "sample.steps=2",
    "train.sample_prompts=a red cat",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])
    return folder


@pytest.fixture(scope="module")
def tuned(images, tmp_path_factory):
    """Return the run directory of a fine-tuned toy."""
    folder = tmp_path_factory.mktemp("journey")
    file = folder / "published.safetensors"
    checkpoint.write_checkpoint(file, MODEL, toy_params(MODEL))
    t5, cache = toy_folder(folder / "t5"), folder / "cache"
    shared = [
        str(EXPERIMENT),
        f"data.path={images}",
        f"output={folder}",
        f"text.file={t5}",
        *TOY_RUN,
    ]
    assert main(["encode", *shared, f"text.cache={cache}"]) == 0
    assert main(["train", *shared, f"init={file}", f"text.cache={cache}", "text.file="]) == 0
    return folder / "finetune"


def test_run_starts_from_the_file_and_learns(tuned):
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0
    assert rows[0]["validation_loss"] > rows[-1]["validation_loss"]
    metadata = json.loads((tuned / "data.json").read_text())
    assert metadata["train"]["count"] + metadata["validation"]["count"] == 12
    assert metadata["text"]["encoder"] == "t5"
    assert (tuned / "samples" / "00000004.png").is_file()


@pytest.mark.reference
def test_export_samples_the_same_image_in_pytorch(tuned, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tuned), str(out), "--weights", "ema=0.5", "--dtype", "bf16"]) == 0
    tensors = load_file(out)
    assert tensors["txt_in.weight"].dtype == "bfloat16"
    assert tensors["nerf_image_embedder.embedder.0.weight"].dtype == np.float32
    assert tensors["__x0__"].shape == (0,)

    assert main(["convert", str(out), str(tmp_path / "torch"), "--to", "torch"]) == 0
    monkeypatch.syspath_prepend(tmp_path / "torch")
    for name in ("model", "sample"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    network = importlib.import_module("model").load(tmp_path / "torch")  # strict

    pipeline = radiance.load(out, text_encoder=str(tuned.parent / "t5"), dtype="float32")
    positive, negative = encode_prompts(
        pipeline.encoder,
        ["a red cat", "two cats and three dogs"],
        pipeline.run.sample,
        MODEL.masking,
    )
    negative = type(negative)(np.repeat(negative.text, 2, axis=0), np.repeat(negative.lengths, 2))
    settings = config.override(pipeline.run.sample, ["guidance_scale=2", "steps=4"])
    times = make_time_schedule(settings, 16)
    noise = np.random.default_rng(1).standard_normal((2, 16, 24, 3), np.float32)
    expected = sample_from_noise(
        bind_model(MODEL, pipeline.run.compute, pipeline.params),
        jax.numpy.asarray(noise),
        times,
        settings,
        positive,
        negative,
    )
    inputs = (
        np.asarray(x)
        for x in (
            positive.text.astype(np.float32),
            positive.lengths,
            negative.text.astype(np.float32),
            negative.lengths,
        )
    )
    text, lengths, negative_text, negative_lengths = map(torch.tensor, inputs)
    samples = importlib.import_module("sample").sample(
        network,
        torch.tensor(noise).permute(0, 3, 1, 2),
        text,
        lengths,
        negative_text,
        negative_lengths,
        times=times.tolist(),
        guidance_scale=2.0,
    )
    samples = samples.permute(0, 2, 3, 1).numpy()
    assert np.abs(samples - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.reference
def test_exported_folder_samples_by_itself(tuned, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert main(["convert", str(tuned), str(tmp_path / "torch"), "--to", "torch"]) == 0
    done = subprocess.run(
        [sys.executable, "sample.py"],
        cwd=tmp_path / "torch",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(next((tmp_path / "torch" / "images").glob("*.png"))).size == (16, 16)


def test_high_initial_loss_names_the_likely_cause(tuned, images, tmp_path, capsys):
    """The same weights are loaded as a model that predicts velocity."""
    out, wrong = tmp_path / "out.safetensors", tmp_path / "wrong.safetensors"
    assert main(["convert", str(tuned), str(out)]) == 0
    assert main(["convert", str(out), str(wrong), "--prediction", "velocity"]) == 0
    again = [
        "train",
        str(EXPERIMENT),
        f"data.path={images}",
        f"output={tmp_path}",
        f"text.cache={tuned.parent / 'cache'}",
        *TOY_RUN,
        "train.steps=1",
    ]
    capsys.readouterr()
    assert main([*again, f"init={out}", "name=right"]) == 0
    assert "the weights were read correctly" in capsys.readouterr().err
    assert main([*again, f"init={wrong}", "model.prediction=velocity", "name=wrong"]) == 0
    assert "model.prediction=x0 is probably the right setting" in capsys.readouterr().err
