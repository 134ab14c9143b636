"""Large images from small ones by diffusion: the second stage of a cascade (ADM-U, arXiv 2105.05233, section 5.2)."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import CLIPModel, CLIPProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.npz import read_samples
from ..guidance import Guidance
from .class_conditional import Labels
from .inputs import Images, images_to_tensor, match_batch
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
            raise ValueError(
                "This UNet is not an upsampler (its low_res_channels is None): load it with ClassifierGuidedPipeline, "
                "or use hf-guided sample."
            )

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Images | str | os.PathLike,
        class_labels: Labels | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int | None = None,
        *,
        respacing: str | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance: Guidance | Sequence[Guidance] | None = None,
        condition_unet: bool = True,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        variance_noise: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        gradient_batch_size: int | None = None,
        nonfinite_gradient: str = "raise",
        return_cost: bool = False,
    ) -> GuidedPipelineOutput | tuple:
        r"""Samples images: noise -> (UNet given the small image -> guidance -> scheduler step) x N -> large image.

        Args:
            image (PIL image, array, tensor or a list of them, or a path): The small images, one or one for each label,
                see [`images_to_tensor`]: what another pipeline returns for any `output_type`. Or a published `.npz`
                file of samples, whose labels are taken where none are given.
            class_labels (`int`, `str`, a list, array or tensor of them, *optional*): Their classes by id or name; one
                for all images, or one for each.
            num_images_per_label (`int`, defaults to 1): Large images of each small one, consecutive in the batch.
            num_inference_steps and the following: As for [`ClassifierGuidedPipeline`].

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
        # 1. Arguments
        if isinstance(image, str | os.PathLike):
            image, labels_of_file = read_samples(image)
            if class_labels is None and labels_of_file is not None and self.num_classes is not None:
                class_labels = labels_of_file.tolist()
        batch_size, labels, low_res = match_batch(
            num_images_per_label, self.resolve_labels(class_labels), self.prepare_low_res(image)
        )
        self.check_inputs(labels, condition_unet, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        kinds = self.resolve_guidance(guidance, guidance_scale, labels, condition_unet)
        eta = self.resolve_eta(eta)

        # 2. Timesteps and noise
        self.set_timesteps(num_inference_steps, respacing, timesteps)
        generators = self.prepare_generators(generator, batch_size)
        latents = self.prepare_latents(latents, batch_size, generators)

        # 3. noise -> (UNet conditioned on the small image -> guidance -> scheduler step) x N -> large image
        loop_timesteps = self.scheduler.timesteps
        is_default = guidance is None and guidance_scale is None
        guider = self.prepare_guider(
            kinds, is_default, labels, loop_timesteps, gradient_batch_size, nonfinite_gradient, return_cost
        )
        latents = self.denoise(
            latents,
            loop_timesteps,
            {**self.unet_conditions(labels if condition_unet else None), "low_res": low_res},
            guider,
            eta,
            generators,
            variance_noise,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        return self.finish(latents, output_type, return_dict, guider.monitor.cost if return_cost else None)

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
