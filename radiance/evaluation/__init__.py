"""Measure models: losses, distances between sets of images, prompt suites and reports."""
