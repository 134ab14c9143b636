"""One image: from the file to an array of the model's size, channels and range."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# All that Pillow raises on broken files (found by flipping bytes in files of eleven formats), and our own ValueErrors.
BAD_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def open_image(record: Any) -> Image.Image:
    """
    Decodes one image and turns it upright, as its EXIF orientation says.

    Args:
        record (`dict` or `PIL.Image.Image`):
            What `datasets` gives for a column of `Image(decode=False)`, `{"bytes": ..., "path": ...}` of which one may
            be None; or an image that is already decoded, which is returned as it is.

    Returns:
        `PIL.Image.Image`: the image, in the mode that its file has.

    Raises:
        One of `BAD_IMAGE_ERRORS`: if there is no image, or it cannot be decoded.
    """
    if isinstance(record, Image.Image):
        return record
    if record is None:
        raise ValueError("the image is missing")
    file = record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """
    Reduces the many modes of image files to three, without losing depth or revealing what is transparent.

    Args:
        image (`PIL.Image.Image`): An image in any mode that Pillow can convert. Floats must lie in 0..1, and integers
            of more than 8 bits in 0..65535.
        channels (`int`): 1 or 3, the channels that the model sees.

    Returns:
        `PIL.Image.Image`: mode "L" or "RGB" (0..255), or "F" (0..1) for 16-bit and float images. For three channels,
        "L" and "F" stand for three equal ones.

    Raises:
        `ValueError`: if the values are out of range, or Pillow knows no conversion from the mode.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values, top = np.asarray(image), 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= top):  # also true of NaN
            raise ValueError(
                f"mode {image.mode} with values from {values.min()} to {values.max()}, where 0 to {top} is meant"
            )
        return image if image.mode == "F" else Image.fromarray((values / top).astype(np.float32))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if channels == 1 or image.mode in ("L", "1"):
        return image.convert("L")
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image, resolution: tuple[int, int], crop_rng: np.random.Generator | None = None
) -> Image.Image:
    """
    Scales an image until it covers the resolution and crops the rest, as ADM was trained: halvings by BOX for as long
    as twice the target is left, then BICUBIC to the target.

    Args:
        image (`PIL.Image.Image`): Mode "L", "RGB" or "F".
        resolution (`tuple[int, int]`): Height and width in pixels.
        crop_rng (`numpy.random.Generator`, *optional*): Draws the scale (the crop keeps 80 to 100 % of the shorter
            side) and the place of the crop. None crops the centre at full scale.

    Returns:
        `PIL.Image.Image`: the crop, of that height and width, in the same mode.
    """
    height, width = resolution
    cover_height, cover_width = float(height), float(width)
    if crop_rng is not None:
        short = min(resolution)
        zoom = crop_rng.integers(short, math.ceil(short / 0.8), endpoint=True) / short
        cover_height, cover_width = height * zoom, width * zoom

    while image.height >= 2 * cover_height and image.width >= 2 * cover_width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(cover_height / image.height, cover_width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)

    spare_height, spare_width = image.height - height, image.width - width
    if crop_rng is None:
        top, left = spare_height // 2, spare_width // 2
    else:
        top = int(crop_rng.integers(spare_height, endpoint=True))
        left = int(crop_rng.integers(spare_width, endpoint=True))
    return image.crop((left, top, left + width, top + height))


def to_pixel_values(image: Image.Image, channels: int) -> np.ndarray:
    """
    Args:
        image (`PIL.Image.Image`): What `to_channels` gave for the same `channels`, resized or not.
        channels (`int`): 1 or 3.

    Returns:
        `numpy.ndarray` of float32 and shape (channels, height, width), in -1..1.
    """
    values = np.asarray(image, dtype=np.float32)
    # BICUBIC overshoots where values are floats. For bytes this equals the published x / 127.5 - 1 to the bit.
    values = values.clip(0, 1) if image.mode == "F" else values / np.float32(255)
    values *= 2
    values -= 1
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return values if len(values) == channels else np.repeat(values, channels, axis=0)
