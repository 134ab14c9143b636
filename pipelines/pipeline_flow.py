"""Images of a class-conditional normalizing flow: latents -> inverse flow -> image."""

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

# Imported to register the class with diffusers, since a saved pipeline may name it.
from ..baselines.flow import ClassConditionalGlow  # noqa: F401
from .class_conditional import ClassConditionalPipeline, Labels


class FlowPipeline(ClassConditionalPipeline):
    r"""Samples images of given classes: random latents through the inverse of a normalizing flow.

    Args:
        flow ([`ClassConditionalGlow`]): The network.
        id2label (`dict[int, str]`, *optional*): Class names.
    """

    main_component = "flow"
    model_cpu_offload_seq = "flow"
    likelihood_kind = "exact"

    def __init__(self, flow: ModelMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(flow=flow)
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
        r"""Samples images: latents -> inverse flow -> image.

        Args:
            class_labels (`int`, `str`, a list, array or tensor of them): Classes by id or by name from `id2label`.
            num_images_per_label (`int`, defaults to 1): Images of each label, side by side.
            temperature (`float`, *optional*): Standard deviation of the latents, by default 1: below, images are more
                typical and less varied (Glow, section 6).
            generator (`torch.Generator` or a list, *optional*): A single one gives image i the i-th integer drawn from
                it as its own seed, so that images do not depend on the batch; in a list, each gives one.
            latents (`torch.Tensor` of shape `(batch, channels * height * width)`, *optional*): Standard normal.
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
            >>> from hf_guided import FlowPipeline

            >>> pipe = FlowPipeline.from_pretrained("outputs/flow/pipeline")
            >>> images = pipe(["3", "7"], generator=torch.Generator().manual_seed(0)).images
            ```
        """
        self.check_output_type(output_type)
        labels = self.prepare_labels(class_labels, num_images_per_label)
        temperature = self.resolve_temperature(temperature)
        length = self.image_channels * self.sample_size[0] * self.sample_size[1]
        latents = self.prepare_vectors(latents, (len(labels), length), generator)
        sample = self.flow.decode(temperature * latents, labels).sample
        return self.finish(sample, output_type, return_dict)

    @torch.no_grad()
    def bits_per_dim(
        self, images: torch.Tensor, class_labels: Labels, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The negative log-likelihood of the dequantised images, exact, in bits per dimension.

        Args:
            images (`torch.Tensor` of shape `(batch, channels, height, width)`): 8-bit images, scaled to [-1, 1].
            class_labels (`int`, `str`, a list, array or tensor of them): The class of each image, by id or name.
            generator (`torch.Generator`, *optional*): Draws the dequantisation noise.

        Returns:
            `torch.Tensor` of shape `(batch,)`

        Raises:
            `ValueError`: In half precision.
        """
        if self.flow.dtype in (torch.float16, torch.bfloat16):
            raise ValueError("The likelihood needs more than half precision; load the pipeline in float32.")
        labels = self.labels_of_images(class_labels, len(images))
        noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype) - 0.5
        return self.flow(images, labels, noise)
