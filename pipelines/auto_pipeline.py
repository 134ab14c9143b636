"""The pipeline class of a saved folder or a Hub repository, and how a command loads it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from transformers.utils import logging as transformers_logging

import hf_guided

from ..families import family_of
from ..files import is_hub_id
from ..loading import naming_damage, read_config

if TYPE_CHECKING:
    from accelerate import PartialState


def is_pipeline(name: str) -> bool:
    """Whether a folder, or a repository of the Hub, holds a pipeline."""
    if "/" not in name or not is_hub_id(name):
        return (Path(name) / "model_index.json").is_file()
    try:
        hf_hub_download(name, "model_index.json")
    except (OSError, ValueError, HTTPError):
        return False
    return True


def pipeline_class(model: str, token: str | None = None) -> Any:
    """The pipeline class of a saved pipeline's family.

    Args:
        model (`str`): A folder, or a name on the Hub.
        token (`str`, *optional*): Token to read it with. Default: the saved login.

    Raises:
        `OSError`: If there is no such pipeline; a `ValueError`, if its `model_index.json` is damaged.
    """
    index = "model_index.json"
    path = Path(model, index) if Path(model).exists() else hf_hub_download(model, index, token=token)
    name: Any = read_config(path).get("_class_name")
    name = name[-1] if isinstance(name, list) else name  # a repository that carries its code names its module too
    return getattr(hf_guided, family_of(name).pipeline)


def load_saved(kind: Any, model: str, **arguments: Any) -> Any:
    """A pipeline or model of a folder or of the Hub, loaded without the progress bars of its parts.

    `kind` is its class, or an Auto class, whose `from_pretrained` takes the arguments. If there is no such model, or it
    is damaged, it is a `ValueError`.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if not Path(model).exists() and not is_hub_id(model):
        raise ValueError(f"There is no folder {model}.")
    try:
        with naming_damage(model):
            return kind.from_pretrained(model, **arguments)
    except OSError as error:
        if Path(model).exists():
            raise
        raise ValueError(f"There is no folder {model}, and it could not be downloaded from the Hub.") from error


def load_pipeline(model: str, state: "PartialState", kind: Any = None) -> Any:
    """A pipeline on this process's device, of a class that is found in its files by default; errors as [`load_saved`].

    The progress bar of its steps is the main process's alone, below that of the images.
    """
    if kind is None:  # loading a guided pipeline says what is missing
        kind = pipeline_class(model) if is_pipeline(model) else hf_guided.ClassifierGuidedPipeline
    pipeline = load_saved(kind, model).to(state.device)
    disable = None if state.is_main_process else True
    pipeline.set_progress_bar_config(desc="batch", position=1, leave=False, disable=disable)
    return pipeline
