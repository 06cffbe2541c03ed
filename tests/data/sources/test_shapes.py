"""The data source `shapes`, as the trainer reads it."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from radiance import config
from radiance.data.batches import Batches, make_validation_batches
from radiance.data.datasets import describe_source, open_source
from radiance.data.source import Mixture
from radiance.shapes.captions import make_caption, split_tokens
from radiance.shapes.scenes import (
    BACKGROUNDS,
    HELD_OUT_PAIRS,
    SceneDescription,
    render_scene,
    sample_scene,
)
from radiance.text.hash_encoder import HashEncoder
from tests.helpers.toy_runs import PLAIN, metrics, toy_run, train

SHAPES = config.Shapes(caption_lengths="short", max_tokens=24, num_images=40, seed=3)
INDEX = 8  # of an image whose caption does not describe everything
DATA = config.Data(
    source="shapes", shapes=SHAPES, resolution=32, batch_size=4, num_threads=1, caption_dropout=0.0
)


@pytest.fixture(scope="module")
def source():
    return open_source(DATA, "train")


def test_images_and_captions_are_the_scenes(source):
    scene = sample_scene(3, INDEX)
    text, described = make_caption(scene, "short", 24)
    assert described != scene.description
    assert len(source) == 40
    assert source.sizes.shape == (40, 2)
    assert (source.sizes == 32).all()
    assert (source.loss_weights == 1).all()
    assert source.load_image(INDEX, (32, 32)).tobytes() == render_scene(scene, 32).tobytes()
    assert source.captions(INDEX) == (text,)
    assert source.attributes(INDEX) == {"scene": scene.description, "described": described}
    assert not source.has_tags(INDEX)
    assert source.address(INDEX) is None
    assert source.name(INDEX) == "train 8 of seed 3"
    assert source.skip_counts == {}
    assert [*source.spans] == [(0, 40, 1.0)]


def test_images_are_rendered_at_the_requested_resolution(source):
    """So no square image is resized."""
    assert source.load_image(2).size == source.load_image(2, (32, 32)).size == (32, 32)
    assert source.load_image(2, (16, 16)).size == (16, 16)
    assert source.load_image(2, (48, 40)).size == (48, 48)
    batch = make_validation_batches(source, DATA, HashEncoder(16, 24), 3, "one_pad")[0]
    assert np.array_equal(batch["image"][1], np.asarray(render_scene(sample_scene(3, 1), 32)))


def test_validation_has_pairs_that_training_never_has(source):
    validation = open_source(DATA, "validation")
    caption = make_caption(sample_scene(3, INDEX, "validation"), "short", 24)
    assert validation.captions(INDEX) == (caption.text,)
    train_pairs, validation_pairs = (
        {
            (item.shape, item.color)
            for i in range(40)
            for item in split.attributes(i)["scene"].objects
        }
        for split in (source, validation)
    )
    assert not train_pairs & HELD_OUT_PAIRS
    assert validation_pairs & HELD_OUT_PAIRS


def test_the_number_of_objects_can_be_limited():
    few = open_source(replace(DATA, shapes=replace(SHAPES, max_objects=2)), "train")
    descriptions = [few.attributes(i)["scene"] for i in range(40)]
    assert {description.num_objects for description in descriptions} == {1, 2}
    for i, description in enumerate(descriptions):
        scene = sample_scene(3, i, max_objects=2)
        assert description == scene.description
        assert description.objects == sample_scene(3, i).objects[: description.num_objects]
        assert few.captions(i) == (make_caption(scene, "short", 24).text,)


def test_backgrounds_can_be_limited():
    assert DATA.shapes.backgrounds == tuple(BACKGROUNDS)
    dark = open_source(
        replace(DATA, shapes=replace(SHAPES, backgrounds=("navy", "black"))), "train"
    )
    descriptions = [dark.attributes(i)["scene"] for i in range(40)]
    assert {description.background for description in descriptions} == {"navy", "black"}
    for i, description in enumerate(descriptions):
        assert description.objects == sample_scene(3, i).objects
    for wrong in ((), ("navy", "navy"), ("navy", "mauve")):
        with pytest.raises(config.ConfigError, match=r"backgrounds.*navy"):
            config.override(DATA, [f"shapes.backgrounds={','.join(wrong)}"])


def test_the_fingerprint_depends_on_all_settings_and_the_split(source):
    others = [
        {"caption_lengths": "mixed"},
        {"max_tokens": 23},
        {"num_images": 41},
        {"seed": 4},
        {"max_objects": 4},
        {"backgrounds": ("navy",)},
    ]
    sources = [source, open_source(DATA, "validation")]
    sources += [
        open_source(replace(DATA, shapes=replace(SHAPES, **change)), "train") for change in others
    ]
    assert len({one.fingerprint() for one in sources}) == len(sources)
    assert open_source(replace(DATA, resolution=64), "train").fingerprint() == source.fingerprint()
    assert json.loads(json.dumps(describe_source(source, DATA, "train")))["count"] == 40


def test_the_pickled_source_is_small():
    million = open_source(replace(DATA, shapes=replace(SHAPES, num_images=2**20)), "train")
    _ = million.sizes, million.loss_weights
    pickled = pickle.dumps(million)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).captions(2**20 - 1) == million.captions(2**20 - 1)


def test_shapes_can_be_a_part_of_a_mixture():
    parts = [
        config.MixtureSource(source="shapes", shapes=SHAPES),
        config.MixtureSource(source="shapes", shapes=replace(SHAPES, seed=4), weight=3.0),
    ]
    mixed = open_source(config.Data(source="mixture", mixture=tuple(parts), resolution=32), "train")
    assert isinstance(mixed, Mixture)
    assert len(mixed) == 80
    assert mixed.captions(40) == (make_caption(sample_scene(4, 0), "short", 24).text,)
    assert isinstance(mixed.attributes(41)["described"], SceneDescription)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path=images"], "not used by data.source=shapes"),
        (["data.flip_probability=0.5"], "whose columns"),
        (
            ["data.shapes.max_tokens=65"],
            "data.shapes.max_tokens=65 gives captions that text.max_length=64 would truncate",
        ),
        (["data.shapes.num_images=0"], "at least 1"),
        (["data.shapes.seed=-1"], "2\\*\\*32 - 1"),
    ],
)
def test_contradictory_settings_are_errors(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.override(config.Config(), ["data.source=shapes", *changes])


def test_captions_need_room():
    with pytest.raises(config.ConfigError, match=r"data\.shapes\.max_tokens=19 is too small"):
        open_source(replace(DATA, shapes=replace(SHAPES, max_tokens=19)), "train")


@pytest.mark.parametrize(("caption_lengths", "length"), [("short", None), ("full", 24)])
def test_no_caption_is_truncated(caption_lengths, length):
    shapes = replace(SHAPES, caption_lengths=caption_lengths)
    source = open_source(replace(DATA, shapes=shapes), "train")
    counts = {len(split_tokens(source.captions(i)[0])) + 1 for i in range(40)}
    assert max(counts) <= 24
    assert length is None or counts == {length}


READ_BATCHES = """
import numpy as np
from radiance import config
from radiance.data.datasets import open_source
from radiance.data.batches import Batches
from radiance.text.hash_encoder import HashEncoder

if __name__ == "__main__":
    for num_workers in (0, 2):
        data = config.Data(
            source="shapes", shapes=config.Shapes(max_tokens=24, num_images=9),
            resolution=32, batch_size=4, num_threads=1, num_workers=num_workers,
        )
        batches = Batches(
            open_source(data, "train"), data, HashEncoder(16, 24), 0, 4, "one_pad"
        ).start(1)
        print(*(int(next(batches)["image"].astype(int).sum()) for _ in range(3)))
        batches.close()
"""


@pytest.mark.slow
def test_worker_processes_load_the_same_images(tmp_path):
    (tmp_path / "read.py").write_text(READ_BATCHES)
    process = subprocess.run(
        [sys.executable, str(tmp_path / "read.py")], capture_output=True, text=True, timeout=120
    )
    in_threads, in_workers = process.stdout.splitlines() or [process.stderr, ""]
    assert in_threads == in_workers


def test_a_batch_is_a_function_of_the_step(source):
    batches = [Batches(source, DATA, HashEncoder(16, 24), 0, 30, "one_pad") for _ in range(2)]
    assert np.array_equal(batches[0][25]["image"], batches[1][25]["image"])  # of the third epoch
    assert not np.array_equal(batches[0][0]["image"], batches[0][1]["image"])


@pytest.mark.slow
def test_a_toy_model_trains_on_shapes(tmp_path, data_directory):
    run = toy_run(
        tmp_path,
        data_directory,
        "data.source=shapes",
        "data.shapes.max_tokens=20",
        "data.shapes.num_images=64",
        "text.encoder=random_t5",
        "text.dtype=float32",
        "text.max_length=20",
        "data.resolution=16",
        "train.steps=2",
        "train.checkpoint_every=2",
        "train.sample_prompts=",
        **PLAIN,
    )
    assert train(run) == 2
    rows = metrics(run)
    assert np.isfinite(rows[-1]["validation_loss"])
    assert rows[0]["captions_cut"] == 0
    data = json.loads((run.run_dir / "data.json").read_text())
    assert data["train"]["count"] == 64
    assert data["train"]["hash"] != data["validation"]["hash"]
