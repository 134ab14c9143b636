"""Image preprocessing of the ADM classifier; needs PIL only, not torchvision."""

import base64
import binascii
import os
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

from ..registration import register_with_diffusers
from .images import covering_steps, open_file, resize_and_crop, to_channels, to_planes, upright


class ADMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Additional keyword arguments of [`ADMImageProcessor`]."""

    num_channels: int  # of the images that the classifier takes, 3 or 1


@register_with_diffusers
class ADMImageProcessor(PilBackend):
    r"""Pixel values in [-1, 1], bit-identical to those of training.

    EXIF orientation is applied, transparent parts become white, 16-bit and float depth is kept. Images are resized
    until they cover the classifier's size, and the centre is cropped. They are PIL images, or paths, URLs and base64
    strings of files in one of `IMAGE_FORMATS`, or 8-bit arrays and tensors of 1, 3 or 4 channels; float arrays keep
    their values and channels.

    Args:
        size (`dict`, defaults to `{"height": 64, "width": 64}`): Height and width in pixels.
        num_channels (`int`, defaults to 3): 3, or 1 for a classifier of grey images, whatever the mode of an image.
        resample: Recorded for other programs; images are resized as in training.

    Raises:
        One of `BAD_IMAGE_ERRORS`: For images that training would not use either.
    """

    valid_kwargs = ADMImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    size = {"height": 64, "width": 64}
    image_mean = 0.5
    image_std = 0.5
    num_channels = 3
    do_resize = True
    do_rescale = True
    do_normalize = True

    def fetch_images(self, image_url_or_urls: Any, timeout: float | None = None) -> Any:
        """PIL images opened from a path, URL or base64 string, in the mode of their file."""
        source = image_url_or_urls
        if isinstance(source, list | tuple):
            return [self.fetch_images(one, timeout) for one in source]
        if not isinstance(source, str):
            return super().fetch_images(source)
        file: str | bytes = source
        if source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=timeout) as response:
                file = response.read()
        elif not os.path.exists(source):
            try:
                file = base64.b64decode("".join(source.rpartition(",")[2].split()), validate=True)
            except binascii.Error as error:
                raise ValueError(f"{source[:200]!r} is neither a file nor a URL nor a picture as base64.") from error
        with open_file(file) as picture:
            return upright(picture)

    def process_image(self, image: Any, **kwargs: Any) -> np.ndarray:
        """An image at its final size, `(num_channels, height, width)` in 0..255."""
        channels = kwargs.get("num_channels") or self.num_channels
        size, do_resize = kwargs.get("size", self.size), kwargs.get("do_resize", self.do_resize)
        if do_resize and not (size and size.height and size.width):
            raise ValueError(f"Pictures are brought to a height and a width; got size={size}.")
        if isinstance(image, Image.Image) and channels not in (1, 3):
            raise ValueError(f"PIL images have 1 or 3 channels for a classifier; this one takes arrays of {channels}.")

        def resized(picture: Image.Image) -> Image.Image:
            return resize_and_crop(picture, (size.height, size.width)) if do_resize else picture

        if not isinstance(image, Image.Image):
            array = super().process_image(image, input_data_format=kwargs.get("input_data_format"))
            is_picture = array.dtype.kind != "f" and channels in (1, 3)
            if len(array) not in ((1, 3, 4) if is_picture else (1, channels)):
                raise ValueError(
                    f"An image of {len(array)} channels cannot be turned into the {channels} that the classifier "
                    f"takes; pass PIL images, or arrays of {channels} channels."
                )
            if not is_picture:
                planes = [np.asarray(resized(Image.fromarray(plane.astype(np.float32)))) for plane in array]
                return np.stack(planes * channels if len(planes) == 1 else planes)
            if array.min() < 0 or array.max() > 255:
                raise ValueError(f"An image has values from {array.min()} to {array.max()}; give 8-bit integers.")
            array = array.astype(np.uint8) * (255 if array.dtype == bool else 1)
            image = Image.fromarray(array[0] if len(array) == 1 else np.moveaxis(array, 0, -1))
        values = to_planes(resized(to_channels(upright(image), channels)), channels)
        return values if values.dtype == np.uint8 else values.astype(np.float64) * 255

    def _preprocess(self, images: list[np.ndarray], do_resize: bool, **kwargs: Any) -> BatchFeature:
        return super()._preprocess(images, do_resize=False, **kwargs)  # already resized

    def resizing_steps(self, height: int, width: int) -> Iterator[tuple[tuple[int, int], int]]:
        """Height and width in pixels after each resizing step, each with its filter."""
        return covering_steps(height, width, self.size["height"], self.size["width"])
