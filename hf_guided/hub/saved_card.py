"""The model card of a folder that `save_pretrained` wrote, generated from its configs."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..families import BASELINES, family_of
from ..files import read_json
from .model_card import Card
from .standalone import saved_class

# Models alone, and what they are called in a sentence.
_MODELS = {
    **{family.models[0]: family.noun for family in BASELINES.values()},
    "BigGANGenerator": "generator of a GAN",
    "ADMUNet2DModel": "UNet of a diffusion model",
}


def card_of_saved(folder: Path, title: str, license: str | None = None) -> str | None:
    """A model card for a folder of `save_pretrained`, which is not changed: library, tags, usage, classes, defaults.

    `None` for a class of another package or a damaged config. `license` is an identifier, such as `"mit"`.
    """
    index, config = _config(folder / "model_index.json"), _config(folder / "config.json")
    name = saved_class(index, config)
    name = str(name[-1] if isinstance(name, list) else name)  # a standalone repository names the module, too
    guided = isinstance(index.get("classifier"), list) and None not in index["classifier"]
    family = family_of(name)
    upscales = name == "ClassifierGuidedUpscalePipeline"
    if index and (upscales or name == family.pipeline):
        noun, config = "upsampler" if upscales else family.noun, _config(folder / family.component / "config.json")
        names = index.get("id2label")
        if names is None and guided:
            names = _config(folder / "classifier" / "config.json").get("id2label")
    elif name in _MODELS and not index:
        noun, names = _MODELS[name], {}
    elif name == "ADMForImageClassification" and not index:
        noun, names = None, config.get("id2label")
    else:
        return None
    if noun is None:
        summary = "A classifier of noisy images"
    else:
        article = "An unconditional" if config.get("num_class_embeds") is None else "A class-conditional"
        summary = f"{article} {noun}{' with classifier guidance' if guided else ''}"
    defaults = index.get("sampling_defaults")
    card = Card(
        title=title,
        dataset="",
        class_names=_class_names(names),
        defaults=defaults if isinstance(defaults, dict) else None,
        license=license,
        model_class=name,
        summary=summary,
        origin="saved with `hf-guided`",
        guided=guided,
    )
    return card.render(folder)


def _config(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):  # a damaged config adds nothing to the card
        return read_json(path)
    return {}


def _class_names(id2label: Any) -> list[str]:
    """Class names in the order of their ids; empty if they are the placeholders of transformers."""
    names = id2label if isinstance(id2label, dict) else {}
    ordered = [str(names[label]) for label in sorted(names, key=lambda label: (len(label), label))]
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in ordered) else ordered
