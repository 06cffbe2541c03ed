"""`digits`: 1,797 real handwritten digits, scanned at 8×8 (UCI, CC BY 4.0; they ship with scikit-learn), with captions.

A smoke test that happens to be real. Prepared and read without TensorFlow.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

RESOLUTION = 32  # images are kept at this size, smoothly enlarged
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION_TEMPLATES = (
    "a handwritten {name}",
    "the digit {digit}",
    "the number {name}, written by hand",
    "a scan of a handwritten {digit}",
    "{name}",
)


class Digits(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

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

    def _split_generators(self, dl_manager):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ImportError(
                "The digits data set comes with scikit-learn: pip install 'radiance[digits]'."
            ) from None
        scans, digits = load_digits(return_X_y=True)
        # Neighbours in the list are often by one writer; every sixth goes to validation.
        is_validation = np.arange(len(digits)) % 6 == 5
        return {
            "train": self._generate_examples(scans[~is_validation], digits[~is_validation]),
            "validation": self._generate_examples(scans[is_validation], digits[is_validation]),
        }

    def _generate_examples(self, scans: np.ndarray, digits: np.ndarray):
        for i, (scan, digit) in enumerate(zip(scans, digits)):
            captions = [
                template.format(digit=digit, name=DIGIT_NAMES[digit])
                for template in CAPTION_TEMPLATES
            ]
            yield (
                i,
                {
                    "image": _encode_png(scan.reshape(8, 8)),
                    "captions": captions,
                    "digit": int(digit),
                },
            )


def _encode_png(scan: np.ndarray) -> io.BytesIO:
    """Ink of 0 to 16, as white on black."""
    image = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8)).resize(
        (RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    buffer.seek(0)
    return buffer
