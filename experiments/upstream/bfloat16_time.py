"""Time in bfloat16: 1000·t is rounded to multiples of 4 near 1000, and the embedding's fast waves read the rounding.

lodestone-rock/flow, src/trainer/train_chroma_lora.py (read at 4325b18), casts the times of
training to bfloat16 while the noisy image was made with those in float32. Shown of the 16 numbers
by which Chroma's approximator knows the time.
"""

import ml_dtypes
import numpy as np


def embedding(t):
    """Cosines and sines of 1000·t at 8 frequencies; the product has the type of t."""
    angles = (t * t.dtype.type(1000)).astype(np.float64)[:, None] * 10_000.0 ** (-np.arange(8) / 8)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def main():
    exact = np.linspace(0, 1, 100_001, dtype=np.float32)
    short = exact.astype(ml_dtypes.bfloat16)
    print(
        f"times between 0.5 and 1 that can be told apart: {len(np.unique(short[exact > 0.5].astype(np.float32)))}"
    )
    print(
        f"largest error of 1000·t: {np.abs((short * short.dtype.type(1000)).astype(np.float32) - 1000 * exact).max():.2f}"
    )
    wrong = embedding(short) - embedding(exact)
    by_wave = np.sqrt(np.square(wrong).reshape(-1, 2, 8).mean(axis=(0, 1)))
    print(
        "error of the embedding by wave, fast to slow (its own root mean square is 0.71):",
        by_wave.round(3),
    )
    print(f"effect = {np.sqrt(np.square(wrong).mean() / 0.5):.3f}")  # relative, of all 16


if __name__ == "__main__":
    main()
