"""What every kind of guidance has in common: how strong it is and where it acts."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

# A [`ClassifierGuidedPipeline`] or one like it: guidance knows nothing of it but the names of its components.
Pipeline = Any
Scale = float | Mapping[float, float] | Callable[[float], float]


class NotFiniteError(RuntimeError):
    """A model's output or a gradient holds NaN or infinity."""


class Guidance:
    r"""Steers samples. Kinds compose in a list, in any order.

    Args:
        scale (`float`, a mapping or a function): How strongly, from 0 up. A mapping from timesteps to scales is joined
            by straight lines, `{0: 0.0, 500: 4.0, 999: 0.0}`; a function is given the timestep. Timesteps are those of
            the training schedule, 0 the least noisy.
        interval (`tuple[int, int]`, *optional*): Lowest and highest timestep at which it acts, both included (arXiv
            2404.07724); outside it costs nothing.

    Raises:
        `ValueError`: For a negative or non-finite scale, or an empty interval.
    """

    neutral_scale = 0.0  # which is exactly no guidance
    needs_labels = True

    def __init__(self, scale: Scale, interval: tuple[float, float] | None = None):
        name = type(self).__name__
        if isinstance(scale, Mapping):
            scale = dict(sorted((float(timestep), value) for timestep, value in scale.items()))
            if not scale:
                raise ValueError(f"The scale of {name} is an empty mapping; give at least one timestep and its scale.")
        for value in scale.values() if isinstance(scale, Mapping) else [] if callable(scale) else [scale]:
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"The scale of {name} must be a finite number from 0 up; got {value!r}.")
        if interval is not None and (
            not isinstance(interval, list | tuple) or len(interval) != 2 or not interval[0] <= interval[1]
        ):
            raise ValueError(
                f"interval={interval} of {name} is empty or no pair: give the lowest timestep first, then the highest."
            )
        self.scale = scale
        self.interval = None if interval is None else tuple(interval)

    def scale_at(self, timestep: float) -> float:
        """The scale at a timestep of the training schedule."""
        if callable(self.scale):
            value = float(self.scale(timestep))
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"The scale of {type(self).__name__} must be a finite number from 0 up; its function gives {value} "
                    f"at timestep {timestep:g}."
                )
            return value
        if not isinstance(self.scale, Mapping):
            return self.scale
        points = list(self.scale.items())
        for (low, at_low), (high, at_high) in pairwise(points):
            if low <= timestep <= high:
                return at_low + (at_high - at_low) * (timestep - low) / (high - low)
        return points[0][1] if timestep < points[0][0] else points[-1][1]

    def acts_at(self, timestep: float) -> bool:
        """Whether it does anything at this timestep of the training schedule."""
        inside = self.interval is None or self.interval[0] <= timestep <= self.interval[1]
        return inside and self.scale_at(timestep) != self.neutral_scale

    @property
    def is_neutral(self) -> bool:
        """Whether it is none at all, whatever the timestep."""
        if callable(self.scale):
            return False
        scales = self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]
        return all(value == self.neutral_scale for value in scales)

    def check(self, pipeline: Pipeline, labels: torch.Tensor | None, condition_unet: bool) -> None:
        """Refuses, before the first step, what could not work with these components and labels."""
        if self.needs_labels and labels is None:
            raise ValueError(
                f"{type(self).__name__} needs class_labels to steer towards; give them, or set the scale to "
                f"{self.neutral_scale:g}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Its kind and its numbers, as `sampling_defaults` of a pipeline hold them; [`guidance_from_dict`] reads them.

        Raises:
            `ValueError`: If it holds a function.
        """
        numbers: dict[str, Any] = {"kind": type(self).__name__}
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if hasattr(value, "to_dict"):
                value = value.to_dict()
            elif isinstance(value, Mapping):
                value = {f"{key:g}": number for key, number in value.items()}
            elif callable(value):
                raise ValueError(
                    f"{type(self).__name__} holds a function ({name}), which cannot be saved with a pipeline; pass it "
                    f"as guidance= at each call instead."
                )
            if value != parameter.default:
                numbers[name] = list(value) if isinstance(value, tuple) else value
        return numbers

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters.items()
        given = [f"{name}={value!r}" for name, p in parameters if (value := getattr(self, name)) != p.default]
        return f"{type(self).__name__}({', '.join(given)})"


class PredictionGuidance(Guidance):
    r"""Compares the UNet's prediction with a worse one and goes on beyond it, prediction + (scale - 1) * (prediction -
    other). Several in a list each add their difference; 1 is exactly no guidance. The learned variance stays the
    UNet's own. What is combined is whatever the UNet predicts, for epsilon, v and the clean image are linear in each
    other at one `x_t`.
    """

    neutral_scale = 1.0
    component: str  # that makes the other prediction

    def difference(self, prediction: torch.Tensor, other: torch.Tensor, timestep: float) -> torch.Tensor:
        """What is added to the prediction."""
        return (self.scale_at(timestep) - 1) * (prediction - other)


@dataclass
class Objective:
    """What a gradient kind climbs, ready for the components and labels of one call.

    Attributes:
        component (`str`): Whose calls it costs.
        model (`nn.Module`, *optional*): The component itself, which takes no gradient with respect to its parameters.
        log_probability (`Callable`): Takes images `(n, channels, height, width)` in float32, the timestep of the
            training schedule, and a tensor of the rows of the batch that these are; returns `(n,)`, or the sum.
    """

    component: str
    model: nn.Module | None
    log_probability: Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]


class GradientGuidance(Guidance, ABC):
    r"""Climbs a log-probability: adds scale * d log p / d x_t to the score. Several in a list add up.

    [`ADMScheduler`] moves DDPM's mean by variance * gradient (arXiv 2105.05233, Algorithm 1) and DDIM's epsilon by
    -sqrt(1 - alpha_bar) * gradient (Algorithm 2), as are the predictions of all other solvers.

    Args:
        scale, interval: As for every [`Guidance`]; 0 is exactly no guidance.
        every (`int`, defaults to 1): Computes the gradient at every so many of the steps where it acts, beginning with
            the first (arXiv 2408.11194).
        reuse (`bool`, defaults to `False`): Between those, go on with the last gradient instead of with none.
    """

    denoised = False  # whether the log-probability is that of the predicted clean image instead of the noisy sample
    through_unet = False

    def __init__(self, scale: Scale, interval: tuple[float, float] | None = None, every: int = 1, reuse: bool = False):
        super().__init__(scale, interval)
        if not isinstance(every, int) or every < 1:
            raise ValueError(
                f"every={every} of {type(self).__name__} is no whole number from 1 up; 1 is each gradient."
            )
        self.every = every
        self.reuse = reuse

    @abstractmethod
    def objective(self, pipeline: Pipeline, labels: torch.Tensor | None) -> Objective:
        """What is climbed in this call."""


class DenoisedGuidance(GradientGuidance):
    r"""Climbs the log-probability of the predicted clean image, for which no model need know noise.

    The image is the one that the UNet predicts after guidance by comparison, clipped if the scheduler clips.

    Args:
        scale, interval, every, reuse: As for every [`GradientGuidance`].
        through_unet (`bool`): Take the gradient through the UNet, to x_t itself (arXiv 2209.14687, equation 10; arXiv
            2302.07121, equation 6), which costs its backward pass. Otherwise it stops at the predicted image (arXiv
            2310.11311) and stands for the gradient at x_t.
    """

    denoised = True

    def __init__(
        self,
        scale: Scale,
        interval: tuple[float, float] | None = None,
        every: int = 1,
        reuse: bool = False,
        through_unet: bool = False,
    ):
        super().__init__(scale, interval, every, reuse)
        self.through_unet = through_unet


@contextmanager
def frozen(*models: nn.Module | None) -> Iterator[None]:
    """Takes no gradient with respect to the parameters, so that no activation is kept for it."""
    trainable = [p for model in models if model is not None for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def broken_images(images: torch.Tensor) -> torch.Tensor:
    """Which images of a batch hold something that is not finite, booleans of shape `(batch,)`."""
    # A sum is finite if all of its terms are, and takes a hundredth of the time of asking each of them.
    return ~images.flatten(1).sum(dim=1, dtype=torch.promote_types(images.dtype, torch.float32)).isfinite()
