"""Makes diffusers record and find this package's classes as `["hf_guided", "ClassName"]` in `model_index.json`.

Without it diffusers writes the full module path, which loads from a folder but not from the Hub.
"""

from typing import TypeVar

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

T = TypeVar("T", bound=type)


def register_with_diffusers(cls: T) -> T:
    """Class decorator for a component that a pipeline of diffusers saves and loads."""
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault("hf_guided", {})[cls.__name__] = methods
    ALL_IMPORTABLE_CLASSES[cls.__name__] = methods
    return cls
