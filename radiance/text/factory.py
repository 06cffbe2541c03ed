"""Make the text encoder, or the token counter, of a configuration."""

from collections.abc import Callable

from radiance import config
from radiance.base.errors import ConfigError
from radiance.text import t5
from radiance.text.embedding_cache import CachedEncoder
from radiance.text.encoder import TextEncoder
from radiance.text.hash_encoder import HashEncoder
from radiance.text.random_t5 import RandomT5Encoder
from radiance.text.t5_encoder import T5Encoder
from radiance.text.tokenizers import open_tokenizer


def make_encoder(
    text: config.Text, dim: int, shardings: Callable[[t5.Params], t5.Params] | None = None
) -> TextEncoder:
    """Make the encoder of a configuration.

    Args:
        text: Settings. With `text.cache` the encoder reads embeddings there, and encodes the texts
            that it does not find.
        dim: Size of an embedding that the model reads (`model.text_dim`).
        shardings: Function from T5's parameter shapes to their shardings.

    Returns:
        The encoder.

    Raises:
        ConfigError: If T5 has neither weights nor a cache, or the encoder has another size.
    """
    encoder = _make_network_encoder(text, dim, shardings)
    if text.cache:
        encoder = CachedEncoder(text.cache, text.encoder, text.max_length, encoder)
    if encoder is None:
        raise ConfigError(
            "text.encoder=t5 needs T5's weights (text.file=FILE.safetensors or .gguf) or "
            "embeddings that `radiance encode` made (text.cache=FOLDER)."
        )
    if encoder.dim != dim:
        raise ConfigError(
            f"{text.file or text.cache} gives embeddings of {encoder.dim} numbers, but "
            f"model.text_dim is {dim}: set model.text_dim={encoder.dim}, or use another encoder."
        )
    return encoder


def _make_network_encoder(
    text: config.Text, dim: int, shardings: Callable[[t5.Params], t5.Params] | None
) -> TextEncoder | None:
    """Make the encoder without a cache; None for a T5 without weights."""
    if text.encoder == "hash":
        return HashEncoder(dim, text.max_length)
    if text.encoder == "random_t5":
        return RandomT5Encoder(dim, text.max_length, text.dtype)
    if text.file:
        return T5Encoder(text.file, text.tokenizer, text.max_length, text.dtype, shardings)
    return None


def make_token_counter(text: config.Text) -> Callable[[str], int]:
    """Make `TextEncoder.count_tokens` of a configuration; T5's tokenizer suffices for it.

    Args:
        text: Settings.

    Returns:
        A function from a text to its number of tokens.

    Raises:
        ConfigError: If T5 has neither tokenizer nor weights nor a cache.
    """
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
    raise ConfigError(
        "text.encoder=t5 counts tokens with T5's tokenizer: set text.tokenizer (spiece.model or "
        "tokenizer.json), or change text.encoder."
    )
