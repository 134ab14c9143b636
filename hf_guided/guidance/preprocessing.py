"""What an image processor does to clean images, differentiably."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def preprocessing(processor: Any | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A differentiable function of images `(n, channels, height, width)` in [-1, 1] that does as a processor does.

    Args:
        processor (`BaseImageProcessor`, *optional*): Its sizes, crop, rescaling and normalisation are read. Without
            one, the images stay as they are.

    Raises:
        `ValueError`: For a processor that resizes in another way.
    """
    if processor is None:
        return lambda images: images
    channels = len(mean) if isinstance(mean := processor.image_mean, list | tuple) else 1
    shape = (1, channels, 1, 1)
    offset = torch.tensor(processor.image_mean if processor.do_normalize else 0.0).expand(channels).view(shape)
    divisor = torch.tensor(processor.image_std if processor.do_normalize else 1.0).expand(channels).view(shape)
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    resample = RESAMPLING.get(int(processor.resample), "") if processor.do_resize else ""
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    if processor.do_resize and not resample:
        raise ValueError(f"{type(processor).__name__} resizes with resample={processor.resample}; take 0, 2 or 3.")
    if processor.do_resize:
        resized_to(processor, 1, 1)

    def prepare(images: torch.Tensor) -> torch.Tensor:
        images = (images + 1) / 2
        if processor.do_resize:
            (height, width), cut = resized_to(processor, *images.shape[-2:])
            if (height, width) != images.shape[-2:]:
                antialias = resample != "nearest"
                images = F.interpolate(images, (height, width), mode=resample, antialias=antialias)
            images = center_crop(images, *cut)
        if crop is not None:
            images = center_crop(images, crop["height"], crop["width"])
        return (images * factor - offset.to(images)) / divisor.to(images)

    return prepare


def resized_to(processor: Any, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The height and width that a processor resizes to, and those that it then cuts out."""
    size = dict(processor.size)
    if size.get("height") and size.get("width"):
        target = (size["height"], size["width"])
        return target, target
    edge = size.get("shortest_edge")
    if not edge or size.get("longest_edge"):
        raise ValueError(
            f"{type(processor).__name__} resizes to {size}, which cannot be done differentiably here; give a processor "
            f"whose size has height and width, or shortest_edge."
        )
    cut = None
    if getattr(processor, "crop_pct", None) is not None:  # as ConvNeXt's: large sizes are warped, small ones cut
        if edge >= 384:
            return (edge, edge), (edge, edge)
        cut, edge = (edge, edge), int(edge / processor.crop_pct)
    shorter, longer = sorted((height, width))
    other = int(edge * longer / shorter)
    target = (edge, other) if height <= width else (other, edge)
    return target, cut or target


def center_crop(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Cuts out the middle; what is missing is black."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return F.pad(images, (-left, width + left - images.shape[-1], -top, height + top - images.shape[-2]))
