"""Time is cast to bfloat16, so that 1000·t is rounded to multiples of 4 near 1000.

lodestone-rock/flow, src/trainer/train_chroma_lora.py (read at 4325b18), casts training times to
bfloat16, while the noisy image is made with float32 times. This measures the error of the 16 values
from which Chroma's approximator reads the time. The script takes seconds.
"""

import ml_dtypes
import numpy as np


def embed_time(t):
    """Return cosines and sines of 1000·t at 8 frequencies; the product has the type of t."""
    angles = (t * t.dtype.type(1000)).astype(np.float64)[:, None] * 10_000.0 ** (-np.arange(8) / 8)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def main():
    exact = np.linspace(0, 1, 100_001, dtype=np.float32)
    rounded = exact.astype(ml_dtypes.bfloat16)
    num_distinct = len(np.unique(rounded[exact > 0.5].astype(np.float32)))
    print(f"distinct times between 0.5 and 1: {num_distinct}")
    product = (rounded * rounded.dtype.type(1000)).astype(np.float32)
    print(f"largest error of 1000·t: {np.abs(product - 1000 * exact).max():.2f}")
    error = embed_time(rounded) - embed_time(exact)
    by_frequency = np.sqrt(np.square(error).reshape(-1, 2, 8).mean(axis=(0, 1)))
    print("error of the embedding by frequency, high to low (its own root mean square is 0.71):")
    print(by_frequency.round(3))
    print(f"effect = {np.sqrt(np.square(error).mean() / 0.5):.3f}")  # relative, over all 16 values


if __name__ == "__main__":
    main()
