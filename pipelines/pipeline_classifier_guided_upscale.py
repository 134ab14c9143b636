"""Large images from small ones by diffusion: the second stage of a cascade (ADM-U, arXiv 2105.05233, section 5.2)."""

import os
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import CLIPModel, CLIPProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.npz import read_samples
from .class_conditional import Labels
from .inputs import Images, images_to_tensor
from .pipeline_classifier_guided import ClassifierGuidedPipeline, GuidedPipelineOutput


class ClassifierGuidedUpscalePipeline(ClassifierGuidedPipeline):
    r"""Upsamples images: a diffusion model conditioned on the small image, with or without guidance.

    Args:
        unet ([`ADMUNet2DModel`]): An upsampler, with `low_res_channels`; class-conditional or not.
        scheduler ([`ADMScheduler`], or one of diffusers): Denoises step by step.
        classifier ([`ADMForImageClassification`], *optional*): Guides the large images.
        classifier_processor, guide_unet, id2label, sampling_defaults: As for [`ClassifierGuidedPipeline`].
        clean_classifier, clip_model, clip_processor: As for [`ClassifierGuidedPipeline`].
        low_res_size (`int`, *optional*): Height in pixels of the small images that the UNet was trained on; others are
            refused.

    Raises:
        `ValueError`: If the UNet is not an upsampler.
    """

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        classifier: PreTrainedModel | None = None,
        classifier_processor: BaseImageProcessor | None = None,
        guide_unet: ModelMixin | None = None,
        id2label: dict | None = None,
        sampling_defaults: dict | None = None,
        clean_classifier: PreTrainedModel | None = None,
        clip_model: CLIPModel | None = None,
        clip_processor: CLIPProcessor | None = None,
        low_res_size: int | None = None,
    ):
        super().__init__(
            unet,
            scheduler,
            classifier,
            classifier_processor,
            guide_unet,
            id2label,
            sampling_defaults,
            clean_classifier,
            clip_model,
            clip_processor,
        )
        self.register_to_config(low_res_size=low_res_size)
        if unet.config.get("low_res_channels") is None:
            raise ValueError("This UNet is not an upsampler: take ClassifierGuidedPipeline, or hf-guided sample.")

    def __call__(  # type: ignore[override]
        self,
        image: Images | str | os.PathLike,
        class_labels: Labels | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int | None = None,
        **options: Any,
    ) -> GuidedPipelineOutput | tuple:
        r"""Samples images: noise -> (UNet given the small image -> guidance -> scheduler step) x N -> large image.

        Args:
            image (PIL image, array, tensor or a list of them, or a path): The small images, one or one for each label,
                see [`images_to_tensor`]: what another pipeline returns for any `output_type`. Or a published `.npz`
                file of samples, whose labels are taken where none are given.
            class_labels (`int`, `str`, a list, array or tensor of them, *optional*): Their classes by id or name; one
                for all images, or one for each.
            num_images_per_label (`int`, defaults to 1): Large images of each small one, consecutive in the batch.
            num_inference_steps, options: As for [`ClassifierGuidedPipeline.__call__`], except those of editing.

        Returns:
            [`GuidedPipelineOutput`]: `.images`, of the UNet's `sample_size`, and `.cost` if asked.

        Raises:
            `ValueError`: As [`ClassifierGuidedPipeline`], and for small images of another size or channel count than
                the UNet was trained on.

        Examples:
            ```py
            >>> from hf_guided import ClassifierGuidedPipeline, ClassifierGuidedUpscalePipeline

            >>> base = ClassifierGuidedPipeline.from_pretrained("adm-64")
            >>> upscale = ClassifierGuidedUpscalePipeline.from_pretrained("adm-64-256")
            >>> image = upscale(base(207, output_type="pt").images, 207).images[0]
            ```
        """
        if of_editing := options.keys() & {"strength", "mask_image", "jump_length", "jump_n_sample"}:
            raise TypeError(f"{', '.join(sorted(of_editing))}: an upsampler does not edit images; leave them out.")
        if isinstance(image, str | os.PathLike):
            image, labels_of_file = read_samples(image)
            if class_labels is None and labels_of_file is not None and self.num_classes is not None:
                class_labels = labels_of_file.tolist()
        return super().__call__(class_labels, num_images_per_label, num_inference_steps, image=image, **options)

    def prepare_images(self, image: Any, *editing: Any) -> tuple[None, None, torch.Tensor]:
        """The small images, and nothing to edit."""
        return None, None, self.prepare_low_res(image)

    def prepare_low_res(self, image: Images) -> torch.Tensor:
        """The small images in [-1, 1], `(batch, low_res_channels, height, width)`."""
        low_res = images_to_tensor(image, self.unet.config.low_res_channels).to(self._execution_device)
        height, width = low_res.shape[-2:]
        large_height, large_width = self.sample_size
        if self.config.low_res_size not in (None, height) or height * large_width != width * large_height:
            small_height = self.config.low_res_size or height
            raise ValueError(
                f"The images are {width}x{height} (width x height), and this UNet makes {large_width}x{large_height} "
                f"of {small_height * large_width // large_height}x{small_height}; resize or crop them to that."
            )
        return low_res
