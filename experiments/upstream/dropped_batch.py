"""A full batch is kept only when another sample follows, so buckets that divide evenly lose one.

lodestone-rock/flow, src/dataloaders/dataloader.py (read at 4571c4d), `_load_batches`, which intends
to drop incomplete batches. The script takes seconds.
"""

BATCH_SIZE = 256


def make_upstream_batches(samples):
    """Return batches by the upstream logic: a full batch is stored when one more comes."""
    batches, current = [], []
    for sample in samples:
        if len(current) == BATCH_SIZE:
            batches.append(current)
            current = []
        current.append(sample)
    return batches  # the current batch is lost, full or not


def make_intended_batches(samples):
    """Return all full batches."""
    starts = range(0, len(samples) - BATCH_SIZE + 1, BATCH_SIZE)
    return [samples[i : i + BATCH_SIZE] for i in starts]


def main():
    for count in (255, 256, 257, 512, 1024, 25_600):
        samples = list(range(count))
        upstream, intended = make_upstream_batches(samples), make_intended_batches(samples)
        print(f"{count:6d} images: {len(upstream):3d} batches, intended {len(intended):3d}")
    sizes = range(1, 8 * BATCH_SIZE + 1)
    lost = [
        len(make_intended_batches(range(n))) - len(make_upstream_batches(range(n))) for n in sizes
    ]
    print(f"buckets of 1 to {sizes[-1]} images that lose a batch: {sum(lost)} of {len(sizes)}")
    print(f"images lost by a bucket of {BATCH_SIZE}:")
    print(f"effect = {BATCH_SIZE * lost[BATCH_SIZE - 1]}")


if __name__ == "__main__":
    main()
