"""Encode prompts as the conditions that the sampler takes."""

from collections.abc import Sequence

import numpy as np

from radiance import config
from radiance.flow.guidance import TextCondition
from radiance.model.transformer import visible_lengths
from radiance.text.encoder import TextEncoder, round_up_length


def encode_prompts(
    encoder: TextEncoder,
    prompts: Sequence[str],
    settings: config.Sample,
    masking: str,
    num_tokens: int | None = None,
) -> tuple[TextCondition, TextCondition]:
    """Encode prompts, and the text of the unconditional prediction.

    Texts are padded to a common length. Tokens beyond it are masked in any case.

    Args:
        encoder: The text encoder.
        prompts: Texts.
        settings: Settings of sampling, which determine the unconditional text: the negative prompt,
            or a text of length 0.
        masking: `model.masking`.
        num_tokens: The common length; the shortest with all visible tokens when None.

    Returns:
        Conditions of the prompts, and of the unconditional text.
    """
    encoded = encoder.encode([*prompts, settings.negative_prompt])
    text, lengths = encoder.pad_embeddings(
        encoded,
        num_tokens or count_visible_tokens(encoder, [*prompts, settings.negative_prompt], masking),
    )
    if settings.unconditional == "masked":
        lengths[-1] = 0
    return TextCondition(text[:-1], lengths[:-1]), TextCondition(text[-1:], lengths[-1:])


def count_visible_tokens(encoder: TextEncoder, texts: Sequence[str], masking: str) -> int:
    """Return a length that contains the visible tokens of all texts.

    It is rounded up, so that few programs are compiled.

    Raises:
        TextError: For a text over the limit of the encoder.
    """
    counts = np.array([encoder.count_tokens(text) for text in texts])
    for text, count in zip(texts, counts.tolist()):
        encoder.check_length(text, count, truncate=False)
    return round_up_length(
        int(visible_lengths(counts, encoder.max_length, masking).max()), encoder.max_length
    )
