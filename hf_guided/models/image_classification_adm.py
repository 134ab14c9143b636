"""`pipeline("image-classification")` of transformers, for images beyond 8-bit RGB."""

from typing import Any

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_classification import ImageClassificationPipeline

from .image_processing_adm import ADMImageProcessor


class ADMImageClassificationPipeline(ImageClassificationPipeline):
    """The image-classification pipeline of transformers, with images opened by [`ADMImageProcessor`].

    transformers converts images to RGB first, which clips 16-bit values and shows transparent pixels. Models with
    another processor are not affected.
    """

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:
        if not isinstance(self.image_processor, ADMImageProcessor):
            return super().preprocess(image, timeout=timeout)
        picture = self.image_processor.fetch_images(image, timeout)
        return self.image_processor(images=picture, return_tensors="pt").to(self.dtype)

    @classmethod
    def register(cls) -> None:
        """Replaces the task's pipeline by this one.

        `PIPELINE_REGISTRY.register_pipeline` would make every such pipeline save its code.
        """
        PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = cls
