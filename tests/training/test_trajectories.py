"""Trajectories: how they are painted, kept and read as batches."""

import json
import shutil
from collections import Counter, namedtuple
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from radiance import config
from radiance.base.errors import CheckpointError, OutputError
from radiance.data.batches import padded_text_length
from radiance.flow.distillation import make_segment_batch
from radiance.pipeline import Pipeline
from radiance.text.hash_encoder import HashEncoder
from radiance.training import trajectories
from radiance.training.trajectories import (
    Trajectories,
    TrajectoryBatches,
    choose_captions,
    generate_missing_trajectories,
    make_fixed_trajectory_batches,
    open_trajectories,
    resolve_segments,
)
from tests.helpers.toy_models import toy_params
from tests.helpers.toy_runs import PLAIN, same, toy_run

pytestmark = pytest.mark.usefixtures("few_trajectories_a_file")


class Captions:
    """A source that nothing but captions is asked of."""

    def __init__(self, *captions):
        self.said = captions

    def __len__(self):
        return len(self.said)

    def captions(self, index):
        return (self.said[index],)

    def tags(self, index):
        return False

    def fingerprint(self):
        return str(hash(self.said) % 2**32)


SOURCES = {
    "train": Captions(
        "a one",
        "a two",
        "a three",
        "a four",
        "five and six",
        "much more than eight words would be too many",
    ),
    "validation": Captions("a seven", "an eight"),
}


def run_of(folder, *changes):
    return toy_run(
        "unused", "unused", "distill.kind=trajectories", "distill.teacher=another", f"distill.trajectory_dir={folder}", "distill.segments=4", "distill.num_trajectories=10",
        "distill.sample.steps=12", "distill.sample.guidance_scale=2", "distill.sample.batch_size=4", "train.validation_images=3", "flow.noise_scale=1.5", *changes, **PLAIN,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    return HashEncoder(16, 8)


@pytest.fixture(scope="module")
def teacher(encoder):
    """What paints: one for all, so that it is compiled once."""
    run = run_of("unused")
    return Pipeline(
        replace(run, sample=run.distill.sample), dict(toy_params(run.model)), encoder=encoder
    )


def made_of(run, encoder, sources=SOURCES, teacher="its identity"):
    return resolve_segments(
        trajectories.trajectory_folder(run),
        trajectories.describe_trajectories(run, sources, encoder, teacher),
    )


def paint(run, teacher, sources=SOURCES):
    generate_missing_trajectories(
        run, made_of(run, teacher.encoder, sources), sources, lambda: teacher
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher):
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("ways")
    paint(run_of(folder), teacher)
    return folder


def files(folder):
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.glob("*.safetensors")
    }


# --- painting and keeping ---------------------------------------------------------------------------------------------


def test_what_is_kept_is_the_teachers_way(folder, teacher):
    """To float16, by seeds of which no two splits have one in common, and whichever is painted beside which."""
    run = run_of(folder)
    assert sorted(files(folder)) == [f"train-{i:06d}.safetensors" for i in range(3)] + [
        "validation-000000.safetensors"
    ]
    ways = open_trajectories(run)
    for split, chosen, seeds in (
        ("train", [9, 0, 6, 3], [18, 0, 12, 6]),
        ("validation", [2, 0, 1, 1], [5, 1, 3, 3]),
    ):
        kept = ways[split]
        assert [kept.seed(index) for index in chosen] == seeds
        prompts = [kept.caption(index) for index in chosen]
        assert set(prompts) <= set(SOURCES[split].said)
        way = teacher.trajectory(prompts, seeds, 8, 8, run.distill.sample).noisy
        points = np.stack([kept.points(index) for index in chosen], axis=1)
        assert points.dtype == np.float16
        assert points.shape == (4, 4, 8, 8, 3)
        np.testing.assert_allclose(points, way[[3, 6, 9, 12]], rtol=2**-10, atol=1e-3)
        # The noise that is not kept comes back from the seeds.
        whole = replace(run, distill=replace(run.distill, segments=1))
        batch = dict(
            image=points[-1:].swapaxes(0, 1), seed=np.uint32(seeds), text=0, lengths=0, weight=0
        )
        np.testing.assert_allclose(
            make_segment_batch(whole, batch, np.zeros(4, int), np.ones(4))["noise"],
            way[0],
            atol=1e-5,
        )


def test_what_is_missing_is_painted_again_bit_for_bit_and_the_rest_is_left(
    folder, teacher, tmp_path
):
    ours = tmp_path / "ours"
    shutil.copytree(folder, ours)
    before = files(ours)
    (ours / "train-000001.safetensors").unlink()
    half = ours / ".train-000001.safetensors.77.part"  # as a process that was killed leaves it
    half.write_bytes(before["train-000001.safetensors"][0][:1000])
    run = run_of(ours)
    assert open_trajectories(run)["train"].missing_shards == [1]
    assert not open_trajectories(run)["validation"].missing_shards
    paint(run, teacher)
    after = files(ours)
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    assert [name for name in after if after[name][1] != before[name][1]] == [
        "train-000001.safetensors"
    ]
    generate_missing_trajectories(
        run, made_of(run, teacher.encoder), SOURCES, partial(pytest.fail, "nothing is missing")
    )


def test_a_file_that_could_not_be_written_whole_is_none(teacher, tmp_path, monkeypatch):
    """And those before it are kept."""
    ways = teacher.ways

    def painting(prompts, seeds, *rest):
        for states in ways(prompts, seeds, *rest):
            yield np.full_like(states, np.nan) if 10 in seeds else states

    monkeypatch.setattr(teacher, "ways", painting)
    with pytest.raises(CheckpointError, match="not finite"):
        paint(run_of(tmp_path), teacher)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "train-000000.safetensors",
        "trajectories.json",
    ]


def test_more_go_on_behind_those_that_are_there(folder, teacher, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    more = run_of(tmp_path, "distill.num_trajectories=14", "train.validation_images=4")
    paint(more, teacher)
    after = files(tmp_path)
    assert after.keys() - before.keys() == {"train-000003.safetensors"}
    assert {name: after[name] for name in before} == before
    ways = open_trajectories(more)["train"]
    captions = [ways.caption(index) for index in range(14)]
    assert captions == choose_captions(SOURCES["train"], teacher.encoder, more.data, 14)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ("distill.sample.guidance_scale=3", "sample"),
        ("distill.sample.schedule=beta", "sample"),
        ("data.resolution=12", "side"),
        ("flow.noise_scale=1", "noise_scale"),
        ("data.caption_prefix=oh", "rules"),
        ("model.masking=strict", "model"),
        ("distill.segments=3", "in 4 segments"),
        ("distill.segments=12", "in 4 segments"),
        (
            "distill.segments=3 data.lowercase_probability=1 data.resolution=4",
            "side, rules, in 4 segments",
        ),
    ],
)
def test_a_folder_of_others_is_refused(folder, encoder, changes, told):
    with pytest.raises(
        config.ConfigError,
        match=rf"^{folder} holds .* otherwise \({told}\): give another distill.trajectory_dir\.$",
    ):
        made_of(run_of(folder, *changes.split()), encoder)


def test_and_one_of_another_teacher_captions_or_encoder(folder, encoder):
    run = run_of(folder)
    for arguments, told in (
        ((encoder, SOURCES, "another"), "teacher"),
        ((encoder, SOURCES | {"train": SOURCES["validation"]}), "captions"),
        ((HashEncoder(15, 8),), "text"),
        ((HashEncoder(16, 9),), "limit"),
    ):
        with pytest.raises(config.ConfigError, match=rf"otherwise \({told}\)"):
            made_of(run, *arguments)


def test_a_number_of_segments_that_divides_reads_every_second_point(folder, teacher):
    for segments, chosen in ((2, [1, 3]), (1, [3])):
        run = run_of(folder, f"distill.segments={segments}", "distill.sample.batch_size=2")
        assert made_of(run, teacher.encoder).segments == 4
        generate_missing_trajectories(
            run, made_of(run, teacher.encoder), SOURCES, partial(pytest.fail, "nothing is missing")
        )
        for index in (0, 7):
            assert np.array_equal(
                open_trajectories(run)["train"].points(index),
                open_trajectories(run_of(folder))["train"].points(index)[chosen],
            )


def test_it_goes_on_in_the_segments_that_are_there(folder, teacher, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    (tmp_path / "train-000000.safetensors").unlink()
    paint(run_of(tmp_path, "distill.segments=1"), teacher)
    assert files(tmp_path)["train-000000.safetensors"][0] == before["train-000000.safetensors"][0]
    assert json.loads((tmp_path / "trajectories.json").read_text())["segments"] == 4


def test_two_that_paint_into_one_folder(folder, teacher, tmp_path):
    """What another run has painted since this one looked is left; and what it paints otherwise stops this one."""
    run = run_of(tmp_path)
    made = made_of(run, teacher.encoder)

    def meanwhile(**changes):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        told = json.loads((folder / "trajectories.json").read_text()) | changes
        (tmp_path / "trajectories.json").write_text(json.dumps(told))
        (tmp_path / "train-000001.safetensors").unlink()
        return files(tmp_path)

    before = []
    there = generate_missing_trajectories(
        run, made, SOURCES, lambda: before.append(meanwhile()) or teacher
    )
    assert there == made
    after = files(tmp_path)
    assert after.keys() - before[0].keys() == {"train-000001.safetensors"}
    assert {name: after[name] for name in before[0]} == before[0]
    (tmp_path / "train-000000.safetensors").unlink()
    with pytest.raises(config.ConfigError, match=r"otherwise \(in 1 segments\)"):
        generate_missing_trajectories(run, made, SOURCES, lambda: meanwhile(segments=1) and teacher)
    # What is kept for the run, which must find the same when it goes on, are the segments that are there.
    whole = run_of(tmp_path / "whole", "distill.segments=1")
    made = made_of(whole, teacher.encoder)

    def finer():
        shutil.copytree(folder, tmp_path / "whole")
        return teacher

    assert made.segments == 1
    assert (
        generate_missing_trajectories(whole, made, SOURCES, finer)
        == made_of(whole, teacher.encoder)
        == made._replace(segments=4)
    )


# --- captions ---------------------------------------------------------------------------------------------------------


def test_each_image_gives_a_caption_in_turn(encoder):
    source, rules = SOURCES["train"], config.Data(caption_prefix="oh ", caption_dropout=1.0)
    found = choose_captions(source, encoder, rules, 15)
    fitting = Counter(f"oh {caption}" for caption in source.said[:5])  # the last is over the limit
    assert all(Counter(found[i : i + 5]) == fitting for i in (0, 5, 10))
    assert found[:5] != found[5:10] or found[5:10] != found[10:15]
    assert choose_captions(source, encoder, rules, 7) == found[:7]


def test_no_caption_that_fits(encoder):
    with pytest.raises(config.ConfigError, match="No caption fits text.max_length=8: raise it"):
        choose_captions(
            Captions("one two three four five six seven eight", "1 2 3 4 5 6 7 8 9"),
            encoder,
            config.Data(),
            3,
        )


def test_captions_are_chosen_once(teacher, tmp_path, monkeypatch):
    asked, choose = [], choose_captions
    monkeypatch.setattr(
        trajectories,
        "choose_captions",
        lambda *arguments: asked.append(arguments[-1]) or choose(*arguments),
    )
    paint(run_of(tmp_path), teacher)
    assert sorted(asked) == [4, 12]


# --- batches ----------------------------------------------------------------------------------------------------------


def batches_of(folder, encoder, *changes, seed=0, rows=None, masking="one_pad"):
    run = run_of(folder, "data.batch_size=4", *changes)
    return TrajectoryBatches(
        open_trajectories(run)["train"], run.data, encoder, seed, 20, masking, rows
    )


def test_batches_follow_from_seed_and_step(folder, encoder):
    batches, again = (batches_of(folder, encoder, "data.caption_dropout=0") for _ in range(2))
    with_feed = batches.start(3)
    first = next(with_feed)
    with_feed.close()
    assert same(first, again[3])
    assert not same(batches_of(folder, encoder, seed=1)[3], again[3])
    seeds = np.concatenate(
        [batches[step]["seed"] for step in range(10)]
    )  # 40 rows: four epochs of 10
    epochs = seeds.reshape(4, 10)
    assert all(sorted(epoch) == list(range(0, 20, 2)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    ways = batches.trajectories
    for step in (0, 2):
        batch = batches[step]
        indices = batch["seed"] // 2
        assert batch["seed"].dtype == np.uint32
        assert batch["weight"].tolist() == [1] * 4
        assert batch["cut"] == batch["skipped"] == 0
        assert np.array_equal(batch["image"], np.stack([ways.points(index) for index in indices]))
        captions = [ways.caption(index) for index in indices]
        text, lengths = encoder(captions)
        assert np.array_equal(batch["lengths"], lengths)
        width = padded_text_length(max(map(encoder.count, captions)), 8, "one_pad")
        assert np.array_equal(batch["text"], text[:, :width])


def test_rows_of_a_host_are_those_of_the_whole_batch(folder, encoder):
    whole, part = (
        batches_of(folder, encoder, "data.caption_dropout=0.5", rows=rows)
        for rows in (None, range(2, 4))
    )
    for step in range(4):
        for name, values in part[step].items():
            expected = whole[step][name]
            assert np.array_equal(values, expected[2:] if expected.ndim else expected), name


def test_the_longest_caption_of_all_hosts_says_how_wide_text_is():
    data, points = (
        config.Data(batch_size=4, caption_dropout=0.0),
        np.zeros((1, 8, 8, 3), np.float16),
    )
    ways = SimpleNamespace(
        count=8,
        caption=lambda i: "word " * (20 if i == 5 else 3),
        points=lambda i: points,
        seed=lambda i: i,
    )
    hosts = [
        TrajectoryBatches(ways, data, HashEncoder(16, 40), 0, 2, "one_pad", rows)
        for rows in (range(2), range(2, 4))
    ]
    assert sorted([host[step]["text"].shape[1] for host in hosts] for step in range(2)) == [
        [16, 16],
        [32, 32],
    ]


@pytest.mark.parametrize("to", ["empty", "masked"])
def test_captions_are_dropped(folder, encoder, to):
    changes = (
        [f"data.dropped_caption={to}"]
        if to == "empty"
        else [f"data.dropped_caption={to}", "model.padding=learned"]
    )
    batches = batches_of(folder, encoder, *changes, "data.caption_dropout=0.4")
    rows = [
        (int(seed) // 2, int(length))
        for step in range(20)
        for seed, length in zip(batches[step]["seed"], batches[step]["lengths"])
    ]
    nothing = 1 if to == "empty" else 0
    dropped = [length == nothing for _, length in rows]
    assert 0.2 < np.mean(dropped) < 0.6
    assert all(
        length == encoder.count(batches.trajectories.caption(index))
        for (index, length), gone in zip(rows, dropped)
        if not gone
    )
    by_row = {}
    for (index, _), gone in zip(rows, dropped):
        by_row.setdefault(index, set()).add(gone)
    assert {True, False} in by_row.values(), "it is drawn anew each time"


def test_validation_is_all_of_them_once(folder, encoder):
    ways = Trajectories(folder, "train", 10, 4)
    batches = make_fixed_trajectory_batches(ways, encoder, "one_pad", 4)
    assert [batch["weight"].tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert len({(batch["image"].shape, batch["text"].shape) for batch in batches}) == 1
    seeds, there = (
        np.concatenate([batch[name] for batch in batches]) for name in ("seed", "weight")
    )
    assert seeds[there > 0].tolist() == list(range(0, 20, 2))
    assert np.array_equal(batches[2]["image"][1], ways.points(9))
    assert batches[2]["lengths"][1] == encoder.count(ways.caption(9))
    (one,) = make_fixed_trajectory_batches(
        Trajectories(folder, "validation", 3, 2), encoder, "one_pad", 8
    )
    assert one["image"].shape == (3, 2, 8, 8, 3)
    assert one["seed"].tolist() == [1, 3, 5]
    assert one["weight"].all()


# --- before anything is painted ---------------------------------------------------------------------------------------


def test_no_room_on_the_disk(encoder, tmp_path, monkeypatch):
    run, needed = (
        run_of(tmp_path / "ways"),
        4 * 4 * 4 * 8 * 8 * 3 * 2,
    )  # four files of four, in four segments of 8×8 pixels, in float16
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 1, needed - 1))
    with pytest.raises(OutputError, match="GB are needed: make room"):
        generate_missing_trajectories(
            run, made_of(run, encoder), SOURCES, partial(pytest.fail, "began to paint")
        )
    assert not (tmp_path / "ways").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 0, needed))
    with pytest.raises(SystemExit):
        generate_missing_trajectories(
            run, made_of(run, encoder), SOURCES, lambda: (_ for _ in ()).throw(SystemExit)
        )


def test_several_hosts_paint_nothing(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    run = run_of(tmp_path)
    with pytest.raises(
        config.ConfigError,
        match="16 trajectories are not painted yet, which one host does: .* distill.trajectory_dir=FOLDER",
    ):
        generate_missing_trajectories(
            run, made_of(run, encoder), SOURCES, partial(pytest.fail, "began to paint")
        )
