"""Inspection of data sets: surveys, near-duplicates, and lists of images."""
