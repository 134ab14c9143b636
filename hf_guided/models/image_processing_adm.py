"""Clean pictures as the classifier of ADM wants them; needs PIL only, not torchvision."""

from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

from ..registration import register_with_diffusers


class ADMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What [`ADMImageProcessor`] takes beside the usual.

    Attributes:
        num_channels (`int`): Channels of the images that the classifier takes, 3 or 1.
    """

    num_channels: int


@register_with_diffusers
class ADMImageProcessor(PilBackend):
    r"""Resizes pictures to the classifier's size, returns to its channels, and maps [0, 255] to [-1, 1].

    Args:
        size (`dict`, defaults to `{"height": 64, "width": 64}`): Height and width in pixels.
        num_channels (`int`, defaults to 3): 3, or 1 for a classifier of grey images, whatever mode a picture has.
        resample (`PIL.Image.Resampling`, defaults to bicubic): How to resize.
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

    def process_image(self, image: Any, **kwargs: Any) -> np.ndarray:
        num_channels = kwargs.get("num_channels") or self.num_channels
        if isinstance(image, PIL.Image.Image):
            return super().process_image(image.convert("L" if num_channels == 1 else "RGB"), **kwargs)
        array = super().process_image(image, **kwargs)
        if array.shape[0] == num_channels:
            return array
        if array.shape[0] not in (1, 3, 4) or num_channels not in (1, 3):
            raise ValueError(
                f"An image of {array.shape[0]} channels cannot be turned into the {num_channels} that the classifier "
                f"takes; pass PIL images, or arrays of {num_channels} channels."
            )
        picture = PIL.Image.fromarray(array[0] if array.shape[0] == 1 else np.moveaxis(array, 0, -1))
        return super().process_image(picture.convert("L" if num_channels == 1 else "RGB"), **kwargs)
