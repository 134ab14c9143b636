"""Entropy-driven sampling (EDS): arXiv 2206.10847 (ED-DPM, ECCV 2022), section 4.1."""

import math

import torch


class EntropyScaling:
    r"""Scales each image's gradient by the entropy of a uniform guess over that of the classifier's: log C / H(p).

    A classifier that is sure gives hardly any gradient, long before the image is done; this keeps it going.

    Args:
        max_factor (`float`, defaults to 1000.0): The factor's upper end. The paper has none, but a classifier that is
            certain in float32 has no entropy at all.
    """

    def __init__(self, max_factor: float = 1000.0):
        if not 1 <= max_factor < math.inf:
            raise ValueError(f"max_factor={max_factor} of EntropyScaling must be a finite number from 1 up.")
        self.max_factor = max_factor

    def factor(self, logits: torch.Tensor) -> torch.Tensor:
        """The factors, shape `(batch,)`, for logits `(batch, classes)`; no gradient flows through them."""
        log_probabilities = logits.detach().log_softmax(dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
        uniform = math.log(logits.shape[-1])
        return uniform / entropy.clamp(min=uniform / self.max_factor)  # which may be 0, or below by rounding

    def to_dict(self) -> dict[str, float]:
        """Its numbers."""
        return {"max_factor": self.max_factor}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EntropyScaling) and self.max_factor == other.max_factor

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"EntropyScaling(max_factor={self.max_factor!r})"


def as_entropy_scaling(value: EntropyScaling | dict | None) -> EntropyScaling | None:
    """An option of a classifier's guidance, as given or as saved."""
    return EntropyScaling(**value) if isinstance(value, dict) else value
