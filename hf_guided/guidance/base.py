"""The base classes of guidance: the scale, and the timesteps at which a kind acts."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn

from ..settings import is_number, is_whole

# A [`ClassifierGuidedPipeline`] or one like it: guidance uses only the names of its components.
Pipeline = Any
Scale = float | Mapping[float, float] | Callable[[float], float]


def is_decimal(text: Any) -> bool:
    """Whether it is a number as text, as the keys of a JSON object are."""
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False


# Those that a pipeline's folder can hold, by name.
KINDS: dict[str, type["Guidance"]] = {}


@dataclass(eq=False, repr=False)
class Guidance:
    r"""Base of all kinds of guidance. They compose in a list, in any order.

    Args:
        scale (`float`, a mapping or a function): Strength of the guidance, 0 or more. A mapping from timesteps to
            scales is interpolated linearly, `{0: 0.0, 500: 4.0, 999: 0.0}`; a function takes the timestep.
            Timesteps are those of the training schedule, 0 the least noisy.
        interval (`tuple[int, int]`, *optional*): Lowest and highest timestep at which it acts, both included (arXiv
            2404.07724); outside it is not computed.

    A kind is a dataclass: its fields are its arguments. A pipeline saves them ([`to_dict`]): numbers, texts, and
    objects with a `to_dict` of their own.

    Raises:
        `ValueError`: For a negative or non-finite scale, or an empty interval.
    """

    neutral_scale = 0.0  # exactly no guidance
    needs_labels = True
    source: ClassVar[str | None] = None

    scale: Scale
    interval: tuple[float, float] | None = None

    def __init_subclass__(cls, source: str | None = None, **kwargs: Any):
        """A kind that names the source of its formula registers itself: pipelines save it and load it again."""
        super().__init_subclass__(**kwargs)
        if source is not None:
            cls.source = source
            KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        name, scale, interval = type(self).__name__, self.scale, self.interval
        if isinstance(scale, Mapping):
            if not all(is_number(timestep) or is_decimal(timestep) for timestep in scale):
                raise ValueError(f"The scale of {name} has keys that are not timesteps: {list(scale)}; give numbers.")
            scale = dict(sorted((float(timestep), value) for timestep, value in scale.items()))
            if not scale:
                raise ValueError(f"The scale of {name} is an empty mapping; give at least one timestep and its scale.")
        for value in scale.values() if isinstance(scale, Mapping) else [] if callable(scale) else [scale]:
            if not (is_number(value) and value >= 0):
                raise ValueError(f"The scale of {name} must be a finite number from 0 up; got {value!r}.")
        is_pair = isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_number, interval))
        if interval is not None and not (is_pair and interval[0] <= interval[1]):
            raise ValueError(
                f"interval={interval!r} of {name} is not a pair: give the lowest timestep first, then the highest."
            )
        self.scale = scale
        self.interval = None if interval is None else (interval[0], interval[1])

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
        """Whether it has an effect at this timestep of the training schedule."""
        inside = self.interval is None or self.interval[0] <= timestep <= self.interval[1]
        return inside and self.scale_at(timestep) != self.neutral_scale

    @property
    def is_neutral(self) -> bool:
        """Whether it has no effect at any timestep."""
        if callable(self.scale):
            return False
        scales = self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]
        return all(value == self.neutral_scale for value in scales)

    def check(self, pipeline: Pipeline, labels: torch.Tensor | None, condition_unet: bool) -> None:
        """Raises `ValueError`, before the first step, if it cannot work with these components and labels."""
        if self.needs_labels and labels is None:
            name = type(self).__name__
            raise ValueError(f"{name} needs class_labels; give them, or set the scale to {self.neutral_scale:g}.")

    def to_dict(self) -> dict[str, Any]:
        """Its kind and arguments, as saved in a pipeline's `sampling_defaults`; [`guidance_from_dict`] reads them.

        Raises:
            `ValueError`: If it holds a function.
        """
        numbers: dict[str, Any] = {"kind": type(self).__name__}
        for name, value in self.given().items():
            if hasattr(value, "to_dict"):
                value = value.to_dict()
            elif isinstance(value, Mapping):
                value = {f"{key:g}": number for key, number in value.items()}
            elif callable(value):
                raise ValueError(
                    f"{type(self).__name__} holds a function ({name}), which cannot be saved with a pipeline; pass it "
                    f"as guidance= at each call instead."
                )
            numbers[name] = list(value) if isinstance(value, tuple) else value
        return numbers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"

    def given(self) -> dict[str, Any]:
        """Its arguments that are not the default."""
        parameters = inspect.signature(type(self)).parameters.items()
        return {name: value for name, p in parameters if (value := getattr(self, name)) != p.default}


class PredictionGuidance(Guidance):
    r"""Base of guidance that extrapolates from a worse prediction: prediction + (scale - 1) * (prediction - other).

    Several in a list each add their difference; 1 is exactly no guidance. The learned variance stays the UNet's own.
    It applies to every prediction type, since epsilon, v and the clean image are linear in each other at one `x_t`.
    """

    neutral_scale = 1.0
    component: str  # makes the other prediction

    def difference(self, prediction: torch.Tensor, other: torch.Tensor, timestep: float) -> torch.Tensor:
        """The term added to the prediction, of its shape."""
        return (self.scale_at(timestep) - 1) * (prediction - other)


@dataclass
class Objective:
    """The log-probability whose gradient guides, for the components and labels of one call.

    It takes images `(n, channels, height, width)` in float32, the timestep of the training schedule, and a tensor of
    their indices in the batch; it returns `(n,)` in nats, or the sum.
    """

    component: str  # that is called, for the cost
    model: nn.Module | None  # the component itself; its parameters are frozen
    log_probability: Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]


@dataclass(eq=False, repr=False)
class GradientGuidance(Guidance, ABC):
    r"""Base of guidance by a gradient: adds scale * d log p / d x_t to the score. Several in a list add up.

    [`ADMScheduler`] moves DDPM's mean by variance * gradient (arXiv 2105.05233, Algorithm 1) and DDIM's epsilon by
    -sqrt(1 - alpha_bar) * gradient (Algorithm 2), which also holds for all other solvers.

    Args:
        scale, interval: As for every [`Guidance`]; 0 is exactly no guidance.
        every (`int`, defaults to 1): Computes the gradient at every n-th of the steps where it acts, starting with the
            first (arXiv 2408.11194).
        reuse (`bool`, defaults to `False`): Reuse the last gradient at the steps between, instead of none.
    """

    denoised = False  # whether the log-probability is that of the predicted clean image instead of the noisy sample

    every: int = 1
    reuse: bool = False
    through_unet: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.every, 10**9):
            raise ValueError(f"every={self.every} of {type(self).__name__} must be a whole number from 1 up.")

    @abstractmethod
    def objective(self, pipeline: Pipeline, labels: torch.Tensor | None) -> Objective:
        """The log-probability whose gradient guides this call."""


@dataclass(eq=False, repr=False)
class DenoisedGuidance(GradientGuidance):
    r"""Base of guidance by the predicted clean image x_0, with models trained on clean images.

    x_0 follows from the prediction after [`PredictionGuidance`], and is clipped if the scheduler clips.

    Args:
        scale, interval, every, reuse: As for every [`GradientGuidance`].
        through_unet (`bool`): Take the gradient through the UNet, to x_t itself (arXiv 2209.14687, equation 10; arXiv
            2302.07121, equation 6), at the cost of its backward pass. Otherwise the gradient with respect to x_0 is
            used in its place (arXiv 2310.11311).
    """

    denoised = True

    through_unet: bool = False  # type: ignore[misc]


@contextmanager
def frozen(*models: nn.Module | None) -> Iterator[None]:
    """Freezes the parameters, so that no activations are kept for their gradients."""
    trainable = [p for model in models if model is not None for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
