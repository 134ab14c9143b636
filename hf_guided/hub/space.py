"""The demo as a Space: a folder that runs on the Hub."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

from huggingface_hub import metadata_save

from ..families import DIFFUSION, Family, family_of
from .markdown import link_to_hub, single_line
from .model_card import TEMPLATES
from .selection import COPIED

_PACKAGE = Path(__file__).parents[1]
_LEFT_OUT = ("conversion", "training", "hub")  # rooms that the demo does not need


def write_space(
    folder: str | os.PathLike,
    *,
    model_id: str,
    judge_id: str | None = None,
    title: str | None = None,
    model_class: str = "ClassifierGuidedPipeline",
) -> Path:
    """The folder of a Space that runs the demo for a pipeline on the Hub, with a copy of this package.

    Args:
        folder (`str` or `os.PathLike`): Where to write it, created if needed.
        model_id (`str`): The pipeline on the Hub.
        judge_id (`str`, *optional*): An evaluation classifier on the Hub, which must not be the one that guides.
        title (`str`, *optional*): Heading of the Space; by default the model's name.
        model_class (`str`, defaults to `"ClassifierGuidedPipeline"`): The pipeline's class.

    Raises:
        `ImportError`: If gradio is not installed, whose version the Space requires.
    """
    folder, family = Path(folder), family_of(model_class)
    try:
        sdk_version = version("gradio")
    except ImportError as error:
        raise ImportError('A Space needs gradio; install it with: pip install "hf-guided[demo]"') from error
    folder.mkdir(parents=True, exist_ok=True)

    models = [model_id, *filter(None, [judge_id])]
    arguments = ["demo", model_id, *(["--judge", judge_id] if judge_id else []), "--host", "0.0.0.0"]
    quoted = [json.dumps(argument) for argument in arguments]
    about = {"models": [link_to_hub(model) for model in models], "family": family, "arguments": quoted}
    for name in ("README.md", "app.py"):
        text = TEMPLATES.get_template(f"space_{name}.jinja").render(about)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements(family)), encoding="utf-8")
    header = {
        "title": single_line(title or model_id.rpartition("/")[2]),
        "emoji": "🎲",
        "colorFrom": "indigo",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": sdk_version,
        "app_file": "app.py",
        "pinned": False,
        "license": "apache-2.0",  # of the copy of this package
        "models": models,
        "tags": ["hf-guided", "diffusers", *(["classifier-guidance"] if family is DIFFUSION else [])],
    }
    metadata_save(folder / "README.md", header)
    _copy_package(folder / "hf_guided")
    return folder


def _requirements(family: Family) -> Iterator[str]:
    """Requirements of the demo and of the family's model, from the package's own metadata."""
    for requirement in requires("hf-guided") or []:
        package, _, marker = (part.strip() for part in requirement.partition(";"))
        is_of_family = re.split(r"[^\w.-]", package)[0] in family.requirements and "train" in marker
        if not marker or marker.replace("'", '"') == 'extra == "demo"' or is_of_family:
            yield package


def _copy_package(folder: Path) -> None:
    """Copies the package's code and templates, with linked folders."""

    def ignored(parent: str, names: list[str]) -> list[str]:
        left = ("__pycache__", *(_LEFT_OUT if Path(parent) == _PACKAGE else ()))
        return [n for n in names if n in left or not (n.endswith(COPIED) or Path(parent, n).is_dir())]

    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(_PACKAGE, folder, ignore=ignored)
