"""The base class of pipelines that make an image from one latent vector, in one pass."""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from ..settings import is_number
from .class_conditional import ClassConditionalPipeline, Labels
from .inputs import check_latents, check_num_images


class LatentPipeline(ClassConditionalPipeline):
    """Base class of pipelines that decode latent vectors; a subclass `decode`s them.

    One that can tell how likely an image is sets `no_likelihood` to `None`, `likelihood_kind` to `"bound"` or
    `"exact"`, and has a method `bits_per_dim`, as [`VAEPipeline`].
    """

    no_likelihood: str | None = "the density of its samples is not known"

    @property
    def latent_length(self) -> int:
        """Numbers of a latent vector."""
        return self.main_config.latent_dim

    def decode(self, latents: torch.Tensor, labels: torch.Tensor, *args: Any, **trade_off: Any) -> torch.Tensor:
        """Images `(batch, channels, height, width)` in [-1, 1] of latents `(batch, latent_length)`."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        num_images_per_label: int = 1,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **trade_off: Any,
    ) -> ImagePipelineOutput | tuple:
        r"""Samples images: latents -> network -> image.

        Args:
            class_labels (`int`, `str`, a list, array or tensor of them): Classes by id or by name from `id2label`.
            num_images_per_label (`int`, defaults to 1): Images of each label, consecutive in the batch.
            generator (`torch.Generator` or a list, *optional*): A single one gives image i the i-th integer drawn from
                it as its own seed, so that images do not depend on the batch; in a list, each gives one.
            latents (`torch.Tensor` of shape `(batch, latent_length)`, *optional*): Standard normal.
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"` `(batch, height, width, channels)` in [0, 1];
                `"pt"` `(batch, channels, height, width)` in [0, 1]; `"latent"`, the same in [-1, 1].
            return_dict (`bool`, defaults to `True`): Return an output object instead of a tuple.
            trade_off: Of variety for fidelity, the argument of the pipeline's `decode`.

        Returns:
            `ImagePipelineOutput`: `.images`.

        Raises:
            `ValueError`: For unknown labels, a trade-off outside its range or tensors of the wrong shape.
        """
        self.check_output_type(output_type)
        labels = self.prepare_labels(class_labels, num_images_per_label)
        latents = self.prepare_latents(latents, len(labels), generator)
        return self.finish(self.decode(latents, labels, **trade_off), output_type, return_dict)

    def prepare_labels(self, class_labels: Labels, num_images_per_label: int) -> torch.Tensor:
        """The class id of each image, `(batch,)`, images of a label consecutive."""
        labels = self.resolve_labels(class_labels)
        if labels is None:
            raise ValueError("This model is class-conditional: give class_labels, ids or names.")
        return labels.repeat_interleave(check_num_images(num_images_per_label))

    def prepare_latents(
        self,
        latents: torch.Tensor | None,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Latent vectors `(batch, latent_length)`: the given ones, or standard normal ones."""
        check_latents(latents)
        shape = (batch_size, self.latent_length)
        if latents is None:
            generators = self.prepare_generators(generator, batch_size)
            latents = randn_tensor(shape, generators, self._execution_device, torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; these images need {shape}.")
        return latents.to(self._execution_device, getattr(self, self.main_component).dtype)

    def labels_of_images(self, class_labels: Labels, num_images: int) -> torch.Tensor:
        """The class id of each image, `(num_images,)`, from one label per image or one for all."""
        labels = self.prepare_labels(class_labels, 1)
        if len(labels) not in (1, num_images):
            raise ValueError(f"{len(labels)} class_labels were given for {num_images} images; give one, or one each.")
        return labels.expand(num_images)


def resolve_temperature(temperature: float | None) -> float:
    """The standard deviation of the latents; 1 if none is given."""
    if temperature is None:
        return 1.0
    if not (is_number(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature!r} is not allowed; give a finite number from 0 up.")
    return temperature
