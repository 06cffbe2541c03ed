"""Images between Pillow and arrays, [height, width, 3]: 8 bits, or float32 in [-1, 1]; PNG files that say how they were made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, PngImagePlugin

Pixels = Float32[np.ndarray, "height width 3"]


def resize_and_crop(
    image: Image.Image, width: int, height: int, crop_x: float = 0.5, crop_y: float = 0.5
) -> UInt8[np.ndarray, "height width 3"]:
    """`image` (mode RGB) scaled (Lanczos) to cover width × height, with its proportions, and what lies beyond cut off.

    across, down: where the cut lies along the side that has something to cut, from 0 (left, top) to 1 (right, bottom).
    """
    scale = max(width / image.width, height / image.height)
    crop_width, crop_height = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - crop_width) * crop_x, (image.height - crop_height) * crop_y
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def to_array(image: Image.Image, width: int, height: int) -> Pixels:
    """`image` fitted to a size from its center, as the model sees it."""
    return to_signed(resize_and_crop(image, width, height))


def to_signed(pixels: UInt8[Any, "*shape"] | Float32[Any, "*shape"]) -> Float32[Any, "*shape"]:
    """0 to 255 as -1 to 1, in NumPy or inside a JAX program; float32 is in [-1, 1] already."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1 if pixels.dtype == np.uint8 else pixels


def to_image(pixels: Pixels) -> Image.Image:
    """Rounded to 8 bits; values beyond [-1, 1] are clipped."""
    return Image.fromarray(
        np.clip(np.rint((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
    )


def make_contact_sheet(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images side by side, row by row, on white."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


def save_png(path: str | Path, image: Image.Image, metadata: Mapping[str, Any]):
    """Writes a PNG whose text chunks hold `facts`: texts as they are, the rest as JSON."""
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=info)
