"""T5's additive mask counts samples: what two or more of the batch share is not 0 but a bias of 2, 3, 4, …

lodestone-rock/flow, src/models/chroma/module/t5.py (read at 4325b18): the same product over the
batch gives the number of samples that keep both tokens; 0 becomes the lowest number, 1 becomes 0,
and every other count stays and is added to the logits. Right for a batch of 1.
"""

import numpy as np

LENGTHS, WORDS = (12, 40, 90, 300), 512


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def main():
    draw = np.random.default_rng(0)
    kept = (np.arange(WORDS) < np.array(LENGTHS)[:, None]).astype(np.float32)
    counts = kept.T @ kept
    bias = np.where(counts == 0, -3e38, np.where(counts == 1, 0, counts)).astype(np.float32)
    row = bias[0]  # of a token that all samples have
    print(
        "bias by position:",
        {
            f"{low}–{high - 1}": float(row[low])
            for low, high in zip((0, *LENGTHS), (*LENGTHS, WORDS))
        },
    )
    logits = draw.standard_normal((LENGTHS[0], WORDS), np.float32)  # of the tokens that all have
    mask = np.where(kept[-1] > 0, 0, -3e38).astype(
        np.float32
    )  # of the longest caption, as it should be
    right, wrong = softmax(logits + mask), softmax(logits + bias[: LENGTHS[0]])
    first = slice(0, LENGTHS[0])
    print(
        f"longest caption: its first {LENGTHS[0]} words look at each other with {right[:, first].sum(-1).mean():.3f} of their attention,"
    )
    print(
        f"and with the bias of 4 with {wrong[:, first].sum(-1).mean():.3f}; the distribution moves by (total variation)"
    )
    print(f"effect = {np.abs(wrong - right).sum(-1).mean() / 2:.3f}")


if __name__ == "__main__":
    main()
