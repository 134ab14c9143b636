"""Modes of a model that a computation needs, and that are as before after it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and the like."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
