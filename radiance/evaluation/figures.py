"""What the notebooks draw with matplotlib, which is in the extra of that name."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from radiance.base.images import make_contact_sheet, to_image

GAP = 1  # pixels between images


def plot_image_grid(
    images: Sequence[Image.Image | Float[np.ndarray, "height width 3"]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    image_inches: float = 0.6,
):
    """A figure of images (Pillow's, or values in [-1, 1]), row by row, with what each row and column is; pixels stay square.

    inches: the width of an image. Raises ValueError unless there is one for each row and column.
    """
    import matplotlib.pyplot as plt

    if len(images) != len(rows) * len(columns):
        raise ValueError(
            f"{len(rows)} rows of {len(columns)} columns need {len(rows) * len(columns)} images, not {len(images)}."
        )
    pil_images = [
        to_image(picture) if isinstance(picture, np.ndarray) else picture for picture in images
    ]
    sheet = make_contact_sheet(pil_images, len(columns), GAP)
    width, height = (
        max(image.width for image in pil_images),
        max(image.height for image in pil_images),
    )
    figure, axes = plt.subplots(
        figsize=(image_inches * len(columns), image_inches * len(rows) * height / width)
    )
    axes.imshow(sheet, interpolation="nearest")
    axes.set_xticks(GAP + width / 2 - 0.5 + (width + GAP) * np.arange(len(columns)), columns)
    axes.set_yticks(GAP + height / 2 - 0.5 + (height + GAP) * np.arange(len(rows)), rows)
    axes.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
