"""Guidance by any loss, for inverse problems: diffusion posterior sampling (DPS), arXiv 2209.14687, equation 10."""

import inspect
from collections.abc import Callable

import torch

from .base import DenoisedGuidance, Objective, Pipeline, Scale


class LossGuidance(DenoisedGuidance):
    r"""Guides by the gradient of -loss of the predicted clean image x_0.

    Args:
        fn (`Callable`): Takes images `(n, channels, height, width)`, float32 in [-1, 1] (outside it, if the scheduler
            does not clip), and returns the loss of each, `(n,)`, or their sum. For an inverse problem y = A(x) + noise
            of standard deviation sigma it is `((A(x) - y) ** 2).sum((1, 2, 3)) / (2 * sigma**2)`; DPS takes the root of
            that sum instead, which is weaker. A high scale overshoots with few steps. If it has a parameter `rows`, it
            gets the indices of the images in the batch, which `gradient_batch_size` splits.
        scale, interval, every, reuse: As for every [`GradientGuidance`].
        through_unet (`bool`, defaults to `True`): Take the gradient through the UNet, see [`DenoisedGuidance`].
    """

    needs_labels = False

    def __init__(
        self,
        fn: Callable[..., torch.Tensor],
        scale: Scale = 1.0,
        interval: tuple[float, float] | None = None,
        every: int = 1,
        reuse: bool = False,
        through_unet: bool = True,
    ):
        super().__init__(scale, interval, every, reuse, through_unet)
        if not callable(fn):
            raise ValueError(f"LossGuidance takes a function of the predicted clean images; got {fn!r}.")
        self.fn = fn

    def objective(self, pipeline: Pipeline, labels: torch.Tensor | None) -> Objective:
        try:
            takes_rows = "rows" in inspect.signature(self.fn).parameters
        except ValueError:  # a builtin without a signature
            takes_rows = False

        def log_probability(images: torch.Tensor, timestep: float, rows: torch.Tensor) -> torch.Tensor:
            loss = self.fn(images, rows=rows) if takes_rows else self.fn(images)
            if not torch.is_tensor(loss) or loss.shape not in ((), (len(images),)):
                got = f"the shape {tuple(loss.shape)}" if torch.is_tensor(loss) else repr(loss)
                wanted = f"one loss for each of the {len(images)} images, or their sum"
                raise ValueError(f"The function of LossGuidance returned {got}; return a tensor, {wanted}.")
            return -loss

        return Objective("loss", None, log_probability)
