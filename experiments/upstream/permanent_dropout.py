"""A dropped caption stays dropped: the empty string is written into the list of samples.

lodestone-rock/flow, src/dataloaders/dataloader.py (read at 4571c4d), `__getitem__`. Workers of a
DataLoader, which start anew each epoch, forget it; without workers (num_workers=0) it adds up.
The script takes seconds.
"""

import random

NUM_SAMPLES, NUM_EPOCHS, DROPOUT = 20_000, 10, 0.1


def main():
    rng = random.Random(0)
    captions = ["a caption"] * NUM_SAMPLES
    fractions = []
    for _ in range(NUM_EPOCHS):
        for i in range(NUM_SAMPLES):
            if rng.random() < DROPOUT:
                captions[i] = ""
        fractions.append(captions.count("") / NUM_SAMPLES)
    rounded = [round(fraction, 3) for fraction in fractions]
    print(f"fraction without caption by epoch: {rounded}")
    expected = 1 - (1 - DROPOUT) ** NUM_EPOCHS
    print(f"expected 1 − 0.9ⁿ: {expected:.3f} after {NUM_EPOCHS}; setting: {DROPOUT}")
    print(f"effect = {fractions[-1]:.3f}")


if __name__ == "__main__":
    main()
