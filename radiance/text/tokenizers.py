"""T5's tokenizer, from its SentencePiece model or from Hugging Face's `tokenizer.json`.

Both give the ids of transformers' T5Tokenizer. This includes control text in a prompt: "</s>",
"<pad>", "<unk>" and "<extra_id_0>" to "<extra_id_99>" become the tokens of those names, where
SentencePiece alone would spell them out. There is one difference: a letter and its accent as two
characters, followed by a joiner or an emoji modifier, are one letter for SentencePiece and two for
the `tokenizers` package.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from radiance.base.errors import CheckpointError
from radiance.base.text_files import decode_text, replace_invalid

TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
PAD_ID, END_ID = 0, 1
PROBE_TEXT = "a cat \ue000"  # has a letter that no tokenizer knows: damaged files fail with it
MAX_TOKENIZER_BYTES = 256_000_000
PROBE_WORDS = ("a", "photo", "of", "the", "red", "cat", "and", "two", "dogs", "in", "park")
# Parts of tokenizer.json whose work is linear in the text. Others, such as regular expressions,
# could make a short prompt take hours, and T5 has none but one.
ALLOWED_PARTS = {
    *("Sequence", "Precompiled", "NFC", "NFD", "NFKC", "NFKD", "Strip", "Lowercase", "Replace"),
    *("Metaspace", "WhitespaceSplit", "Whitespace"),
}
ALLOWED_PATTERN = {"Regex": " {2,}"}  # of Replace
NUM_SENTINELS = 100  # their ids follow those of the pieces, the last sentinel first

OpenedTokenizer = tuple[Callable[[str], list[int]], int, dict[str, int | None]]


class Tokenizer:
    """A function from a text to token ids, end-of-sequence (1) last.

    Args:
        origin: The file that errors name.
        content: Content of the tokenizer's file.
        tokenize: Function from a text to token ids, without end-of-sequence.
        vocab_size: A number above all ids.
    """

    def __init__(
        self,
        origin: object,
        content: bytes,
        tokenize: Callable[[str], list[int]],
        vocab_size: int,
    ):
        self.origin, self.tokenize, self.vocab_size = origin, tokenize, vocab_size
        self.identity = hashlib.blake2b(content, digest_size=16).hexdigest()

    def __call__(self, text: str) -> list[int]:
        """Convert a text to token ids; lone surrogates, which are invalid, become U+FFFD."""
        return [*self.tokenize(replace_invalid(text)), END_ID]


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open the tokenizer in a file, or of the model in a folder (see `find_tokenizer`).

    Args:
        path: A file or a folder.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: If there is none, if the file is damaged, or if it is not T5's.
    """
    path = Path(path).expanduser()
    path = find_tokenizer(path) if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"There is no tokenizer {path}: set text.tokenizer to one.")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path} is too large for a tokenizer: set text.tokenizer to one.")
    return parse_tokenizer(path.read_bytes(), path)


def parse_tokenizer(content: bytes, origin: object) -> Tokenizer:
    """Return the tokenizer of a SentencePiece model or a tokenizer.json.

    Args:
        content: Content of the file.
        origin: The file that errors name.

    Raises:
        CheckpointError: If the content is damaged, or not T5's tokenizer.
    """
    is_json = content[:64].lstrip().startswith(b"{")
    parse = _parse_tokenizer_json if is_json else _parse_sentencepiece
    tokenize, vocab_size, control_ids = parse(content, origin)
    _check_control_ids(origin, control_ids)
    _check_words(origin, tokenize)
    return Tokenizer(origin, content, tokenize, vocab_size)


def _check_control_ids(origin: object, control_ids: dict[str, int | None]):
    """Raise CheckpointError if the ids of padding and end-of-sequence are not T5's."""
    if control_ids != {"<pad>": PAD_ID, "</s>": END_ID}:
        id_list = ", ".join(f"{token} is {token_id}" for token, token_id in control_ids.items())
        raise CheckpointError(
            f"{origin} is not a tokenizer of T5, which has <pad> as 0 and </s> as 1 "
            f"(here {id_list}): use T5's."
        )


def _check_words(origin: object, tokenize: Callable[[str], list[int]]):
    """Raise CheckpointError if a tokenizer does not know half of some frequent words."""
    (unknown_id,) = set(tokenize("\ue000")[-1:]) or {None}
    known_words = [word for word in PROBE_WORDS if unknown_id not in tokenize(word)]
    if 2 * len(known_words) < len(PROBE_WORDS):
        raise CheckpointError(
            f"{origin} knows {len(known_words)} of {len(PROBE_WORDS)} frequent words, so it is "
            "incomplete: copy or download T5's tokenizer again."
        )


def find_tokenizer(folder: Path) -> Path:
    """Find the first spiece.model or tokenizer.json of a model's folder.

    It is looked for in the folder itself, in its tokenizer_2 and tokenizer, and, for diffusers'
    layout, in the tokenizer_2 beside text_encoder_2.

    Args:
        folder: Folder of a model or of a text encoder.

    Returns:
        The file.

    Raises:
        CheckpointError: If there is none.
    """
    folders = [folder, folder / "tokenizer_2", folder / "tokenizer"]
    if folder.name.startswith("text_encoder"):
        folders.append(folder.with_name(folder.name.replace("text_encoder", "tokenizer")))
    for candidate_folder in folders:
        for name in TOKENIZER_FILES:
            if (candidate_folder / name).is_file():
                return candidate_folder / name
    raise CheckpointError(
        f"There is no {' or '.join(TOKENIZER_FILES)} in {folder} (nor in a tokenizer folder of "
        "it): set text.tokenizer to one."
    )


def _parse_sentencepiece(content: bytes, origin: object) -> OpenedTokenizer:
    """Return a function to ids, the vocabulary's size, and the ids of control text."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ImportError(
            "spiece.model needs the sentencepiece package: pip install 'radiance[text]'."
        ) from None
    try:
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(content)
    except RuntimeError:
        raise CheckpointError(
            f"{origin} is not a complete SentencePiece model: copy or download it again."
        ) from None
    num_pieces = model.get_piece_size()
    piece_ids = {model.id_to_piece(i): i for i in range(num_pieces)}
    control_ids = {token: piece_ids.get(token) for token in ("<pad>", "</s>")}
    special_ids = {
        token: piece_ids[token] for token in ("<pad>", "</s>", "<unk>") if token in piece_ids
    }
    special_ids |= {
        f"<extra_id_{i}>": num_pieces + NUM_SENTINELS - 1 - i for i in range(NUM_SENTINELS)
    }
    split_at_special = re.compile(f"({'|'.join(map(re.escape, special_ids))})").split

    def tokenize(text: str) -> list[int]:
        ids = []
        # SentencePiece treats every space as one except U+0085; `tokenizers` treats that as one
        # too.
        for segment in split_at_special(text.replace("\x85", " ")):
            ids += [special_ids[segment]] if segment in special_ids else model.encode(segment)
        return ids

    return tokenize, num_pieces + NUM_SENTINELS, control_ids


def _parse_tokenizer_json(content: bytes, origin: object) -> OpenedTokenizer:
    """Return a function to ids, the vocabulary's size, and the ids of control text."""
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "tokenizer.json needs the tokenizers package: pip install 'radiance[text]'."
        ) from None
    try:
        text = decode_text(content, "it")
        _check_parts(json.loads(text))
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()  # files store the settings of their last use
        tokenizer.no_padding()
        tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
    except Exception as error:  # tokenizers raises plain exceptions
        raise CheckpointError(
            f"{origin} is not a complete tokenizer ({error}): copy or download it again."
        ) from None
    control_ids = {token: tokenizer.token_to_id(token) for token in ("<pad>", "</s>")}
    return (
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        max(tokenizer.get_vocab().values(), default=0) + 1,
        control_ids,
    )


def _check_parts(content: dict[str, Any]):
    """Raise ValueError if a tokenizer.json has parts that T5's tokenizer does not have."""
    parts = [content.get("normalizer"), content.get("pre_tokenizer")]
    while parts:
        part = parts.pop()
        if part is None:
            continue
        if part["type"] not in ALLOWED_PARTS or (
            part["type"] == "Replace" and part["pattern"] != ALLOWED_PATTERN
        ):
            raise ValueError(f"T5 has no part {str(part)[:80]}")
        parts += [*part.get("normalizers", []), *part.get("pretokenizers", [])]
