"""The base class of all pipelines: labels by id or name, one generator per image, output types."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from ..guidance.monitor import NotFiniteError, broken_images
from ..labels import id_of_name, resolve_labels
from ..loading import SavedConfigMixin, check_loaded, naming_damage
from ..messages import first_few
from ..settings import check_names

Labels = int | str | Sequence[int | str] | np.ndarray | torch.Tensor


class ClassConditionalPipeline(SavedConfigMixin, DiffusionPipeline):
    """Base class of pipelines that sample images of given classes.

    A subclass names in `main_component` the one that makes the images. Its config has their size, channels and classes.

    Args:
        id2label (`dict[int, str]`, *optional*): Class names, saved in the config.
        components: Registered by name, as by [`register_modules`].

    Raises:
        `ValueError`: For class names that are not a mapping from the ids of the model's classes to texts.
    """

    main_component: str

    def __init__(self, id2label: Any = None, **components: Any):
        super().__init__()
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self.register_modules(**components)
        if id2label is not None:
            check_names(id2label, self.main_config.get("num_class_embeds"))
        self.register_to_config(id2label=id2label)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a saved pipeline, as [`~diffusers.DiffusionPipeline.from_pretrained`] does.

        A damaged file, or weights that do not cover their model, are a `ValueError` that names the file or the tensors.
        """
        with naming_damage(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def register_modules(self, **components: Any) -> None:
        """Registers the components; one whose weights were not all loaded is a `ValueError`."""
        for name, component in components.items():
            check_loaded(name, component)
        super().register_modules(**components)

    @property
    def main_config(self) -> Any:
        """The config of the component that makes the images."""
        return getattr(self, self.main_component).config

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; empty if they have none."""
        return {int(label): name for label, name in (self.config.id2label or {}).items()}

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or `None` for an unconditional model."""
        return self.main_config.num_class_embeds

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        size = self.main_config.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.main_config.image_channels

    def resolve_labels(self, class_labels: Labels | None) -> torch.Tensor | None:
        """A tensor of class ids from ids and names, see [`~hf_guided.labels.resolve_labels`]; `None` stays `None`."""
        if class_labels is None:
            return None
        if self.num_classes is None:
            raise ValueError("This pipeline has no classes: leave class_labels out, or load a classifier.")
        ids = resolve_labels(class_labels, self.id2label, self.num_classes)
        return torch.tensor(ids, device=self._execution_device)

    def id_of_name(self, name: str) -> int:
        """The id of a class name, see [`~hf_guided.labels.id_of_name`]."""
        return id_of_name(name, self.id2label)

    def check_output_type(self, output_type: str) -> None:
        """Refuses unknown output types, and PIL for other than 1 or 3 channels."""
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is not one of 'pil', 'np', 'pt', 'latent'.")
        if output_type == "pil" and self.image_channels not in (1, 3):
            raise ValueError(
                f"Images of {self.image_channels} channels cannot be PIL images; choose output_type='np' or 'pt'."
            )

    def prepare_generators(
        self, generator: torch.Generator | list[torch.Generator] | None, batch_size: int
    ) -> list[torch.Generator]:
        """One generator for each image, so that an image does not depend on its batch.

        The seed of image i is the i-th integer drawn from a single generator, or the first drawn from the i-th of a
        list.
        """
        given: list[Any] = list(generator) if isinstance(generator, list | tuple) else [generator] * batch_size
        if len(given) != batch_size:
            raise ValueError(f"{len(given)} generators were given for {batch_size} images; give one per image.")
        for one in given:
            if one is not None and not isinstance(one, torch.Generator):
                raise ValueError(f"generator is a {type(one).__name__}; give a torch.Generator, or a list of them.")
        # one by one: a generator on a GPU draws other numbers when it draws several at once
        seeds = [
            torch.randint(2**63 - 1, (), generator=one, device="cpu" if one is None else one.device).item()
            for one in given
        ]
        return [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def check_finite(self, sample: torch.Tensor) -> None:
        """Refuses images `(batch, channels, height, width)` that are not finite, which clipping would hide."""
        if broken := broken_images(sample).nonzero()[:, 0].tolist():
            raise NotFiniteError(
                f"Images {first_few(list(map(str, broken)), 5)} of the batch are not finite: the weights of the model "
                f"have infinite values or NaN, or it overflowed. Load the pipeline in float32 or bfloat16; if that "
                f"does not help, its training diverged or its file is damaged."
            )

    def finish(self, sample: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """The images in the requested output type."""
        self.check_finite(sample)
        images: Any = sample
        if output_type != "latent":
            images = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
