"""One image, from its file to an array of the model's size, channels and range: for training and inference alike."""

import io
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

# What Pillow decodes by itself. Other formats are not tried, whatever the file name: EPS starts Ghostscript, and IPTC
# opens its contents as any format.
IMAGE_FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"),
    *("ICO", "QOI", "SGI", "SUN", "PCX", "PSD", "TGA"),
)
# All that Pillow raises on broken files (found by flipping bytes in files of these formats), and our own ValueErrors.
BAD_IMAGE_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, IndexError, OverflowError, RuntimeError),
    Image.DecompressionBombError,
)
MAX_ELONGATION = 32  # largest length of a resized image, in units of the target's


def open_file(source: Any) -> Image.Image:
    """The opened image (first frame) of a file, of which only the header has been read; a context manager.

    Args:
        source (`str`, `os.PathLike`, `bytes` or a binary file): A path to a regular file, or the contents of one.

    Raises:
        One of `BAD_IMAGE_ERRORS`: If it is no image in one of `IMAGE_FORMATS`, has no pixels, or has more than
            twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million in all; Pillow warns of more than half of them).
    """
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif isinstance(source, str | os.PathLike) and os.path.exists(source) and not os.path.isfile(source):
        raise ValueError(f"{os.fspath(source)} is not a regular file")  # reading a pipe would wait forever
    image = Image.open(source, formats=IMAGE_FORMATS)
    if 0 in image.size:
        raise ValueError("the image has no pixels")
    return image


def upright(image: Image.Image) -> Image.Image:
    """A decoded copy of an image, with its EXIF orientation applied."""
    return ImageOps.exif_transpose(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels of an opened image once it is `upright`, in most cases without decoding it."""
    lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
    if lies_on_its_side and image.format != "TIFF":  # whose size Pillow gives upright
        return image.width, image.height
    return image.height, image.width


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """An image of the same depth, transparent parts on white: mode "L", "RGB" (0..255), or "F" (0..1) for more bits.

    Args:
        image (`PIL.Image.Image`): Of any mode that Pillow converts. Floats lie in 0..1, 16-bit integers in 0..65535.
        channels (`int`): Input channels of the model, 1 or 3; "L" and "F" then stand for three equal ones.

    Raises:
        `ValueError`: If the values are out of range, or Pillow cannot convert from the mode.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values, top = np.asarray(image), 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= top):  # also true of NaN
            raise ValueError(
                f"mode {image.mode} with values from {values.min()} to {values.max()}, where 0 to {top} is meant"
            )
        if image.mode == "F":
            return image
        is_transparent = values == image.info.get("transparency", -1)  # the one value that a PNG may name
        return Image.fromarray(np.where(is_transparent, 1, values / top).astype(np.float32))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if channels == 1 or image.mode in ("L", "1"):
        return image.convert("L")
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image, resolution: tuple[int, int], crop_rng: np.random.Generator | None = None
) -> Image.Image:
    """An image resized until it covers the resolution and then cropped, as ADM was trained.

    Of an image much longer than the resolution (`MAX_ELONGATION`) only the middle is resized, which bounds the memory.

    Args:
        image (`PIL.Image.Image`): Mode "L", "RGB" or "F".
        resolution (`tuple[int, int]`): Height and width in pixels.
        crop_rng (`numpy.random.Generator`, *optional*): Draws the scale (the crop keeps 80 to 100 % of the shorter
            side) and the place of the crop. None crops the centre at full scale.
    """
    height, width = resolution
    cover_height, cover_width = float(height), float(width)
    if crop_rng is not None:
        short = min(resolution)
        zoom = crop_rng.integers(short, math.ceil(short / 0.8), endpoint=True) / short
        cover_height, cover_width = height * zoom, width * zoom

    scale = max(cover_height / image.height, cover_width / image.width)
    longest = math.ceil(MAX_ELONGATION * cover_height / scale), math.ceil(MAX_ELONGATION * cover_width / scale)
    if image.height > longest[0] or image.width > longest[1]:
        image = cut_middle(image, min(image.height, longest[0]), min(image.width, longest[1]))
    for step, resampling in covering_steps(image.height, image.width, cover_height, cover_width):
        image = image.resize(step[::-1], resampling)

    if crop_rng is None:
        return cut_middle(image, height, width)
    top = int(crop_rng.integers(image.height - height, endpoint=True))
    left = int(crop_rng.integers(image.width - width, endpoint=True))
    return image.crop((left, top, left + width, top + height))


def covering_steps(
    height: int, width: int, cover_height: float, cover_width: float
) -> Iterator[tuple[tuple[int, int], Image.Resampling]]:
    """Height and width in pixels after each step in which an image is resized to just cover a target, and the filter.

    It is halved with BOX while it is at least twice the target, and then resized to the target with BICUBIC.
    """
    while height >= 2 * cover_height and width >= 2 * cover_width:
        height, width = height // 2, width // 2
        yield (height, width), Image.Resampling.BOX
    scale = max(cover_height / height, cover_width / width)
    yield (round(height * scale), round(width * scale)), Image.Resampling.BICUBIC


def cut_middle(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of an image, of that height and width in pixels."""
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))


def to_planes(image: Image.Image, channels: int) -> np.ndarray:
    """Pixel values of an image from [`to_channels`], resized or not, in its depth.

    Returns:
        `numpy.ndarray` of shape (channels, height, width): uint8 in 0..255, or float32 in 0..1 for mode "F".
    """
    values = np.asarray(image)
    if image.mode == "F":
        values = values.clip(0, 1)  # BICUBIC overshoots where values are floats
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return values if len(values) == channels else np.repeat(values, channels, axis=0)


def to_pixel_values(image: Image.Image, channels: int) -> np.ndarray:
    """Pixel values in [-1, 1], float32 of shape (channels, height, width); arguments as of [`to_planes`]."""
    planes = to_planes(image, channels)
    # For bytes this equals the published x / 127.5 - 1 to the bit.
    values = planes if planes.dtype == np.float32 else planes.astype(np.float32) / np.float32(255)
    values *= 2
    values -= 1
    return values
