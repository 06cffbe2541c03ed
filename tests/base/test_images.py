import numpy as np
import pytest
from PIL import Image

from radiance.base.images import make_contact_sheet, resize_and_crop, to_array, to_image


def test_an_image_of_that_size_is_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(to_image(to_array(Image.fromarray(pixels), 12, 9))), pixels)


def test_values_beyond_the_range_are_clipped():
    assert np.array_equal(np.asarray(to_image(np.full((1, 1, 3), 7, np.float32)))[0, 0], [255] * 3)


def test_a_contact_sheet_has_gaps_all_around():
    assert make_contact_sheet([Image.new("RGB", (5, 4))] * 7, 3, gap=1).size == (
        3 * 6 + 1,
        3 * 5 + 1,
    )


RAMP = Image.fromarray(
    np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None], (100, 200, 3)).copy()
)


@pytest.mark.parametrize(("position", "first"), [(0.0, 0), (0.5, 50), (1.0, 100)])
def test_the_longer_side_is_cropped_at_the_given_position(position, first):
    expected = np.arange(first, first + 100)
    assert np.array_equal(
        resize_and_crop(RAMP, 100, 100, crop_x=position, crop_y=0.3)[0, :, 0], expected
    )
    upright = RAMP.transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(
        resize_and_crop(upright, 100, 100, crop_x=0.3, crop_y=position)[:, 0, 0], expected
    )


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (7, 13), (1, 1)])
def test_images_of_any_size_cover_the_result(size):
    for position in (0.0, 1 / 3, 1.0):
        cropped = resize_and_crop(Image.new("RGB", size, (5, 6, 7)), 33, 17, position, position)
        assert cropped.shape == (17, 33, 3)
        assert (cropped == (5, 6, 7)).all()
