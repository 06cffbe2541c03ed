"""T5's tokenizer from both kinds of files, compared with transformers."""

import json
import random
import sys
from functools import partial

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Their
from tokenizers import models, normalizers, pre_tokenizers

from radiance.base.errors import CheckpointError, ConfigError
from radiance.text.t5 import T5
from radiance.text.t5_encoder import T5Encoder
from radiance.text.tokenizers import find_tokenizer, open_tokenizer
from tests.helpers.toy_t5 import CAPTIONS, toy_folder, train_tokenizer

SPACES = [chr(i) for i in range(0x3001) if chr(i).isspace()] + [
    "\u200b",
    "\u200c",
    "\u2060",
    "\ufeff",
    "\u00ad",
]
CONTROL = [
    "</s>",
    "<pad>",
    "<unk>",
    "<extra_id_0>",
    "<extra_id_99>",
    "<extra_id_100>",
    "<s>",
    "</S>",
]
LETTERS = [
    *"abcdefgh .,'!<>/▁_12",
    *SPACES,
    *CONTROL,
    "😀",
    "👨‍👩‍👧",
    "é",
    "红",
    "ｆ",
    "ﬁ",
    "…",
    "ß",
    "İ",
    "קטה",
    "\x00",
    "\x1f",
]
TEXTS = [
    *CAPTIONS, "", " ", "  two   cats ", "two\ncats\tand\r\ndogs", "A CAT", "cafe\u0301",
    "two\x85cats", "😀 cat 😀😀", "红色方块", "x" * 3000, "a </s> b", "a</s>b", "<pad>",
    "</s></s>", "<extra_id_3> cat<extra_id_0>", "<unk> a", "a<s>b", "a < b > c / d",
]  # fmt: skip


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


@pytest.fixture(scope="module")
def as_json(spiece, tmp_path_factory):
    """Write the model like Hugging Face, without normalizer, with truncation and padding."""
    model = SentencePieceProcessor(model_file=str(spiece))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    tokenizer = Their(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.add_special_tokens(
        ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(99, -1, -1))]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def random_texts(count, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choice(LETTERS) for _ in range(draw.randint(1, 14))) for _ in range(count)]


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


# --- ids ------------------------------------------------------------------------------------------


def test_ids_end_with_end_of_sequence(spiece, as_json):
    for path in (spiece, as_json):
        tokenizer = open_tokenizer(path)
        for text in TEXTS:
            ids = tokenizer(text)
            assert ids[-1] == 1
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            if "</s>" not in text:
                assert 1 not in ids[:-1]
        assert tokenizer("") == tokenizer("  \n") == [1]
        assert tokenizer("two cats") == tokenizer("  two\n cats ")
        assert len(tokenizer("x" * 3000)) == 1 + len(tokenizer.tokenize("x" * 3000)) > 1000


def test_both_files_give_the_same_ids(spiece, as_json):
    a, b = open_tokenizer(spiece), open_tokenizer(as_json)
    assert a.vocab_size == b.vocab_size
    for text in TEXTS:
        assert a(text) == b(text), text
    assert a.identity != b.identity  # the files differ
    assert a.identity == open_tokenizer(spiece.parent).identity


def test_control_text_becomes_tokens(spiece):
    tokenizer = open_tokenizer(spiece)
    last = tokenizer.vocab_size - 1
    (cat,) = tokenizer("cat")[:-1]
    for text, expected in {
        "</s>": [1],
        "<pad>": [0],
        "<unk>": [2],
        "<extra_id_0>": [last],
        "<extra_id_99>": [last - 99],
        "cat</s>cat": [cat, 1, cat],
        "cat </s>  cat": [cat, 1, cat],
        "<pad><extra_id_1>cat": [0, last - 1, cat],
    }.items():
        assert tokenizer(text) == [*expected, 1], text
    assert last not in tokenizer("<extra_id_100>")
    assert 1 not in tokenizer("</S>")[:-1]


def test_a_lone_surrogate_is_an_unknown_character(spiece, as_json):
    """Cut JSON strings may contain one."""
    for path in (spiece, as_json):
        tokenizer = open_tokenizer(path)
        assert tokenizer("cat \ud83d") == tokenizer("cat \ufffd")
        assert tokenizer("cat \ud83d\ude00") == tokenizer("cat 😀")


@pytest.mark.reference
def test_ids_equal_those_of_transformers(spiece, tmp_path):
    """Compare T5Tokenizer on unusual texts, and its own tokenizer.json."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    theirs = transformers.T5Tokenizer.from_pretrained(str(spiece.parent))
    theirs.save_pretrained(tmp_path)
    sentencepiece, json_file = open_tokenizer(spiece), open_tokenizer(tmp_path)
    assert (sentencepiece.origin.name, json_file.origin.name) == (
        "spiece.model",
        "tokenizer.json",
    )
    assert sentencepiece.vocab_size == json_file.vocab_size == len(theirs)
    for text in [
        *TEXTS,
        *random_texts(3000),
        *(f"a{space}b {space}cat{space}" for space in SPACES),
    ]:
        expected = theirs(text).input_ids
        assert sentencepiece(text) == json_file(text) == expected, repr(text)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    ["spiece.model", "tokenizer.json", "tokenizer_2/spiece.model", "tokenizer/tokenizer.json"],
)
def test_tokenizers_are_found_in_a_folder(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert find_tokenizer(tmp_path) == path


def test_tokenizers_are_found_beside_the_text_encoder(tmp_path):
    for name in ("text_encoder_2", "tokenizer_2", "tokenizer"):
        (tmp_path / name).mkdir()
    for name in ("tokenizer_2", "tokenizer"):
        (tmp_path / name / "tokenizer.json").touch()
    assert (
        find_tokenizer(tmp_path / "text_encoder_2") == tmp_path / "tokenizer_2" / "tokenizer.json"
    )
    assert find_tokenizer(tmp_path / "tokenizer") == tmp_path / "tokenizer" / "tokenizer.json"


def test_the_kind_is_detected_from_the_content(spiece, as_json, tmp_path):
    for number, path in enumerate((spiece, as_json)):
        other = tmp_path / f"tokenizer{number}.bin"
        other.write_bytes(path.read_bytes())
        assert open_tokenizer(other)("two cats") == open_tokenizer(path)("two cats")


def test_wrong_files_are_an_error(spiece, as_json, tmp_path):
    bad = tmp_path / "bad"
    model = json.loads(as_json.read_text())
    cases = {
        "cut short": spiece.read_bytes()[:500],
        "empty": b"",
        "no protobuf": b"not a model at all",
        "JSON cut short": as_json.read_bytes()[:500],
        "another JSON": b'{"weight_map": {}}',
        "no UTF-8": b'{"\xff": 1}',
    }
    for name, data in cases.items():
        bad.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            open_tokenizer(bad)
        assert str(bad) in sentence(error), name
        assert "not a complete" in str(error.value), name
    model["added_tokens"] = []
    model["model"]["vocab"][:2] = [["<s>", 0.0], ["<pad>", 0.0]]
    bad.write_text(json.dumps(model))
    with pytest.raises(CheckpointError) as error:
        open_tokenizer(bad)
    assert "not a tokenizer of T5" in sentence(error)
    assert "<pad> is 1" in str(error.value)
    model = json.loads(as_json.read_text())
    del model["model"]["unk_id"]
    bad.write_text(json.dumps(model))
    with pytest.raises(CheckpointError) as error:
        open_tokenizer(bad)
    assert "unk_id" in sentence(error)
    for path in (tmp_path / "absent.model", tmp_path):
        with pytest.raises(CheckpointError) as error:
            open_tokenizer(path)
        assert "There is no" in sentence(error)


@pytest.mark.parametrize("package", ["sentencepiece", "tokenizers"])
def test_a_missing_package_is_an_error(spiece, as_json, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    wanting = partial(open_tokenizer, spiece if package == "sentencepiece" else as_json)
    with pytest.raises(ImportError, match=r"pip install 'radiance\[text\]'"):
        wanting()


def test_files_without_words_are_an_error(spiece, as_json, tmp_path):
    """As 104 tokens: control text alone, with which every word is unknown."""
    content = json.loads(as_json.read_text("utf-8"))
    content["model"]["vocab"] = [*content["model"]["vocab"][:3], ["▁", -1.0]]
    sentinels = [token for token in content["added_tokens"] if "extra" in token["content"]]
    for i, token in enumerate(sentinels):
        token["id"] = 4 + i
    content["added_tokens"] = [*content["added_tokens"][:3], *sentinels]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), "utf-8")
    assert Their.from_file(str(path)).get_vocab_size() == 104
    with pytest.raises(CheckpointError) as error:
        open_tokenizer(path)
    assert "knows 0 of 11 frequent words" in sentence(error)


def test_a_tokenizer_of_another_model_is_an_error(tmp_path):
    """Its tokens are few beside the vectors of the network."""
    folder = toy_folder(tmp_path / "t5", T5(1000, 32, 1, 4, 6, 40))
    with pytest.raises(ConfigError, match=r"has .* tokens, and .* vectors for 1000: set"):
        T5Encoder(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 99}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed"}),
        ("pre_tokenizer", "Metaspace"),
        ("pre_tokenizer", {}),
    ],
)
def test_parts_that_choose_the_amount_of_work_are_an_error(as_json, tmp_path, place, part):
    content = json.loads(as_json.read_text("utf-8"))
    content[place] = {"type": "Sequence", f"{place.replace('_', '')}s": [content[place], part]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(CheckpointError) as error:
        open_tokenizer(path)
    assert "is not a complete tokenizer" in sentence(error)
