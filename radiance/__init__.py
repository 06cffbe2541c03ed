"""Pixel-space text-to-image transformers in JAX: train, sample, measure and convert Chroma and Radiance models.

    import radiance
    pictures = radiance.load("runs/quickstart")(["a handwritten seven"], seeds=[1])
"""

__all__ = ["load"]


def __getattr__(name: str):
    """`load` brings JAX and everything else with it, so it is imported when it is asked for."""
    if name == "load":
        from radiance.models import load

        return load
    raise AttributeError(f"module 'radiance' has no attribute {name!r}")
