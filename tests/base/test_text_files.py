"""Text files: UTF-8 everywhere, and lines that end with a line feed."""

import pytest

from radiance.base.errors import TextError
from radiance.base.text_files import decode_text, read_lines, read_text, split_lines


def test_text_is_utf_8_on_every_system(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "cp1252")
    path = tmp_path / "captions.txt"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + "ein Café 🐈\nкот\n".encode())
        assert read_text(path) == "ein Café 🐈\nкот\n"
        assert read_lines(path) == ["ein Café 🐈", "кот"]


@pytest.mark.parametrize(
    ("content", "position"),
    [
        ("é".encode("latin-1"), 0),
        (b"a cat, \xff", 7),
        (b"\xef\xbb\xbfa cat, \xff", 10),
        ("a cat".encode("utf-16"), 0),
        ("a cat".encode("utf-16-le"), 1),
        (b"a cat\0\0\0", 5),
        (b"\xed\xa0\x80", 0),  # a surrogate
    ],
)
def test_other_bytes_are_refused(content, position):
    message = rf"^list\.txt is not UTF-8 text \(byte {position}\): save it as UTF-8\.$"
    with pytest.raises(TextError, match=message):
        decode_text(content, "list.txt")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", *"\f\v\x1c\x1d\x1e\r"])
def test_only_line_feeds_end_lines(separator):
    text = f"a cat{separator}at night"
    assert split_lines(f"{text}\n\r\n{text}\r\n") == [text, "", text]
    assert split_lines(text) == [text]


def test_an_empty_file_has_no_lines():
    assert split_lines("") == []
    assert split_lines("\n") == [""]
