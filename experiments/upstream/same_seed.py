"""Every process seeds its generator alike: all devices draw the same times and the same noise, for different images.

lodestone-rock/flow, src/trainer/train_chroma_dct.py (read at 1845f16) seeds by master_seed,
without the rank. Shown on the gradient of the smallest denoiser, velocity ≈ a·x_t, on 8 devices
of 32 images.
"""

import numpy as np

DEVICES, BATCH, PIXELS, STEPS, A = 8, 32, 48, 1000, 0.3


def gradient(draw, alike):
    """d/da of the mean squared error of a batch."""
    image = 0.5 * draw.standard_normal((DEVICES, BATCH, PIXELS))
    rows = 1 if alike else DEVICES
    noise, t = (
        draw.standard_normal((rows, BATCH, PIXELS)),
        draw.beta(2, 2, (rows, BATCH, 1)),
    )  # near the published law
    noisy, velocity = (1 - t) * image + t * noise, noise - image
    return 2 * np.mean((A * noisy - velocity) * noisy)


def main():
    deviation = {}
    for alike in (False, True):
        draw = np.random.default_rng(0)
        found = [gradient(draw, alike) for _ in range(STEPS)]
        deviation[alike] = np.std(found)
        print(
            f"{'one seed for all' if alike else 'a seed each     '}: gradient {np.mean(found):.4f} ± {deviation[alike]:.5f} a step"
        )
    ratio = deviation[True] / deviation[False]
    print(
        f"images for the same noise of the gradient: {ratio**2:.1f} times as many; the deviation is larger by"
    )
    print(f"effect = {ratio:.3f}")


if __name__ == "__main__":
    main()
