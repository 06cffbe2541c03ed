"""Pixel-space text-to-image transformers in JAX.

Train, sample, evaluate and convert Chroma and Radiance models:

    import radiance
    images = radiance.load("runs/quickstart")(["a handwritten seven"], seeds=[1])
"""

from typing import Any

__version__ = "0.2.0"
__all__ = ["Config", "Pipeline", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load`, `Pipeline` and `Config` on first use: they import JAX."""
    if name == "load":
        from radiance.loading import load

        return load
    if name == "Pipeline":
        from radiance.pipeline import Pipeline

        return Pipeline
    if name == "Config":
        from radiance.config import Config

        return Config
    raise AttributeError(f"module 'radiance' has no attribute {name!r}")
