"""How a sample is guided: one small file for each kind, all with a scale and an interval.

To add one, write its file: a subclass that names its `source` registers itself, and pipelines save and load it.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from .autoguidance import AutoGuidance
from .base import KINDS, Guidance
from .classifier import ClassifierGuidance
from .classifier_free import ClassifierFreeGuidance
from .clip import CLIPGuidance
from .denoised_classifier import DenoisedClassifierGuidance
from .entropy_scaling import EntropyScaling
from .loss import LossGuidance


def guidance_from_dict(numbers: Mapping[str, Any]) -> Guidance:
    """A guidance object from the output of [`Guidance.to_dict`].

    Raises:
        `ValueError`: For an unknown kind, or an argument that it does not support.
    """
    name = numbers.get("kind") if isinstance(numbers, Mapping) else numbers
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{name!r} is not a kind of guidance that can be saved; those are {', '.join(KINDS)}.")
    arguments = {name: value for name, value in numbers.items() if name != "kind"}
    known = inspect.signature(KINDS[name]).parameters
    if unknown := set(arguments) - set(known):
        raise ValueError(f"{name} does not support {', '.join(sorted(unknown))}; it takes {', '.join(known)}.")
    return KINDS[name](**arguments)


__all__ = [
    "AutoGuidance",
    "CLIPGuidance",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "DenoisedClassifierGuidance",
    "EntropyScaling",
    "Guidance",
    "LossGuidance",
    "guidance_from_dict",
]
