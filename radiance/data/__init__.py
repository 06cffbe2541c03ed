"""Data sources, the dataset index, decoding, and batches."""
