"""`pipeline("image-classification")` of transformers, for pictures that are more than 8-bit RGB."""

from typing import Any

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_classification import ImageClassificationPipeline

from .image_processing_adm import ADMImageProcessor


class ADMImageClassificationPipeline(ImageClassificationPipeline):
    """Leaves the opening of pictures to [`ADMImageProcessor`]: transformers' makes RGB of them first, where 16 bits are
    clipped and what is transparent shows. Models with another processor are as they were."""

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:
        if not isinstance(self.image_processor, ADMImageProcessor):
            return super().preprocess(image, timeout=timeout)
        picture = self.image_processor.fetch_images(image, timeout)
        return self.image_processor(images=picture, return_tensors="pt").to(self.dtype)

    @classmethod
    def register(cls) -> None:
        """Makes this the pipeline of the task, in place of its base class. `PIPELINE_REGISTRY.register_pipeline` would
        make every such pipeline save its code."""
        PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = cls
