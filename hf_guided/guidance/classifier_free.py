"""Classifier-free guidance: Ho and Salimans, arXiv 2207.12598, equation 6."""

from dataclasses import dataclass

import torch

from .base import Pipeline, PredictionGuidance, Scale


@dataclass(eq=False, repr=False)
class ClassifierFreeGuidance(PredictionGuidance, source="arXiv 2207.12598, equation 6"):
    r"""Guides by the difference of the conditional and the unconditional prediction, in one doubled batch.

    prediction = uncond + scale * (cond - uncond): the scale is that of diffusers, the paper's w + 1. Needs a UNet with
    a null label, trained with label dropout. Combined with other kinds it adds (scale - 1) * (cond - uncond).

    Args:
        scale, interval: As for every [`Guidance`]; 1 is exactly no guidance.
    """

    component = "unet"

    scale: Scale = 2.0

    def check(self, pipeline: Pipeline, labels: torch.Tensor | None, condition_unet: bool) -> None:
        super().check(pipeline, labels, condition_unet)
        if not pipeline.unet.config.get("null_class_label", False):
            raise ValueError(
                "ClassifierFreeGuidance compares with the null label, and this UNet has none: take one with "
                "null_class_label=True, trained with label dropout, or set the scale to 1."
            )
        if not condition_unet:
            raise ValueError(
                "ClassifierFreeGuidance needs the conditional prediction, which condition_unet=False turns off; leave "
                "one of them out."
            )
