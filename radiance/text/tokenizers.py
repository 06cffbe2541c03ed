"""T5's tokenizer, from its SentencePiece model or from the `tokenizer.json` that Hugging Face makes of it.

Both give the ids that transformers' T5Tokenizer gives. That includes control text in a prompt: "</s>", "<pad>", "<unk>" and
"<extra_id_0>" to "<extra_id_99>" become the tokens they name (SentencePiece alone would spell them out). One thing differs:
a letter and its accent as two characters, with a joiner or an emoji modifier right behind them, are one letter to SentencePiece
and two to the `tokenizers` package.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from radiance.base.errors import CheckpointError

TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
PAD_ID, END_ID = 0, 1
PROBE_TEXT = "a cat \ue000"  # with a letter that no tokenizer knows: some files are read, and fail at such a text
NUM_SENTINELS = 100  # with ids after the pieces, the last one first


class Tokenizer:
    """Text in, ids out, the end of the sequence (1) last. Ids are below `size`."""

    def __init__(self, path: Path, tokenize: Callable[[str], list[int]], vocab_size: int):
        self.path, self.tokenize, self.vocab_size = path, tokenize, vocab_size
        self.identity = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()

    def __call__(self, text: str) -> list[int]:
        """Half of a surrogate pair, which is no text, becomes U+FFFD."""
        valid_text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return [*self.tokenize(valid_text), END_ID]


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or of the model in a folder (see `find`).

    Raises CheckpointError when there is none, when the file is damaged, or when it is not T5's.
    """
    path = Path(path).expanduser()
    path = find_tokenizer(path) if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"There is no tokenizer {path}.")
    with path.open("rb") as file:
        header = file.read(64)
    tokenize, vocab_size, control_ids = (
        _open_tokenizer_json if header.lstrip().startswith(b"{") else _open_sentencepiece
    )(path)
    if control_ids != {"<pad>": PAD_ID, "</s>": END_ID}:
        id_list = ", ".join(f"{token} is {token_id}" for token, token_id in control_ids.items())
        raise CheckpointError(
            f"{path} is not a tokenizer of T5, which has <pad> as 0 and </s> as 1 (here {id_list}): give T5's."
        )
    return Tokenizer(path, tokenize, vocab_size)


def find_tokenizer(folder: Path) -> Path:
    """The first spiece.model or tokenizer.json of a model's folder: in itself, in its tokenizer_2 or tokenizer, or (diffusers'
    layout) in the tokenizer_2 beside text_encoder_2. Raises CheckpointError when there is none.
    """
    folders = [folder, folder / "tokenizer_2", folder / "tokenizer"]
    if folder.name.startswith("text_encoder"):
        folders.append(folder.with_name(folder.name.replace("text_encoder", "tokenizer")))
    for candidate in (
        candidate_folder / name for candidate_folder in folders for name in TOKENIZER_FILES
    ):
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"There is no {' or '.join(TOKENIZER_FILES)} in {folder} (nor in a tokenizer folder of it): give one as text.tokenizer."
    )


def _open_sentencepiece(
    path: Path,
) -> tuple[Callable[[str], list[int]], int, dict[str, int | None]]:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ImportError(
            "spiece.model needs the sentencepiece package: pip install 'radiance[text]'."
        ) from None
    try:
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError:
        raise CheckpointError(
            f"{path} is not a SentencePiece model, or not a whole one: copy or download it again."
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
        # SentencePiece takes every space for one but this; `tokenizers` takes this too.
        segments = split_at_special(text.replace("\x85", " "))
        return [
            i
            for segment in segments
            for i in ([special_ids[segment]] if segment in special_ids else model.encode(segment))
        ]

    return tokenize, num_pieces + NUM_SENTINELS, control_ids


def _open_tokenizer_json(
    path: Path,
) -> tuple[Callable[[str], list[int]], int, dict[str, int | None]]:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "tokenizer.json needs the tokenizers package: pip install 'radiance[text]'."
        ) from None
    try:
        text = path.read_text()
        json.loads(text)
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()  # files keep what they were last used with
        tokenizer.no_padding()
        tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
    except Exception as error:  # what tokenizers raises is of no narrower type
        raise CheckpointError(
            f"{path} is not a tokenizer, or not a whole one ({error}): copy or download it again."
        ) from None
    control_ids = {token: tokenizer.token_to_id(token) for token in ("<pad>", "</s>")}
    return (
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        max(tokenizer.get_vocab().values(), default=0) + 1,
        control_ids,
    )
