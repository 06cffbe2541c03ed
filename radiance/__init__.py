"""Pixel-space text-to-image transformers in JAX: train, sample, measure and convert Chroma and Radiance models."""
