"""Autoguidance, a model guided by a bad version of itself: Karras et al., arXiv 2406.02507, equation 3."""

from dataclasses import dataclass

import torch

from .base import Pipeline, PredictionGuidance, Scale


@dataclass(eq=False, repr=False)
class AutoGuidance(PredictionGuidance, source="arXiv 2406.02507, equation 3"):
    r"""Guides by the difference to the prediction of a weaker UNet, the pipeline's `guide_unet`.

    prediction = weak + scale * (strong - weak). The weaker UNet is smaller or trained for a shorter time, on the same
    data and noise schedule, with the same conditioning. Combined with other kinds it adds (scale - 1) * (strong -
    weak).

    Args:
        scale, interval: As for every [`Guidance`]; 1 is exactly no guidance.
    """

    component = "guide_unet"
    needs_labels = False

    scale: Scale = 2.0

    def check(self, pipeline: Pipeline, labels: torch.Tensor | None, condition_unet: bool) -> None:
        super().check(pipeline, labels, condition_unet)
        if pipeline.guide_unet is None:
            raise ValueError(
                "AutoGuidance needs a second, weaker UNet: load the pipeline with guide_unet=, or set the scale to 1."
            )
        ours, theirs = pipeline.unet.config, pipeline.guide_unet.config
        for name in ("in_channels", "num_class_embeds", "low_res_channels"):
            one, other = ours.get(name), theirs.get(name)
            if one != other and not (name == "num_class_embeds" and other is None):
                raise ValueError(f"The guide_unet's {name} is {other} and the UNet's {one}; they must be the same.")
        unconditional = labels is None or not condition_unet
        if unconditional and theirs.num_class_embeds is not None and not theirs.get("null_class_label", False):
            raise ValueError(
                "The guide_unet is class-conditional without a null label, and the UNet is sampled unconditionally; "
                "give class_labels without condition_unet=False, or another guide_unet."
            )
