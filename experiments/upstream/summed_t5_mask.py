"""T5's additive mask counts samples: tokens that several samples share get a bias of 2, 3, 4.

lodestone-rock/flow, src/models/chroma/module/t5.py (read at 4325b18): the mask's product over the
batch is the number of samples that keep both tokens; 0 becomes the lowest number, 1 becomes 0, and
every other count stays and is added to the logits. It is correct for a batch of 1.
The script takes seconds.
"""

import numpy as np

LENGTHS, NUM_TOKENS = (12, 40, 90, 300), 512


def softmax(x):
    """Return the softmax over the last axis."""
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def main():
    rng = np.random.default_rng(0)
    is_token = (np.arange(NUM_TOKENS) < np.array(LENGTHS)[:, None]).astype(np.float32)
    counts = is_token.T @ is_token
    bias = np.where(counts == 0, -3e38, np.where(counts == 1, 0, counts)).astype(np.float32)
    ranges = zip((0, *LENGTHS), (*LENGTHS, NUM_TOKENS))
    by_position = {f"{low}–{high - 1}": float(bias[0, low]) for low, high in ranges}
    print(f"bias of a token that all samples have, by position: {by_position}")
    logits = rng.standard_normal((LENGTHS[0], NUM_TOKENS), np.float32)  # of those tokens
    mask = np.where(is_token[-1] > 0, 0, -3e38).astype(np.float32)  # correct for the longest
    correct, upstream = softmax(logits + mask), softmax(logits + bias[: LENGTHS[0]])
    first = slice(0, LENGTHS[0])
    attention = [weights[:, first].sum(-1).mean() for weights in (correct, upstream)]
    print(
        f"longest caption: its first {LENGTHS[0]} tokens give each other {attention[0]:.3f} of "
        f"their attention, and {attention[1]:.3f} with the bias of 4"
    )
    print("total variation distance of the attention:")
    print(f"effect = {np.abs(upstream - correct).sum(-1).mean() / 2:.3f}")


if __name__ == "__main__":
    main()
