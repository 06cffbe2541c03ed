"""`data.source=shapes`: the endless images as the trainer reads them."""

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
NUMBER = 8  # of an image whose caption leaves something out
DATA = config.Data(
    source="shapes", shapes=SHAPES, resolution=32, batch_size=4, num_threads=1, caption_dropout=0.0
)


@pytest.fixture(scope="module")
def source():
    return open_source(DATA, "train")


def test_images_and_captions_are_the_scenes(source):
    drawn = sample_scene(3, NUMBER)
    told = make_caption(drawn, "short", 24).description
    assert told != drawn.description
    assert len(source) == 40
    assert source.sizes.shape == (40, 2)
    assert (source.sizes == 32).all()
    assert (source.weights == 1).all()
    assert source.picture(NUMBER, (32, 32)).tobytes() == render_scene(drawn, 32).tobytes()
    assert source.captions(NUMBER) == (make_caption(drawn, "short", 24).text,)
    assert source.attributes(NUMBER) == {"shown": drawn.description, "told": told}
    assert not source.tags(NUMBER)
    assert source.address(NUMBER) is None
    assert source.name(NUMBER) == "train 8 of seed 3"
    assert source.skipped == {}
    assert [*source.spans] == [(0, 40, 1.0)]


def test_it_is_drawn_at_the_side_that_is_asked_for(source):
    """So nothing is scaled where all images are squares."""
    assert source.picture(2).size == source.picture(2, (32, 32)).size == (32, 32)
    assert source.picture(2, (16, 16)).size == (16, 16)
    assert source.picture(2, (48, 40)).size == (
        48,
        48,
    )
    batch = make_validation_batches(source, DATA, HashEncoder(16, 24), 3, "one_pad")[0]
    assert np.array_equal(batch["image"][1], np.asarray(render_scene(sample_scene(3, 1), 32)))


def test_validation_has_what_training_never_shows(source):
    held_out = open_source(DATA, "validation")
    assert held_out.captions(NUMBER) == (
        make_caption(sample_scene(3, NUMBER, "validation"), "short", 24).text,
    )
    pairs = [
        {
            (thing.shape, thing.colour)
            for i in range(40)
            for thing in split.attributes(i)["shown"].objects
        }
        for split in (source, held_out)
    ]
    assert not pairs[0] & HELD_OUT_PAIRS
    assert pairs[1] & HELD_OUT_PAIRS


def test_images_of_few_objects():
    few = open_source(replace(DATA, shapes=replace(SHAPES, max_objects=2)), "train")
    shown = [few.attributes(i)["shown"] for i in range(40)]
    assert {facts.count for facts in shown} == {1, 2}
    for i, facts in enumerate(shown):
        assert facts == sample_scene(3, i, max_objects=2).description
        assert facts.objects == sample_scene(3, i).objects[: facts.count]
        assert few.captions(i) == (
            make_caption(sample_scene(3, i, max_objects=2), "short", 24).text,
        )


def test_images_on_few_backgrounds():
    assert DATA.shapes.backgrounds == tuple(BACKGROUNDS)
    dark = open_source(
        replace(DATA, shapes=replace(SHAPES, backgrounds=("navy", "black"))), "train"
    )
    shown = [dark.attributes(i)["shown"] for i in range(40)]
    assert {facts.background for facts in shown} == {"navy", "black"}
    assert [facts.objects for facts in shown] == [sample_scene(3, i).objects for i in range(40)]
    for wrong in ((), ("navy", "navy"), ("navy", "mauve")):
        with pytest.raises(config.ConfigError, match="backgrounds.*navy"):
            config.override(DATA, [f"shapes.backgrounds={','.join(wrong)}"])


def test_a_fingerprint_tells_all_settings_and_the_split_apart(source):
    others = [
        {"law": "mixed"},
        {"limit": 23},
        {"count": 41},
        {"seed": 4},
        {"objects": 4},
        {"backgrounds": ("navy",)},
    ]
    sources = [source, open_source(DATA, "validation")]
    sources += [
        open_source(replace(DATA, shapes=replace(SHAPES, **change)), "train") for change in others
    ]
    assert len({one.fingerprint() for one in sources}) == len(sources)
    assert open_source(replace(DATA, resolution=64), "train").fingerprint() == source.fingerprint()
    assert json.loads(json.dumps(describe_source(source, DATA, "train")))["count"] == 40


def test_it_is_small_where_it_is_sent(source):
    million = open_source(replace(DATA, shapes=replace(SHAPES, num_images=2**20)), "train")
    _ = million.sizes, million.loss_weights
    sent = pickle.dumps(million)
    assert len(sent) < 1000
    assert pickle.loads(sent).captions(2**20 - 1) == million.captions(2**20 - 1)


def test_it_can_be_a_part_of_a_mixture(source):
    parts = [
        config.MixtureSource(source="shapes", shapes=SHAPES),
        config.MixtureSource(source="shapes", shapes=replace(SHAPES, seed=4), weight=3.0),
    ]
    mixed = open_source(config.Data(source="mixture", mixture=tuple(parts), resolution=32), "train")
    assert isinstance(mixed, Mixture)
    assert len(mixed) == 80
    assert mixed.captions(40) == (make_caption(sample_scene(4, 0), "short", 24).text,)
    assert isinstance(mixed.attributes(41)["told"], SceneDescription)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["data.path=pictures"], "not for data.source=shapes"),
        (["data.flip_probability=0.5"], "in columns"),
        (
            ["data.shapes.max_tokens=65"],
            "data.shapes.max_tokens=65 gives captions that text.max_length=64 would cut",
        ),
        (["data.shapes.num_images=0"], "at least 1"),
        (["data.shapes.seed=-1"], "2\\*\\*32 - 1"),
    ],
)
def test_settings_that_cannot_be(changes, told):
    with pytest.raises(config.ConfigError, match=told):
        config.override(config.Config(), ["data.source=shapes", *changes])


def test_captions_need_room():
    with pytest.raises(
        config.ConfigError, match="room for 20 tokens, and the limit is 19.*data.shapes.max_tokens"
    ):
        open_source(replace(DATA, shapes=replace(SHAPES, max_tokens=19)), "train")


@pytest.mark.parametrize(("law", "length"), [("short", None), ("full", 24)])
def test_no_caption_is_cut(law, length):
    source = open_source(replace(DATA, shapes=replace(SHAPES, caption_lengths=law)), "train")
    counts = {len(split_tokens(source.captions(i)[0])) + 1 for i in range(40)}
    assert max(counts) <= 24
    assert length is None or counts == {length}


READ = """
import numpy as np
from radiance import config
from radiance.data.datasets import open_source
from radiance.data.pipeline import Batches
from radiance.text.encoders import HashEncoder

if __name__ == "__main__":
    for workers in (0, 2):
        data = config.Data(source="shapes", shapes=config.Shapes(limit=24, count=9), side=32, batch=4, threads=1, workers=workers)
        feed = Batches(open_source(data, "train"), data, HashEncoder(16, 24), 0, 4, "one_pad").start(1)
        print(*(int(next(feed)["image"].astype(int).sum()) for _ in range(3)))
        feed.close()
"""


@pytest.mark.slow
def test_worker_processes_draw_the_same(tmp_path):
    (tmp_path / "read.py").write_text(READ)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "read.py")], capture_output=True, text=True, timeout=120
    )
    alone, shared = done.stdout.splitlines() or [done.stderr, ""]
    assert alone == shared


def test_batches_follow_from_the_step(source):
    batches = [Batches(source, DATA, HashEncoder(16, 24), 0, 30, "one_pad") for _ in range(2)]
    assert np.array_equal(batches[0][25]["image"], batches[1][25]["image"])  # of the third epoch
    assert not np.array_equal(batches[0][0]["image"], batches[0][1]["image"])


@pytest.mark.slow
def test_a_toy_learns_on_it(tmp_path, data_directory):
    run = toy_run(
        tmp_path, data_directory, "data.source=shapes", "data.shapes.max_tokens=20", "data.shapes.num_images=64", "text.encoder=random_t5",
        "text.dtype=float32", "text.max_length=20", "data.resolution=16", "train.steps=2", "train.checkpoint_every=2", "train.sample_prompts=", **PLAIN,
    )  # fmt: skip
    assert train(run) == 2
    rows = metrics(run)
    assert np.isfinite(rows[-1]["validation_loss"])
    assert rows[0]["captions_cut"] == 0
    facts = json.loads((run.run_dir / "data.json").read_text())
    assert facts["train"]["count"] == 64
    assert facts["train"]["hash"] != facts["validation"]["hash"]
