"""The random T5: its values, contextual rows, and padding that depends on prompt and position."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from radiance.base.errors import TextError
from radiance.config import ConfigError, Data, Text
from radiance.data.batches import Batches
from radiance.data.source import Span
from radiance.shapes.captions import make_caption, split_tokens
from radiance.shapes.scenes import sample_scene
from radiance.text import t5
from radiance.text.factory import make_encoder
from radiance.text.hash_encoder import HashEncoder
from radiance.text.random_t5 import ATTENTION_DECAY, TOKEN_IDS, RandomT5Encoder, make_random_params

LIMIT = 32
PROMPTS = ("two: small red circle b3, on white", "one: large blue ring d1")


class Captions:
    """The part of a data source that batches need."""

    sizes, loss_weights = (
        np.full((len(PROMPTS), 2), 4, np.uint32),
        np.ones(len(PROMPTS), np.float32),
    )
    spans = (Span(0, len(PROMPTS), 1.0),)

    def __len__(self):
        return len(PROMPTS)

    def load_image(self, index, cover=None):
        return Image.new("RGB", (4, 4))

    def captions(self, index):
        return (PROMPTS[index],)

    def has_tags(self, index):
        return False


@pytest.fixture(scope="module")
def encoder():
    return RandomT5Encoder(64, LIMIT)


def relative(a, b):
    return np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)


def test_values_do_not_change(encoder):
    """Models were trained on these numbers."""
    sampled, digest = make_random_params(encoder.sizes), hashlib.sha256()
    for part in (
        sampled["embedding"],
        *(sampled["blocks"]["attention"][name]["kernel"] for name in "qkv"),
        sampled["blocks"]["mlp"]["gate"]["kernel"],
    ):
        digest.update(np.ascontiguousarray(part).tobytes())
    assert digest.hexdigest()[:16] == "0a0a58a0ae674498"
    rows, lengths = encoder([PROMPTS[0]])
    assert lengths.tolist() == [10]
    expected = [
        [-0.436698, -0.676349, 0.179806],
        [-1.371473, -0.518605, 0.716743],
        [0.750047, 1.997828, 0.850001],
        [-0.317191, 2.377422, 0.978498],
    ]
    np.testing.assert_allclose(rows[0, [3, 9, 10, 31], :3], expected, atol=1e-4)
    assert encoder.identity == "ea7dbd546f75755aaea572926ffea4d5"


def test_the_config_selects_the_encoder():
    encoder = make_encoder(Text(encoder="random_t5", max_length=40, dtype="float32"), 24)
    assert isinstance(encoder, RandomT5Encoder)
    assert (
        encoder.kind,
        encoder.dim,
        encoder.max_length,
    ) == ("random_t5", 24, 40)
    assert encoder.identity == RandomT5Encoder(24, 40).identity
    for wrong in ({"cache": "folder"}, {"file": "t5.safetensors"}):
        with pytest.raises(ConfigError, match=f"text.{next(iter(wrong))}"):
            Text(encoder="random_t5", **wrong)


def test_batches_without_a_mask_hold_all_padding():
    """Masking "off" sees the encoder's own padding."""
    source, encoder = Captions(), RandomT5Encoder(24, 40)
    batch = Batches(
        source,
        Data(resolution=4, batch_size=2, caption_dropout=0, num_threads=1),
        encoder,
        0,
        3,
        "off",
    )[0]
    for row, length in zip(batch["text"], batch["lengths"]):
        assert len(row) == 40
        assert relative(row[length:-1], row[length + 1 :]).max() > 0.05
    assert relative(*(row[20:] for row in batch["text"])).min() > 0.05


def test_identities_of_different_encoders_differ(encoder):
    others = [RandomT5Encoder(32, LIMIT), RandomT5Encoder(64, LIMIT, "bfloat16")]
    assert len({encoder.identity, *(other.identity for other in others)}) == 3
    assert (
        RandomT5Encoder(64, 16).identity == encoder.identity
    )  # the maximum length is not part of it


def test_weights_are_scaled_by_their_inputs(encoder):
    sampled = make_random_params(encoder.sizes)
    attention, mlp = sampled["blocks"]["attention"], sampled["blocks"]["mlp"]
    assert sampled["embedding"].std() == pytest.approx(1, rel=0.05)
    expected = {"q": 1 / 32, "k": 1 / 8, "v": 1 / 8, "proj": 1 / 8}  # width 64, four heads of 16
    assert {name: attention[name]["kernel"].std() for name in expected} == pytest.approx(
        expected, rel=0.05
    )
    expected = {"gate": 1 / 8, "linear_in": 1 / 8, "linear_out": 128**-0.5}
    assert {name: mlp[name]["kernel"].std() for name in expected} == pytest.approx(
        expected, rel=0.05
    )
    assert not np.allclose(attention["k"]["kernel"], attention["v"]["kernel"])
    # One bias per head and distance, the same in both directions.
    bias = np.array(sampled["position_bias"])[t5.position_buckets(8, 32)]
    distance = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    np.testing.assert_allclose(
        np.exp(bias), np.maximum(distance, 1.0)[..., None] ** -np.array(ATTENTION_DECAY), rtol=1e-5
    )


# --- vocabulary -----------------------------------------------------------------------------------


def test_the_vocabulary_has_every_word_of_the_captions(encoder):
    for index in range(100):
        text = make_caption(sample_scene(0, index), "mixed", 64).text
        ids = encoder.tokenizer(text)
        assert len(ids) == len(split_tokens(text)) + 1 == encoder.count_tokens(text)
        assert TOKEN_IDS["<unk>"] not in ids
        assert ids[-1] == TOKEN_IDS["</s>"]
    assert encoder.tokenizer("A zebra, RED")[:4] == [
        TOKEN_IDS["a"],
        TOKEN_IDS["<unk>"],
        TOKEN_IDS[","],
        TOKEN_IDS["red"],
    ]
    assert encoder.tokenizer("") == [TOKEN_IDS["</s>"]]


def test_a_long_text_is_an_error(encoder):
    with pytest.raises(TextError, match="40 tokens"):
        encoder(["red " * 39])
    assert encoder(["red " * 39], truncate=True)[1] == LIMIT


# --- context --------------------------------------------------------------------------------------


def test_rows_depend_on_neighbors(encoder):
    """Swapping the colors of two shapes changes the rows of the shapes."""
    a, b = encoder(
        ["small red circle b3, small blue ring d1", "small blue circle b3, small red ring d1"]
    )[0]
    words = HashEncoder.split_words("small red circle b3, small blue ring d1")
    changes = relative(a, b)
    assert min(changes[words.index("circle")], changes[words.index("ring")]) > 0.2
    # The change is larger near the changed word.
    c, d = encoder(
        [
            "small red circle b3, and there is nothing to add",
            "small blue circle b3, and there is nothing to add",
        ]
    )[0]
    changes = relative(c, d)
    assert changes[2] > 2 * changes[9] > 0


def test_padding_depends_on_the_prompt_and_on_its_position(encoder):
    (a, b), lengths = encoder(PROMPTS)
    assert lengths.tolist() == [10, 7]
    first, second = a[10:], b[7:][: LIMIT - 10]
    assert relative(first, second).min() > 0.1
    assert relative(first[:-1], first[1:]).max() > 0.05
    assert relative(first[:1], first[12:]).min() > 0.1


def test_all_different_rows_of_padding_are_kept():
    """The padded rows equal those of the network for the maximum length."""
    encoder = RandomT5Encoder(16, 200)
    ids = np.zeros((2, 200), np.int32)
    lengths = np.array([encoder.count_tokens(prompt) for prompt in PROMPTS])
    for row, prompt in zip(ids, PROMPTS):
        row[: encoder.count_tokens(prompt)] = encoder.tokenizer(prompt)
    expected = np.asarray(
        t5.encode_ids(encoder.sizes, "float32", make_random_params(encoder.sizes), ids, lengths)
    )
    result = encoder.encode(PROMPTS)
    assert [len(rows) for rows, _ in result] == [10 + 91, 7 + 91]
    np.testing.assert_allclose(encoder.pad_embeddings(result, 200)[0], expected, atol=1e-5)
    assert relative(expected[0, 99:100], expected[0, 100:101]) > 1e-3  # the last rows that differ
    np.testing.assert_allclose(encoder.pad_embeddings(result, 12)[0], expected[:, :12], atol=1e-5)


def test_embeddings_do_not_depend_on_the_batch(encoder):
    alone = encoder([PROMPTS[1]])[0][0]
    np.testing.assert_allclose(encoder(["red", *PROMPTS, "blue ring"])[0][2], alone, atol=1e-5)
