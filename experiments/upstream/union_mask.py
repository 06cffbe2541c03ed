"""One mask for the whole batch: the outer product of the padding masks runs over the batch.

lodestone-rock/flow, src/models/chroma/model_dct.py (read at 940f9e3) and model.py, as `mask.T @
mask`: a pair of tokens attends as soon as any one sample keeps both. It is correct for a batch
of 1; the published Radiance configs have 4. The script takes seconds.
"""

import numpy as np

LENGTHS, NUM_TEXT, NUM_IMAGE, NUM_HEADS, HEAD_DIM = (12, 40, 90, 300), 512, 256, 4, 64


def attend(query, key, value, mask):
    """Apply one attention layer; mask [b, n, n] is True where a token may attend to another."""
    logits = np.einsum("bnhk,bmhk->bhnm", query, key) / np.sqrt(HEAD_DIM)
    weights = np.exp(np.where(mask[:, None], logits, -np.inf).clip(-80))
    return np.einsum("bhnm,bmhk->bnhk", weights / weights.sum(-1, keepdims=True), value)


def relative_change(upstream, correct):
    """Return the norm of the difference over the norm of the correct output."""
    return np.linalg.norm(upstream - correct) / np.linalg.norm(correct)


def main():
    rng = np.random.default_rng(0)
    # Real tokens, and one token of padding.
    is_kept = np.arange(NUM_TEXT) <= np.array(LENGTHS)[:, None]
    is_kept = np.concatenate([is_kept, np.ones((len(is_kept), NUM_IMAGE), bool)], axis=1)
    own = is_kept[:, :, None] & is_kept[:, None, :]
    union = np.broadcast_to((is_kept.T.astype(int) @ is_kept.astype(int)) > 0, own.shape)
    visible = [mask[:, -1, :NUM_TEXT].sum(-1) for mask in (own, union)]
    print(f"text tokens that each sample should see: {visible[0]}; it sees {visible[1]}")
    shape = (3, len(is_kept), NUM_TEXT + NUM_IMAGE, NUM_HEADS, HEAD_DIM)
    query, key, value = rng.standard_normal(shape, np.float32)
    correct, upstream = (attend(query, key, value, mask)[:, NUM_TEXT:] for mask in (own, union))
    for length, x, y in zip(LENGTHS, correct, upstream):
        print(f"{length:4d} tokens: relative change of image tokens {relative_change(y, x):.3f}")
    print(f"effect = {relative_change(upstream[0], correct[0]):.3f}")


if __name__ == "__main__":
    main()
