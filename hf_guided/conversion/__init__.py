"""Published OpenAI checkpoints to this library's models, and back.

Imported on first use (PEP 562): converting files needs pipelines and the Hub, converting state dicts only the models.
"""

import importlib
from typing import TYPE_CHECKING, Any

_MODULE_OF = {
    "convert_checkpoint": "convert",
    "convert_openai_classifier": "openai",
    "convert_openai_unet": "openai",
    "export_checkpoint": "export",
    "to_openai_state_dict": "openai",
}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from .convert import convert_checkpoint as convert_checkpoint
    from .export import export_checkpoint as export_checkpoint
    from .openai import convert_openai_classifier as convert_openai_classifier
    from .openai import convert_openai_unet as convert_openai_unet
    from .openai import to_openai_state_dict as to_openai_state_dict
