"""A training that has diverged ends with one sentence, before it overwrites what was good."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from ..guidance.monitor import NotFiniteError

DIVERGED = 1e6  # times its first value: a loss from which no training comes back


class DivergedError(ValueError):
    """A loss, a weight or an image is not finite, or the loss has grown beyond use; the message says `what`."""

    def __init__(self, what: str):
        super().__init__(
            f"The training has diverged: {what}. Start from scratch in another --output_dir with a lower "
            f"--learning_rate, more --lr_warmup_steps, or bf16 instead of fp16; checkpoints are kept."
        )


def check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise DivergedError(f"{name} is {value} at step {step}")


def check_loss(loss: float, step: int, history: list[dict[str, float]]) -> None:
    """Refuses a loss that is not finite, or a million times what it was first: the samples would soon not be finite."""
    check_finite("the loss", loss, step)
    first = next((row["loss"] for row in history if "loss" in row), loss)
    if abs(loss) > DIVERGED * max(1.0, abs(first)):
        raise DivergedError(f"the loss is {loss:.3g} at step {step}, and was {first:.3g} at first")


@contextmanager
def naming_divergence() -> Iterator[None]:
    """Turns images that are not finite into a [`DivergedError`]: the weights are finite, but beyond use."""
    try:
        yield
    except NotFiniteError:
        raise DivergedError("the model's images are not finite") from None
