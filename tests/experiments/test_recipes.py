"""Stages of recipes run at toy size, each from the one before, with the documented commands."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from PIL import Image

from radiance import config
from radiance.base.errors import OutputError
from radiance.cli import main
from radiance.config.experiments import load_experiment, load_module
from radiance.model.autoencoder import Autoencoder
from radiance.training import callbacks
from radiance.training.coordination import lock_run_directory
from radiance.training.initialization import load_pretrained_params
from radiance.training.run_directory import RunDirectory
from radiance.weights import autoencoder
from radiance.weights.checkpoint import open_checkpoint
from tests.helpers.toy_files import published, save
from tests.helpers.toy_models import noisy_autoencoder, toy_model
from tests.helpers.toy_runs import same
from tests.helpers.toy_t5 import CAPTIONS, TOY, toy_folder

pytestmark = pytest.mark.slow

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHORT = [
    "data.batch_size=4", "train.steps=3", "train.validate_every=3", "train.validation_images=2",
    "train.sample_every=3", "train.checkpoint_every=3",
    "train.sample_prompts=one", "sample.steps=2", "sample.guidance_scale=1",
    "optimizer.warmup_steps=0",
    # tests/training/test_run.py tests mixed shapes
    "data.extra_resolutions=", "data.bucket_step=0", "flow.coupling=independent",
]  # fmt: skip


@pytest.fixture
def trained(tmp_path, data_directory, monkeypatch):
    """Train a variant without sampling, and return its config."""
    monkeypatch.setattr(callbacks, "sample_gallery", lambda *_: None)

    def train(name: str, *changes: str) -> config.Config:
        changes = [*SHORT, f"output={tmp_path}", f"data.cache_dir={data_directory}", *changes]
        assert main(["train", f"{EXPERIMENTS}/{name}", *changes]) == 0
        return config.override(load_experiment(f"{EXPERIMENTS}/{name}"), changes)

    return train


def load_weights(run: config.Config):
    return load_pretrained_params(str(run.run_dir), run)


def first_row(run: config.Config) -> dict:
    return json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[0])


def changed_parts(before, after) -> set[str]:
    """Return the parts of the network that differ."""
    return {name for name in before if not same(before[name], after[name])}


def test_stages_of_radiance_512_train_what_they_should(trained, tmp_path):
    model = load_experiment(f"{EXPERIMENTS}/radiance_512.py:toy").model
    grafted = save(
        tmp_path / "grafted.safetensors", published(model), model
    )  # fresh blocks would not train: their gates are 0
    head = trained("radiance_512.py:head:toy", f"init={grafted}")
    assert changed_parts(load_pretrained_params(str(grafted), head), load_weights(head)) == {
        "patch_embed",
        "head",
    }
    trunk = trained("radiance_512.py:trunk:toy", f"init={head.run_dir}")
    assert changed_parts(load_weights(head), load_weights(trunk)) == {
        "patch_embed",
        "head",
        "double",
        "single",
    }
    assert first_row(trunk)["step"] == 0  # the loss of the initial weights
    files = {
        name: str(tmp_path / f"{name}.safetensors") for name in ("velocity", "x0", "sequential")
    }
    assert main(["convert", str(trunk.run_dir), files["velocity"]]) == 0
    assert main(["convert", files["velocity"], files["x0"], "--prediction", "x0"]) == 0
    x0 = trained("radiance_512.py:x0:toy", f"init={files['x0']}")
    assert changed_parts(load_weights(trunk), load_weights(x0)) == {
        "patch_embed",
        "head",
        "double",
        "single",
    }
    assert main(["convert", files["x0"], files["sequential"], "--text-ids", "sequential"]) == 0
    later = trained("radiance_512.py:2026:toy", f"init={files['sequential']}")
    assert changed_parts(load_weights(trunk), load_weights(later)) == {
        "patch_embed",
        "head",
        "double",
        "single",
        "text_embed",
    }


def test_growing_resolutions(trained):
    first = trained("radiance_512.py:256:toy", "data.resolution=8", "model.head=linear")
    last = trained("radiance_512.py:1024:toy", f"init={first.run_dir}", "model.head=linear")
    assert (first.data.resolution, last.data.resolution) == (8, 16)
    assert first_row(last)["step"] == 0
    assert changed_parts(load_weights(first), load_weights(last)) >= {
        "double",
        "single",
        "modulation",
    }


def test_pixel_model_trains_on_samples_of_a_latent_model(trained, tmp_path):
    latent = toy_model(
        hidden=64, rope_axes=(4, 14, 14), head="linear", patch=1, channels=8, text_dim=TOY.hidden
    )
    file, grafted = (
        save(tmp_path / "latent.safetensors", published(latent), latent),
        tmp_path / "grafted.safetensors",
    )
    sizes = Autoencoder(latent_channels=2, width=8, multipliers=(1, 2), blocks=1, groups=4)
    autoencoder.write_autoencoder(tmp_path / "ae.safetensors", sizes, noisy_autoencoder(sizes))
    t5, captions, generated = (
        toy_folder(tmp_path / "t5"),
        tmp_path / "captions.txt",
        tmp_path / "generated",
    )
    captions.write_text("\n".join(CAPTIONS))
    sample = [
        "sample",
        file,
        "--text-encoder",
        t5,
        "--autoencoder",
        tmp_path / "ae.safetensors",
        "--size",
        "32x32",
        "--dtype",
        "float32",
    ]
    assert (
        main(
            [
                *map(str, sample),
                "--prompts",
                str(captions),
                "--seeds",
                "0-1",
                "--folder",
                str(generated),
                "steps=2",
            ]
        )
        == 0
    )
    assert main(["convert", str(file), str(grafted), "--graft", "chroma1-radiance-x0"]) == 0

    model = toy_model(
        hidden=64,
        rope_axes=(4, 14, 14),
        text_dim=TOY.hidden,
        patch=16,
        nerf_hidden=64,
        nerf_mlp_ratio=4,
        nerf_depth=4,
        nerf_freqs=8,
    )
    model_settings = {
        key: ",".join(map(str, x)) if isinstance(x, tuple) else x
        for key, x in config.to_dict(model).items()
        if key != "prediction"
    }
    changes = [
        f"init={grafted}",
        "data.source=folder",
        f"data.path={generated}",
        "data.resolution=32",
        "data.extra_resolutions=",
        "data.bucket_step=16",
    ]
    changes += [
        "data.validation_fraction=0.3",
        "text.encoder=t5",
        f"text.file={t5}",
        "text.max_length=32",
        "optimizer.frozen=text_embed,modulation",
    ]
    run = trained(
        "latent_to_pixel.py:toy",
        *changes,
        *(f"model.{key}={value}" for key, value in model_settings.items()),
    )
    before, after = (
        load_pretrained_params(str(grafted), run),
        load_pretrained_params(str(run.run_dir), config.override(run, ["sample.weights=params"])),
    )
    assert changed_parts(before, after) == {"patch_embed", "head", "double", "single"}
    for kind, count, edge in (("double", 2, 0), ("single", 3, 2)):
        unchanged = {
            i
            for i in range(count)
            if not changed_parts(
                *({"": jax.tree.map(lambda x, i=i: x[i], tree[kind])} for tree in (before, after))
            )
        }
        assert unchanged == set(range(count)) - {edge}


def test_latent_source_resumes_and_exports(tmp_path, monkeypatch, data_directory):
    """It trains both parts, resumes and samples; its trunk gets another pixel head."""
    source = load_module(str(EXPERIMENTS / "latent_source.py"))
    sizes = Autoencoder(latent_channels=2, width=4, multipliers=(1, 1, 1), blocks=1, groups=2)
    for name, value in {
        "SIZES": sizes,
        "CROP_STEPS": 1,
        "FULL_STEPS": 1,
        "NUM_CAPTIONS": 2,
    }.items():
        monkeypatch.setattr(source, name, value)
    changes = [
        f"output={tmp_path}",
        f"data.cache_dir={data_directory}",
        "data.batch_size=4",
        "train.checkpoint_every=1",
        "train.log_every=1",
        "optimizer.warmup_steps=0",
    ]
    assert source.main([*changes, "train.steps=1"]) == 0
    run, file = tmp_path / "latent_source", tmp_path / "latent_source/autoencoder.safetensors"
    written, stored = file.stat().st_mtime_ns, autoencoder.read_autoencoder(file)[0]
    assert stored == replace(sizes, shift=stored.shift, scale=stored.scale)
    assert stored.scale != 1
    assert source.main([*changes, "train.steps=2"]) == 0
    assert file.stat().st_mtime_ns == written
    assert [row["step"] for row in RunDirectory(run).read_metrics()] == [1, 2]
    with lock_run_directory(run), pytest.raises(OutputError, match="is in use by process"):
        source.main([*changes, "train.steps=3"])
    sample = [
        "sample",
        run,
        "--autoencoder",
        file,
        "--prompts",
        run / "captions.txt",
        "--folder",
        tmp_path / "generated",
        "steps=1",
    ]
    assert main([*map(str, sample)]) == 0
    assert {Image.open(path).size for path in (tmp_path / "generated").glob("*.png")} == {(32, 32)}

    grafted = tmp_path / "grafted.safetensors"
    assert main(["convert", str(run), str(grafted), "--graft", f"{EXPERIMENTS}/one_shape.py"]) == 0
    assert open_checkpoint(grafted).model == load_experiment(f"{EXPERIMENTS}/one_shape.py").model
    assert (
        load_experiment(f"{EXPERIMENTS}/latent_to_pixel.py:shapes").model
        == load_experiment(f"{EXPERIMENTS}/one_shape.py").model
    )
