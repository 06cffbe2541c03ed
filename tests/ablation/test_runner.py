"""Seeds trained together equal each seed alone, and resumed training equals uninterrupted."""

import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from radiance import config
from radiance.ablation.data import (
    ImageSet,
    PoolBatches,
    TextSet,
    encode_captions,
    exchange_captions,
    hash_data,
    load_image_set,
    sample_indices,
)
from radiance.ablation.metrics import (
    METRICS,
    measure_retrieval,
    measure_validation_losses,
    summarize_losses,
)
from radiance.ablation.runner import make_init_params, make_runs, share_params, train_seeds
from radiance.evaluation.report import write_report
from radiance.loading import load
from radiance.shapes.captions import make_caption
from radiance.shapes.scenes import render_scene, sample_scene
from radiance.training import callbacks
from radiance.training.checkpoints import Checkpoints
from radiance.training.inputs import prepare
from radiance.training.loop import fit, train
from radiance.training.run_directory import RunDirectory
from radiance.training.seeds import init_states, make_seeds_step, select_seed
from radiance.training.step import compute_validation_losses, init_state, make_train_step
from radiance.training.validation import select_average
from tests.helpers.toy_runs import PLAIN, metrics, same, state_of, toy_run

SEEDS = (3, 5)
SHAPES = (
    "data.source=shapes",
    "data.shapes.caption_lengths=short",
    "data.shapes.max_tokens=20",
    "text.max_length=20",
)


@pytest.fixture(scope="module")
def run() -> config.Config:
    changes = ("train.steps=3", "train.checkpoint_every=2", "train.validate_every=1")
    return toy_run(
        "unused",
        "unused",
        *SHAPES,
        *changes,
        "data.caption_dropout=0.3",
        modulation="none",
        head="linear",
    )


@pytest.fixture(scope="module")
def pool(run) -> tuple[ImageSet, TextSet]:
    images = load_image_set(run.data, "train", 12)
    return images, encode_captions(images.captions, run.text, run.model.text_dim)


@pytest.fixture
def no_samples(monkeypatch):
    monkeypatch.setattr(callbacks, "sample_gallery", lambda *_: None)


def select(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def test_the_pool_holds_the_images_and_captions_of_the_source():
    data = config.Data(
        source="shapes", shapes=config.Shapes(caption_lengths="short", max_tokens=20), resolution=16
    )
    images = load_image_set(data, "validation", 5)
    scenes = [sample_scene(0, i, "validation") for i in range(5)]
    captions = [make_caption(scene, "short", 20) for scene in scenes]
    assert images.captions == tuple(caption.text for caption in captions)
    assert images.descriptions == tuple(caption.description for caption in captions)
    assert np.array_equal(
        images.image, np.stack([np.asarray(render_scene(scene, 16)) for scene in scenes])
    )
    black = replace(data, shapes=replace(data.shapes, max_objects=1, backgrounds=("black",)))
    for caption in load_image_set(black, "train", 8).descriptions:
        assert caption.num_objects == 1
        assert caption.background in ("black", None)
    few = replace(data, shapes=replace(data.shapes, num_images=4))
    with pytest.raises(config.ConfigError, match="needs 5: lower num_images"):
        load_image_set(few, "train", 5)
    with pytest.raises(config.ConfigError, match=r"needs 1000000: lower train\.validation_images"):
        load_image_set(few, "validation", 1_000_000)


def test_exchanged_captions_belong_to_the_next_image(pool):
    _, texts = pool
    exchanged = exchange_captions(texts)
    for own, other in (
        (texts.embeddings, exchanged.embeddings),
        (texts.lengths, exchanged.lengths),
    ):
        assert np.array_equal(other[:-2], own[1:-1])
        assert np.array_equal(other[-2], own[0])
        assert np.array_equal(other[-1], own[-1])  # the empty prompt


def test_groups_of_captions_share_the_longest_mask(run, pool):
    shared = config.override(run, ["data.mask_group_size=4", "data.batch_size=8"])
    own = config.override(run, ["data.batch_size=8"])
    batch, own_batch = PoolBatches(shared, *pool)[0], PoolBatches(own, *pool)[0]
    longest = own_batch["lengths"].reshape(2, 4).max(axis=1)
    assert batch["lengths"].tolist() == np.repeat(longest, 4).tolist()
    assert np.array_equal(batch["text"], own_batch["text"])


def test_metrics_equal_those_worked_out_by_hand():
    bins = np.stack([np.arange(10.0), np.full(10, 2.0)])
    losses = summarize_losses(bins)
    assert losses["validation_loss"].tolist() == [4.5, 2.0]
    assert losses["high_noise_loss"].tolist() == [6.0, 2.0]  # the mean of 3 to 9
    assert losses.keys() == {name for name, metric in METRICS.items() if metric.needs == "losses"}
    images = np.random.default_rng(0).uniform(-1, 1, (4, 2, 2, 3)).astype(np.float32)
    assert measure_retrieval(images, images) == 1
    assert measure_retrieval(images[[1, 0, 2, 3]], images) == 0.5
    assert measure_retrieval(images[::-1], images) == 0
    broken = images.copy()
    broken[2] = np.nan
    assert measure_retrieval(broken, images) == 0.75
    broken[2] = images[2]
    broken[2, 0, 0, 0] = np.inf * np.sign(images[2, 0, 0, 0])
    assert measure_retrieval(broken, images) == 0.75


def test_seeds_trained_together_equal_each_alone(run, pool):
    feeds = [
        PoolBatches(replace(run, train=replace(run.train, seed=seed)), *pool) for seed in SEEDS
    ]
    batches = [
        [
            {name: x for name, x in feed[step].items() if name not in ("cut", "skipped")}
            for feed in feeds
        ]
        for step in range(2)
    ]
    step = jax.jit(make_seeds_step(run, 2))
    together = init_states(run, SEEDS)
    for seed_batches in batches:
        stacked = {
            name: np.stack([batch[name] for batch in seed_batches]) for name in seed_batches[0]
        }
        together, group_metrics = step(together, stacked, None, np.array(SEEDS, np.uint32), None)
    for i, seed in enumerate(SEEDS):
        alone = replace(run, train=replace(run.train, seed=seed))
        state, step_alone = init_state(alone), jax.jit(make_train_step(alone))
        for seed_batches in batches:
            weights = {"weight": np.ones(run.data.batch_size, np.float32)}
            state, step_metrics = step_alone(state, seed_batches[i] | weights)
        np.testing.assert_allclose(group_metrics["loss"][i], step_metrics["loss"], rtol=1e-5)
        of_seed = select_seed(together, i)
        for name in ("params", "ema", "optimizer_state"):
            leaves = jax.tree.leaves(getattr(of_seed, name)), jax.tree.leaves(getattr(state, name))
            for x, y in zip(*leaves, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6)
    assert not same(select(together.params, 0), select(together.params, 1))


@pytest.mark.slow
def test_a_group_trains_on_the_batches_of_any_source(tmp_path, data_directory, no_samples):
    run = toy_run(tmp_path, data_directory, "train.steps=4", "train.log_every=1", **PLAIN)
    runs = make_runs(run, SEEDS, tmp_path / "together")
    step, _ = fit(prepare(runs))
    assert step == 4
    for seed_run in runs:
        alone = replace(seed_run, output=str(tmp_path / "alone"))
        assert train(alone) == 4
        for row, expected in zip(metrics(seed_run), metrics(alone), strict=True):
            assert row.keys() == expected.keys()
            name = "loss" if "loss" in row else "validation_loss"
            assert row[name] == pytest.approx(expected[name], rel=1e-3)
    with pytest.raises(config.ConfigError, match=r"differ in name and train\.seed"):
        prepare([runs[0], config.override(runs[1], ["optimizer.learning_rate=1"])])
    with pytest.raises(config.ConfigError, match="images of one shape"):
        prepare([config.override(run, ["data.bucket_step=8"]) for run in runs])


@pytest.mark.slow
def test_interrupted_seeds_resume_bit_for_bit(run, pool, tmp_path, monkeypatch, no_samples):
    def train_in(folder: str, should_stop=lambda: False):
        return train_seeds(run, run, SEEDS, pool, pool, tmp_path / folder, should_stop)

    expected = train_in("uninterrupted")
    assert train_in("interrupted", lambda: True) is None
    runs = make_runs(run, SEEDS, tmp_path / "interrupted")
    folders = [seed_run.run_dir / "checkpoints" for seed_run in runs]
    assert [[path.name for path in folder.iterdir()] for folder in folders] == [["1"], ["1"]]

    # Killed when one seed has its next checkpoint, and the other has not.
    save = Checkpoints.save

    def save_first_only(checkpoints, *arguments):
        if checkpoints.directory == folders[1].absolute():
            raise KeyboardInterrupt
        save(checkpoints, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_first_only)
        with pytest.raises(KeyboardInterrupt):
            train_in("interrupted")
    assert sorted(path.name for path in folders[0].iterdir()) == ["1", "2"]
    assert [path.name for path in folders[1].iterdir()] == ["1"]
    interrupted = train_in("interrupted")
    assert same(expected.state, interrupted.state)
    assert expected.curve == interrupted.curve
    assert len(expected.curve) == 3
    assert interrupted.seconds > 0
    for seed_run in runs:
        whole = replace(seed_run, output=str(tmp_path / "uninterrupted"))
        assert metrics(seed_run) == metrics(whole)
    assert same(train_in("uninterrupted").state, expected.state)  # nothing is left to do


@pytest.mark.slow
def test_the_directory_of_a_seed_is_that_of_an_ordinary_run(run, pool, tmp_path):
    outcome = train_seeds(run, run, SEEDS, pool, pool, tmp_path)
    for i, seed_run in enumerate(make_runs(run, SEEDS, tmp_path)):
        assert RunDirectory(seed_run.run_dir).read_config() == seed_run
        assert same(state_of(seed_run, 3), select_seed(outcome.state, i))
        assert (seed_run.run_dir / "samples" / "00000003.png").is_file()
        assert write_report(seed_run.run_dir).is_file()
    pipeline = load(seed_run.run_dir)
    assert same(pipeline.params, select_seed(outcome.state, 1).ema["0.99"])
    assert len(pipeline(["one shape"])) == 1
    shutil.rmtree(seed_run.run_dir / "samples")
    before = metrics(seed_run)
    train_seeds(run, run, SEEDS, pool, pool, tmp_path)  # samples again, and nothing else
    assert (seed_run.run_dir / "samples" / "00000003.png").is_file()
    assert metrics(seed_run) == before


def test_variants_share_first_weights_data_and_validation(run, pool):
    other = config.override(
        run, ["model.modulation=per_block", "model.registers=2", "model.masking=strict"]
    )
    ours, theirs = (
        init_states(variant, SEEDS, init_params=make_init_params(variant.model, run.model)).params
        for variant in (run, other)
    )
    for part in ("double", "single", "text_embed", "patch_embed", "head"):
        assert same(ours[part], theirs[part]), part
    assert "registers" in theirs
    assert not same(select(ours["double"], 0), select(ours["double"], 1))
    shared = share_params(
        {"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(1)}, {"a": np.ones(2), "b": np.ones(4)}
    )
    assert [x.mean() for x in shared.values()] == [1, 0, 0]
    hotter = config.override(run, ["optimizer.learning_rate=1", "data.caption_dropout=1"])
    params = select_average(run, init_states(run, SEEDS), "0.9")
    assert np.array_equal(
        measure_validation_losses(run, run, params, *pool),
        measure_validation_losses(hotter, run, params, *pool),
    )


def test_the_validation_loss_is_the_mean_over_images(run, pool):
    images, texts = pool  # 12 images in batches of 8: the padding of the second does not count
    params = select_average(run, init_states(run, SEEDS), "0.9")
    rows = [np.arange(8), np.minimum(np.arange(8, 16), 11)]
    batches = [
        {
            "image": images.image[r],
            "text": texts.embeddings[r],
            "lengths": texts.lengths[r],
            "weight": np.ones(8, np.float32),
        }
        for r in rows
    ]
    validate = jax.jit(partial(compute_validation_losses, run))
    for i, losses in enumerate(measure_validation_losses(run, run, params, *pool)):
        expected = [
            validate(select(params, i), batch, np.int32(part)) for part, batch in enumerate(batches)
        ]
        np.testing.assert_allclose(losses, np.concatenate(expected)[:12].mean(axis=0), rtol=1e-5)


def test_sampled_images_follow_from_seed_and_step_alone(run):
    data = replace(run.data, batch_size=4096)
    images, texts = sample_indices(1, 7, 100, data)
    assert np.array_equal(images, sample_indices(1, 7, 100, replace(data, caption_dropout=0.0))[1])
    assert images.min() == 0
    assert images.max() == 99
    assert set(texts[texts != images]) == {100}
    assert 0.25 < (texts == 100).mean() < 0.35
    assert not np.array_equal(images, sample_indices(1, 8, 100, data)[0])
    assert not np.array_equal(images, sample_indices(2, 7, 100, data)[0])


def test_hashes_distinguish_data(run, pool):
    images, texts = pool
    image = images.image.copy()
    image[0, 0, 0, 0] ^= 1
    hashes = [
        hash_data([images], [texts]),
        hash_data([images._replace(image=image)], [texts]),
        hash_data([images._replace(captions=("other", *images.captions[1:]))], [texts]),
        hash_data([images], [texts._replace(identity="")]),
    ]
    assert hashes[0] == hash_data([images], [texts])
    assert len(set(hashes)) == 4
    assert texts.lengths[-1] == 1
    assert texts.embeddings.shape == (13, 20, run.model.text_dim)
