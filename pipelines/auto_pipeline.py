"""The pipeline class of a saved folder or a Hub repository."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

import hf_guided

from ..families import BASELINES
from ..loading import read_config


def pipeline_class(model: str, token: str | None = None) -> Any:
    """The pipeline class that `model_index.json` names, if it is of another family than diffusion; else a guided one.

    Args:
        model (`str`): A folder, or a name on the Hub.
        token (`str`, *optional*): Token to read it with. Default: the saved login.

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
    is_baseline = name in [family.pipeline for family in BASELINES.values()]
    return getattr(hf_guided, name) if is_baseline else hf_guided.ClassifierGuidedPipeline
