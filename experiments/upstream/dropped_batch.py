"""A batch is kept only when the next sample comes: of every bucket that divides evenly, a whole batch is lost.

lodestone-rock/flow, src/dataloaders/dataloader.py (read at 4571c4d), `_load_batches`: meant is to
drop what does not fill a batch.
"""

BATCH = 256


def theirs(samples):
    """The logic in our words: fill; when full and one more comes, put the full one away."""
    batches, current = [], []
    for sample in samples:
        if len(current) == BATCH:
            batches.append(current)
            current = []
        current.append(sample)
    return batches  # whatever is in hand is gone, full or not


def meant(samples):
    return [samples[i : i + BATCH] for i in range(0, len(samples) - BATCH + 1, BATCH)]


def main():
    for count in (255, 256, 257, 512, 1024, 25_600):
        rows = list(range(count))
        print(
            f"{count:6d} images of one shape: {len(theirs(rows)):3d} batches, meant are {len(meant(rows)):3d}"
        )
    sizes = range(1, 8 * BATCH + 1)
    lost = sum(len(meant(range(n))) - len(theirs(range(n))) for n in sizes)
    print(
        f"buckets of 1 to {8 * BATCH} images that lose one: {lost} of {len(sizes)}; images lost of a bucket of 256:"
    )
    print(f"effect = {BATCH * (len(meant(range(BATCH))) - len(theirs(range(BATCH))))}")


if __name__ == "__main__":
    main()
