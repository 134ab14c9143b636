"""Images of a class-conditional normalizing flow: latents -> inverse flow -> image."""

import torch
from diffusers.models.modeling_utils import ModelMixin

# Imported to register the class with diffusers, since a saved pipeline may name it.
from ..baselines.flow import ClassConditionalGlow  # noqa: F401
from .class_conditional import Labels
from .from_latents import LatentPipeline, resolve_temperature


class FlowPipeline(LatentPipeline):
    r"""Samples images of given classes: random latents through the inverse of a normalizing flow.

    Args:
        flow ([`ClassConditionalGlow`]): The network.
        id2label (`dict[int, str]`, *optional*): Class names.
    """

    main_component = "flow"
    model_cpu_offload_seq = "flow"
    no_likelihood = None
    likelihood_kind = "exact"

    def __init__(self, flow: ModelMixin, id2label: dict | None = None):
        super().__init__(id2label, flow=flow)

    @property
    def latent_length(self) -> int:
        """Numbers of a latent vector, as many as of an image."""
        return self.image_channels * self.sample_size[0] * self.sample_size[1]

    def decode(self, latents: torch.Tensor, labels: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        """The images that the flow maps to these latents; arguments as of [`VAEPipeline.decode`] (Glow, section 6)."""
        return self.flow.decode(resolve_temperature(temperature) * latents, labels).sample

    @torch.no_grad()
    def bits_per_dim(
        self, images: torch.Tensor, class_labels: Labels, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The negative log-likelihood of the dequantised images, exact, in bits per dimension, `(batch,)`.

        Args: as of [`VAEPipeline.bits_per_dim`]; the generator draws the dequantisation noise. Half precision is a
        `ValueError`.
        """
        if self.flow.dtype in (torch.float16, torch.bfloat16):
            raise ValueError("The likelihood needs more than half precision; load the pipeline in float32.")
        labels = self.labels_of_images(class_labels, len(images))
        noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype) - 0.5
        return self.flow(images, labels, noise)
