"""Images of a class-conditional GAN: latents -> generator -> image."""

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

# Imported to register the class with diffusers, since a saved pipeline may name it.
from ..baselines.gan import BigGANGenerator  # noqa: F401
from ..settings import is_number
from .class_conditional import ClassConditionalPipeline, Labels


class GANPipeline(ClassConditionalPipeline):
    r"""Samples images of given classes: the generator's output for random latents.

    Args:
        generator ([`BigGANGenerator`]): The network.
        id2label (`dict[int, str]`, *optional*): Class names.
    """

    main_component = "generator"
    model_cpu_offload_seq = "generator"
    no_likelihood = "a GAN learns to draw samples and never says how likely an image is"

    def __init__(self, generator: ModelMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(generator=generator)
        self.register_names(id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        num_images_per_label: int = 1,
        *,
        truncation: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        r"""Samples images: latents -> generator -> image.

        Args:
            class_labels (`int`, `str`, a list, array or tensor of them): Classes by id or by name from `id2label`.
            num_images_per_label (`int`, defaults to 1): Images of each label, side by side.
            truncation (`float`, *optional*): The latents are truncated normal, between minus and plus this: the
                lower, the more typical and the less varied the images (BigGAN, section 3.1). By default they are not
                truncated.
            generator (`torch.Generator` or a list, *optional*): A single one gives image i the i-th integer drawn from
                it as its own seed, so that images do not depend on the batch; in a list, each gives one.
            latents (`torch.Tensor` of shape `(batch, latent_dim)`, *optional*): Standard normal.
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"` `(batch, height, width, channels)` in [0, 1];
                `"pt"` `(batch, channels, height, width)` in [0, 1]; `"latent"`, the same in [-1, 1].
            return_dict (`bool`, defaults to `True`): Return an output object instead of a tuple.

        Returns:
            `ImagePipelineOutput`: `.images`.

        Raises:
            `ValueError`: For unknown labels, a truncation that is not positive or tensors of the wrong shape.

        Examples:
            ```py
            >>> import torch
            >>> from hf_guided import GANPipeline

            >>> pipe = GANPipeline.from_pretrained("outputs/gan/pipeline")
            >>> images = pipe(["3", "7"], generator=torch.Generator().manual_seed(0)).images
            ```
        """
        self.check_output_type(output_type)
        labels = self.prepare_labels(class_labels, num_images_per_label)
        latents = self.prepare_vectors(latents, (len(labels), self.generator.config.latent_dim), generator)
        if truncation is not None:
            latents = truncate(latents, truncation)
        sample = self.generator(latents, labels).sample
        return self.finish(sample, output_type, return_dict)


def truncate(latents: torch.Tensor, threshold: float) -> torch.Tensor:
    """Truncated normal numbers between minus and plus a threshold, a monotonic function of standard normal ones.

    So samples at different thresholds share their noise, as they do at different guidance scales.

    Args:
        latents (`torch.Tensor`): Standard normal.
        threshold (`float`): Positive.

    Raises:
        `ValueError`: If it is not.
    """
    if not (is_number(threshold) and threshold > 0):
        raise ValueError(f"truncation={threshold!r} leaves no latents; give a positive threshold, or None.")
    low, high = torch.special.ndtr(torch.tensor([-threshold, threshold], dtype=torch.float64)).tolist()
    rank = torch.special.ndtr(latents.double())
    return torch.special.ndtri(low + (high - low) * rank).to(latents.dtype)
