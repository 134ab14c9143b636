"""Guidance by a text prompt: CLIP (arXiv 2103.00020), as in GLIDE (arXiv 2112.10741, section 2.4)."""

import torch
import torch.nn.functional as F

from ..settings import is_number, is_whole
from .base import DenoisedGuidance, Objective, Pipeline, Scale
from .preprocessing import preprocessing


class CLIPGuidance(DenoisedGuidance, source="arXiv 2112.10741, section 2.4"):
    r"""Guides towards a text by the gradient of CLIP's logit, exp(logit_scale) cos(image, text), of the predicted x_0.

    The logit is the mean over random square cutouts, drawn again at each timestep. Their positions depend on the
    timestep alone, so an image does not depend on its batch. Needs the pipeline's `clip_model` and `clip_processor`; no
    labels.

    Args:
        prompt (`str`): The text.
        scale, interval, every, reuse: As for every [`GradientGuidance`].
        through_unet (`bool`, defaults to `False`): Take the gradient through the UNet instead of stopping at the
            predicted image, see [`DenoisedGuidance`].
        num_cutouts (`int`, defaults to 16): Cutouts of each image.
        min_cutout (`float`, defaults to 0.5): The smallest, as a share of the shorter side; 1 always takes all of it.
    """

    needs_labels = False

    def __init__(
        self,
        prompt: str,
        scale: Scale = 1.0,
        interval: tuple[float, float] | None = None,
        every: int = 1,
        reuse: bool = False,
        through_unet: bool = False,
        num_cutouts: int = 16,
        min_cutout: float = 0.5,
    ):
        super().__init__(scale, interval, every, reuse, through_unet)
        if not prompt or not isinstance(prompt, str):
            raise ValueError(f"The prompt of CLIPGuidance must be a text; got {prompt!r}.")
        if not is_whole(num_cutouts) or not (is_number(min_cutout) and 0 < min_cutout <= 1):
            raise ValueError(
                f"num_cutouts={num_cutouts!r} and min_cutout={min_cutout!r} of CLIPGuidance: give at least 1 cutout, "
                f"and a share of the shorter side above 0 and up to 1."
            )
        self.prompt = prompt
        self.num_cutouts = num_cutouts
        self.min_cutout = min_cutout

    def check(self, pipeline: Pipeline, labels: torch.Tensor | None, condition_unet: bool) -> None:
        super().check(pipeline, labels, condition_unet)
        missing = [name for name in ("clip_model", "clip_processor") if getattr(pipeline, name) is None]
        if missing:
            raise ValueError(
                f"CLIPGuidance needs a CLIPModel and its CLIPProcessor, and this pipeline has no "
                f"{' and no '.join(missing)}; load it with {', '.join(f'{name}=' for name in missing)}."
            )
        channels = pipeline.unet.config.in_channels
        if channels not in (1, 3):
            raise ValueError(f"CLIP takes RGB and grey images, and this UNet makes images of {channels} channels.")

    def objective(self, pipeline: Pipeline, labels: torch.Tensor | None) -> Objective:
        clip, processor = pipeline.clip_model, pipeline.clip_processor
        prepare = preprocessing(processor.image_processor)
        side = clip.config.vision_config.image_size
        tokens = processor.tokenizer([self.prompt], return_tensors="pt", truncation=True).to(pipeline._execution_device)

        def log_probability(images: torch.Tensor, timestep: float, rows: torch.Tensor) -> torch.Tensor:
            places = self.cutouts(images.shape[-2], images.shape[-1], seed=int(timestep))
            cutouts = [images[:, :, top : top + cut, left : left + cut] for top, left, cut in places]
            resized = [F.interpolate(cutout, (side, side), mode="bicubic", antialias=True) for cutout in cutouts]
            pixels = prepare(torch.cat(resized).expand(-1, 3, -1, -1)).to(clip.dtype)
            logits = clip(pixel_values=pixels, **tokens).logits_per_image.float()
            return logits.view(self.num_cutouts, len(images)).mean(dim=0)

        return Objective("clip_model", clip, log_probability)

    def cutouts(self, height: int, width: int, seed: int) -> list[tuple[int, int, int]]:
        """Top, left and side in pixels of each cutout."""
        generator = torch.Generator().manual_seed(seed)
        shorter = min(height, width)
        shares = self.min_cutout + (1 - self.min_cutout) * torch.rand(self.num_cutouts, generator=generator)
        places = torch.rand(self.num_cutouts, 2, generator=generator)
        cuts = [max(1, round(share * shorter)) for share in shares.tolist()]
        return [
            (int(top * (height - cut + 1)), int(left * (width - cut + 1)), cut)
            for cut, (top, left) in zip(cuts, places.tolist(), strict=True)
        ]
