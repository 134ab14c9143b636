"""Images of a class-conditional variational autoencoder: latents -> decoder -> image."""

import torch
from diffusers.models.modeling_utils import ModelMixin

# Imported to register the class with diffusers, since a saved pipeline may name it.
from ..baselines.vae import ClassConditionalVAE  # noqa: F401
from .class_conditional import Labels
from .from_latents import LatentPipeline, resolve_temperature


class VAEPipeline(LatentPipeline):
    r"""Samples images of given classes: the decoder's mean for random latents.

    Args:
        vae ([`ClassConditionalVAE`]): The network.
        id2label (`dict[int, str]`, *optional*): Class names.
    """

    main_component = "vae"
    model_cpu_offload_seq = "vae"
    no_likelihood = None
    likelihood_kind = "bound"

    def __init__(self, vae: ModelMixin, id2label: dict | None = None):
        super().__init__(id2label, vae=vae)

    def decode(self, latents: torch.Tensor, labels: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        """The decoder's mean for standard normal latents `(batch, latent_length)` and class ids `(batch,)`.

        Args:
            temperature (`float`, *optional*): Standard deviation that the latents are given, 0 or more, by default 1:
                below, images are more typical and less varied.
        """
        return self.vae.decode(resolve_temperature(temperature) * latents, labels).sample

    @torch.no_grad()
    def bits_per_dim(
        self, images: torch.Tensor, class_labels: Labels, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The upper bound (negative ELBO) on the negative log-likelihood, in bits per dimension: distortion and rate.

        Args:
            images (`torch.Tensor` of shape `(batch, channels, height, width)`): 8-bit images, scaled to [-1, 1].
            class_labels (`int`, `str`, a list, array or tensor of them): The class of each image, by id or name.
            generator (`torch.Generator`, *optional*): Draws from the posterior.

        Returns:
            `torch.Tensor` of shape `(batch,)`; a `RuntimeError`, if the decoder's images are not finite.
        """
        labels = self.labels_of_images(class_labels, len(images))
        output = self.vae(images.to(self.vae.dtype), labels, generator)
        self.check_finite(output.sample)  # the likelihood would be finite nevertheless
        distortion, rate = self.vae.bound(images, output)
        return distortion + rate
