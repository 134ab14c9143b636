"""The model card of a saved pipeline or model: its README.md with usage, classes, limits, training and results."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..credentials import without_credentials
from ..families import BASELINES, DIFFUSION, family_of
from ..files import replacing
from .card_edits import merge, sign
from .markdown import CODE_BLOCK, code_span, escape, single_line
from .standalone import PIPELINES

TEMPLATES = Environment(
    loader=PackageLoader("hf_guided.hub"), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
)
_HEADINGS = {"condition_unet": "class-conditional UNet"}
_PICTURES = {"grid.png": "Samples, one row per class", "trade_off.png": "Precision, recall and FID by guidance scale"}
_INSPECTION_COLUMNS = (
    "timestep", "accuracy", "train_accuracy", "confidence", "calibration_error", "cross_entropy", "epsilon_shift"
)  # fmt: skip
_PIPELINE, _TRUSTED = f"(?:{'|'.join(PIPELINES)})", r"(?!.*trust_remote_code)(.*)\)$"
# Lines of usage with this package, and what they become where the repository carries its code.
_STANDALONE_USAGE = {
    rf"from hf_guided import {_PIPELINE}": "from diffusers import DiffusionPipeline",
    rf"{_PIPELINE}\.from_pretrained\({_TRUSTED}": r"DiffusionPipeline.from_pretrained(\1, trust_remote_code=True)",
    "from hf_guided import ADMUNet2DModel": "from diffusers import AutoModel",
    rf"ADMUNet2DModel\.from_pretrained\({_TRUSTED}": r"AutoModel.from_pretrained(\1, trust_remote_code=True)",
    "from hf_guided import ADMForImageClassification  # registers it with transformers\n": "",
    rf'(pipeline\("image-classification", model=){_TRUSTED}': r"\1\2, trust_remote_code=True)",
}


def write_model_card(folder: str | os.PathLike, **card: Any) -> Path:
    """Writes the model card `README.md` of a saved pipeline or model, and keeps the user's edits of an existing one.

    Args:
        folder (`str` or `os.PathLike`): The saved pipeline or model.
        card: The fields of [`Card`].

    Returns:
        `Path`: The card. A `ValueError` if its metadata are invalid.
    """
    path = Path(folder, "README.md")
    text = sign(Card(**card).render(Path(folder)))
    if path.is_file():
        text = merge(path.read_text(encoding="utf-8"), text)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


WEAK_JUDGE = 0.9  # accuracy on held-out images below which an evaluation classifier's numbers say little


@dataclass(kw_only=True)
class Card:
    """What a model card says; all texts but `origin` are escaped."""

    title: str  # heading, and the name of the model in the metadata
    dataset: str  # the training data in words, such as "scikit-learn's 8x8 digits"
    dataset_id: str | None = None  # its id on the Hub
    class_names: Sequence[str] = ()  # in the order of the ids; empty for an unconditional model
    training: Mapping[str, Any] | None = None  # how it was trained, as a table; a nested mapping becomes one row
    # Rows of the report, also listed as `model-index`. The name of a metric includes its features, "fid/judge".
    results: Sequence[Mapping[str, Any]] = ()
    inspection: Mapping[str, Any] | None = None  # the `to_dict()` of `inspect_classifier`
    repo_id: str | None = None  # on the Hub, which the usage loads; None: it loads the current folder
    license: str | None = None  # identifier, such as "apache-2.0"
    base_model: str | None = None  # id on the Hub of the model that it was fine-tuned from
    model_class: str = DIFFUSION.pipeline  # class of the pipeline or model
    summary: str = "A class-conditional diffusion model with classifier guidance"
    origin: str | None = None  # end of the first sentence, in Markdown; None: trained on `dataset` with this library
    guided: bool = True  # whether a classifier guides it
    dtype: str | None = None  # "float16" or "bfloat16", if the weights are saved in half precision
    defaults: Mapping[str, Any] | None = None  # the pipeline's saved sampling defaults, as a table

    def render(self, folder: Path) -> str:
        """The card of a folder, with the pictures that are in it; a `ValueError` if its metadata are invalid."""
        kind = "pipeline" if self.model_class.endswith("Pipeline") else "model"
        kind = "classifier" if self.model_class == "ADMForImageClassification" else kind
        upscales = self.model_class == "ClassifierGuidedUpscalePipeline"
        pictures = _PICTURES | ({"grid.png": "Upsampled images"} if upscales else {})
        measured = list(dict.fromkeys(column for row in self.results for column in row))
        levels = self.inspection["rows"] if self.inspection else []
        inspected = [name for name in _INSPECTION_COLUMNS if any(level[name] is not None for level in levels)]
        card = TEMPLATES.get_template("model_card.jinja").render(
            vars(self),
            metadata=self._metadata(kind).to_yaml(),
            family=family_of(self.model_class),
            kind=kind,
            upscales=upscales,
            pictures={name: text for name, text in pictures.items() if (folder / name).is_file()},
            arguments=json.dumps(self.repo_id or ".") + (f", dtype=torch.{self.dtype}" if self.dtype else ""),
            label=_label(self.class_names),
            images=_images(folder),
            copied=[row[column] for row in self.results for column in row if column.startswith("copied_share/")],
            weak_judge=weak_accuracy(self.results),
            report=(measured, [[row.get(column) for column in measured] for row in self.results]),
            levels=(inspected, [[_rounded(level[name]) for name in inspected] for level in levels]),
            has_inspection_picture=(folder / "inspection.png").is_file(),
        )
        return str(ModelCard(card))  # validates the metadata

    def _metadata(self, kind: str) -> ModelCardData:
        classifies = kind == "classifier"
        tags = {
            "hf-guided": True,
            "diffusers": not classifies,
            family_of(self.model_class).tag: True,
            "classifier-guidance": self.guided or classifies,
            "class-conditional-image-generation": bool(self.class_names) and not classifies,
        }
        return ModelCardData(
            library_name="transformers" if classifies else "diffusers",
            # The Hub has no tag for class-conditional models; those on ImageNet are listed under this one.
            pipeline_tag="image-classification" if classifies else "unconditional-image-generation",
            tags=[tag for tag, applies in tags.items() if applies],
            license=self.license and _public(self.license),
            datasets=None if self.dataset_id is None else [_public(self.dataset_id)],
            base_model=self.base_model and _public(self.base_model),
            model_name=_public(self.title),
            eval_results=self._eval_results() or None,
        )

    def _eval_results(self) -> list[EvalResult]:
        """The metrics of all rows, named with their features and the row's settings, and the classifier's accuracy."""
        name = _public(self.dataset)
        dataset_type = _public(self.dataset_id or "") or re.sub(r"\W+", "-", name).strip("-").lower()
        evaluations = []

        def add(task: str, metric: str, metric_name: str, value: float) -> None:
            evaluations.append(EvalResult(task, dataset_type, name, metric, value, metric_name=metric_name))

        for row in self.results:
            if row.get("samples", "generated") != "generated":  # real images for comparison, no result of the model
                continue
            present = {key: value for key, value in row.items() if value is not None and key != "samples"}
            settings = "".join(f", {_heading(k)}: {_public(v)}" for k, v in present.items() if "/" not in k)
            for key, value in present.items():
                if "/" in key:
                    metric = key.partition("/")[0]
                    add("unconditional-image-generation", metric, _heading(key) + settings, float(value))
        if self.inspection is not None:
            first = self.inspection["rows"][0]
            add("image-classification", "accuracy", f"Accuracy at timestep {first['timestep']}", first["accuracy"])
        return evaluations


def weak_accuracy(results: Sequence[Mapping[str, Any]]) -> float | None:
    """The evaluation classifier's accuracy on held-out images, if a report has one below [`WEAK_JUDGE`]."""
    rows = (row for row in results if row.get("samples") == "held-out images")
    accuracy = next((row.get("accuracy/judge") for row in rows), None)
    return None if accuracy is None or accuracy >= WEAK_JUDGE else accuracy


def address(card: str, repo_id: str, standalone: bool = False) -> str:
    """The card with its usage loading from a repository instead of the current folder.

    `standalone`: the repository carries its code, so that the usage does not need this package.
    """

    def addressed(code: re.Match) -> str:
        text = re.sub(r'(from_pretrained\(|model=)"\."', lambda found: found[1] + json.dumps(repo_id), code[0])
        for pattern, replacement in _STANDALONE_USAGE.items() if standalone else ():
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        return text

    card = re.sub(CODE_BLOCK, addressed, card, flags=re.MULTILINE)
    alone = "`pip install torch diffusers transformers"
    return re.sub("^`pip install hf-guided(?=.*`, then:$)", alone, card, flags=re.MULTILINE) if standalone else card


def _notes(columns: Sequence[str]) -> list[str]:
    """What the metrics of a report mean."""
    from ..evaluation.metrics.table import METRICS  # imports torch, which a card without results does without

    names = {column.partition("/")[0] for column in columns}
    return [metric.note for name, metric in METRICS.items() if name in names and metric.note]


def _images(folder: Path) -> str:
    """The images of a saved model with their size, as its config says."""
    components = [family.component for family in (DIFFUSION, *BASELINES.values())]
    configs = [folder / part / "config.json" for part in ("", *components)]
    sizes = (json.loads(config.read_text()).get("sample_size") for config in configs if config.is_file())
    size = next(sizes, None)
    height, width = size if isinstance(size, list) else (size, size)
    return "images" if size is None else f"images of {width}x{height} pixels"


def _label(class_names: Sequence[str]) -> str:
    """The labels of a call, with a comma; nothing for an unconditional model."""
    if not class_names:
        return ""
    is_plain = class_names[0] == single_line(class_names[0], length=100)
    label = json.dumps(class_names[0], ensure_ascii=False) if is_plain else "0"
    return f"class_labels=[{label}], "


def _heading(column: str) -> str:
    name, _, features = _public(column).partition("/")
    words = _HEADINGS.get(name, name.replace("_", " "))
    if features:
        from ..evaluation.metrics.table import METRICS  # imports torch, which a card without results does without

        words = f"{METRICS[name].title if name in METRICS else words} ({features})"
    return words if words[1:2].isupper() else words[:1].upper() + words[1:]


def _public(value: Any) -> str:
    """Text for a public page: one line, short numbers, no credentials, only the last part of absolute paths."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_public(item)}" for key, item in value.items())
    text = without_credentials(single_line(str(value)))
    for flavour in (PurePosixPath, PureWindowsPath):
        if flavour(text).is_absolute():
            return flavour(text).name
    return text


def _rounded(value: float | None) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else value


def _shown(value: Any) -> str:
    return escape(_public(value))


TEMPLATES.filters |= {
    "cell": lambda value: _shown(value).replace("|", "\\|"),
    "code_span": code_span,
    "heading": _heading,
    "notes": _notes,
    "shown": _shown,
    "without_credentials": without_credentials,
}
