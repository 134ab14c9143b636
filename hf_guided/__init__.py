"""Classifier-guided diffusion (ADM, arXiv 2105.05233) for diffusers, transformers and accelerate.

Public names are imported on first use (PEP 562), so that `import hf_guided` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .families import BASELINES

__version__ = "0.1.0"

_MODULE_OF = {
    "ADMUNet2DModel": "models.unet_adm",
    "ADMClassifierConfig": "models.classifier_adm",
    "ADMForImageClassification": "models.classifier_adm",
    "ADMImageProcessor": "models.image_processing_adm",
    "ADMScheduler": "schedulers.scheduling_adm",
    "ClassifierGuidedPipeline": "pipelines.pipeline_classifier_guided",
    "ClassifierGuidedUpscalePipeline": "pipelines.pipeline_classifier_guided_upscale",
    **{model: f"baselines.{name}" for name, family in BASELINES.items() for model in family.models},
    **{family.pipeline: f"pipelines.pipeline_{name}" for name, family in BASELINES.items()},
}

__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from .baselines.flow import ClassConditionalGlow as ClassConditionalGlow
    from .baselines.gan import BigGANDiscriminator as BigGANDiscriminator
    from .baselines.gan import BigGANGenerator as BigGANGenerator
    from .baselines.vae import ClassConditionalVAE as ClassConditionalVAE
    from .models.classifier_adm import ADMClassifierConfig as ADMClassifierConfig
    from .models.classifier_adm import ADMForImageClassification as ADMForImageClassification
    from .models.image_processing_adm import ADMImageProcessor as ADMImageProcessor
    from .models.unet_adm import ADMUNet2DModel as ADMUNet2DModel
    from .pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline as ClassifierGuidedPipeline
    from .pipelines.pipeline_classifier_guided_upscale import (
        ClassifierGuidedUpscalePipeline as ClassifierGuidedUpscalePipeline,
    )
    from .pipelines.pipeline_flow import FlowPipeline as FlowPipeline
    from .pipelines.pipeline_gan import GANPipeline as GANPipeline
    from .pipelines.pipeline_vae import VAEPipeline as VAEPipeline
    from .schedulers.scheduling_adm import ADMScheduler as ADMScheduler
