"""How a sample is steered."""

from .classifier import ClassifierGuidance

__all__ = ["ClassifierGuidance"]
