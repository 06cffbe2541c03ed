"""Several data sets as one: how often each is seen, that none of its images is seen twice before all were, and how it is asked for."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.data.batches import Batches, first_image_indices
from radiance.data.datasets import DataError, describe_source, open_source
from radiance.data.sampler import NO_IMAGE, BatchSampler
from radiance.data.source import Mixture
from radiance.text.hash_encoder import HashEncoder
from tests.helpers.toy_shards import fill_parquet, fill_tar


class Numbers:
    """So many images, with captions that say whose they are and which."""

    def __init__(self, name, count, skipped=None):
        self.title, self.count, self.skipped, self.examples = name, count, skipped or {}, {}
        self.sizes, self.weights = (
            np.full((count, 2), 8, np.uint32),
            np.full(count, count, np.float32),
        )

    def __len__(self):
        return self.count

    def image(self, index, cover=None):
        return f"image {self.title}{index}"

    def captions(self, index):
        return (self.name(index),)

    def tags(self, index):
        return self.title == "a"

    def attributes(self, index):
        return {self.title: index}

    def name(self, index):
        return f"{self.title}{index}"

    def fingerprint(self):
        return hashlib.sha256(f"{self.title} {self.count}".encode()).hexdigest()


def mixture(counts=(10, 30, 7), shares=(1, 1, 2)):
    return Mixture([Numbers(name, count) for name, count in zip("abc", counts)], shares)


def epochs(source, count, batch=1, **more):
    """The images of each epoch. With batches of one, nothing is carried from one to the next."""
    order = BatchSampler(source, config.Data(resolution=8, batch_size=batch, **more), seed=5)
    return [
        [int(order[epoch * len(source) + i].indices[0]) for i in range(len(source))]
        for epoch in range(count)
    ]


# --- one source ---------------------------------------------------------------------------------------------------------


def test_images_are_numbered_one_part_after_the_other():
    source = mixture((2, 3, 1))
    assert len(source) == 6
    assert [(span.start, span.num_images, span.fraction) for span in source.spans] == [
        (0, 2, 0.25),
        (2, 3, 0.25),
        (5, 1, 0.5),
    ]
    assert [source.name(i) for i in range(6)] == ["a0", "a1", "b0", "b1", "b2", "c0"]
    assert [source.captions(i) for i in range(6)] == [(source.name(i),) for i in range(6)]
    assert [source.load_image(i) for i in range(6)] == [f"image {source.name(i)}" for i in range(6)]
    assert [source.has_tags(i) for i in range(6)] == [True, True, False, False, False, False]
    assert [source.attributes(i) for i in (1, 4, 5)] == [{"a": 1}, {"b": 2}, {"c": 0}]
    assert source.loss_weights.tolist() == [2, 2, 3, 3, 3, 1]
    assert source.sizes.shape == (6, 2)


def test_what_was_left_out_is_summed():
    parts = [
        Numbers("a", 2, {"no caption": 3, "animated": 1}),
        Numbers("b", 2, {"no caption": 4}),
        Numbers("c", 2),
    ]
    assert Mixture(parts, [1, 1, 1]).skip_counts == {"animated": 1, "no caption": 7}


def test_fingerprint():
    assert mixture().fingerprint() == mixture().fingerprint() != mixture((10, 30, 8)).fingerprint()
    a, b = Numbers("a", 4), Numbers("b", 4)
    assert Mixture([a, b], [1, 1]).fingerprint() != Mixture([b, a], [1, 1]).fingerprint()


# --- shares -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(1, 1, 2), (5, 3, 2), (1, 100, 1), (0.2, 0.2, 0.2)])
def test_shares_are_kept_over_every_epoch(shares):
    source = mixture(shares=shares)
    seen = np.zeros(3)
    for number, images in enumerate(epochs(source, 6), 1):
        seen += [
            sum(span.start <= index < span.start + span.num_images for index in images)
            for span in source.spans
        ]
        assert (
            np.abs(seen - [span.fraction * len(source) * number for span in source.spans]).max() < 1
        )


def test_each_part_is_gone_through_before_it_begins_again():
    source = mixture()
    seen = sum(epochs(source, 12), [])
    for span in source.spans:
        ours = [index for index in seen if span.start <= index < span.start + span.num_images]
        counts = Counter(ours)
        assert (
            len(counts) == span.num_images
            if len(ours) >= span.num_images
            else len(counts) == len(ours)
        )
        assert (
            max(counts.values())
            - min(counts.get(span.start + i, 0) for i in range(span.num_images))
            <= 1
        )


def test_the_turns_of_a_part_have_orders_of_their_own():
    """Of parts that are alike, and of the same part the second time: an epoch shows half of each."""
    source = mixture((8, 8, 16), (1, 1, 6))
    halves = [
        [{index % 8 for index in epoch if index // 8 == part} for epoch in epochs(source, 6)]
        for part in (0, 1)
    ]
    assert all(len(half) == 4 for part in halves for half in part)
    assert all(
        part[turn] | part[turn + 1] == set(range(8)) for part in halves for turn in (0, 2, 4)
    )
    assert halves[0] != halves[1]
    assert all(part[0] != part[2] for part in halves)


def test_parts_are_mixed_within_batches():
    source = mixture((400, 400), (1, 1))
    order = BatchSampler(source, config.Data(resolution=8, batch_size=40), seed=5)
    assert all(8 <= (order[step].indices < 400).sum() <= 32 for step in range(40))


@pytest.mark.parametrize("remainder", ["carry", "pad", "drop"])
def test_batches_keep_the_shares(remainder):
    source = mixture()
    order = BatchSampler(
        source, config.Data(resolution=8, batch_size=6, incomplete_batches=remainder), seed=5
    )
    seen = np.concatenate([order[step].indices for step in range(1600)])
    seen = seen[seen != NO_IMAGE]
    for span in source.spans:
        share = ((span.start <= seen) & (seen < span.start + span.num_images)).mean()
        assert abs(share - span.fraction) < 0.02


def test_shares_are_counted_where_batches_may_never_fill():
    """An epoch of 100 shows ten of the first part's 60, and 45 times each of the second part's two shapes: none fills a batch, ever."""
    source = mixture((60, 40), (1, 9))
    source.sizes[60:] = [(16, 8), (8, 16)] * 20
    with pytest.raises(
        DataError, match="No shape has data.batch_size=50 images in an epoch, but 45 at most"
    ):
        BatchSampler(
            source,
            config.Data(
                resolution=8,
                batch_size=50,
                incomplete_batches="drop",
                bucket_step=4,
                max_aspect_ratio=3.0,
            ),
            seed=5,
        )


def test_validation_has_of_each_part_as_many_as_its_share_says():
    source = mixture((10, 30, 7), (1, 2, 1))
    assert [source.name(i) for i in first_image_indices(source, 8)] == [
        "a0",
        "a1",
        "b0",
        "b1",
        "b2",
        "b3",
        "c0",
        "c1",
    ]
    assert Counter(source.name(i)[0] for i in first_image_indices(source, 40)) == {
        "a": 10,
        "b": 20,
        "c": 7,
    }  # there are no more


# --- settings -----------------------------------------------------------------------------------------------------------

FOLDER = (
    '[{"source": "folder", "path": "scans", "share": 2}, {"source": "tar", "path": "shards/*.tar"}]'
)


def test_on_the_command_line():
    run = config.override(config.Config(), ["data.source=mixture", f"data.mixture={FOLDER}"])
    assert run.data.sources == (
        config.MixtureSource("folder", "scans", weight=2.0),
        config.MixtureSource("tar", "shards/*.tar"),
    )
    assert config.from_json(config.Config, config.to_json(run)) == run
    assert config.override(run, ["data.source=digits", "data.mixture=[]"]).data == config.Data()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["data.source=mixture"], r"data\.source=mixture and data\.mixture=\[…\] belong together"),
        (
            [f"data.mixture={FOLDER}"],
            r"data\.source=mixture and data\.mixture=\[…\] belong together",
        ),
        (
            ["data.source=mixture", f"data.mixture={FOLDER}", "data.path=x"],
            r"data\.path=x is of no use to a mixture",
        ),
        (
            ["data.source=mixture", "data.mixture=[{source: folder}]"],
            r"data\.mixture=.*: this list is not JSON: write",
        ),
        (
            ["data.source=mixture", 'data.mixture=[{"source": "folder", "part": 2}]'],
            r"Unknown key 'part': did you mean 'path'\?",
        ),
        (
            ["data.source=mixture", 'data.mixture=[{"source": "fold"}]'],
            r"part\.source='fold': did you mean 'folder'\?",
        ),
        (
            ["data.source=mixture", 'data.mixture=[{"source": "mixture"}]'],
            r"part\.source='mixture'",
        ),
        (
            ["data.source=mixture", 'data.mixture=[{"path": "x", "share": 0}]'],
            r"The share 0\.0 of x in the mixture must be more than 0",
        ),
        (
            ["data.source=mixture", 'data.mixture=[{"path": "x", "share": -1}]'],
            r"The share -1\.0 of x",
        ),
        (
            ["data.source=mixture", 'data.mixture=[{"path": "x", "share": "2"}]'],
            r"part\.share='2': float is expected",
        ),
        (
            ["data.source=mixture", 'data.mixture=[{"source": "tar", "root": "x"}]'],
            r"data\.root=x is for data\.source=jsonl",
        ),
    ],
)
def test_settings_that_cannot_work(changes, told):
    with pytest.raises(config.ConfigError, match=told):
        config.override(config.Config(), changes)


# --- of files -----------------------------------------------------------------------------------------------------------


def fill(folder):
    """Three data sets of other sources: images of greys from 0, from 0 and from 200 on."""
    fill_tar(folder / "tar")
    fill_parquet(folder / "parquet")
    (folder / "folder").mkdir()
    for i in range(5):
        Image.new("L", (12, 10), 200 + i).save(folder / "folder" / f"{i}.png")
        (folder / "folder" / f"{i}.txt").write_text(f"grey {200 + i}")
    Image.new("L", (12, 10)).save(folder / "folder" / "mute.png")
    return folder


def settings(folder, **more):
    parts = [
        {"source": "tar", "path": f"{folder}/tar"},
        {"source": "parquet", "path": f"{folder}/parquet/train-*"},
    ]
    parts.append({"source": "folder", "path": f"{folder}/folder", "share": 2.0})
    data = config.Data(
        resolution=8,
        max_upscale=2.0,
        num_threads=2,
        validation_fraction=1e-9,
        caption_dropout=0.0,
        cache_dir=f"{folder}/prepared",
    )
    changes = [
        "data.source=mixture",
        f"data.mixture={json.dumps(parts)}",
        *(f"data.{name}={value}" for name, value in more.items()),
    ]
    return config.override(config.Config(data=data, model=config.Model(patch=4)), changes).data


def batches(data, steps):
    return list(
        Batches(open_source(data, "train"), data, HashEncoder(8, 6), 0, steps, "one_pad").start(0)
    )


def test_sources_of_every_kind(tmp_path):
    data = settings(fill(tmp_path), batch=8)
    told = describe_source(open_source(data, "train"), data, "train")
    assert told["source"] == "mixture"
    assert told["count"] == 18 + 18 + 5
    assert told["skipped"] == {"no caption": 1}
    shown = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches(data, 10)])
    assert abs((shown >= 200).mean() - 0.5) < 0.05
    assert len(set(shown.tolist())) == 23


@pytest.mark.slow
def test_workers_give_what_threads_give(tmp_path):
    fill(tmp_path)
    threads, workers = (batches(settings(tmp_path, batch=5, workers=count), 6) for count in (0, 2))
    assert all(
        np.array_equal(a[name], b[name])
        for a, b in zip(threads, workers, strict=True)
        for name in a
    )
