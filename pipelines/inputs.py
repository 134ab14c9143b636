"""Images and masks that a pipeline is given, as tensors of one batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..models.images import to_channels, to_pixel_values, upright
from .class_conditional import check_num_images

Images = Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image | np.ndarray | torch.Tensor]


def match_batch(num_images_per_label: int, *parts: torch.Tensor | None) -> tuple[Any, ...]:
    """The batch size, and labels, images and masks expanded to it; one of a kind serves for all.

    Args:
        num_images_per_label (`int`): How often each is repeated, consecutive in the batch.
        parts (`torch.Tensor` of shape `(n or 1, ...)`, *optional*): Labels, images or masks.

    Returns:
        The batch size and the parts, each of that length or `None`.

    Raises:
        `ValueError`: If their numbers do not fit.
    """
    num_images_per_label = check_num_images(num_images_per_label)
    given = [part for part in parts if part is not None]
    count = max((len(part) for part in given), default=1)
    if any(len(part) not in (1, count) for part in given):
        numbers = ", ".join(str(len(part)) for part in given)
        raise ValueError(
            f"class_labels, images and masks do not match ({numbers} were given): give as many of each, or one for all."
        )
    matched = (
        None if part is None else part.expand(count, *part.shape[1:]).repeat_interleave(num_images_per_label, dim=0)
        for part in parts
    )
    return count * num_images_per_label, *matched


def images_to_tensor(images: Images, channels: int) -> torch.Tensor:
    """Images of any type as a tensor of shape `(batch, channels, height, width)` in [-1, 1].

    Args:
        images: PIL images; arrays `(height, width)`, `(height, width, C)` or `(batch, height, width, C)`; tensors
            `(height, width)`, `(C, height, width)` or `(batch, C, height, width)`; or a list of one kind. 8-bit
            integers run from 0 to 255, as in the published `.npz` files; booleans and floats from 0 to 1 or, if some
            are clearly negative, from -1 to 1.
        channels (`int`): Channels of the model, 1 or 3. Grey images are expanded to three equal channels.

    Raises:
        `ValueError`: For other shapes or values, and images that differ in size.
    """
    several: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    if several and all(isinstance(image, Image.Image) for image in several):
        pictures = [to_pixel_values(to_channels(upright(image), channels), channels) for image in several]
        tensors = [torch.from_numpy(picture)[None] for picture in pictures]
    else:
        tensors = [_planes(image) for image in several]
    if len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) != 1:
        kinds = sorted({f"{tensor.shape[-2]}x{tensor.shape[-1]} {tensor.dtype}" for tensor in tensors})
        raise ValueError(f"Images of one batch must have one size and type; these have {', '.join(kinds) or 'none'}.")
    batch = torch.cat(tensors)
    if batch.shape[1] not in (1, channels) or batch.numel() == 0:
        raise ValueError(f"Images of shape {tuple(batch.shape)} were given where {channels} channels are expected.")
    batch = batch.expand(-1, channels, -1, -1)
    if batch.dtype == torch.uint8:
        return batch / 127.5 - 1
    batch = batch.float()
    low, high = batch.min().item(), batch.max().item()
    if low < -2 or -0.1 < low < 0 or not high <= 2:  # samples may overshoot a little; the last also holds for NaN
        raise ValueError(
            f"The images have values from {low:g} to {high:g}; give 8-bit integers, or floats in [0, 1] or [-1, 1]."
        )
    return (batch if low < 0 else 2 * batch - 1).clamp(-1, 1)


def _planes(values: Any) -> torch.Tensor:
    """An array or tensor of one or several images as a tensor of shape `(batch, C, height, width)`."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.array(values))
        values = values.movedim(-1, -3) if values.ndim > 2 else values
    if not torch.is_tensor(values) or values.ndim not in (2, 3, 4):
        raise ValueError(
            f"An image is a PIL image, an array (height, width, channels) or a tensor (channels, height, width), alone "
            f"or in a batch; got {type(values).__name__} of shape {tuple(getattr(values, 'shape', ()))}."
        )
    return values.reshape(-1, values.shape[-3] if values.ndim > 2 else 1, *values.shape[-2:])
