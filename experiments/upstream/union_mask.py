"""One mask for the whole batch: the outer product of the padding masks is taken over the batch axis.

lodestone-rock/flow, src/models/chroma/model_dct.py (read at 940f9e3) and model.py, as `mask.T @
mask`: a pair of tokens attends as soon as both are kept in any one sample. Right for a batch of
1; the published Radiance configs have 4.
"""

import numpy as np

LENGTHS, WORDS, IMAGE, HEADS, WIDTH = (12, 40, 90, 300), 512, 256, 4, 64


def attend(query, key, value, pairs):
    """One attention layer without weights; pairs: [b, n, n], True where one token may see the other."""
    logits = np.einsum("bnhk,bmhk->bhnm", query, key) / np.sqrt(WIDTH)
    weights = np.exp(np.where(pairs[:, None], logits, -np.inf).clip(-80))
    return np.einsum("bhnm,bmhk->bnhk", weights / weights.sum(-1, keepdims=True), value)


def main():
    draw = np.random.default_rng(0)
    kept = np.arange(WORDS) <= np.array(LENGTHS)[:, None]  # the words, and one token of padding
    kept = np.concatenate([kept, np.ones((len(kept), IMAGE), bool)], axis=1)
    own = kept[:, :, None] & kept[:, None, :]
    union = np.broadcast_to((kept.T.astype(int) @ kept.astype(int)) > 0, own.shape)
    print(
        "text tokens that each sample sees:",
        own[:, -1, :WORDS].sum(-1),
        "instead:",
        union[:, -1, :WORDS].sum(-1),
    )
    query, key, value = draw.standard_normal(
        (3, len(kept), WORDS + IMAGE, HEADS, WIDTH), np.float32
    )
    right, wrong = (attend(query, key, value, pairs)[:, WORDS:] for pairs in (own, union))
    for length, x, y in zip(LENGTHS, right, wrong):
        print(
            f"{length:4d} words: image tokens move by {np.linalg.norm(y - x) / np.linalg.norm(x):.3f} (relative)"
        )
    print(f"effect = {np.linalg.norm(wrong[0] - right[0]) / np.linalg.norm(right[0]):.3f}")


if __name__ == "__main__":
    main()
