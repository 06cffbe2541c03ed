import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.base.errors import SamplingError, TextError
from radiance.base.images import save_png, to_image
from radiance.flow.inpainting import InitImage
from radiance.flow.sampler import compute_modulations, generate_images
from radiance.loading import load
from radiance.model.transformer import bind_model
from radiance.pipeline import Pipeline
from radiance.text.prompts import encode_prompts
from tests.helpers.toy_models import toy_params
from tests.helpers.toy_runs import toy_run


@pytest.fixture(scope="module")
def pipeline():
    run = toy_run("unused", "unused", "text.max_length=40", "sample.batch_size=3")
    return Pipeline(run, jax.tree.map(lambda x: x, toy_params(run.model)), "toy")


def pixels(image):
    return np.asarray(image.image, int)


def test_images_do_not_depend_on_the_others(pipeline):
    prompts = [
        "a one",
        "two and three and four",
        "",
        "five",
        "a long row of words about nothing at all",
    ]
    together = pipeline(prompts, seeds=[4, 5, 6, 7, 8])
    for i in (0, 3, 4):
        alone = pipeline([prompts[i]], seeds=[4 + i])
        assert np.abs(pixels(alone[0]) - pixels(together[i])).max() <= 1
    assert np.abs(pixels(together[0]) - pixels(pipeline(["a one"], seeds=[9])[0])).max() > 5


def test_prompts_are_encoded_in_batches_after_their_tokens_are_counted(pipeline, monkeypatch):
    batch_sizes, encode = [], pipeline.encoder.encode
    monkeypatch.setattr(
        pipeline.encoder,
        "encode",
        lambda texts, *options: batch_sizes.append(len(texts)) or encode(texts, *options),
    )
    images = pipeline.generate(["a one", "two", "three", "four", "five"], seeds=[4, 5, 6, 7, 8])
    next(images)
    assert batch_sizes == [4]  # three prompts, and the negative one
    assert len([*images]) == 4
    assert batch_sizes == [4, 4]
    batch_sizes.clear()
    with pytest.raises(TextError, match="has 51 tokens"):
        next(pipeline.generate(["a one", "two", "three", "four " * 50]))
    assert not batch_sizes


def test_modulation_is_computed_once_per_schedule_and_then_stored_on_the_host(
    pipeline, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        "radiance.pipeline.compute_modulations",
        lambda *a, **k: calls.append(1) or compute_modulations(*a, **k),
    )
    first = pipeline(["a one"], seeds=[2])
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(pipeline._modulation))
    assert "modulation" not in pipeline._network
    calls.clear()
    pipeline(["a two", "three", "four", "five"])
    assert not calls
    pipeline(["a one"], settings=config.override(pipeline.run.sample, ["steps=3"]))
    assert np.array_equal(pixels(pipeline(["a one"], seeds=[2])[0]), pixels(first[0]))
    assert len(calls) == 2
    # The result is the same as when the program computes the modulation itself.
    positive, negative = encode_prompts(pipeline.encoder, ["a one"], pipeline.run.sample, "one_pad")
    run = pipeline.run
    whole = generate_images(
        pipeline.params,
        np.array([2], np.uint32),
        positive,
        negative,
        model=run.model,
        compute=run.compute,
        settings=run.sample,
        noise_scale=1.0,
        height=8,
        width=8,
    )
    assert np.abs(np.asarray(to_image(np.asarray(whole[0])), int) - pixels(first[0])).max() <= 1


def test_a_trajectory_ends_in_the_image_and_contains_predictions(pipeline):
    run = pipeline.run
    settings = config.override(run.sample, ["guidance_scale=1", "steps=3", "solver=euler"])
    # A batch of three, and one that is padded.
    prompts, seeds = ["a one", "two", "three", "four"], [4, 5, 6, 7]
    trajectory = pipeline.generate_trajectory(prompts, seeds, settings=settings)
    assert trajectory.noisy.shape == (4, 4, 8, 8, 3)
    assert trajectory.clean.shape == (3, 4, 8, 8, 3)
    values = np.concatenate([*pipeline.generate_arrays(prompts, seeds, 8, 8, settings)])
    np.testing.assert_allclose(trajectory.noisy[-1], values, atol=1e-5)
    text, lengths = pipeline.encoder(prompts)
    velocity = jax.jit(
        lambda x, t: bind_model(run.model, run.compute, pipeline.params)(
            x, jnp.asarray(text), jnp.asarray(lengths), t
        )
    )
    for t, x, clean in zip(trajectory.times, trajectory.noisy, trajectory.clean):
        np.testing.assert_allclose(clean, x - t * velocity(x, np.full(4, t)), atol=1e-4)
    np.testing.assert_allclose(trajectory.clean[-1], values, atol=1e-4)


def test_images_of_any_size_are_crops_of_complete_patches(pipeline):
    image = pipeline(["a one"], width=13, height=7)[0]
    assert image.image.size == (13, 7)
    whole = pipeline(["a one"], width=16, height=8)[0]
    assert np.array_equal(pixels(image), pixels(whole)[:7, :13])


def test_shorter_padding_of_texts_changes_nothing(pipeline, monkeypatch):
    positive, negative = encode_prompts(pipeline.encoder, ["a one"], pipeline.run.sample, "one_pad")
    assert positive.text.shape[1] == 16
    assert negative.text.shape[1] == 16
    cut = pipeline(["a one"])
    monkeypatch.setattr(
        "radiance.text.prompts.round_up_length", lambda length, max_length: max_length
    )
    assert (
        encode_prompts(pipeline.encoder, ["a one"], pipeline.run.sample, "one_pad")[0].text.shape[1]
        == 40
    )
    assert np.abs(pixels(pipeline(["a one"])[0]) - pixels(cut[0])).max() <= 1


def test_the_masked_unconditional_text_is_the_learned_padding(pipeline):
    run = config.override(
        toy_run("unused", "unused", "text.max_length=40", padding="learned", masking="off"),
        ["sample.unconditional=masked", "sample.steps=2"],
    )
    positive, negative = encode_prompts(pipeline.encoder, ["a one"], run.sample, "off")
    assert positive.lengths.tolist() == [3]
    assert negative.lengths.tolist() == [0]
    assert negative.text.shape == (1, 40, 16)
    learned = Pipeline(run, toy_params(run.model), "toy")
    masked, named = (
        pixels(learned(["a one"])[0]),
        config.override(run.sample, ["unconditional=negative"]),
    )
    assert np.abs(masked - pixels(learned(["a one"], settings=named)[0])).max() > 2
    # The learned embedding is used, not the output of the encoder.
    params = dict(learned.params, padding=learned.params["padding"] + 1)
    assert np.abs(masked - pixels(Pipeline(run, params, "toy")(["a one"])[0])).max() > 2


def test_the_negative_prompt_and_settings_change_the_image(pipeline):
    plain = pixels(pipeline(["a one"])[0])
    for change in (
        "negative_prompt=bad",
        "guidance_scale=1",
        "solver=heun",
        "steps=3",
        "schedule=shifted",
    ):
        settings = config.override(pipeline.run.sample, [change])
        assert np.abs(pixels(pipeline(["a one"], settings=settings)[0]) - plain).max() > 0, change


def test_a_png_contains_prompt_seed_and_settings(pipeline, tmp_path):
    image = pipeline(["a ünï one"], seeds=[3])[0]
    save_png(tmp_path / "a" / "x.png", image.image, image.metadata)
    text = Image.open(tmp_path / "a" / "x.png").text
    assert text["prompt"] == "a ünï one"
    assert json.loads(text["seed"]) == 3
    assert json.loads(text["size"]) == [8, 8]
    assert json.loads(text["settings"])["guidance_scale"] == 2.0
    assert text["model"] == "toy"


def test_masked_pixels_remain_unchanged(pipeline, tmp_path):
    # Neither side consists of complete patches.
    image = np.random.RandomState(0).randint(0, 256, (7, 10, 3)).astype(np.uint8)
    mask = np.zeros((7, 10), np.float32)
    mask[2:, 3:8], mask[0, 0] = 1, 0.5
    samples = pipeline(["a one", "two"], seeds=[3, 4], init_image=InitImage(image, mask))
    for sample in samples:
        assert sample.image.size == (10, 7)
        changed = pixels(sample) - image
        assert not changed[mask == 0].any()
        assert np.abs(changed[mask == 1]).mean() > 10
    full = [
        pixels(p) for p in pipeline(["a one", "two"], seeds=[3, 4], init_image=InitImage(image))
    ]
    assert (
        np.abs(full[0] - pixels(pipeline(["a one"], seeds=[3], width=10, height=7)[0])).max() <= 1
    )  # at full strength the samples do not depend on the image
    half = pipeline(["a one"], seeds=[3], init_image=InitImage(image, strength=0.5))[0]
    assert np.abs(pixels(half) - full[0]).max() > 5
    assert half.metadata["start"]["strength"] == 0.5
    metadata = samples[0].metadata["start"]
    assert metadata["strength"] == 1
    assert (
        len(
            {
                metadata["image"],
                metadata["mask"],
                pipeline(["two"], init_image=InitImage(image + 1))[0].metadata["start"]["image"],
            }
        )
        == 3
    )


def test_impossible_initial_images_are_rejected(pipeline):
    image = np.zeros((8, 12, 3), np.uint8)
    with pytest.raises(config.ConfigError, match="The mask has 8×12 pixels, and the image 12×8"):
        InitImage(image, np.zeros((12, 8), np.float32))
    with pytest.raises(config.ConfigError, match="strength=0 must be more than 0"):
        InitImage(image, strength=0)
    with pytest.raises(config.ConfigError, match="not 8×8"):
        pipeline(["one"], width=8, height=8, init_image=InitImage(image))


def test_a_prompt_over_the_limit_is_reported_before_any_work(pipeline):
    with pytest.raises(TextError, match="has 61 tokens, and the limit is 40"):
        pipeline(["one", "word " * 60])


# --- images that are not finite -------------------------------------------------------------------


def overflow_from(pipeline, step):
    """A pipeline whose modulation makes the network overflow from a step on."""
    broken = Pipeline(pipeline.run, pipeline.params, "toy")
    compute = broken.modulation_vectors

    def modulation_vectors(times, settings=None):
        vectors = compute(times, settings)
        return vectors._replace(output=vectors.output.at[step - 1 :].set(jnp.nan))

    broken.modulation_vectors = modulation_vectors
    return broken


@pytest.fixture(scope="module")
def modulated():
    run = toy_run("unused", "unused", "text.max_length=40", head="linear", double_blocks=0)
    run = config.override(run, ["sample.steps=4", "sample.batch_size=2"])
    return Pipeline(run, toy_params(run.model), "toy")


@pytest.mark.parametrize("step", [1, 3])
def test_images_that_are_not_finite_are_errors(modulated, step):
    broken = overflow_from(modulated, step)
    message = f"The image of 'a one' with seed 7 is not finite from step {step} of 4 on: lower "
    for sample in (
        lambda: broken(["a one"], seeds=[7]),
        lambda: list(broken.generate_arrays(["a one"], [7], 8, 8, broken.run.sample)),
        lambda: broken.generate_trajectory(["a one"], seeds=[7]),
        lambda: broken(["a one"], seeds=[7], init_image=InitImage(np.zeros((8, 8, 3), np.uint8))),
    ):
        with pytest.raises(SamplingError, match=message):
            sample()


def test_the_image_that_is_not_finite_is_named(modulated, monkeypatch):
    """The fourth of five, after batches that are finite."""
    sample_batch = Pipeline._sample_batch

    def spoil(self, prompts, *args, **kwargs):
        samples = np.array(sample_batch(self, prompts, *args, **kwargs))
        for row, prompt in enumerate(prompts):
            if prompt == "four":
                samples[..., row, :, :, :] = np.inf
        return samples

    monkeypatch.setattr(Pipeline, "_sample_batch", spoil)
    images = modulated.generate(["one", "two", "three", "four", "five"], seeds=[1, 2, 3, 4, 5])
    assert [image.metadata["seed"] for image in (next(images), next(images))] == [1, 2]
    with pytest.raises(SamplingError, match="'four' with seed 4 is not finite from step 0 of 4"):
        next(images)


def test_noise_that_is_not_finite_begins_at_step_0(modulated):
    run = modulated.run
    flow = config.Flow()
    object.__setattr__(flow, "noise_scale", float("inf"))
    broken = Pipeline(replace(run, flow=flow), modulated.params, "toy")
    with pytest.raises(SamplingError, match="from step 0 of 4"):
        broken(["a one"])


@pytest.mark.parametrize("text", ["a \udcff", "a\0b"])
def test_invalid_unicode_in_prompts_is_an_error_before_any_work(modulated, text, monkeypatch):
    monkeypatch.setattr(Pipeline, "_sample_batch", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(TextError, match="is not UTF-8 text"):
        modulated(["a one", text])
    with pytest.raises((TextError, config.ConfigError), match=r"is not UTF-8|NUL"):
        modulated(["a one"], settings=replace(modulated.run.sample, negative_prompt=text))


def test_the_number_of_seeds_must_be_that_of_prompts(pipeline):
    with pytest.raises(ValueError, match="2 prompts need as many seeds"):
        pipeline(["a", "b"], seeds=[1])


def test_a_run_without_a_checkpoint_is_rejected(tmp_path):
    with pytest.raises(config.ConfigError, match="is not a run directory"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json(config.Config()))
    with pytest.raises(config.ConfigError, match="has no checkpoint yet"):
        load(tmp_path)
