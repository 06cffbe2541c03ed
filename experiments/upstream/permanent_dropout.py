"""A caption that was dropped stays dropped: the empty string is written into the list of samples.

lodestone-rock/flow, src/dataloaders/dataloader.py (read at 4571c4d), `__getitem__`. It is
forgotten with the worker processes of a DataLoader, which are started anew each epoch; without
workers (num_workers=0) it adds up.
"""

import random

SAMPLES, EPOCHS, CHANCE = 20_000, 10, 0.1


def main():
    draw = random.Random(0)
    captions = ["a caption"] * SAMPLES
    shares = []
    for _ in range(EPOCHS):
        for i in range(SAMPLES):
            if draw.random() < CHANCE:
                captions[i] = ""
        shares.append(captions.count("") / SAMPLES)
    print("share without caption, epoch by epoch:", [round(share, 3) for share in shares])
    print(
        f"expected 1 − 0.9ⁿ: {1 - (1 - CHANCE) ** EPOCHS:.3f} after {EPOCHS}; asked for: {CHANCE}"
    )
    print(f"effect = {shares[-1]:.3f}")


if __name__ == "__main__":
    main()
