"""All processes have the same seed: every device samples the same times and noise.

lodestone-rock/flow, src/trainer/train_chroma_dct.py (read at 1845f16), seeds with master_seed,
without the rank. This measures the gradient of the smallest denoiser, velocity ≈ a·x_t, on 8
devices with 32 images each. The script takes seconds.
"""

import numpy as np

NUM_DEVICES, BATCH_SIZE, NUM_PIXELS, NUM_STEPS, A = 8, 32, 48, 1000, 0.3


def compute_gradient(rng, same_seed):
    """Return d/da of the mean squared error of a batch."""
    image = 0.5 * rng.standard_normal((NUM_DEVICES, BATCH_SIZE, NUM_PIXELS))
    rows = 1 if same_seed else NUM_DEVICES
    noise = rng.standard_normal((rows, BATCH_SIZE, NUM_PIXELS))
    t = rng.beta(2, 2, (rows, BATCH_SIZE, 1))  # close to the published distribution
    noisy, velocity = (1 - t) * image + t * noise, noise - image
    return 2 * np.mean((A * noisy - velocity) * noisy)


def main():
    deviation = {}
    for same_seed in (False, True):
        rng = np.random.default_rng(0)
        gradients = [compute_gradient(rng, same_seed) for _ in range(NUM_STEPS)]
        deviation[same_seed] = np.std(gradients)
        label = "one seed for all  " if same_seed else "one seed for each "
        print(f"{label}: gradient {np.mean(gradients):.4f} ± {deviation[same_seed]:.5f} per step")
    ratio = deviation[True] / deviation[False]
    print(f"images needed for the same gradient noise: {ratio**2:.1f} times as many")
    print("ratio of the gradients' standard deviations:")
    print(f"effect = {ratio:.3f}")


if __name__ == "__main__":
    main()
