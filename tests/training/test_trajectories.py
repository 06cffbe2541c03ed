"""Trajectories are generated, stored, and read as batches."""

import json
import shutil
from collections import Counter, namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
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
    choose_captions,
    generate_missing_trajectories,
    open_trajectories,
    resolve_segments,
)
from radiance.training.trajectory_batches import (
    TrajectoryBatches,
    make_fixed_trajectory_batches,
)
from tests.helpers.toy_models import toy_params
from tests.helpers.toy_runs import PLAIN, same, toy_run

pytestmark = pytest.mark.usefixtures("four_trajectories_per_file")


class Captions:
    """A data source that has only captions."""

    def __init__(self, *captions):
        self.all_captions = captions

    def __len__(self):
        return len(self.all_captions)

    def captions(self, index):
        return (self.all_captions[index],)

    def has_tags(self, index):
        return False

    def fingerprint(self):
        return str(hash(self.all_captions) % 2**32)


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
        "unused",
        "unused",
        "distill.kind=trajectories",
        "distill.teacher=another",
        f"distill.trajectory_dir={folder}",
        "distill.segments=4",
        "distill.num_trajectories=10",
        "distill.sample.steps=12",
        "distill.sample.guidance_scale=2",
        "distill.sample.batch_size=4",
        "train.validation_images=3",
        "flow.noise_scale=1.5",
        *changes,
        **PLAIN,
    )


@pytest.fixture(scope="module")
def encoder():
    return HashEncoder(16, 8)


@pytest.fixture(scope="module")
def teacher(encoder):
    """Return one teacher for all tests, so that it is compiled once."""
    run = run_of("unused")
    return Pipeline(
        replace(run, sample=run.distill.sample), dict(toy_params(run.model)), encoder=encoder
    )


def metadata_of(run, encoder, sources=SOURCES, teacher="its identity"):
    return resolve_segments(
        trajectories.trajectory_folder(run),
        trajectories.describe_trajectories(run, sources, encoder, teacher),
    )


def generate(run, teacher, sources=SOURCES):
    generate_missing_trajectories(
        run, metadata_of(run, teacher.encoder, sources), sources, lambda: teacher
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher):
    """Generate the trajectories; tests must not write to this folder."""
    folder = tmp_path_factory.mktemp("trajectories")
    generate(run_of(folder), teacher)
    return folder


def files(folder):
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.glob("*.safetensors")
    }


# --- generation and storage -----------------------------------------------------------------------


def test_stored_points_are_the_teachers(folder, teacher):
    """They are float16, splits share no seeds, and the composition of batches has no influence."""
    run = run_of(folder)
    assert sorted(files(folder)) == [f"train-{i:06d}.safetensors" for i in range(3)] + [
        "validation-000000.safetensors"
    ]
    trajectories_by_split = open_trajectories(run)
    for split, chosen, seeds in (
        ("train", [9, 0, 6, 3], [18, 0, 12, 6]),
        ("validation", [2, 0, 1, 1], [5, 1, 3, 3]),
    ):
        stored = trajectories_by_split[split]
        assert [stored.seed(index) for index in chosen] == seeds
        prompts = [stored.caption(index) for index in chosen]
        assert set(prompts) <= set(SOURCES[split].all_captions)
        states = teacher.generate_trajectory(prompts, seeds, 8, 8, run.distill.sample).noisy
        points = np.stack([stored.points(index) for index in chosen], axis=1)
        assert points.dtype == np.float16
        assert points.shape == (4, 4, 8, 8, 3)
        np.testing.assert_allclose(points, states[[3, 6, 9, 12]], rtol=2**-10, atol=1e-3)
        # The noise is not stored; the seeds give it.
        one_segment = replace(run, distill=replace(run.distill, segments=1))
        batch = dict(
            image=points[-1:].swapaxes(0, 1), seed=np.uint32(seeds), text=0, lengths=0, weight=0
        )
        batch = jax.tree.map(jnp.asarray, batch)
        np.testing.assert_allclose(
            make_segment_batch(one_segment, batch, jnp.zeros(4, jnp.int32), jnp.ones(4))["noise"],
            states[0],
            atol=1e-5,
        )


def test_missing_files_are_generated_bit_for_bit(folder, teacher, tmp_path):
    ours = tmp_path / "ours"
    shutil.copytree(folder, ours)
    before = files(ours)
    (ours / "train-000001.safetensors").unlink()
    # a killed process leaves such a file
    partial_file = ours / ".train-000001.safetensors.77.part"
    partial_file.write_bytes(before["train-000001.safetensors"][0][:1000])
    run = run_of(ours)
    assert open_trajectories(run)["train"].missing_shards == [1]
    assert not open_trajectories(run)["validation"].missing_shards
    generate(run, teacher)
    after = files(ours)
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    assert [name for name in after if after[name][1] != before[name][1]] == [
        "train-000001.safetensors"
    ]
    generate_missing_trajectories(
        run,
        metadata_of(run, teacher.encoder),
        SOURCES,
        partial(pytest.fail, "loaded the teacher although nothing is missing"),
    )


def test_failed_file_is_not_written(teacher, tmp_path, monkeypatch):
    """Files before it remain."""
    iter_trajectories = teacher.iter_trajectories

    def generate_nan(prompts, seeds, *rest):
        for states in iter_trajectories(prompts, seeds, *rest):
            yield np.full_like(states, np.nan) if 10 in seeds else states

    monkeypatch.setattr(teacher, "iter_trajectories", generate_nan)
    with pytest.raises(CheckpointError, match="not finite"):
        generate(run_of(tmp_path), teacher)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "train-000000.safetensors",
        "trajectories.json",
    ]


def test_more_trajectories_are_appended(folder, teacher, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    more = run_of(tmp_path, "distill.num_trajectories=14", "train.validation_images=4")
    generate(more, teacher)
    after = files(tmp_path)
    assert after.keys() - before.keys() == {"train-000003.safetensors"}
    assert {name: after[name] for name in before} == before
    stored = open_trajectories(more)["train"]
    captions = [stored.caption(index) for index in range(14)]
    assert captions == choose_captions(SOURCES["train"], teacher.encoder, more.data, 14)


@pytest.mark.parametrize(
    ("changes", "mismatches"),
    [
        ("distill.sample.guidance_scale=3", "sample"),
        ("distill.sample.schedule=beta", "sample"),
        ("data.resolution=12", "resolution"),
        ("flow.noise_scale=1", "noise_scale"),
        ("data.caption_prefix=oh", "caption_rules"),
        ("model.masking=strict", "model"),
        ("distill.segments=3", "4 segments"),
        ("distill.segments=12", "4 segments"),
        (
            "distill.segments=3 data.lowercase_probability=1 data.resolution=4",
            "resolution, caption_rules, 4 segments",
        ),
    ],
)
def test_folder_with_other_settings_is_an_error(folder, encoder, changes, mismatches):
    with pytest.raises(
        config.ConfigError,
        match=rf"^{folder} holds .* settings \({mismatches}\): set distill.trajectory_dir to .*\.$",
    ):
        metadata_of(run_of(folder, *changes.split()), encoder)


def test_folder_of_another_teacher_captions_or_encoder_is_an_error(folder, encoder):
    run = run_of(folder)
    for arguments, mismatch in (
        ((encoder, SOURCES, "another"), "teacher"),
        ((encoder, SOURCES | {"train": SOURCES["validation"]}), "captions"),
        ((HashEncoder(15, 8),), "text_encoder"),
        ((HashEncoder(16, 9),), "max_length"),
    ):
        with pytest.raises(config.ConfigError, match=rf"other settings \({mismatch}\)"):
            metadata_of(run, *arguments)


def test_fewer_segments_read_every_second_point(folder, teacher):
    for segments, chosen in ((2, [1, 3]), (1, [3])):
        run = run_of(folder, f"distill.segments={segments}", "distill.sample.batch_size=2")
        assert metadata_of(run, teacher.encoder).segments == 4
        generate_missing_trajectories(
            run,
            metadata_of(run, teacher.encoder),
            SOURCES,
            partial(pytest.fail, "loaded the teacher although nothing is missing"),
        )
        for index in (0, 7):
            assert np.array_equal(
                open_trajectories(run)["train"].points(index),
                open_trajectories(run_of(folder))["train"].points(index)[chosen],
            )


def test_generation_keeps_the_segments_of_the_folder(folder, teacher, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    (tmp_path / "train-000000.safetensors").unlink()
    generate(run_of(tmp_path, "distill.segments=1"), teacher)
    assert files(tmp_path)["train-000000.safetensors"][0] == before["train-000000.safetensors"][0]
    assert json.loads((tmp_path / "trajectories.json").read_text())["segments"] == 4


def test_only_one_run_generates_into_a_folder(teacher, tmp_path):
    run = run_of(tmp_path)
    metadata = metadata_of(run, teacher.encoder)

    def start_other_run():
        with pytest.raises(OutputError, match=r"in use by process \d+ on .*Wait until it ends"):
            generate_missing_trajectories(run, metadata, SOURCES, lambda: teacher)
        return teacher

    generate_missing_trajectories(run, metadata, SOURCES, start_other_run)
    assert not (tmp_path / ".lock").exists()


def test_trajectories_that_another_run_finished_meanwhile_are_used(folder, teacher, tmp_path):
    """Other settings of it are an error."""
    run = run_of(tmp_path / "same")
    metadata = metadata_of(run, teacher.encoder)
    shutil.copytree(folder, tmp_path / "same")
    before = files(tmp_path / "same")
    assert generate_missing_trajectories(run, metadata, SOURCES, lambda: teacher) == metadata
    (tmp_path / "same" / "train-000001.safetensors").unlink()
    assert generate_missing_trajectories(run, metadata, SOURCES, lambda: teacher) == metadata
    after = files(tmp_path / "same")
    assert after.keys() == before.keys()
    del before["train-000001.safetensors"]
    assert {name: after[name] for name in before} == before

    # The run must find the same metadata when it resumes: the segments of the folder.
    run = run_of(tmp_path / "finer", "distill.segments=1")
    metadata = metadata_of(run, teacher.encoder)
    assert metadata.segments == 1
    shutil.copytree(folder, tmp_path / "finer")
    (tmp_path / "finer" / "train-000001.safetensors").unlink()
    assert (
        generate_missing_trajectories(run, metadata, SOURCES, lambda: teacher)
        == metadata_of(run, teacher.encoder)
        == metadata._replace(segments=4)
    )
    stored = json.loads((folder / "trajectories.json").read_text()) | {"segments": 1}
    run = run_of(tmp_path / "other")
    metadata = metadata_of(run, teacher.encoder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trajectories.json").write_text(json.dumps(stored))
    with pytest.raises(config.ConfigError, match=r"other settings \(1 segments\)"):
        generate_missing_trajectories(run, metadata, SOURCES, lambda: teacher)


# --- captions -------------------------------------------------------------------------------------


def test_images_take_turns_in_giving_captions(encoder):
    source, rules = SOURCES["train"], config.Data(caption_prefix="oh ", caption_dropout=1.0)
    captions = choose_captions(source, encoder, rules, 15)
    fitting = Counter(
        f"oh {caption}" for caption in source.all_captions[:5]
    )  # the last is too long
    assert all(Counter(captions[i : i + 5]) == fitting for i in (0, 5, 10))
    assert captions[:5] != captions[5:10] or captions[5:10] != captions[10:15]
    assert choose_captions(source, encoder, rules, 7) == captions[:7]


def test_no_fitting_caption_is_an_error(encoder):
    with pytest.raises(
        config.ConfigError, match=r"No caption fits text\.max_length=8: increase it"
    ):
        choose_captions(
            Captions("one two three four five six seven eight", "1 2 3 4 5 6 7 8 9"),
            encoder,
            config.Data(),
            3,
        )


def test_captions_are_chosen_once(teacher, tmp_path, monkeypatch):
    counts, choose = [], choose_captions
    monkeypatch.setattr(
        trajectories,
        "choose_captions",
        lambda *arguments: counts.append(arguments[-1]) or choose(*arguments),
    )
    generate(run_of(tmp_path), teacher)
    assert sorted(counts) == [4, 12]


# --- batches --------------------------------------------------------------------------------------


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
    stored = batches.trajectories
    for step in (0, 2):
        batch = batches[step]
        indices = batch["seed"] // 2
        assert batch["seed"].dtype == np.uint32
        assert batch["weight"].tolist() == [1] * 4
        assert batch["cut"] == batch["skipped"] == 0
        assert np.array_equal(batch["image"], np.stack([stored.points(index) for index in indices]))
        captions = [stored.caption(index) for index in indices]
        text, lengths = encoder(captions)
        assert np.array_equal(batch["lengths"], lengths)
        width = padded_text_length(max(map(encoder.count_tokens, captions)), 8, "one_pad")
        assert np.array_equal(batch["text"], text[:, :width])


def test_rows_of_a_host_are_rows_of_the_global_batch(folder, encoder):
    all_rows, host_rows = (
        batches_of(folder, encoder, "data.caption_dropout=0.5", rows=rows)
        for rows in (None, range(2, 4))
    )
    for step in range(4):
        for name, values in host_rows[step].items():
            expected = all_rows[step][name]
            assert np.array_equal(values, expected[2:] if expected.ndim else expected), name


def test_longest_caption_of_all_hosts_determines_the_text_length():
    class LongCaption(Trajectories):
        def points(self, index):
            return np.zeros((1, 8, 8, 3), np.float16)

        def caption(self, index):
            return "word " * (20 if index == 5 else 3)

    stored = LongCaption(Path("unused"), "train", 8, 1)
    data = config.Data(batch_size=4, caption_dropout=0.0)
    hosts = [
        TrajectoryBatches(stored, data, HashEncoder(16, 40), 0, 2, "one_pad", rows)
        for rows in (range(2), range(2, 4))
    ]
    assert sorted([host[step]["text"].shape[1] for host in hosts] for step in range(2)) == [
        [16, 16],
        [32, 32],
    ]


@pytest.mark.parametrize("dropped_caption", ["empty", "masked"])
def test_captions_are_dropped(folder, encoder, dropped_caption):
    changes = [f"data.dropped_caption={dropped_caption}"]
    if dropped_caption == "masked":
        changes.append("model.padding=learned")
    batches = batches_of(folder, encoder, *changes, "data.caption_dropout=0.4")
    rows = [
        (int(seed) // 2, int(length))
        for step in range(20)
        for seed, length in zip(batches[step]["seed"], batches[step]["lengths"])
    ]
    empty_length = 1 if dropped_caption == "empty" else 0
    is_dropped = [length == empty_length for _, length in rows]
    assert 0.2 < np.mean(is_dropped) < 0.6
    assert all(
        length == encoder.count_tokens(batches.trajectories.caption(index))
        for (index, length), dropped in zip(rows, is_dropped)
        if not dropped
    )
    by_row = {}
    for (index, _), dropped in zip(rows, is_dropped):
        by_row.setdefault(index, set()).add(dropped)
    assert {True, False} in by_row.values(), "dropout is sampled at each step"


def test_validation_has_each_trajectory_once(folder, encoder):
    stored = Trajectories(folder, "train", 10, 4)
    batches = make_fixed_trajectory_batches(stored, encoder, "one_pad", 4)
    assert [batch["weight"].tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert len({(batch["image"].shape, batch["text"].shape) for batch in batches}) == 1
    seeds, weights = (
        np.concatenate([batch[name] for batch in batches]) for name in ("seed", "weight")
    )
    assert seeds[weights > 0].tolist() == list(range(0, 20, 2))
    assert np.array_equal(batches[2]["image"][1], stored.points(9))
    assert batches[2]["lengths"][1] == encoder.count_tokens(stored.caption(9))
    (one,) = make_fixed_trajectory_batches(
        Trajectories(folder, "validation", 3, 2), encoder, "one_pad", 8
    )
    assert one["image"].shape == (3, 2, 8, 8, 3)
    assert one["seed"].tolist() == [1, 3, 5]
    assert one["weight"].all()


# --- errors before the generation -----------------------------------------------------------------


def test_full_disk_is_an_error(encoder, tmp_path, monkeypatch):
    run = run_of(tmp_path / "trajectories")
    # four files of four trajectories, each of four segments of 8×8 pixels, in float16
    needed = 4 * 4 * 4 * 8 * 8 * 3 * 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 1, needed - 1))
    with pytest.raises(OutputError, match="GB are needed: make room"):
        generate_missing_trajectories(
            run, metadata_of(run, encoder), SOURCES, partial(pytest.fail, "loaded the teacher")
        )
    assert not (tmp_path / "trajectories").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 0, needed))
    with pytest.raises(SystemExit):
        generate_missing_trajectories(
            run, metadata_of(run, encoder), SOURCES, lambda: (_ for _ in ()).throw(SystemExit)
        )


def test_several_hosts_generate_nothing(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    run = run_of(tmp_path)
    with pytest.raises(
        config.ConfigError,
        match=r"16 trajectories are missing, and one host .* distill\.trajectory_dir=FOLDER",
    ):
        generate_missing_trajectories(
            run, metadata_of(run, encoder), SOURCES, partial(pytest.fail, "loaded the teacher")
        )
