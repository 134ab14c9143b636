"""Differentiable versions of image processors, for clean images."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

RESAMPLING = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def preprocessing(processor: Any | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A differentiable function of images `(n, channels, height, width)` in [-1, 1] that matches an image processor.

    One difference: the overshoot of a bicubic filter is not clipped, which would stop the gradient.

    Args:
        processor (`BaseImageProcessor`, *optional*): Its sizes, crop, rescaling and normalisation are read, and the
            result is compared with its own on a test image. `None` leaves images unchanged.

    Raises:
        `ValueError`: For a processor that cannot be matched.
    """
    if processor is None:
        return lambda images: images
    channels = len(mean) if isinstance(mean := processor.image_mean, list | tuple) else 1
    shape = (1, channels, 1, 1)
    offset = torch.tensor(processor.image_mean if processor.do_normalize else 0.0).expand(channels).view(shape)
    divisor = torch.tensor(processor.image_std if processor.do_normalize else 1.0).expand(channels).view(shape)
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    if processor.do_resize:
        resizing(processor, 1, 1)  # refuses what it does not know

    def prepare(images: torch.Tensor) -> torch.Tensor:
        images = (images + 1) / 2
        if processor.do_resize:
            steps, cut = resizing(processor, *images.shape[-2:])
            for size, resample in steps:
                images = resize(images, size, resample)
            images = center_crop(images, *cut)
        if crop is not None:
            images = center_crop(images, crop["height"], crop["width"])
        return (images * factor - offset.to(images)) / divisor.to(images)

    picture = Image.merge("RGB", [Image.linear_gradient("L").rotate(angle).resize((56, 40)) for angle in (0, 90, 180)])
    expected = processor(picture, return_tensors="pt").pixel_values
    pixels = np.atleast_3d(np.array(picture.convert("L") if expected.shape[1] == 1 else picture))
    prepared = prepare(torch.from_numpy(pixels).movedim(-1, 0)[None] / 127.5 - 1)
    spread = expected.max() - expected.min()
    if prepared.shape != expected.shape or (prepared - expected).abs().max() > 0.04 * spread:
        raise ValueError(
            f"{type(processor).__name__} does more to images than its size, crop, rescaling and normalisation say, "
            f"which cannot be done differentiably here; give a processor such as ViTImageProcessor."
        )
    return prepare


Size = tuple[int, int]  # height and width


def resizing(processor: Any, height: int, width: int) -> tuple[Iterable[tuple[Size, int]], Size]:
    """Sizes in pixels of the resizing steps of a processor, each with PIL's filter number, and of the centre crop after
    them."""
    size, resample = dict(processor.size), int(processor.resample)
    if resample not in RESAMPLING:
        raise ValueError(f"{type(processor).__name__} resizes with resample={resample}; take 0, 2 or 3.")
    if size.get("height") and size.get("width"):
        target = (size["height"], size["width"])
        if hasattr(processor, "resizing_steps"):  # ADMImageProcessor, or a copy of it in a repository with its own code
            return processor.resizing_steps(height, width), target
        return [(target, resample)], target
    edge = size.get("shortest_edge")
    if not edge or size.get("longest_edge"):
        raise ValueError(
            f"{type(processor).__name__} resizes to {size}, which cannot be done differentiably here; give a processor "
            f"whose size has height and width, or shortest_edge."
        )
    cut = None
    if getattr(processor, "crop_pct", None) is not None:  # as ConvNeXt's: large sizes are warped, small ones cropped
        if edge >= 384:
            return [((edge, edge), resample)], (edge, edge)
        cut, edge = (edge, edge), int(edge / processor.crop_pct)
    shorter, longer = sorted((height, width))
    other = int(edge * longer / shorter)
    target = (edge, other) if height <= width else (other, edge)
    return [(target, resample)], cut or target


def resize(images: torch.Tensor, size: Size, resample: int) -> torch.Tensor:
    """Images `(n, channels, height, width)` resized with one of PIL's filters."""
    if size == images.shape[-2:]:
        return images
    if resample == Image.Resampling.BOX:
        rows, columns = (box_weights(*sides).to(images) for sides in zip(images.shape[-2:], size, strict=True))
        return rows @ images @ columns.T
    mode = RESAMPLING[resample]
    return F.interpolate(images, size, mode=mode, antialias=mode != "nearest-exact")


@cache
def box_weights(before: int, after: int) -> torch.Tensor:
    """Weights of PIL's BOX filter from a row of `before` pixels to one of `after`, `(after, before)`."""
    pixels = Image.fromarray(np.eye(before, dtype=np.float32))
    return torch.from_numpy(np.array(pixels.resize((before, after), Image.Resampling.BOX)))


def center_crop(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The centre of images; missing pixels are black."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return F.pad(images, (-left, width + left - images.shape[-1], -top, height + top - images.shape[-2]))
