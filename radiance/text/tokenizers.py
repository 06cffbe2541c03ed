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

from radiance.weights.files import CheckpointError

NAMES = ("spiece.model", "tokenizer.json")
PAD, END = 0, 1
PROBE = "a cat \ue000"  # with a letter that no tokenizer knows: some files are read, and fail at such a text
SENTINELS = 100  # with ids after the pieces, the last one first


class Tokenizer:
    """Text in, ids out, the end of the sequence (1) last. Ids are below `size`."""

    def __init__(self, path: Path, pieces: Callable[[str], list[int]], size: int):
        self.path, self.pieces, self.size = path, pieces, size
        self.identity = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()

    def __call__(self, text: str) -> list[int]:
        """Half of a surrogate pair, which is no text, becomes U+FFFD."""
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return [*self.pieces(whole), END]


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or of the model in a folder (see `find`).

    Raises CheckpointError when there is none, when the file is damaged, or when it is not T5's.
    """
    path = Path(path).expanduser()
    path = find(path) if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"There is no tokenizer {path}.")
    with path.open("rb") as file:
        start = file.read(64)
    pieces, size, control = (_json if start.lstrip().startswith(b"{") else _sentencepiece)(path)
    if control != {"<pad>": PAD, "</s>": END}:
        told = ", ".join(f"{token} is {number}" for token, number in control.items())
        raise CheckpointError(f"{path} is not a tokenizer of T5, which has <pad> as 0 and </s> as 1 (here {told}): give T5's.")
    return Tokenizer(path, pieces, size)


def find(folder: Path) -> Path:
    """The first spiece.model or tokenizer.json of a model's folder: in itself, in its tokenizer_2 or tokenizer, or (diffusers'
    layout) in the tokenizer_2 beside text_encoder_2. Raises CheckpointError when there is none."""
    folders = [folder, folder / "tokenizer_2", folder / "tokenizer"]
    if folder.name.startswith("text_encoder"):
        folders.append(folder.with_name(folder.name.replace("text_encoder", "tokenizer")))
    for candidate in (each / name for each in folders for name in NAMES):
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"There is no {' or '.join(NAMES)} in {folder} (nor in a tokenizer folder of it): give one as text.tokenizer.")


def _sentencepiece(path: Path) -> tuple[Callable[[str], list[int]], int, dict[str, int | None]]:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ImportError("spiece.model needs the sentencepiece package: pip install 'radiance[text]'.") from None
    try:
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError:
        raise CheckpointError(f"{path} is not a SentencePiece model, or not a whole one: copy or download it again.") from None
    count = model.get_piece_size()
    known = {model.id_to_piece(i): i for i in range(count)}
    control = {token: known.get(token) for token in ("<pad>", "</s>")}
    special = {token: known[token] for token in ("<pad>", "</s>", "<unk>") if token in known}
    special |= {f"<extra_id_{i}>": count + SENTINELS - 1 - i for i in range(SENTINELS)}
    split = re.compile(f"({'|'.join(map(re.escape, special))})").split

    def pieces(text: str) -> list[int]:
        # SentencePiece takes every space for one but this; `tokenizers` takes this too.
        parts = split(text.replace("\x85", " "))
        return [i for part in parts for i in ([special[part]] if part in special else model.encode(part))]

    return pieces, count + SENTINELS, control


def _json(path: Path) -> tuple[Callable[[str], list[int]], int, dict[str, int | None]]:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("tokenizer.json needs the tokenizers package: pip install 'radiance[text]'.") from None
    try:
        text = path.read_text()
        json.loads(text)
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()  # files keep what they were last used with
        tokenizer.no_padding()
        tokenizer.encode(PROBE, add_special_tokens=False)
    except Exception as error:  # what tokenizers raises is of no narrower type
        raise CheckpointError(f"{path} is not a tokenizer, or not a whole one ({error}): copy or download it again.") from None
    control = {token: tokenizer.token_to_id(token) for token in ("<pad>", "</s>")}
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, max(tokenizer.get_vocab().values(), default=0) + 1, control
