"""Entropy-driven sampling (EDS): arXiv 2206.10847 (ED-DPM, ECCV 2022), section 4.1."""

import math
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class EntropyScaling:
    r"""Scales each image's gradient by the entropy of a uniform guess over that of the classifier's: log C / H(p).

    A classifier that is sure gives hardly any gradient, long before the image is done; this keeps it going.

    Args:
        max_factor (`float`, defaults to 20.0): The factor's upper end. The paper has none, but a classifier that is
            certain has no entropy at all, and on digits an end was better than none.
    """

    max_factor: float = 20.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_factor < math.inf:
            raise ValueError(f"max_factor={self.max_factor} of EntropyScaling must be a finite number from 1 up.")

    def factor(self, logits: torch.Tensor) -> torch.Tensor:
        """The factors, shape `(batch,)`, for logits `(batch, classes)`; no gradient flows through them."""
        log_probabilities = logits.detach().log_softmax(dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
        uniform = math.log(logits.shape[-1])
        return uniform / entropy.clamp(min=uniform / self.max_factor)  # which may be 0, or below by rounding

    def to_dict(self) -> dict[str, float]:
        """Its numbers."""
        return asdict(self)


def as_entropy_scaling(value: EntropyScaling | dict | bool | None) -> EntropyScaling | None:
    """An option of a classifier's guidance, as given or as saved; `True` is the default one."""
    if isinstance(value, dict):
        return EntropyScaling(**value)
    if not isinstance(value, EntropyScaling | bool | None):
        raise ValueError(f"entropy_scaling takes an EntropyScaling; got {value!r}.")
    return EntropyScaling() if value is True else value or None
