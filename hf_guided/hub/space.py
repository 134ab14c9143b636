"""The demo as a Space: a folder that runs on the Hub."""

import json
import os
import re
import shutil
from importlib.metadata import requires, version
from pathlib import Path

from huggingface_hub import metadata_save

from ..families import DIFFUSION, family_of
from .markdown import link_to_hub, single_line

_PACKAGE = Path(__file__).parents[1]
_LEFT_OUT = ("conversion", "training", "hub")  # parts of the package that the demo does not need
_DIFFUSION = (
    "Classifier-guided diffusion: samples of {model} as they are denoised, and the same noise at several guidance "
    "scales, side by side."
)
_BASELINE = "A {noun}: samples of {model}, and the same noise at several {trade_off}s."

_APP = '''\
"""The page of `hf-guided demo`; locally: python app.py --host 127.0.0.1"""

import sys

from hf_guided.cli import main

main(["demo", {arguments}, "--host", "0.0.0.0", *sys.argv[1:]])
'''

_README = """
{shown}{judge}

Made by `hf-guided push --space`. `hf_guided/` is a copy of that package; only `requirements.txt` is installed.

A private model needs a secret `HF_TOKEN` in the settings of this Space: a token with read access to it.
"""


def write_space(
    folder: str | os.PathLike,
    *,
    model_id: str,
    judge_id: str | None = None,
    title: str | None = None,
    license: str = "apache-2.0",
    model_class: str = "ClassifierGuidedPipeline",
) -> Path:
    """The folder of a Space that runs the demo for a pipeline on the Hub, with a copy of this package.

    Args:
        folder (`str` or `os.PathLike`): Where to write it, created if needed.
        model_id (`str`): The pipeline on the Hub, `"user/name"`.
        judge_id (`str`, *optional*): An evaluation classifier on the Hub; it must not be the one that guides.
        title (`str`, *optional*): Heading of the Space; by default the model's name.
        license (`str`, defaults to `"apache-2.0"`): Identifier of the licence of the Space's code.
        model_class (`str`, defaults to `"ClassifierGuidedPipeline"`): The pipeline's class: this, `"VAEPipeline"`,
            `"GANPipeline"` or `"FlowPipeline"`.

    Returns:
        `Path`: The folder.

    Raises:
        `ImportError`: If gradio is not installed, whose version the Space requires.
    """
    folder = Path(folder)
    models = [model_id] if judge_id is None else [model_id, judge_id]
    try:
        sdk_version = version("gradio")
    except ImportError as error:
        raise ImportError('A Space needs gradio; install it with: pip install "hf-guided[demo]"') from error
    folder.mkdir(parents=True, exist_ok=True)

    arguments = ", ".join(json.dumps(argument) for argument in [model_id, *(["--judge", judge_id] if judge_id else [])])
    (folder / "app.py").write_text(_APP.format(arguments=arguments), encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(_requirements(model_class)) + "\n", encoding="utf-8")
    judge = "" if judge_id is None else f" Evaluation classifier: {link_to_hub(judge_id)}."
    readme = folder / "README.md"
    family = family_of(model_class)
    shown = (_DIFFUSION if family is DIFFUSION else _BASELINE).format(
        model=link_to_hub(model_id), noun=family.noun, trade_off=family.trade_off
    )
    readme.write_text(_README.format(shown=shown, judge=judge), encoding="utf-8")
    header = {
        "title": single_line(title or model_id.rpartition("/")[2]),
        "emoji": "🎲",
        "colorFrom": "indigo",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": sdk_version,
        "app_file": "app.py",
        "pinned": False,
        "license": license,
        "models": models,
        "tags": ["hf-guided", "diffusers", *(["classifier-guidance"] if family is DIFFUSION else [])],
    }
    metadata_save(readme, header)
    _copy_package(folder / "hf_guided")
    return folder


def _requirements(model_class: str) -> list[str]:
    """Requirements of the demo and of the family's model, from the package's own metadata."""
    needed = []
    for requirement in requires("hf-guided") or []:
        package, _, marker = (part.strip() for part in requirement.partition(";"))
        name = re.match(r"[\w.-]+", package)
        is_of_family = name is not None and name[0] in family_of(model_class).requirements and "train" in marker
        if not marker or marker.replace("'", '"') == 'extra == "demo"' or is_of_family:
            needed.append(package)
    return needed


def _copy_package(folder: Path) -> None:
    """Copies the package's code, with linked folders."""

    def ignored(parent: str, names: list[str]) -> list[str]:
        parts = _LEFT_OUT if Path(parent) == _PACKAGE else ()
        return [name for name in names if name in parts or not (name.endswith(".py") or (Path(parent) / name).is_dir())]

    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(_PACKAGE, folder, ignore=lambda parent, names: [*ignored(parent, names), "__pycache__"])
