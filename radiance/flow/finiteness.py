"""Find images that are not finite, which would become black files."""

import numpy as np
from jaxtyping import Float32

from radiance.base.errors import SamplingError
from radiance.base.text_files import quote_text


def find_nonfinite_row(images: Float32[np.ndarray, "*steps b rows columns c"]) -> int | None:
    """Return the index b of the first image or trajectory that is not finite, or None."""
    is_finite = np.isfinite(images).all(axis=(*range(images.ndim - 4), -3, -2, -1))
    return None if is_finite.all() else int(np.argmin(is_finite))


def make_nonfinite_error(
    prompt: str, seed: int, trajectory: Float32[np.ndarray, "times 1 rows columns c"]
) -> SamplingError:
    """Return the error for an image that is not finite, with the first step that is not finite.

    Args:
        prompt: Prompt of the image.
        seed: Seed of the image.
        trajectory: States of the image at all times, computed again.
    """
    is_finite = np.isfinite(trajectory).all(axis=(1, 2, 3, 4))
    num_steps, step = len(trajectory) - 1, int(np.argmin(is_finite))
    location = "" if is_finite.all() else f" from step {step} of {num_steps} on"
    return SamplingError(
        f"The image of {quote_text(prompt)} with seed {seed} is not finite{location}: lower the "
        "guidance scale, compute in float32, or use other weights."
    )
