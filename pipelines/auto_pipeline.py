"""Finds which of this package's pipelines a folder or a repository holds."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ..loading import read_config
from .pipeline_classifier_guided import ClassifierGuidedPipeline
from .pipeline_flow import FlowPipeline
from .pipeline_gan import GANPipeline
from .pipeline_vae import VAEPipeline

_OTHER_FAMILIES = {kind.__name__: kind for kind in (FlowPipeline, GANPipeline, VAEPipeline)}


def pipeline_class(model: str, token: str | None = None) -> Any:
    """The class that a pipeline's `model_index.json` names, if it is of another family than diffusion; else ours.

    Args:
        model (`str`): A folder, or a name on the Hub.
        token (`str`, *optional*): To read it with; the saved login, by default.

    Raises:
        `OSError`: If there is no such pipeline.
        `ValueError`: If its `model_index.json` is damaged.
    """
    folder = Path(model)
    path = (
        folder / "model_index.json"
        if folder.exists()
        else Path(hf_hub_download(model, "model_index.json", token=token))
    )
    name: Any = read_config(path).get("_class_name")
    name = name[-1] if isinstance(name, list) else name  # a repository that carries its code names its module too
    return _OTHER_FAMILIES.get(name, ClassifierGuidedPipeline)
