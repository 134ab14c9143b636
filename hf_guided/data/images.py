"""One row of a dataset: its picture, and which files it may name."""

from typing import Any

from PIL import Image

from ..models.images import (
    BAD_IMAGE_ERRORS,
    IMAGE_FORMATS,
    open_file,
    resize_and_crop,
    to_channels,
    to_pixel_values,
    upright,
)

__all__ = ["BAD_IMAGE_ERRORS", "IMAGE_FORMATS", "open_image", "resize_and_crop", "to_channels", "to_pixel_values"]


def open_image(record: Any) -> Image.Image:
    """
    Decodes one image and turns it upright, as its EXIF orientation says.

    Args:
        record (`dict` or `PIL.Image.Image`):
            What `datasets` gives for a column of `Image(decode=False)`, `{"bytes": ..., "path": ...}` of which one may
            be None; or an image that is already decoded.

    Returns:
        `PIL.Image.Image`: the image, in the mode that its file has.

    Raises:
        One of `BAD_IMAGE_ERRORS`: if there is no image, or it cannot be decoded.
    """
    if isinstance(record, Image.Image):
        return upright(record)
    with open_record(record) as image:
        return upright(image)


def open_record(record: dict[str, Any] | None) -> Image.Image:
    """Opens an image that is not decoded yet, as `open_file` does."""
    if record is None or (record["path"] is None and record["bytes"] is None):
        raise ValueError("the image is missing")
    return open_file(record["path"] if record["bytes"] is None else record["bytes"])
