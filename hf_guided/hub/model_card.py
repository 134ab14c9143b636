"""The model card of a saved pipeline or model: its README.md with usage, classes, limits, training and results."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..credentials import without_credentials
from ..families import BASELINES, DIFFUSION, family_of
from ..files import replacing
from .card_edits import CODE, merge, sign
from .markdown import code_span, escape, single_line

_HEADINGS = {"condition_unet": "class-conditional UNet"}

_ENVIRONMENT = Environment(
    loader=PackageLoader("hf_guided.hub"), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
)
_INSPECTION_COLUMNS = (
    "timestep", "accuracy", "train_accuracy", "confidence", "calibration_error", "cross_entropy", "epsilon_shift"
)  # fmt: skip


def write_model_card(folder: str | os.PathLike, **card: Any) -> Path:
    """Writes the model card `README.md` of a saved pipeline or model.

    The user's edits of an existing card are kept.

    Args:
        folder (`str` or `os.PathLike`): The saved pipeline.
        card: The arguments of [`render_card`].

    Returns:
        `Path`: The card.
    """
    path = Path(folder, "README.md")
    text = sign(render_card(folder, **card))
    if path.is_file():
        text = merge(path.read_text(encoding="utf-8"), text)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render_card(
    folder: str | os.PathLike,
    *,
    title: str,
    dataset: str,
    class_names: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    inspection: Mapping[str, Any] | None = None,
    dataset_id: str | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    model_class: str = "ClassifierGuidedPipeline",
    summary: str = "A class-conditional diffusion model with classifier guidance",
    origin: str | None = None,
    guided: bool = True,
    dtype: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """The model card of a saved pipeline or model, which shows `grid.png` and `trade_off.png` where present.

    Args:
        folder (`str` or `os.PathLike`): The saved pipeline.
        title (`str`): Heading of the card, and the name of the model in its metadata.
        dataset (`str`): The training data in words, such as `"scikit-learn's 8x8 digits"`.
        class_names (`Sequence[str]`, *optional*): Name of each class, in the order of the ids; empty for an
            unconditional model.
        training (`Mapping[str, Any]`, *optional*): How it was trained, shown as a table in this order: steps, batch
            size, time, hardware, versions of packages ... A nested mapping becomes one row. Only the last part of a
            path is shown.
        results (`Sequence[Mapping[str, Any]]`, *optional*): Rows of the report, shown as a table with the first row's
            keys as columns. The name of a metric includes its features, `"fid/judge"`. The metadata lists them as
            `model-index`.
        inspection (`Mapping[str, Any]`, *optional*): The result of [`inspect_classifier`], from its `to_dict()` or
            `inspection.json`; shown with `inspection.png`, where present.
        dataset_id (`str`, *optional*): The data's id on the Hub.
        repo_id (`str`, *optional*): The pipeline's id on the Hub, which the usage then loads. By default it loads the
            current folder.
        license (`str`, *optional*): Identifier of the licence, such as `"apache-2.0"`.
        base_model (`str`, *optional*): The model that it was fine-tuned from, by its id on the Hub.
        model_class (`str`, defaults to `"ClassifierGuidedPipeline"`): The class of the pipeline or model.
        summary (`str`): The kind of model, in a few words.
        origin (`str`, *optional*): The end of the first sentence, in Markdown, such as how it was made; by default that
            it was trained on `dataset` with this library. All other texts are escaped.
        guided (`bool`, defaults to `True`): Whether a classifier guides it.
        dtype (`str`, *optional*): `"float16"` or `"bfloat16"`, if the weights are saved in half precision.
        defaults (`Mapping[str, Any]`, *optional*): The pipeline's saved sampling defaults, shown as a table.

    Returns:
        `str`: The card.

    Raises:
        `ValueError`: If its metadata are invalid.
    """
    folder, title, dataset = Path(folder), _public(title), _public(dataset)
    dataset_id = dataset_id and _public(dataset_id)
    classifies, is_pipeline = model_class == "ADMForImageClassification", model_class.endswith("Pipeline")
    family = family_of(model_class)
    tags = {
        "hf-guided": True,
        "diffusers": not classifies,
        family.tag: True,
        "classifier-guidance": guided or classifies,
    }
    tags["class-conditional-image-generation"] = bool(class_names) and not classifies
    data = ModelCardData(
        library_name="transformers" if classifies else "diffusers",
        # The Hub has no tag for class-conditional models; those on ImageNet are listed under this one.
        pipeline_tag="image-classification" if classifies else "unconditional-image-generation",
        tags=[tag for tag, applies in tags.items() if applies],
        license=license and _public(license),
        datasets=None if dataset_id is None else [dataset_id],
        base_model=base_model and _public(base_model),
        model_name=title,
        eval_results=_eval_results(results, inspection, dataset, dataset_id) or None,
    )
    upscales = model_class == "ClassifierGuidedUpscalePipeline"
    pictures = {
        "grid.png": "Upsampled images" if upscales else "Samples, one row per class",
        "trade_off.png": "Precision, recall and FID by guidance scale",
    }
    copied = [value for row in results for key, value in row.items() if key.startswith("copied_share/")]
    sections = {"Sampling defaults": defaults, "Training": training}
    card = _ENVIRONMENT.get_template("model_card.jinja").render(
        metadata=data.to_yaml(),
        title=escape(title),
        summary=escape(_public(summary)),
        paper=family.paper,
        origin=without_credentials(origin) or f"trained on {escape(dataset)} with\n`hf-guided`",
        pictures=[{"name": name, "text": text} for name, text in pictures.items() if (folder / name).is_file()],
        requirements=family.requirements,
        kind="pipeline" if is_pipeline else "classifier" if classifies else "model",
        model_class=model_class,
        upscales=upscales,
        source=json.dumps(repo_id or "."),
        dtype=dtype,
        loaded_in="" if dtype is None else f", dtype=torch.{dtype}",
        label=_label(class_names),
        guided=guided,
        trade_off=family.trade_off,
        classes=[code_span(name) for name in class_names],
        images=_images(folder),
        copied=f"{max(copied):.1%}" if copied else None,
        tables=[
            {"heading": heading, "rows": _table(["", ""], [[_heading(name), _public(v)] for name, v in values.items()])}
            for heading, values in sections.items()
            if values
        ],
        **_results(results),
        inspection=None if inspection is None else _inspection(folder, inspection),
    )
    return str(ModelCard(card))  # validates the metadata


def _results(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of a report, and what its metrics mean."""
    if not results:
        return {"results": None, "notes": []}
    from ..evaluation.metrics.table import METRICS  # imports torch, which a card without results does without

    columns = list(dict.fromkeys(column for row in results for column in row))
    shown = {column.partition("/")[0] for column in columns}
    rows = [[_public(row.get(column)) for column in columns] for row in results]
    notes = [metric.note for name, metric in METRICS.items() if name in shown and metric.note]
    return {"results": _table([_heading(column) for column in columns], rows), "notes": notes}


def _inspection(folder: Path, inspection: Mapping[str, Any]) -> dict[str, Any]:
    """The classifier's table by noise level, and what follows from it."""
    rows, num_trained = inspection["rows"], inspection["num_train_images"]
    columns = [name for name in _INSPECTION_COLUMNS if any(row[name] is not None for row in rows)]
    return {
        "num_images": f"{inspection['num_images']:,}",
        "num_trained": f"{num_trained:,}" if num_trained else "",
        "has_picture": (folder / "inspection.png").is_file(),
        "table": _table(
            [_heading(name) for name in columns], [[_rounded(row[name]) for name in columns] for row in rows]
        ),
        "findings": [escape(_public(finding)) for finding in inspection["findings"]],
    }


def address(card: str, repo_id: str, standalone: bool = False) -> str:
    """The card with its usage loading from a repository instead of the current folder.

    Args:
        card (`str`): The card.
        repo_id (`str`): The repository.
        standalone (`bool`, defaults to `False`): Whether the repository carries its code and does not need this
            package.
    """

    pipelines = "|".join(family.pipeline for family in BASELINES.values())

    def addressed(block: re.Match) -> str:
        code = re.sub(r'(from_pretrained\(|model=)"\."', lambda match: f"{match[1]}{json.dumps(repo_id)}", block[0])
        if standalone:
            code = re.sub(r"(?m)^from hf_guided import \w*Pipeline", "from diffusers import DiffusionPipeline", code)
            code = re.sub(
                rf"\b(?:ClassifierGuided\w*Pipeline|{pipelines})\.from_pretrained\((.*?)\)\n",
                r"DiffusionPipeline.from_pretrained(\1, trust_remote_code=True)\n",
                code,
            )
            code = re.sub(r"(?m)^from hf_guided import ADMUNet2DModel$", "from diffusers import AutoModel", code)
            code = re.sub(
                r"\bADMUNet2DModel\.from_pretrained\((.*?)\)\n",
                r"AutoModel.from_pretrained(\1, trust_remote_code=True)\n",
                code,
            )
            code = re.sub(r"(?m)^from hf_guided import ADMForImageClassification  # .*\n", "", code)
            code = re.sub(r'(pipeline\("image-classification".*?)\)\n', r"\1, trust_remote_code=True)\n", code)
        return code

    card = CODE.sub(addressed, card)
    if standalone:
        pip = r"(?m)^`pip install hf-guided(.*)`, then:"
        card = re.sub(pip, r"`pip install torch diffusers transformers\1`, then:", card)
    return card


def _eval_results(
    results: Sequence[Mapping[str, Any]], inspection: Mapping[str, Any] | None, dataset: str, dataset_id: str | None
) -> list[EvalResult]:
    """The metrics of all rows, named with their features and the row's settings, and the classifier's accuracy."""
    data: dict[str, Any] = {
        "dataset_type": dataset_id or re.sub(r"\W+", "-", dataset).strip("-").lower(),
        "dataset_name": dataset,
    }
    evaluations = []
    for row in results:
        if row.get("samples", "generated") != "generated":  # real images for comparison, not a result of the model
            continue
        metrics = {key: value for key, value in row.items() if "/" in key and value is not None}
        settings = "".join(
            f", {_heading(key)}: {_public(value)}"
            for key, value in row.items()
            if key not in (*metrics, "samples") and value is not None
        )
        evaluations += [
            EvalResult(
                task_type="unconditional-image-generation",
                **data,
                metric_type=key.partition("/")[0],
                metric_name=_heading(key) + settings,
                metric_value=float(value),
            )
            for key, value in metrics.items()
        ]
    if inspection is not None:
        first = inspection["rows"][0]
        evaluations.append(
            EvalResult(
                task_type="image-classification",
                **data,
                metric_type="accuracy",
                metric_name=f"Accuracy at timestep {first['timestep']}",
                metric_value=first["accuracy"],
            )
        )
    return evaluations


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


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, *rows]
    cells = [[escape(cell).replace("|", "\\|") for cell in line] for line in lines]
    cells.insert(1, ["---"] * len(headings))
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _rounded(value: float | None) -> str:
    return f"{value:.3f}" if isinstance(value, float) else _public(value)


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
