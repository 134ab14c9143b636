"""Classifier guidance: arXiv 2105.05233, section 4, equations 8 to 14."""

import inspect
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..labels import match_labels
from ..schedulers.scheduling_adm import check_betas, model_timesteps
from .base import GradientGuidance, Objective, Pipeline, Scale
from .entropy_scaling import EntropyScaling, as_entropy_scaling


@dataclass(eq=False, repr=False)
class ClassifierGuidance(GradientGuidance, source="arXiv 2105.05233, equations 8 to 14"):
    r"""Guides by the gradient of a noisy-image classifier, scale * d log p(y | x_t) / d x_t.

    `guidance_scale=` of a pipeline is its short form.

    Args:
        scale (`float`, a mapping or a function, defaults to 1.0): The paper's `s`; 0 is exactly no guidance.
        interval, every, reuse: As for every [`GradientGuidance`].
        entropy_scaling ([`EntropyScaling`], *optional*): Strengthens the gradient where the classifier is confident.
    """

    scale: Scale = 1.0
    entropy_scaling: EntropyScaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.entropy_scaling = as_entropy_scaling(self.entropy_scaling)

    def check(self, pipeline: Pipeline, labels: torch.Tensor | None, condition_unet: bool) -> None:
        """Raises `ValueError` without labels, or for a classifier that does not fit images or noise schedule."""
        check_classifier(pipeline, pipeline.classifier)
        super().check(pipeline, labels, condition_unet)
        config = pipeline.classifier.config
        model = getattr(pipeline.classifier, "_orig_mod", pipeline.classifier)  # of torch.compile
        if "timestep" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"{type(model).__name__} takes no timestep: it is for clean images. Guide with "
                f"guidance=DenoisedClassifierGuidance(...), or train a classifier with training/train_classifier.py."
            )
        betas = check_betas(config.trained_betas, config.beta_schedule, config.num_train_timesteps)
        alphas_cumprod = torch.from_numpy(1 - betas).cumprod(0)
        theirs = pipeline.scheduler.alphas_cumprod.cpu().double()
        rescales = pipeline.scheduler.config.get("rescale_timesteps", False)
        same_scale = config.num_train_timesteps == 1000 or config.rescale_timesteps == rescales
        same_betas = theirs.shape == alphas_cumprod.shape and torch.allclose(theirs, alphas_cumprod, atol=1e-4)
        if not (same_betas and same_scale):
            raise ValueError(
                f"The classifier was trained on another noise schedule ({config.beta_schedule!r}, "
                f"{config.num_train_timesteps} timesteps, rescale_timesteps={config.rescale_timesteps}) than the "
                f"scheduler's; use the schedule that both were trained on."
            )

    def objective(self, pipeline: Pipeline, labels: torch.Tensor | None) -> Objective:
        classifier = pipeline.classifier
        assert labels is not None  # as checked
        targets = match_labels(pipeline, classifier, labels)

        def log_probability(images: torch.Tensor, timestep: float, rows: torch.Tensor) -> torch.Tensor:
            model_timestep = model_timesteps(pipeline.scheduler, torch.tensor(timestep, device=images.device))
            logits = classifier(images.to(classifier.dtype), model_timestep).logits.float()
            log_p = logits.log_softmax(dim=-1).gather(1, targets[rows, None])[:, 0]
            return log_p if self.entropy_scaling is None else self.entropy_scaling.factor(logits) * log_p

        return Objective("classifier", classifier, log_probability)


def check_classifier(pipeline: Pipeline, classifier: PreTrainedModel | None) -> None:
    """Refuses a missing classifier, and one for images with another number of channels."""
    if classifier is None:
        raise ValueError("Guidance needs a classifier, and this pipeline has none; load one, or set the scale to 0.")
    channels = getattr(classifier.config, "in_channels", getattr(classifier.config, "num_channels", None))
    if channels not in (None, pipeline.unet.config.in_channels):
        ours = pipeline.unet.config.in_channels
        raise ValueError(
            f"The classifier takes images of {channels} channels and the UNet of {ours}; take one of {ours}."
        )
