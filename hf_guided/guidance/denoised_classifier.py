"""Guidance by an off-the-shelf classifier of clean images: Ma et al. (EluCD), arXiv 2310.11311, section 4."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..labels import match_labels
from ..settings import is_number
from .base import DenoisedGuidance, Objective, Pipeline, Scale
from .classifier import check_classifier
from .entropy_scaling import EntropyScaling, as_entropy_scaling
from .preprocessing import preprocessing


@dataclass(eq=False, repr=False)
class DenoisedClassifierGuidance(DenoisedGuidance, source="arXiv 2310.11311, section 4"):
    r"""Guides by any `AutoModelForImageClassification`, applied to the predicted clean image x_0.

    The classifier is the pipeline's `clean_classifier` or, without one, its `classifier`; its input is resized and
    normalised as its `classifier_processor` does, differentiably, or else is in [-1, 1]. Its classes are matched with
    the pipeline's by name. The gradient is that of tau_1 f_y(x) - log sum_i exp(tau_2 f_i(x)), where f are the logits.

    Args:
        scale, interval, every, reuse: As for every [`GradientGuidance`].
        through_unet (`bool`, defaults to `False`): Take the gradient through the UNet instead of stopping at the
            predicted image, see [`DenoisedGuidance`].
        joint_temperature (`float`, defaults to 1.0), marginal_temperature (`float`, defaults to 0.5): The paper's
            tau_1 and tau_2. With both 1 it is log p(y | x); a smaller tau_2 weights the joint probability of class and
            image.
        softplus_beta (`float`, *optional*, defaults to 3.0): Sharpness of the softplus that replaces each
            `nn.ReLU` of the classifier during the call, for a smoother gradient. `None` keeps the ReLUs.
        sine (`float`, defaults to 0.3): The sine schedule: the scale is multiplied by 1 + sine * sin(pi t / T). The
            paper's code adds the sine to DDPM's variance instead, which other solvers do not have: there its 0.3 is a
            factor of up to 14 at low noise. A `scale` that is a mapping can express that too.
        entropy_scaling ([`EntropyScaling`], *optional*): Strengthens the gradient where the classifier is confident.
    """

    scale: Scale = 1.0
    joint_temperature: float = 1.0
    marginal_temperature: float = 0.5
    softplus_beta: float | None = 3.0
    sine: float = 0.3
    entropy_scaling: EntropyScaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("joint_temperature", "softplus_beta", "marginal_temperature", "sine"):
            value, may_be_0 = getattr(self, name), name in ("marginal_temperature", "sine")
            if name == "softplus_beta" and value is None:
                continue
            if not is_number(value) or value < 0 or (value == 0 and not may_be_0):
                bound = "from 0 up" if may_be_0 else "above 0"
                raise ValueError(f"{name}={value!r} of DenoisedClassifierGuidance must be a finite number {bound}.")
        self.entropy_scaling = as_entropy_scaling(self.entropy_scaling)

    def check(self, pipeline: Pipeline, labels: torch.Tensor | None, condition_unet: bool) -> None:
        check_classifier(pipeline, pipeline.clean_classifier or pipeline.classifier)
        super().check(pipeline, labels, condition_unet)

    def objective(self, pipeline: Pipeline, labels: torch.Tensor | None) -> Objective:
        component = "classifier" if pipeline.clean_classifier is None else "clean_classifier"
        classifier: PreTrainedModel = getattr(pipeline, component)
        assert labels is not None  # as checked
        targets = match_labels(pipeline, classifier, labels)
        prepare = preprocessing(pipeline.classifier_processor)
        total = pipeline.scheduler.config.num_train_timesteps

        def log_probability(images: torch.Tensor, timestep: float, rows: torch.Tensor) -> torch.Tensor:
            with smoothed(classifier, self.softplus_beta):
                logits = classifier(prepare(images).to(classifier.dtype)).logits.float()
            growth = 1 + self.sine * math.sin(math.pi * timestep / total)
            chosen = self.joint_temperature * logits.gather(1, targets[rows, None])[:, 0]
            log_p = chosen - (self.marginal_temperature * logits).logsumexp(dim=-1)
            factor = 1.0 if self.entropy_scaling is None else self.entropy_scaling.factor(logits)
            return growth * factor * log_p

        return Objective(component, classifier, log_probability)


@contextmanager
def smoothed(model: nn.Module, beta: float | None) -> Iterator[None]:
    """Replaces every `nn.ReLU` by a softplus, by giving it softplus(x), which is positive already."""
    with ExitStack() as hooks:
        for module in model.modules():
            if beta is not None and isinstance(module, nn.ReLU):
                hook = module.register_forward_pre_hook(lambda _, inputs: F.softplus(inputs[0], beta=beta))
                hooks.enter_context(hook)
        yield
