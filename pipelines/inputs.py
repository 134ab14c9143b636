"""What a pipeline's call is given: images and masks as tensors of one batch, and checks of the other arguments."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..models.images import to_channels, to_pixel_values, upright
from ..schedulers.schedules import check_timesteps, respacing_counts
from ..settings import is_number, whole_number

MOST_IMAGES = 65_536  # of one label in a batch
STEPS = ("num_inference_steps", "respacing", "timesteps")  # arguments of a call, of which one is given

Images = Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image | np.ndarray | torch.Tensor]


def match_batch(num_images_per_label: int, *parts: torch.Tensor | None) -> tuple[Any, ...]:
    """The batch size, and labels, images and masks `(n or 1, ...)` expanded to it; `None` stays `None`.

    Each is repeated `num_images_per_label` times, consecutive in the batch; one of a kind serves for all. If their
    numbers do not fit, it is a `ValueError`.
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


def check_latents(latents: Any) -> None:
    """Refuses latents that are not a floating-point tensor."""
    if latents is None:
        return
    if not torch.is_tensor(latents):
        raise ValueError(f"latents is a {type(latents).__name__}; give a torch.Tensor, torch.from_numpy makes one.")
    if not latents.is_floating_point():
        raise ValueError(f"latents are of {latents.dtype}; give normal noise in a floating-point type.")


def check_num_images(num_images_per_label: Any) -> int:
    """Images per label as an `int`; refuses less than 1, and more than a batch can hold."""
    number = whole_number("num_images_per_label", num_images_per_label)
    if not 1 <= number <= MOST_IMAGES:
        raise ValueError(f"num_images_per_label={number} is not allowed; give a number from 1 to {MOST_IMAGES}.")
    return number


def check_steps(total: int, **steps: Any) -> dict[str, Any]:
    """The one of `STEPS` that is not `None`, by name; refuses several, and steps outside `total` timesteps."""
    given = {name: value for name, value in steps.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"Give only one of num_inference_steps, respacing and timesteps; got {', '.join(given)}.")
    if "num_inference_steps" in given:
        number = given["num_inference_steps"] = whole_number("num_inference_steps", given["num_inference_steps"])
        if not 1 <= number <= total:
            raise ValueError(f"num_inference_steps={number} does not lie between 1 and {total}, all timesteps.")
    if "respacing" in given:
        respacing_counts(given["respacing"])
    if "timesteps" in given:
        given["timesteps"] = check_timesteps(given["timesteps"], total)
    return given


def check_one_kind(guidance: Any, guidance_scale: float | None) -> None:
    """Refuses guidance together with guidance_scale, in a call or among its defaults."""
    if guidance is not None and guidance_scale is not None:
        raise ValueError("Give guidance_scale or guidance, not both: the former is short for ClassifierGuidance.")


def check_eta(eta: Any) -> None:
    """Refuses an eta outside [0, 1]."""
    if eta is not None and not (is_number(eta) and 0 <= eta <= 1):
        raise ValueError(f"eta={eta!r} is not allowed; it is DDIM's share of noise, a number from 0 to 1.")
