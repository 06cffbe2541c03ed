"""Possible attributes of the scenes of `shapes`, without heavy imports: settings use them."""

from typing import Literal

Background = Literal["white", "grey", "black", "beige", "brown", "navy"]
CaptionLengths = Literal["short", "mixed", "full"]
Split = Literal["train", "validation"]

GRID_SIZE = 4  # cells along each side of an image
MAX_OBJECTS = 5  # objects of an image
# 8-bit sRGB. Every channel leaves room for a texture.
COLORS = {
    "red": (205, 35, 40),
    "orange": (227, 125, 35),
    "yellow": (227, 210, 50),
    "green": (45, 160, 65),
    "cyan": (60, 200, 210),
    "blue": (45, 85, 220),
    "purple": (130, 50, 170),
    "pink": (227, 105, 180),
}
BACKGROUNDS = {  # the colors of every Background
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (15, 15, 15),
    "beige": (225, 205, 175),
    "brown": (95, 60, 30),
    "navy": (20, 30, 80),
}
SIZES = {"large": 1.0, "small": 0.65}
TEXTURES = ("plain", "striped", "checked")
SPLITS: tuple[Split, ...] = ("train", "validation")
