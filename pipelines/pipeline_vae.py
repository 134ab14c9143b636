"""Images of a class-conditional variational autoencoder: latents -> decoder -> image."""

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

# Imported to register the class with diffusers, since a saved pipeline may name it.
from ..baselines.vae import ClassConditionalVAE  # noqa: F401
from .class_conditional import ClassConditionalPipeline, Labels


class VAEPipeline(ClassConditionalPipeline):
    r"""Samples images of given classes: the decoder's mean for random latents.

    Args:
        vae ([`ClassConditionalVAE`]): The network.
        id2label (`dict[int, str]`, *optional*): Class names.
    """

    main_component = "vae"
    model_cpu_offload_seq = "vae"
    likelihood_kind = "bound"

    def __init__(self, vae: ModelMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(vae=vae)
        self.register_names(id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        num_images_per_label: int = 1,
        *,
        temperature: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        r"""Samples images: latents -> decoder -> image.

        Args:
            class_labels (`int`, `str`, a list, array or tensor of them): Classes by id or by name from `id2label`.
            num_images_per_label (`int`, defaults to 1): Images of each label, side by side.
            temperature (`float`, *optional*): Standard deviation of the latents, by default 1: below, images are more
                typical and less varied.
            generator (`torch.Generator` or a list, *optional*): A single one gives image i the i-th integer drawn from
                it as its own seed, so that images do not depend on the batch; in a list, each gives one.
            latents (`torch.Tensor` of shape `(batch, latent_dim)`, *optional*): Standard normal.
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"` `(batch, height, width, channels)` in [0, 1];
                `"pt"` `(batch, channels, height, width)` in [0, 1]; `"latent"`, the same in [-1, 1].
            return_dict (`bool`, defaults to `True`): Return an output object instead of a tuple.

        Returns:
            `ImagePipelineOutput`: `.images`.

        Raises:
            `ValueError`: For unknown labels, a negative temperature or tensors of the wrong shape.

        Examples:
            ```py
            >>> import torch
            >>> from hf_guided import VAEPipeline

            >>> pipe = VAEPipeline.from_pretrained("outputs/vae/pipeline")
            >>> images = pipe(["3", "7"], generator=torch.Generator().manual_seed(0)).images
            ```
        """
        self.check_output_type(output_type)
        labels = self.prepare_labels(class_labels, num_images_per_label)
        temperature = self.resolve_temperature(temperature)
        latents = self.prepare_vectors(latents, (len(labels), self.vae.config.latent_dim), generator)
        sample = self.vae.decode(temperature * latents, labels).sample
        return self.finish(sample, output_type, return_dict)

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
            `torch.Tensor` of shape `(batch,)`

        Raises:
            `RuntimeError`: If the decoder's images are not finite.
        """
        labels = self.labels_of_images(class_labels, len(images))
        output = self.vae(images.to(self.vae.dtype), labels, generator)
        self.check_finite(output.sample)  # the likelihood would be finite nevertheless
        distortion, rate = self.vae.bound(images, output)
        return distortion + rate
