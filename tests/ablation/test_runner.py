"""Seeds that are trained together are what each is alone; a piece that goes on is what an unbroken one is."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from radiance import config
from radiance.ablation.data import (
    ImageSet,
    TextSet,
    encode_captions,
    hash_parts,
    render_image_set,
    sample_indices,
)
from radiance.ablation.runner import (
    init_states,
    measure_validation_losses,
    select_average,
    share_params,
    step_seeds,
    train_seeds,
)
from radiance.training.checkpoints import Checkpoints
from radiance.training.step import compute_validation_losses, init_state, make_train_step
from tests.helpers.toy_runs import same, toy_run

SEEDS = (3, 5)


@pytest.fixture(scope="module")
def run() -> config.Config:
    return toy_run("unused", "unused", "train.steps=3", "train.checkpoint_every=2", "train.validate_every=1", "data.caption_dropout=0.3",
                   "text.max_length=20", modulation="none", head="linear")  # fmt: skip


@pytest.fixture(scope="module")
def pool(run) -> tuple[ImageSet, TextSet]:
    shown = render_image_set("train", 12, run.data.side, "short")
    return shown, encode_captions(shown.captions, run.text, run.model.text_dim)


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def test_seeds_together_are_each_alone(run, pool):
    shown, texts = pool
    chosen = [
        [sample_indices(seed, n, len(shown.image), run.data) for seed in SEEDS] for n in range(2)
    ]
    step = jax.jit(lambda *given: step_seeds(run, *given))
    together = init_states(run, run.model, SEEDS)
    for picked in chosen:
        together, metrics = step(
            together,
            tuple(map(np.stack, zip(*picked))),
            np.array(SEEDS, np.uint32),
            (shown.image, *texts[:2]),
        )
    for i, seed in enumerate(SEEDS):
        alone = replace(run, train=replace(run.train, seed=seed))
        state, one = init_state(alone), jax.jit(make_train_step(alone))
        for index, said in (picked[i] for picked in chosen):
            batch = {
                "image": shown.image[index],
                "text": texts.rows[said],
                "lengths": texts.lengths[said],
                "weight": np.ones(len(index)),
            }
            state, facts = one(state, batch)
        np.testing.assert_allclose(metrics["loss"][i], facts["loss"], rtol=1e-5)
        for name in ("params", "ema", "optimizer"):
            for x, y in zip(
                jax.tree.leaves(at(getattr(together, name), i)),
                jax.tree.leaves(getattr(state, name)),
            ):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6)
    assert not same(at(together.params, 0), at(together.params, 1))


def test_a_piece_goes_on_as_if_unbroken(run, pool, tmp_path, monkeypatch):
    def trained(folder: str, stop=lambda: False):
        return train_seeds(run, run, SEEDS, *pool, pool, tmp_path / folder, stop)

    whole = trained("whole")
    assert trained("broken", lambda: True) is None
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["1"]
    wait = Checkpoints.wait

    def killed(checkpoints):
        wait(checkpoints)
        raise KeyboardInterrupt

    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
    ):  # one more step, and killed as soon as it is saved
        patch.setattr(Checkpoints, "wait", killed)
        trained("broken", lambda: True)
    broken = trained("broken")
    assert same(whole.state, broken.state)
    assert whole.curve == broken.curve
    assert len(whole.curve) == 3
    assert broken.seconds > 0
    assert same(trained("whole").state, whole.state)  # nothing is left to do


def test_arms_share_first_weights_data_and_validation(run, pool):
    other = config.override(
        run, ["model.modulation=per_block", "model.registers=2", "model.masking=strict"]
    )
    ours, theirs = (init_states(arm, run.model, SEEDS).params for arm in (run, other))
    for part in ("double", "single", "text_embed", "patch_embed", "head"):
        assert same(ours[part], theirs[part]), part
    assert "registers" in theirs
    assert not same(at(ours["double"], 0), at(ours["double"], 1))
    shared = share_params(
        {"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(1)}, {"a": np.ones(2), "b": np.ones(4)}
    )
    assert [x.mean() for x in shared.values()] == [1, 0, 0]
    state = init_states(run, run.model, SEEDS)
    hotter = config.override(run, ["optimizer.learning_rate=1", "data.caption_dropout=1"])
    params = select_average(run, state, "0.9")
    assert np.array_equal(
        measure_validation_losses(run, run, params, *pool),
        measure_validation_losses(hotter, run, params, *pool),
    )


def test_validation_is_the_mean_over_images(run, pool):
    shown, texts = pool  # 12 images in batches of 8: what fills up the second does not count
    params = select_average(run, init_states(run, run.model, SEEDS), "0.9")
    rows = [np.arange(8), np.minimum(np.arange(8, 16), 11)]
    batches = [
        {
            "image": shown.image[r],
            "text": texts.rows[r],
            "lengths": texts.lengths[r],
            "weight": np.ones(8, np.float32),
        }
        for r in rows
    ]
    validate = jax.jit(partial(compute_validation_losses, run))
    for i, losses in enumerate(measure_validation_losses(run, run, params, *pool)):
        found = [
            validate(at(params, i), batch, np.int32(part)) for part, batch in enumerate(batches)
        ]
        np.testing.assert_allclose(losses, np.concatenate(found)[:12].mean(axis=0), rtol=1e-5)


def test_draws_follow_from_seed_and_step_alone(run):
    data = replace(run.data, batch_size=4096)
    index, said = sample_indices(1, 7, 100, data)
    assert np.array_equal(index, sample_indices(1, 7, 100, replace(data, caption_dropout=0.0))[1])
    assert index.min() == 0
    assert index.max() == 99
    assert set(said[said != index]) == {100}
    assert 0.25 < (said == 100).mean() < 0.35
    assert not np.array_equal(index, sample_indices(1, 8, 100, data)[0])
    assert not np.array_equal(index, sample_indices(2, 7, 100, data)[0])


def test_a_digest_tells_data_apart(run, pool):
    shown, texts = pool
    same_again = hash_parts([shown], [texts])
    image = shown.image.copy()
    image[0, 0, 0, 0] ^= 1
    brighter = shown._replace(image=image)
    said = shown._replace(captions=("other", *shown.captions[1:]))
    hashed = [
        hash_parts([shown], [texts]),
        hash_parts([brighter], [texts]),
        hash_parts([said], [texts]),
        hash_parts([shown], [texts._replace(identity="")]),
    ]
    assert hashed[0] == same_again
    assert len(set(hashed)) == 4
    assert texts.lengths[-1] == 1
    assert texts.rows.shape == (13, 20, run.model.text_dim)
