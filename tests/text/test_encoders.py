"""The hash encoder: its values and its properties; and T5 with the same interface."""

import hashlib
import os
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from radiance.base.errors import CheckpointError, TextError
from radiance.config import ConfigError, Text
from radiance.text import t5, t5_encoder
from radiance.text.encoder import round_up_length
from radiance.text.factory import make_encoder, make_token_counter
from radiance.text.hash_encoder import HashEncoder
from radiance.text.t5_encoder import T5Encoder
from radiance.text.tokenizers import open_tokenizer
from tests.helpers.toy_runs import output_of
from tests.helpers.toy_t5 import CAPTIONS, TOY, torch_tensors, toy_folder, train_tokenizer


def rows(text, dim=8, max_length=32, truncate=False):
    """Encode one text without padding."""
    embeddings, lengths = HashEncoder(dim, max_length)([text], truncate)
    return embeddings[0, : lengths[0]]


def same(a, b):
    return np.array_equal(rows(a), rows(b))


def test_shapes_and_types_of_the_hash_encoder():
    encoder = make_encoder(Text(max_length=20), 12)
    embeddings, lengths = encoder(["a red square", "", "two cats, sleeping"])
    assert embeddings.shape == (3, 20, 12)
    assert embeddings.dtype == np.float32
    assert lengths.tolist() == [4, 1, 5]
    assert lengths.dtype == np.int32
    assert (encoder.dim, encoder.max_length) == (12, 20)
    assert [encoder.count_tokens(text) for text in ("a red square", "", "two cats, sleeping")] == [
        4,
        1,
        5,
    ]


# --- determinism ----------------------------------------------------------------------------------


def test_values_do_not_change():
    """Models were trained on these numbers."""
    embeddings, _ = HashEncoder(8, 16)(["A red square", "", "红色 squares"])
    expected = {
        (0, 0): [1.145891, 0.73630404, 0.28674674, 0.6463191],  # a
        (0, 1): [-0.3065196, -0.46894506, 1.4605572, 0.6675358],  # red
        (0, 3): [-0.3458937, 1.2211542, -0.61087924, 0.64803565],  # end-of-sequence
        (1, 0): [-0.9604536, 0.12117307, 0.06717947, 0.5436811],  # end-of-sequence of an empty text
        (1, 1): [-0.2667461, 2.0217617, 0.37406304, -0.64071125],  # padding
        (2, 1): [1.6925296, -0.78588134, -0.54615813],  # 色
    }
    for (text, row), values in expected.items():
        np.testing.assert_allclose(embeddings[text, row, : len(values)], values, atol=1e-6)


def test_a_row_is_the_sum_of_a_word_and_two_pairs():
    """Each has a Gaussian vector, whose seed is its BLAKE2b hash."""

    def gaussian(gram):
        seed = np.frombuffer(hashlib.blake2b(gram.encode(), digest_size=16).digest(), "<u4")
        return np.random.RandomState(seed).standard_normal(8)

    grams = [
        ["red", " red", "red square"],
        ["square", "red square", "square </s>"],
        ["</s>", "square </s>", "</s> "],
    ]
    expected = [sum(map(gaussian, row)) / np.sqrt(3) for row in grams]
    np.testing.assert_allclose(rows("red square"), expected, atol=1e-6)


def test_embeddings_are_the_same_in_every_process():
    texts = ["A red square", "红色方块 🐱", "قطة"]
    script = f"""
import hashlib
from radiance.text.hash_encoder import HashEncoder
print(hashlib.sha256(HashEncoder(8, 16)({texts!r})[0].tobytes()).hexdigest())
"""
    ours = hashlib.sha256(HashEncoder(8, 16)(texts)[0].tobytes()).hexdigest()
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONIOENCODING": "utf-8"}
    assert output_of(script, environment=env).decode().strip() == ours


def test_embeddings_do_not_depend_on_batch_or_time():
    encoder = HashEncoder(8, 16)
    first, _ = encoder(["a cat"])
    again, _ = encoder(["a dog", "a cat"])
    np.testing.assert_array_equal(first[0], again[1])
    first[:], again[:] = 0, 0  # callers may change their arrays
    assert np.abs(encoder(["a cat"])[0]).min() > 0


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
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
def test_spellings_of_one_text_are_equal(a, b):
    assert same(a, b)


@pytest.mark.parametrize(
    ("text", "words"),
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
def test_words_of_all_scripts(text, words):
    encoder = HashEncoder(8, 32)
    assert encoder.split_words(text) == words
    embeddings, lengths = encoder([text])
    assert lengths[0] == encoder.count_tokens(text) == len(words) + 1
    result = embeddings[0, : lengths[0]]
    assert np.isfinite(result).all()
    assert len(np.unique(result, axis=0)) == len(result)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AI스타일", ["ai", "스", "타", "일"]),
        ("3마리", ["3", "마", "리"]),
        ("hdแมว", ["hd", "แ", "ม", "ว"]),
        ("a\U00020000", ["a", "\U00020000"]),
    ],
)
def test_letters_of_scripts_without_spaces_are_words(text, words):
    """In "red红色" they are not part of the word before."""
    assert HashEncoder(8, 32).split_words(text) == words


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_prompt_is_end_of_sequence_alone(text):
    assert rows(text).shape == (1, 8)
    assert same(text, "")


def test_padding_is_one_vector():
    embeddings, lengths = HashEncoder(8, 16)(["", "a red square"])
    padding = np.concatenate([embeddings[i, n:] for i, n in enumerate(lengths)])
    assert len(padding) == 32 - 5
    assert len(np.unique(padding, axis=0)) == 1
    assert not (embeddings[0, 0] == padding[0]).any()


def test_the_order_of_words_changes_the_rows():
    """After swapping the colors of two shapes only the row of end-of-sequence is the same."""
    a, b = rows("red square blue circle"), rows("blue square red circle")
    equal = (a[:, None] == b[None]).all(axis=-1)
    assert equal.tolist() == np.diag([False] * 4 + [True]).tolist()
    distance = np.abs(a[:, None] - b[None]).max(axis=-1)
    assert distance[~equal].min() > 0.1


# --- statistics -----------------------------------------------------------------------------------


def test_rows_have_unit_variance():
    result = rows("one two three four five six seven eight", dim=4096)
    np.testing.assert_allclose(result.var(axis=1), 1, atol=0.1)
    np.testing.assert_allclose(result.mean(axis=1), 0, atol=0.06)
    padding = HashEncoder(4096, 4)([""])[0][0, -1]
    assert padding.var() == pytest.approx(1, abs=0.1)


def test_a_word_correlates_with_itself_in_another_context():
    """It shares one vector of three; other words share none."""
    a, b = rows("a red car", dim=4096), rows("the red house", dim=4096)
    similar = np.corrcoef(a, b)[:4, 4:]
    expected = np.zeros((4, 4))
    expected[1, 1] = 1 / 3  # red
    expected[3, 3] = 2 / 3  # end-of-sequence, which shares a pair too
    np.testing.assert_allclose(similar, expected, atol=0.07)


# --- maximum length -------------------------------------------------------------------------------


def test_a_long_prompt_is_an_error():
    encoder = HashEncoder(8, 6)
    assert encoder(["a b c d e"])[1][0] == 6
    for text, count in (("a b c d e f", 7), ("a b\nc d\ne f g", 8), ("word " * 100, 101)):
        with pytest.raises(TextError) as caught:
            encoder(["fine", text])
        message = str(caught.value)
        assert f"{count} tokens" in message
        assert "limit is 6" in message
        assert "text.max_length" in message
        assert message.count("\n") == 0
        assert len(message) < 250
    assert issubclass(TextError, ValueError)


def test_truncation_keeps_the_first_words_and_end_of_sequence():
    encoder = HashEncoder(8, 6)
    embeddings, lengths = encoder(["a b c d e f g", "a b c d e", "a"], truncate=True)
    assert lengths.tolist() == [6, 6, 2]
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    np.testing.assert_array_equal(encoder(["a"])[0][0], embeddings[2])
    with pytest.raises(TextError):  # also after it was cut once
        encoder(["a b c d e f g"])


def test_lengths_are_rounded_up():
    cases = [
        (1, 64),
        (15, 64),
        (16, 64),
        (17, 64),
        (33, 64),
        (64, 64),
        (17, 20),
        (40, 40),
        (512, 512),
    ]
    assert [round_up_length(*case) for case in cases] == [16, 16, 16, 32, 48, 64, 20, 40, 512]


# --- T5 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("model") / "text_encoder")


@pytest.fixture(scope="module")
def toy(folder):
    return T5Encoder(folder, max_length=40, dtype="float32")


def encode_alone(encoder, text):
    """Encode one text and two padding tokens by a call of the network."""
    ids = encoder.tokenizer(text)
    padded = np.array([[*ids, 0, 0]], np.int32)
    return np.asarray(
        t5.encode_ids(
            TOY,
            "float32",
            encoder.weights.load_params("float32"),
            padded,
            np.array([len(ids)], np.int32),
        )
    )[0]


def test_tokens_are_counted_without_weights(toy, folder):
    """The tokenizer suffices, also the one beside the weights."""
    caption = "a red cat, two dogs"
    for text in (
        Text("t5", tokenizer=str(folder / "spiece.model")),
        Text("t5", file=str(folder), max_length=4),
    ):
        assert make_token_counter(text)(caption) == toy.count_tokens(caption) > 4
    assert (
        make_token_counter(Text(max_length=3))("one two, three")
        == make_token_counter(Text("random_t5", 3))("one two, three")
        == 5
    )
    with pytest.raises(ConfigError, match=r"set text\.tokenizer"):
        make_token_counter(Text("t5"))


def test_t5_shapes_and_types(toy, folder):
    embeddings, lengths = toy(["a red cat", "", "two cats"])
    assert embeddings.shape == (3, 40, TOY.hidden)
    assert embeddings.dtype == np.float32
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [toy.count_tokens(text) for text in ("a red cat", "", "two cats")]
    assert (toy.dim, toy.max_length, lengths[1]) == (TOY.hidden, 40, 1)
    half = T5Encoder(folder, max_length=40)
    result, _ = half(["a red cat", "", "two cats"])
    assert result.dtype == half.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), embeddings, atol=0.1)
    none, lengths = toy([])
    assert none.shape == (0, 40, TOY.hidden)
    assert lengths.shape == (0,)


def test_rows_of_t5(toy):
    """Rows behind the first padding token repeat it, so that they do not depend on shapes."""
    texts = ["a red cat", "", CAPTIONS[0], "the dog", " ".join(["a"] * 15)]
    embeddings, lengths = toy(texts)
    assert lengths[-1] == 16  # all 16 rows are real; the padding token adds 16
    assert len({round_up_length(n + 1, 40) for n in lengths}) > 1
    for text, rows, length, encoded in zip(texts, embeddings, lengths, toy.encode(texts)):
        expected = encode_alone(toy, text)
        np.testing.assert_allclose(rows[: length + 1], expected[: length + 1], atol=1e-5)
        assert (rows[length:] == rows[length]).all()
        assert encoded.length == length
        np.testing.assert_array_equal(encoded.rows, rows[: length + 1])
    assert np.abs(embeddings[0, -1] - embeddings[1, -1]).max() > 0.1  # padding depends on the text


def test_a_text_of_the_maximum_length_has_no_padding(toy, folder):
    text = CAPTIONS[0]
    full = T5Encoder(folder, max_length=toy.count_tokens(text), dtype="float32")
    (encoded,) = full.encode([text])
    assert encoded.rows.shape == (full.max_length, TOY.hidden)
    assert encoded.length == full.max_length
    np.testing.assert_allclose(encoded.rows, encode_alone(toy, text)[:-2], atol=1e-5)


def test_many_texts_are_encoded_in_few_shapes(toy, monkeypatch):
    """Order is kept, equal texts are encoded once, and batches are bounded."""
    shapes, run = [], t5.encode_ids

    def recorded(sizes, dtype, params, ids, lengths):
        shapes.append(ids.shape)
        return run(sizes, dtype, params, ids, lengths)

    monkeypatch.setattr(t5_encoder, "MAX_BATCH_TOKENS", 128)
    monkeypatch.setattr(t5, "encode_ids", recorded)
    texts = [("cat " * (i % 7 + 1) + "dog " * (i // 7)).strip() for i in range(28)] + [
        "cat",
        "cat dog",
    ] * 9
    embeddings, lengths = toy(texts)
    assert len(set(texts)) == 28
    assert sum(rows for rows, _ in shapes) < 28 * 1.5
    assert all(
        rows * width <= 128 and rows.bit_count() == 1 and width in (16, 32, 40)
        for rows, width in shapes
    )
    assert len(set(shapes)) <= 6
    for text, rows, length in zip(texts, embeddings, lengths):
        assert length == toy.count_tokens(text)
        np.testing.assert_allclose(
            rows[length - 1], embeddings[texts.index(text), length - 1], atol=0
        )
    for i in (0, 13, 27):
        expected = encode_alone(toy, texts[i])
        np.testing.assert_allclose(
            embeddings[i, : lengths[i] + 1], expected[: lengths[i] + 1], atol=1e-5
        )


def test_long_texts_of_t5(folder):
    small = T5Encoder(folder, max_length=8, dtype="float32")
    text = "two cats and three dogs, playing"
    with pytest.raises(TextError) as caught:
        small(["a cat", text])
    assert f"{small.count_tokens(text)} tokens" in str(caught.value)
    assert "limit is 8" in str(caught.value)
    assert small._params is None
    (encoded,) = small.encode([text], truncate=True)
    assert encoded.length == 8
    assert encoded.rows.shape == (8, TOY.hidden)
    ids = np.array([[*small.tokenizer(text)[:7], 1]], np.int32)
    expected = t5.encode_ids(
        TOY, "float32", small.weights.load_params("float32"), ids, np.array([8], np.int32)
    )
    np.testing.assert_allclose(encoded.rows, expected[0], atol=1e-5)


def test_t5_in_many_threads(folder):
    encoder, result = T5Encoder(folder, max_length=16, dtype="float32"), {}

    def work(i):
        result[i] = encoder([f"cat {i}"])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        np.testing.assert_array_equal(result[i], encoder([f"cat {i}"])[0])


def test_t5_loads_weights_with_the_given_shardings(folder):
    sharded_trees = []

    def shardings(tree):
        sharded_trees.append(tree)
        return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)

    encoder = make_encoder(
        Text(encoder="t5", file=str(folder), max_length=16), TOY.hidden, shardings
    )
    assert not sharded_trees  # weights are loaded for the first text
    encoder(["a cat"])
    assert len(sharded_trees) == 1


def test_identity_depends_on_everything_that_embeddings_depend_on(folder, tmp_path):
    base = T5Encoder(folder).identity
    assert (
        T5Encoder(folder / "model.safetensors", folder / "spiece.model", max_length=40).identity
        == base
    )
    other = toy_folder(tmp_path / "weights", seed=1)
    retrained = toy_folder(tmp_path / "tokenizer")
    train_tokenizer(retrained / "spiece.model", CAPTIONS[:4])
    nearly = tmp_path / "nearly.safetensors"
    tensors = torch_tensors()
    tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"][5, 7] *= 1.01
    save_file(tensors, nearly)
    result = {
        base,
        T5Encoder(folder, dtype="float32").identity,
        T5Encoder(other).identity,
        T5Encoder(retrained).identity,
        T5Encoder(nearly, folder).identity,
        HashEncoder(8, 16).identity,
        HashEncoder(9, 16).identity,
    }
    assert len(result) == 7
    assert HashEncoder(8, 16).identity == HashEncoder(8, 32).identity


def test_padding_to_the_visible_tokens(toy):
    """These are the real tokens for `strict`, and one padding token more for `one_pad`."""
    texts = ["a red cat", "", "two cats"]
    for encoder in (toy, HashEncoder(8, 40)):
        embeddings, lengths = encoder(texts)
        for width in (lengths.max(), lengths.max() + 1, 32):
            result, again = encoder.pad_embeddings(encoder.encode(texts), width)
            np.testing.assert_array_equal(result, embeddings[:, :width])
            np.testing.assert_array_equal(again, lengths)


# --- errors ---------------------------------------------------------------------------------------


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def test_wrong_settings_of_t5_are_an_error(folder, tmp_path):
    def make(dim=TOY.hidden, **settings):
        return make_encoder(Text(encoder="t5", max_length=16, **settings), dim)

    assert isinstance(make(file=str(folder)), T5Encoder)
    with pytest.raises(ConfigError) as error:
        make()
    assert all(part in sentence(error) for part in ("text.file", "text.cache", "radiance encode"))
    with pytest.raises(ConfigError) as error:
        make(dim=4096, file=str(folder))
    assert f"embeddings of {TOY.hidden} numbers, but model.text_dim is 4096" in sentence(error)
    with pytest.raises(CheckpointError) as error:
        make(file=str(tmp_path / "absent.safetensors"))
    assert "absent.safetensors" in sentence(error)
    save_file(torch_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        make(file=str(tmp_path))
    assert "text.tokenizer" in sentence(error)
    assert make(file=str(tmp_path), tokenizer=str(folder)).count_tokens("a cat") == make(
        file=str(folder)
    ).count_tokens("a cat")


def test_the_tokenizer_in_the_weights_is_used(folder, tmp_path):
    """ComfyUI's files of T5 contain the SentencePiece model as a tensor of bytes."""
    (tmp_path / "other").mkdir()
    spiece = train_tokenizer(tmp_path / "other" / "spiece.model").read_bytes()
    content = {"spiece_model": np.frombuffer(spiece, np.uint8)}
    save_file(torch_tensors() | content, tmp_path / "model.safetensors")
    inside, beside = T5Encoder(tmp_path / "model.safetensors"), T5Encoder(folder)
    assert inside.tokenizer("a red cat") == open_tokenizer(tmp_path / "other")("a red cat")
    given = T5Encoder(tmp_path / "model.safetensors", folder)
    assert given.tokenizer("a red cat") == beside.tokenizer("a red cat")
    save_file(
        torch_tensors() | {"spiece_model": np.zeros(9, np.uint8)}, tmp_path / "bad.safetensors"
    )
    with pytest.raises(CheckpointError, match="spiece_model in") as error:
        T5Encoder(tmp_path / "bad.safetensors")
    sentence(error)


def test_a_tokenizer_of_a_larger_model_is_an_error(folder, tmp_path):
    small = t5.T5(vocabulary=100, hidden=16, layers=1, heads=2, head_dim=4, mlp_hidden=8)
    save_file(torch_tensors(small), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        T5Encoder(tmp_path, folder)
    assert f"{open_tokenizer(folder).vocab_size} tokens" in sentence(error)
    assert "vectors for 100" in str(error.value)
