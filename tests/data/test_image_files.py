"""Files of many kinds to pixel values, against values computed another way."""

import io
import math

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from hf_guided.data.images import open_image
from hf_guided.models.images import BAD_IMAGE_ERRORS, resize_and_crop, to_channels, to_pixel_values


def read(image: Image.Image, channels: int, file_format: str = "PNG", **save) -> np.ndarray:
    """Writes an image to a file, and reads its pixel values at its own size."""
    file = io.BytesIO()
    image.save(file, file_format, **save)
    image = to_channels(open_image({"bytes": file.getvalue(), "path": None}), channels)
    return to_pixel_values(image, channels)


def published(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values.astype(np.float32), -1, 0) / 127.5 - 1


def test_bytes_are_scaled_as_published_to_the_bit():
    every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixel_values = read(Image.fromarray(every_byte), channels=1)
    assert pixel_values.dtype == np.float32
    assert np.array_equal(pixel_values, published(every_byte[..., None]))
    assert pixel_values.min() == -1
    assert pixel_values.max() == 1


def test_rgb_and_gray(noise_image):
    image = noise_image(0)
    assert np.array_equal(read(image, channels=3), published(np.asarray(image)))
    luma = np.asarray(image, np.float64) @ (0.299, 0.587, 0.114)  # ITU-R 601-2
    assert np.abs((read(image, channels=1)[0] + 1) * 127.5 - luma).max() < 0.52

    gray = noise_image(0, mode="L")
    three = read(gray, channels=3)
    assert three.shape == (3, 20, 24)
    assert np.array_equal(three, np.repeat(published(np.asarray(gray)[..., None]), 3, axis=0))


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(channels):
    values = np.array([[0, 257, 800], [40_000, 65_534, 65_535]], dtype=np.uint16)
    pixel_values = read(Image.fromarray(values), channels)
    assert pixel_values.shape == (channels, 2, 3)
    assert np.allclose(pixel_values, values / 65_535 * 2 - 1, atol=1e-7)

    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    assert np.array_equal(read(wide, channels, "TIFF"), pixel_values)


def test_floats_lie_in_0_to_1_or_are_refused():
    values = np.array([[0, 0.25], [0.5, 1]], dtype=np.float32)
    assert np.array_equal(read(Image.fromarray(values), 1, "TIFF")[0], values * 2 - 1)
    for bad in (values * 255, values - 0.1, values * np.float32("nan")):
        with pytest.raises(ValueError, match="mode F with values from"):
            read(Image.fromarray(bad), 1, "TIFF")


def test_transparent_pixels_are_white_and_do_not_show_the_colour_beneath():
    values = np.full((1, 3, 4), (200, 100, 0, 255), dtype=np.uint8)
    values[0, :, 3] = 255, 0, 51
    expected = [[200, 100, 0], [255, 255, 255], [244, 224, 204]]  # 51 / 255 is a fifth
    assert np.array_equal(read(Image.fromarray(values), 3), published(np.array([expected])))

    gray = Image.fromarray(np.array([[[100, 255], [100, 0]]], dtype=np.uint8), mode="LA")
    assert np.array_equal(read(gray, 1), published(np.array([[[100], [255]]])))
    assert np.array_equal(read(gray, 3), published(np.array([[[100] * 3, [255] * 3]])))


def test_the_one_value_that_a_png_calls_transparent_is_white():
    deep = Image.fromarray(np.array([[300, 65_535, 257]], dtype=np.uint16))
    assert np.allclose(read(deep, 1, transparency=300)[0], [[1, 1, 257 / 65_535 * 2 - 1]], atol=1e-7)
    gray = Image.fromarray(np.array([[5, 6]], dtype=np.uint8))
    assert np.array_equal(read(gray, 3, transparency=5), published(np.array([[[255] * 3, [6] * 3]])))
    colour = Image.fromarray(np.array([[[1, 2, 3], [3, 2, 1]]], dtype=np.uint8))
    assert np.array_equal(read(colour, 3, transparency=(1, 2, 3)), published(np.array([[[255] * 3, [3, 2, 1]]])))


def test_palettes_with_and_without_transparency():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert image.mode == "P"
    assert np.array_equal(read(image, 3), published(np.array([[[255, 0, 0], [0, 0, 255]]])))
    assert np.array_equal(read(image, 3, transparency=1), published(np.array([[[255, 0, 0], [255] * 3]])))


def test_cmyk_and_bilevel():
    cmyk = Image.new("CMYK", (2, 1), (255, 0, 0, 0))
    assert np.array_equal(read(cmyk, 3, "TIFF"), published(np.array([[[0, 255, 255]] * 2])))
    bilevel = Image.fromarray(np.array([[True, False]]))
    assert bilevel.mode == "1"
    assert np.array_equal(read(bilevel, 3), published(np.array([[[255] * 3, [0] * 3]])))


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation, turns, noise_image):
    image = noise_image(0, height=16, width=32).resize((32, 16), box=(0, 0, 2, 1))  # smooth: JPEG keeps it
    exif = Image.Exif()
    exif[TiffImagePlugin.ExifTags.Base.Orientation] = orientation
    upright = np.rot90(np.asarray(image), turns)
    pixel_values = read(image, 3, "JPEG", quality=100, subsampling=0, exif=exif)
    assert np.abs(pixel_values - published(upright)).max() < 0.05


def test_broken_files_raise_what_the_dataset_catches(tmp_path, noise_image):
    file = io.BytesIO()
    noise_image(0).save(file, "PNG")
    avif = io.BytesIO()
    noise_image(0).save(avif, "AVIF")
    qoi = io.BytesIO()
    noise_image(0).save(qoi, "QOI")
    (tmp_path / "empty.png").touch()
    for record in (
        None,
        {"bytes": b"", "path": None},
        {"bytes": b"not an image", "path": None},
        {"bytes": file.getvalue()[:-200], "path": None},
        {"bytes": avif.getvalue()[:-100], "path": None},
        {"bytes": qoi.getvalue()[:100], "path": None},
        {"bytes": None, "path": None},
        {"bytes": None, "path": str(tmp_path)},
        {"bytes": None, "path": str(tmp_path / "empty.png")},
        {"bytes": None, "path": str(tmp_path / "missing.png")},
    ):
        with pytest.raises(BAD_IMAGE_ERRORS):
            open_image(record)


def reference_resize(image: Image.Image, side: int) -> np.ndarray:
    """What guided-diffusion does to the shorter side before it crops, from the shape of its steps alone."""
    width, height = image.size
    num_halvings = max(0, math.floor(math.log2(min(width, height) / side)))
    for _ in range(num_halvings):
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    ratio = side / min(width, height)
    return np.asarray(image.resize((round(width * ratio), round(height * ratio)), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(16, 16), (33, 16), (20, 97), (64, 64), (131, 75), (9, 12), (300, 70)])
def test_centre_crop_equals_the_published_one(size, noise_image):
    height, width = size
    image = noise_image(1, height, width)
    full = reference_resize(image, 16)
    top, left = (full.shape[0] - 16) // 2, (full.shape[1] - 16) // 2
    assert np.array_equal(np.asarray(resize_and_crop(image, (16, 16))), full[top : top + 16, left : left + 16])


def test_random_crops_are_windows_of_the_published_scales(noise_image):
    image = noise_image(2, 50, 70)
    scales = {side: reference_resize(image, side) for side in range(16, 21)}  # 16 / 0.8 = 20
    seen = set()
    for seed in range(60):
        crop = np.asarray(resize_and_crop(image, (16, 16), np.random.default_rng(seed)))
        places = [
            (side, *place)
            for side, full in scales.items()
            for place in np.argwhere(
                (np.lib.stride_tricks.sliding_window_view(full, (16, 16, 3))[:, :, 0] == crop).all((2, 3, 4))
            ).tolist()
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {side for side, _, _ in seen} == set(scales)
    assert {top for side, top, _ in seen if side == 20} == set(range(5))  # both ends are reached
    assert len({left for _, _, left in seen}) > 5


@pytest.mark.parametrize("crop_seed", [None, 0])
def test_of_a_very_long_image_the_middle_is_scaled(crop_seed):
    """Scaled whole, this one would take 12 GB."""
    values = np.zeros((1, 1_000_000), dtype=np.uint8)
    values[0, 499_000:501_000] = 200
    for image in (Image.fromarray(values), Image.fromarray(values.T.copy())):
        crop_rng = None if crop_seed is None else np.random.default_rng(crop_seed)
        assert (np.asarray(resize_and_crop(image, (64, 64), crop_rng)) == 200).all()


@pytest.mark.parametrize("size", [(50, 50), (20, 300), (9, 9), (64, 96)])
def test_crops_that_are_not_square(size, noise_image):
    image = noise_image(3, *size)
    for crop_rng in (None, np.random.default_rng(0)):
        assert resize_and_crop(image, (16, 24), crop_rng).size == (24, 16)
    if size == (64, 96):  # the same shape: nothing to crop, two exact halvings
        expected = image.resize((48, 32), Image.Resampling.BOX).resize((24, 16), Image.Resampling.BOX)
        assert np.array_equal(np.asarray(resize_and_crop(image, (16, 24))), np.asarray(expected))
