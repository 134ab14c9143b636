"""Entropy-driven sampling (EDS): arXiv 2206.10847 (ED-DPM, ECCV 2022), section 4.1."""

import math
from dataclasses import asdict, dataclass

import torch

from ..settings import is_number


@dataclass(frozen=True)
class EntropyScaling:
    r"""Scales each image's gradient by log C / H(p): the entropy of the uniform distribution over the classifier's.

    A confident classifier has a vanishing gradient long before sampling ends; this compensates for it.

    Args:
        max_factor (`float`, defaults to 20.0): Upper bound of the factor. The paper has none, but the entropy of
            a certain classifier is 0, and on digits a bound was better than none.
    """

    max_factor: float = 20.0

    def __post_init__(self) -> None:
        if not (is_number(self.max_factor) and self.max_factor >= 1):
            raise ValueError(f"max_factor={self.max_factor!r} of EntropyScaling must be a finite number from 1 up.")

    def factor(self, logits: torch.Tensor) -> torch.Tensor:
        """The factors of shape `(batch,)`, for logits of shape `(batch, classes)`; constants to the gradient."""
        log_probabilities = logits.detach().log_softmax(dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
        uniform = math.log(logits.shape[-1])
        return uniform / entropy.clamp(min=uniform / self.max_factor)  # the entropy may be 0, or negative by rounding

    def to_dict(self) -> dict[str, float]:
        """Its numbers."""
        return asdict(self)


def as_entropy_scaling(value: EntropyScaling | dict | bool | None) -> EntropyScaling | None:
    """The `entropy_scaling` argument as an object, from an object, a saved dict or `True` (the defaults)."""
    if isinstance(value, dict):
        return EntropyScaling(**value)
    if not isinstance(value, EntropyScaling | bool | None):
        raise ValueError(f"entropy_scaling takes an EntropyScaling; got {value!r}.")
    return EntropyScaling() if value is True else value or None
