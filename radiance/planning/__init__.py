"""Predict what a run costs on devices that are not present."""
