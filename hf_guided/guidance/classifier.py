"""Classifier guidance: arXiv 2105.05233, section 4, equations 8 to 14."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


class ClassifierGuidance:
    r"""Steers samples towards their class by a noisy-image classifier's gradient, scale * d log p(y | x_t) / d x_t.

    The scheduler moves the mean by variance * gradient (Algorithm 1) or epsilon by -sqrt(1 - alpha_bar) * gradient
    (Algorithm 2). Several gradient guidances in a list add up.

    Args:
        scale (`float`, defaults to 1.0): Multiplies the gradient; the paper's `s`. 0 is exactly no guidance.
        interval (`tuple[int, int]`, *optional*): Lowest and highest timestep at which it acts, both included; outside
            the classifier is not called.

    Raises:
        `ValueError`: For a negative or non-finite scale, or an empty interval.
    """

    def __init__(self, scale: float = 1.0, interval: tuple[int, int] | None = None):
        if not 0 <= scale < float("inf"):
            raise ValueError(f"The scale of classifier guidance is a finite number from 0 up; got {scale}.")
        if interval is not None and interval[0] > interval[1]:
            raise ValueError(f"interval={interval} is empty: give the lowest timestep first, then the highest.")
        self.scale = scale
        self.interval = interval

    def acts_at(self, timestep: float) -> bool:
        """Whether it does anything at this timestep of the training schedule."""
        inside = self.interval is None or self.interval[0] <= timestep <= self.interval[1]
        return self.scale != 0 and inside

    def gradient(
        self, classifier: PreTrainedModel, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        r"""
        Args:
            classifier ([`ADMForImageClassification`]): Gives `p(y | x_t)`; its parameters take no gradient.
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): `x_t`.
            timestep (`torch.Tensor` of shape `()` or `(batch,)`): As the classifier is told it.
            class_labels (`torch.Tensor` of shape `(batch,)`): Class ids.

        Returns:
            `torch.Tensor` like `sample`, float32: The scaled gradient.
        """
        with torch.enable_grad(), frozen(classifier):
            sample = sample.detach().float().requires_grad_()
            logits = classifier(sample.to(classifier.dtype), timestep).logits
            log_probability = logits.float().log_softmax(dim=-1).gather(1, class_labels[:, None]).sum()
            return torch.autograd.grad(log_probability, sample)[0] * self.scale


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Takes no gradient with respect to the parameters, so that no activation is kept for it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
