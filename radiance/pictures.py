"""Pictures between Pillow and arrays, [height, width, 3]: 8 bits, or float32 in [-1, 1]; PNG files that say how they were made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, PngImagePlugin

Pixels = Float32[np.ndarray, "height width 3"]


def fitted(picture: Image.Image, width: int, height: int, across: float = 0.5, down: float = 0.5) -> UInt8[np.ndarray, "height width 3"]:
    """`picture` (mode RGB) scaled (Lanczos) to cover width × height, with its proportions, and what lies beyond cut off.

    across, down: where the cut lies along the side that has something to cut, from 0 (left, top) to 1 (right, bottom).
    """
    scale = max(width / picture.width, height / picture.height)
    kept_width, kept_height = min(width / scale, picture.width), min(height / scale, picture.height)
    left, top = (picture.width - kept_width) * across, (picture.height - kept_height) * down
    box = (left, top, min(left + kept_width, picture.width), min(top + kept_height, picture.height))
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))


def to_array(picture: Image.Image, width: int, height: int) -> Pixels:
    """`picture` fitted to a size from its centre, as the model sees it."""
    return to_signed(fitted(picture, width, height))


def to_signed(pixels: UInt8[Any, "*shape"] | Float32[Any, "*shape"]) -> Float32[Any, "*shape"]:
    """0 to 255 as -1 to 1, in NumPy or inside a JAX program; float32 is in [-1, 1] already."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1 if pixels.dtype == np.uint8 else pixels


def to_picture(pixels: Pixels) -> Image.Image:
    """Rounded to 8 bits; values beyond [-1, 1] are clipped."""
    return Image.fromarray(np.clip(np.rint((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8))


def contact_sheet(pictures: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures side by side, row by row, on white."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


def save_png(path: str | Path, picture: Image.Image, facts: Mapping[str, Any]):
    """Writes a PNG whose text chunks hold `facts`: texts as they are, the rest as JSON."""
    info = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "PNG", pnginfo=info)
