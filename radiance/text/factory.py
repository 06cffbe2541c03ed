"""Text in, (embeddings [b, l, d], lengths [b]) out: the interface of all encoders, one that needs no download, and T5.

`lengths` counts real tokens, the end of the sequence included. The row behind them is a padding token's, which the published
models see (`masking: one_pad`); T5 computes it with the real tokens in view, so it is not the same in every text. The rows behind
that one, which only `masking: off` sees, repeat it; the random T5 gives them too.
"""

from collections.abc import Callable

from radiance import config
from radiance.text import t5
from radiance.text.encoder import TextEncoder
from radiance.text.hash_encoder import HashEncoder
from radiance.text.t5_encoder import T5Encoder
from radiance.text.tokenizers import open_tokenizer


def make_encoder(
    text: config.Text, dim: int, shardings: Callable[[t5.Params], t5.Params] | None = None
) -> TextEncoder:
    """The encoder of a config; with `text.cache`, one that looks texts up there and encodes those it does not find.

    dim: the model's `text_dim`; ConfigError when the encoder has another. shardings: gives the places of T5's parameters.
    """
    from radiance.text.embedding_cache import CachedEncoder  # which is an Encoder itself
    from radiance.text.random_t5 import RandomT5Encoder

    if text.encoder == "t5" and not text.file and not text.cache:
        raise config.ConfigError(
            "text.encoder=t5 needs T5's weights (text.file=FILE.safetensors or .gguf) or embeddings that `radiance encode` made (text.cache=FOLDER)."
        )
    encoder: TextEncoder | None = None
    if text.encoder == "hash":
        encoder = HashEncoder(dim, text.max_length)
    elif text.encoder == "random_t5":
        encoder = RandomT5Encoder(dim, text.max_length, text.dtype)
    elif text.file:
        encoder = T5Encoder(text.file, text.tokenizer, text.max_length, text.dtype, shardings)
    if text.cache:
        encoder = CachedEncoder(text.cache, text.encoder, text.max_length, encoder)
    if encoder.dim != dim:
        origin = text.file or text.cache
        raise config.ConfigError(
            f"{origin} gives embeddings of {encoder.dim} numbers, but model.text_dim is {dim}: set model.text_dim={encoder.dim}, or give another."
        )
    return encoder


def make_token_counter(text: config.Text) -> Callable[[str], int]:
    """`Encoder.count` of a config's encoder, for which T5's tokenizer alone will do. Raises ConfigError when there is not even that."""
    from radiance.text.embedding_cache import CachedEncoder  # which is an Encoder itself
    from radiance.text.random_t5 import RandomT5Encoder

    if text.encoder == "hash":
        return HashEncoder(1, text.max_length).count_tokens
    if text.encoder == "random_t5":
        return RandomT5Encoder(1, text.max_length).count_tokens
    if text.tokenizer:
        tokenize = open_tokenizer(text.tokenizer)
        return lambda caption: len(tokenize(caption))
    if text.file:
        return T5Encoder(text.file, max_length=text.max_length).count_tokens
    if text.cache:
        return CachedEncoder(text.cache, text.encoder, text.max_length).count_tokens
    raise config.ConfigError(
        "text.encoder=t5 counts tokens with T5's tokenizer: give it as text.tokenizer (spiece.model or tokenizer.json), or change text.encoder."
    )
