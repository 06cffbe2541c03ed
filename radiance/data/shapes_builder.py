"""`shapes` as a TensorFlow Dataset: so many of the endless pictures, kept at one side. Prepared and read without TensorFlow."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from radiance.data.shape_captions import Law, caption
from radiance.data.shapes import BACKGROUNDS, COLOURS, GRID, MOST, SHAPES, SIZES, TEXTURES, Split, render, scene

Labels = tfds.features.ClassLabel


@dataclass(kw_only=True, eq=False)
class ShapesConfig(tfds.core.BuilderConfig):
    """`tfds.builder("shapes/64")` and its like name one of `Shapes.BUILDER_CONFIGS`; any other can be given as `config`."""

    side: int = 64  # pixels
    law: Law = "mixed"
    limit: int = 256  # tokens
    objects: int = MOST  # of a picture at most
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    seed: int = 0
    train: int = 16384  # pictures
    validation: int = 4096


class Shapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [ShapesConfig(name=str(side), description=f"{side}×{side} pixels.", side=side) for side in (64, 32, 128)]

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.side
        thing = {
            "size": Labels(names=list(SIZES)),
            "colour": Labels(names=list(COLOURS)),
            "shape": Labels(names=list(SHAPES)),
            "row": Labels(num_classes=GRID),
            "column": Labels(num_classes=GRID),
            "texture": Labels(names=list(TEXTURES)),
            "told": tfds.features.Scalar(np.bool_),  # by the caption
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "background": Labels(names=list(BACKGROUNDS)),
                    "background_told": tfds.features.Scalar(np.bool_),
                    "objects": tfds.features.Sequence(thing),
                    "index": tfds.features.Scalar(np.int64),  # of the scene
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, getattr(self.builder_config, split)) for split in ("train", "validation")}

    def _generate_examples(self, split: Split, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        made = self.builder_config
        for index in range(count):
            drawn = scene(made.seed, index, split, made.objects, made.backgrounds)
            text, facts = caption(drawn, made.law, made.limit)
            yield (
                index,
                {
                    "image": _png(render(drawn, made.side)),
                    "captions": [text],
                    "background": drawn.background,
                    "background_told": facts.background is not None,
                    "objects": [
                        {**thing._asdict(), "texture": finish.texture, "told": thing in facts.objects}
                        for thing, finish in zip(drawn.objects, drawn.finishes)
                    ],
                    "index": index,
                },
            )


def _png(picture: Any) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, "PNG")
    file.seek(0)
    return file
