"""The hash encoder: its scheme pinned, and what conditioning needs of it."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from radiance.config import Text
from radiance.text.encoders import HashEncoder, TextError, bucket, make_encoder


def rows(text, dim=8, limit=32, cut=False):
    """The embedding of one text, without padding."""
    embeddings, lengths = HashEncoder(dim, limit)([text], cut)
    return embeddings[0, : lengths[0]]


def same(a, b):
    return np.array_equal(rows(a), rows(b))


def test_shapes_and_types():
    encoder = make_encoder(Text(length=20), 12)
    embeddings, lengths = encoder(["a red square", "", "two cats, sleeping"])
    assert embeddings.shape == (3, 20, 12) and embeddings.dtype == np.float32
    assert lengths.tolist() == [4, 1, 5] and lengths.dtype == np.int32
    assert (encoder.dim, encoder.limit) == (12, 20)
    assert [encoder.count(text) for text in ("a red square", "", "two cats, sleeping")] == [4, 1, 5]


# --- always the same --------------------------------------------------------------------------------------------------


def test_scheme_is_pinned():
    """Models are trained on these numbers: whoever changes them must know."""
    embeddings, _ = HashEncoder(8, 16)(["A red square", "", "红色 squares"])
    expected = {
        (0, 0): [1.145891, 0.73630404, 0.28674674, 0.6463191],  # a
        (0, 1): [-0.3065196, -0.46894506, 1.4605572, 0.6675358],  # red
        (0, 3): [-0.3458937, 1.2211542, -0.61087924, 0.64803565],  # the end of the sequence
        (1, 0): [-0.9604536, 0.12117307, 0.06717947, 0.5436811],  # the end of an empty one
        (1, 1): [-0.2667461, 2.0217617, 0.37406304, -0.64071125],  # padding
        (2, 1): [1.6925296, -0.78588134, -0.54615813],  # 色
    }
    for (text, row), values in expected.items():
        np.testing.assert_allclose(embeddings[text, row, : len(values)], values, atol=1e-6)


def test_grams_of_a_row():
    """Row of word i: the word, the pair before and the pair after, each a Gaussian vector seeded by its BLAKE2b hash."""

    def gaussian(gram):
        seed = np.frombuffer(hashlib.blake2b(gram.encode(), digest_size=16).digest(), "<u4")
        return np.random.RandomState(seed).standard_normal(8)

    grams = [["red", " red", "red square"], ["square", "red square", "square </s>"], ["</s>", "square </s>", "</s> "]]
    expected = [sum(map(gaussian, row)) / np.sqrt(3) for row in grams]
    np.testing.assert_allclose(rows("red square"), expected, atol=1e-6)


def test_same_in_every_process():
    texts = ["A red square", "红色方块 🐱", "قطة"]
    script = f"""
import hashlib
from radiance.text.encoders import HashEncoder
print(hashlib.sha256(HashEncoder(8, 16)({texts!r})[0].tobytes()).hexdigest())
"""
    ours = hashlib.sha256(HashEncoder(8, 16)(texts)[0].tobytes()).hexdigest()
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}
        found = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
        assert found.strip() == ours


def test_a_text_is_encoded_alike_in_any_batch_and_again():
    encoder = HashEncoder(8, 16)
    first, _ = encoder(["a cat"])
    again, _ = encoder(["a dog", "a cat"])
    np.testing.assert_array_equal(first[0], again[1])
    first[:], again[:] = 0, 0  # what a caller does with its arrays stays with the caller
    assert np.abs(encoder(["a cat"])[0]).min() > 0


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b",
    [
        ("A Red SQUARE", "a red square"),
        ("STRASSE", "straße"),
        ("ΟΔΟΣ", "οδος"),
        ("Ｒｅｄ", "red"),  # full-width letters
        ("caf\u00e9", "cafe\u0301"),
        ("ｶﾀｶﾅ", "カタカナ"),
        (" red\n\tsquare ", "red square"),
    ],
)
def test_written_differently(a, b):
    assert same(a, b)


@pytest.mark.parametrize(
    "text, words",
    [
        ("红色方块", ["红", "色", "方", "块"]),
        ("赤い四角とカメラ", ["赤", "い", "四", "角", "と", "カ", "メ", "ラ"]),
        ("빨간 사각형", ["빨", "간", "사", "각", "형"]),
        ("แมว", ["แ", "ม", "ว"]),
        ("قطة حمراء", ["قطة", "حمراء"]),
        ("красный квадрат", ["красный", "квадрат"]),
        ("🐱🐶", ["🐱", "🐶"]),
        ("red红色car", ["red", "红", "色", "car"]),
        ("3只猫", ["3", "只", "猫"]),
        ("a \U00020000\U00020001", ["a", "\U00020000", "\U00020001"]),
        ("don't, stop!", ["don", "'", "t", ",", "stop", "!"]),
    ],
)
def test_words_of_any_script(text, words):
    encoder = HashEncoder(8, 32)
    assert encoder.words(text) == words
    embeddings, lengths = encoder([text])
    assert lengths[0] == encoder.count(text) == len(words) + 1
    found = embeddings[0, : lengths[0]]
    assert np.isfinite(found).all() and len(np.unique(found, axis=0)) == len(found)


@pytest.mark.parametrize(
    "text, words",
    [
        ("AI스타일", ["ai", "스", "타", "일"]),
        ("3마리", ["3", "마", "리"]),
        ("hdแมว", ["hd", "แ", "ม", "ว"]),
        ("a\U00020000", ["a", "\U00020000"]),
    ],
)
def test_scripts_without_spaces_after_a_word_of_another(text, words):
    """As "red红色": no word swallows letters that are words of their own."""
    assert HashEncoder(8, 32).words(text) == words


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_prompt_is_the_end_alone(text):
    assert rows(text).shape == (1, 8)
    assert same(text, "")


def test_padding_is_one_vector():
    embeddings, lengths = HashEncoder(8, 16)(["", "a red square"])
    padding = np.concatenate([embeddings[i, n:] for i, n in enumerate(lengths)])
    assert len(padding) == 32 - 5 and len(np.unique(padding, axis=0)) == 1
    assert not (embeddings[0, 0] == padding[0]).any()


def test_order_of_words_binds():
    """Colours swapped between shapes: no row but that of the end occurs in both, so it is more than another order of rows."""
    a, b = rows("red square blue circle"), rows("blue square red circle")
    equal = (a[:, None] == b[None]).all(axis=-1)
    assert equal.tolist() == np.diag([False] * 4 + [True]).tolist()
    distance = np.abs(a[:, None] - b[None]).max(axis=-1)
    assert distance[~equal].min() > 0.1


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_unit_variance():
    found = rows("one two three four five six seven eight", dim=4096)
    np.testing.assert_allclose(found.var(axis=1), 1, atol=0.1)
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=0.06)
    padding = HashEncoder(4096, 4)([""])[0][0, -1]
    assert padding.var() == pytest.approx(1, abs=0.1)


def test_a_word_is_akin_to_itself_in_another_context():
    """It shares one vector of three; other words share none."""
    a, b = rows("a red car", dim=4096), rows("the red house", dim=4096)
    similar = np.corrcoef(a, b)[:4, 4:]
    expected = np.zeros((4, 4))
    expected[1, 1] = 1 / 3  # red
    expected[3, 3] = 2 / 3  # the end, which shares its right-hand pair too
    np.testing.assert_allclose(similar, expected, atol=0.07)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_overlong_prompt_is_an_error_that_says_what_to_do():
    encoder = HashEncoder(8, 6)
    assert encoder(["a b c d e"])[1][0] == 6
    for text, count in (("a b c d e f", 7), ("a b\nc d\ne f g", 8), ("word " * 100, 101)):
        with pytest.raises(TextError) as caught:
            encoder(["fine", text])
        message = str(caught.value)
        assert f"{count} tokens" in message and "limit is 6" in message and "text.length" in message
        assert message.count("\n") == 0 and len(message) < 250
    assert issubclass(TextError, ValueError)


def test_cut_keeps_the_first_words_and_the_end():
    encoder = HashEncoder(8, 6)
    embeddings, lengths = encoder(["a b c d e f g", "a b c d e", "a"], cut=True)
    assert lengths.tolist() == [6, 6, 2]
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    np.testing.assert_array_equal(encoder(["a"])[0][0], embeddings[2])
    with pytest.raises(TextError):  # having cut it once is no permission
        encoder(["a b c d e f g"])


def test_bucket():
    cases = [(1, 64), (15, 64), (16, 64), (17, 64), (33, 64), (64, 64), (17, 20), (40, 40), (512, 512)]
    assert [bucket(*case) for case in cases] == [16, 16, 16, 32, 48, 64, 20, 40, 512]
