"""Images of a class-conditional GAN: latents -> generator -> image."""

import torch
from diffusers.models.modeling_utils import ModelMixin

# Imported to register the class with diffusers, since a saved pipeline may name it.
from ..baselines.gan import BigGANGenerator  # noqa: F401
from ..settings import is_number
from .from_latents import LatentPipeline


class GANPipeline(LatentPipeline):
    r"""Samples images of given classes: the generator's output for random latents.

    Args:
        generator ([`BigGANGenerator`]): The network.
        id2label (`dict[int, str]`, *optional*): Class names.
    """

    main_component = "generator"
    model_cpu_offload_seq = "generator"
    no_likelihood = "a GAN learns to draw samples and never says how likely an image is"

    def __init__(self, generator: ModelMixin, id2label: dict | None = None):
        super().__init__(id2label, generator=generator)

    def decode(self, latents: torch.Tensor, labels: torch.Tensor, truncation: float | None = None) -> torch.Tensor:
        """The generator's images of standard normal latents `(batch, latent_length)` and class ids `(batch,)`.

        Args:
            truncation (`float`, *optional*): The latents become truncated normal, between minus and plus this: the
                lower, the more typical and the less varied the images (BigGAN, section 3.1). It must be positive.
        """
        latents = latents if truncation is None else truncate(latents, truncation)
        return self.generator(latents, labels).sample


def truncate(latents: torch.Tensor, threshold: float) -> torch.Tensor:
    """Truncated normal numbers between minus and plus a threshold, a monotonic function of standard normal ones.

    So samples at different thresholds share their noise, as they do at different guidance scales.
    """
    if not (is_number(threshold) and threshold > 0):
        raise ValueError(f"truncation={threshold!r} leaves no latents; give a positive threshold, or None.")
    low, high = torch.special.ndtr(torch.tensor([-threshold, threshold], dtype=torch.float64)).tolist()
    rank = torch.special.ndtr(latents.double())
    return torch.special.ndtri(low + (high - low) * rank).to(latents.dtype)
