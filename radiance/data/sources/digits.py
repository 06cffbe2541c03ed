"""The dataset `digits`: 1,797 handwritten digits, scanned at 8 × 8 pixels, with captions.

The scans come with scikit-learn (UCI, CC BY 4.0). The dataset serves as a smoke test with real
images. It is prepared and read without TensorFlow.
"""

import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float64, Int64
from PIL import Image

RESOLUTION = 32  # pixels; the scans are upsampled to it
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION_TEMPLATES = (
    "a handwritten {name}",
    "the digit {digit}",
    "the number {name}, written by hand",
    "a scan of a handwritten {digit}",
    "{name}",
)


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder of the dataset for TensorFlow Datasets."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(RESOLUTION, RESOLUTION, 3), encoding_format="png"
                    ),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "digit": tfds.features.ClassLabel(names=list(DIGIT_NAMES)),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ImportError(
                "The dataset digits comes with scikit-learn: pip install 'radiance[digits]'."
            ) from None
        scans, digits = load_digits(return_X_y=True)
        # Neighbors in the list are often by one writer. Every sixth scan goes to validation.
        is_validation = np.arange(len(digits)) % 6 == 5
        return {
            "train": self._generate_examples(scans[~is_validation], digits[~is_validation]),
            "validation": self._generate_examples(scans[is_validation], digits[is_validation]),
        }

    def _generate_examples(
        self, scans: Float64[np.ndarray, "n 64"], digits: Int64[np.ndarray, " n"]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, (scan, digit) in enumerate(zip(scans, digits)):
            name = DIGIT_NAMES[digit]
            captions = [template.format(digit=digit, name=name) for template in CAPTION_TEMPLATES]
            image = _encode_png(scan.reshape(8, 8))
            yield i, {"image": image, "captions": captions, "digit": int(digit)}


def _encode_png(scan: Float64[np.ndarray, "8 8"]) -> io.BytesIO:
    """Encode ink of 0 to 16 as white on black."""
    image = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8)).resize(
        (RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    buffer.seek(0)
    return buffer
