"""Inspection of datasets: surveys, near-duplicates, and lists of images."""
