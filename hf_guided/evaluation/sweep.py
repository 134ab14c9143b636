"""Guidance scale sweep: metrics at each scale (figure 4 of arXiv 2105.05233), and the choice of a scale."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..credentials import without_credentials
from ..files import check_outside, check_place, check_replaceable, differing, has_json, read_json, write_json
from ..generation.options import labels_to_sample
from ..generation.sampling import COMPILING
from ..guidance import guidance_from_dict
from ..loading import weights_digest
from ..pipelines.auto_pipeline import load_pipeline
from ..processes import from_main, join_processes, print_once, resumable
from .evaluate import expected_labels, measure
from .features.extractors import FeatureExtractor
from .features.feature_sets import FeatureSet, collect_features
from .features.image_sets import SampledImages
from .metrics.table import METRICS
from .plots import sweep_curve
from .run import MeasuringSettings, load_extractors, open_real, paths_of

Row = dict[str, Any]
_SETTING = ("num_inference_steps", "guidance_scale", "seed")
_setting_of = itemgetter(*_SETTING)  # identifies a row


@dataclass
class SweepSettings(MeasuringSettings):
    """What [`run_sweep`] measures and how, beside [`MeasuringSettings`]."""

    model: str  # a guided pipeline's folder, or its name on the Hub
    reference: str  # real images, or a file of statistics
    output: str = "sweep"  # folder of the results
    scales: Sequence[float] = (0, 1, 2, 5, 10)
    steps: Sequence[int | None] = (None,)  # numbers of steps; None is the pipeline's default
    # Each gives the same noise at every setting, so that differences that agree over seeds are not due to chance.
    seeds: Sequence[int] = (0, 1, 2)
    num_images: int = 1000  # samples at each setting
    no_save: bool = False  # leave the pipeline's saved defaults as they are


@dataclass
class SweepResult:
    """What [`run_sweep`] found; `str()` says it in sentences."""

    rows: list[Row]  # of [`sweep`]
    chosen: Row  # of [`choose_scale`], as the reason
    reason: str
    saved: str = ""  # what became of the choice, in a sentence

    def __str__(self) -> str:
        return "\n".join(filter(None, (self.reason, self.saved)))


def sweep(
    settings: SweepSettings,
    pipeline: Any,
    reference: FeatureSet | None,
    extractor: FeatureExtractor,
    labels: torch.Tensor,
    judged: np.ndarray | None = None,
    done: Sequence[Row] = (),
    on_row: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """The metrics of samples at every scale and number of steps with every seed, computed by all processes.

    Args:
        settings ([`SweepSettings`]): Scales, steps and seeds, and how to sample.
        pipeline ([`ClassifierGuidedPipeline`]): Makes the samples, with its saved guidance at other scales.
        reference ([`FeatureSet`]): Features of real images; only the main process needs them.
        extractor ([`FeatureExtractor`]): Computes the features; not the classifier that guides.
        labels (`torch.Tensor` of shape `(n,)`): The class of each sample, the same for every setting.
        judged (`np.ndarray` of shape `(n,)`, *optional*): The labels as class ids of the extractor, for accuracy.
        done (`Sequence[dict]`, *optional*): Rows of an earlier call, which are not measured again.
        on_row (`Callable`, *optional*): Called with all rows after each new row, in the main process.

    Returns:
        `list[dict]`: `num_inference_steps`, `guidance_scale`, `seed` and the metrics of [`measure`] by name.
    """
    rows = {_setting_of(row): row for row in done}
    in_order = dict.fromkeys(itertools.product(settings.seeds, settings.steps, settings.scales))
    wanted = [(count, scale, seed) for seed, count, scale in in_order]
    missing = [setting for setting in wanted if setting not in rows]
    for setting in tqdm(missing, desc="sweep", unit="setting", disable=not PartialState().is_main_process):
        count, scale, seed = setting
        options = {**guidance_at(pipeline, scale), "num_inference_steps": count}
        samples = SampledImages(pipeline, labels, seed, condition_unet=settings.condition_unet, **options)
        features = collect_features(samples, extractor, batch_size=settings.batch_size)
        if features is not None and reference is not None:
            rows[setting] = dict(zip(_SETTING, setting, strict=True)) | measure(features, reference, judged)
            if on_row is not None:
                on_row(list(rows.values()))
    return [rows[setting] for setting in wanted if setting in rows]


def guidance_at(pipeline: Any, scale: float) -> dict[str, Any]:
    """The pipeline's argument for a guidance scale, of its saved kind of guidance or of its classifier."""
    saved = (pipeline.config.sampling_defaults or {}).get("guidance")
    if saved is None:
        return {"guidance_scale": scale}
    if len(saved) > 1:
        raise ValueError(f"The pipeline saves {len(saved)} kinds of guidance; save one, whose scale a sweep varies.")
    return {"guidance": guidance_from_dict({**saved[0], "scale": scale})}


def choose_scale(rows: Sequence[Row], metric: str) -> tuple[Row, str]:
    """The setting with the fewest steps, and then the smallest scale, among those that are as good as the best.

    Seeds shift all settings together, and noise grows with the metric. The noise is therefore the residual of the
    metric's logarithm after subtracting the means of settings and seeds (two-way analysis of variance). A setting is as
    good as the best if their means differ by at most one standard error of such a difference.

    Args:
        rows (`Sequence[dict]`): Rows of [`sweep`], every setting with every seed.
        metric (`str`): The metric to minimise, such as `"fid/inception"`.

    Returns:
        The setting's `num_inference_steps` and `guidance_scale` with the mean of the metric, and the reason.
    """
    settings = list(dict.fromkeys(_setting_of(row)[:2] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    value_of = {_setting_of(row): row[metric] for row in rows}
    values = np.array([[value_of[(*setting, seed)] for seed in seeds] for setting in settings])

    logs = np.log(values.clip(min=1e-12))
    means = logs.mean(axis=1)
    best, error = int(means.argmin()), 0.0
    if min(values.shape) > 1:
        noise = logs - means[:, None] - logs.mean(axis=0) + logs.mean()
        degrees = (len(settings) - 1) * (len(seeds) - 1)
        error = math.sqrt((noise**2).sum() / degrees * 2 / len(seeds))
    as_good = [i for i in range(len(settings)) if means[i] - means[best] <= error]
    chosen = min(as_good, key=lambda i: (settings[i][0] or 0, settings[i][1]))

    def described(i: int) -> str:
        count, scale = settings[i]
        return f"scale {scale:g}{'' if count is None else f' with {count} steps'}"

    name, _, features = metric.partition("/")
    reason = (
        f"{described(chosen).capitalize()}: {METRICS[name].title} in {features} features {values[chosen].mean():.3g} "
        f"({values[chosen].min():.3g} to {values[chosen].max():.3g} over {len(seeds)} seeds)"
    )
    if chosen != best:
        reason += f"; {described(best)} has {values[best].mean():.3g}, but {math.expm1(error):.0%} can be noise"
    elif len(seeds) == 1:
        reason += "; with one seed the noise of that is unknown"
    count, scale = settings[chosen]
    mean = float(values[chosen].mean())
    return {"num_inference_steps": count, "guidance_scale": scale, metric: mean}, f"{reason}."


def parse_scales(text: str) -> list[float]:
    """Scales of the command line: `"0,1,2.5"`, or `"0:10"` for both ends and the values 1, 2, 5 times powers of ten
    between them, from a fiftieth of the upper end; a `ValueError` for other texts."""
    try:
        if ":" not in text:
            scales = sorted({float(part) for part in text.split(",")})
            if not all(0 <= scale < math.inf for scale in scales):
                raise ValueError
            return scales
        low, high = (float(part) for part in text.split(":"))
        if not 0 <= low < high < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(f"--scales {text} is not a list of guidance scales; give 0,1,2.5 or a range 0:10.") from None
    exponents = range(math.floor(math.log10(high / 50)), math.ceil(math.log10(high)) + 1)
    between = [round(digit * 10.0**exponent, 12) for exponent in exponents for digit in (1, 2, 5)]
    least = max(low, high / 50 * (1 - 1e-9))
    return [low, *(scale for scale in between if least < scale < high), high]


def save_choice(folder: str | os.PathLike, chosen: Row) -> dict[str, Any]:
    """Saves the setting of [`choose_scale`] into a pipeline's folder; only its `model_index.json` changes.

    Returns:
        `dict`: The pipeline's new defaults, with the chosen scale, and the steps if they were swept.
    """
    path = Path(folder) / "model_index.json"
    index = read_json(path, fix="save the pipeline again")
    defaults = dict(index.get("sampling_defaults") or {})
    if defaults.get("guidance"):
        defaults["guidance"] = [{**defaults["guidance"][0], "scale": chosen["guidance_scale"]}]
    else:
        defaults["guidance_scale"] = chosen["guidance_scale"]
    if chosen["num_inference_steps"] is not None:
        for name in ("respacing", "timesteps"):
            defaults.pop(name, None)
        defaults["num_inference_steps"] = chosen["num_inference_steps"]
    index["sampling_defaults"] = defaults
    write_json(index, path)
    return defaults


def run_sweep(settings: SweepSettings) -> SweepResult | None:
    """Measures a pipeline at every scale, over all processes that run this, and saves the scale to keep.

    The folder `output` gets `sweep.json`, after each row, and the curves as `sweep.png`; rerunning it resumes, and more
    scales, steps or seeds are added. The choice goes into the defaults of a pipeline's folder.

    Returns:
        [`SweepResult`]: In the main process; `None` in the others.

    Raises:
        `ValueError`: For inputs that cannot be opened or swept, or an output of another command or other settings.
    """
    if len(settings.features) > 1:
        raise ValueError("One kind of features chooses the scale; give one to --features.")
    output, sources = Path(settings.output), paths_of(settings.reference, *settings.features)
    path, picture = output / "sweep.json", output / "sweep.png"
    check_outside(output, sources)
    is_sweep = has_json(path, "settings", "rows")
    check_replaceable([path, picture], lambda path: is_sweep, [settings.model, *sources])
    check_place(settings.output)

    state = join_processes()
    pipeline = load_pipeline(settings.model, state)
    if not hasattr(pipeline, "set_sampling_defaults"):
        raise ValueError(f"{settings.model} is a {type(pipeline).__name__}, which nothing guides; give a guided one.")
    guidance_at(pipeline, settings.scales[0])  # refuses several kinds of guidance
    for count in settings.steps:
        if count is not None:
            pipeline.set_timesteps(count, None, None)  # refuses what the schedule has not
    (extractor,) = load_extractors(settings.features, pipeline, state)
    reference = open_real(settings.reference, pipeline.sample_size, state, settings.labels, settings.num_images)
    labels = labels_to_sample(pipeline, settings.labels, default="all", num_images=settings.num_images)
    if pipeline.num_classes is None:
        raise ValueError(f"{settings.model} has no classes, and a sweep is of guidance by classes.")
    notes = list(reference.notes)
    judged = expected_labels(SampledImages(pipeline, labels), extractor, notes)
    names = ("model", "reference", "num_images", "condition_unet", "batch_size")
    record = without_credentials({  # what the numbers depend on; the rest may differ when a sweep is resumed
        **{name: getattr(settings, name) for name in names},
        "labels": settings.labels or ["all"],
        "seed": 0,
        "features": f"{extractor.name} {extractor.fingerprint}",
        "weights": [weights_digest(model) for model in (pipeline.unet, pipeline.classifier) if model is not None],
        "images": from_main(reference.digest),
    })  # fmt: skip
    known = _rows_of(path, record)
    print_once(*(f"Note: {note}" for note in notes))

    def keep(rows: list[Row]) -> None:
        known[:] = rows
        write_json({"settings": record, "rows": known}, path)

    output.mkdir(parents=True, exist_ok=True)
    if settings.compile:
        pipeline.compile()
        print_once(COMPILING)
    with resumable():
        real = collect_features(reference, extractor, **settings.collecting())
        rows = sweep(settings, pipeline, real, extractor, labels, judged, known, keep)
    if not state.is_main_process:
        return None
    chosen, reason = choose_scale(rows, f"fid/{extractor.name}")
    write_json({"settings": record, "rows": known, "chosen": chosen, "reason": reason}, path)
    sweep_curve(rows, extractor.name, picture, chosen)
    return SweepResult(rows, chosen, reason, _save(settings, chosen))


def _rows_of(path: Path, record: dict[str, Any]) -> list[Row]:
    """The rows of an earlier sweep of the same settings; none if there was none."""
    if not path.is_file():
        return []
    rows = [{"num_inference_steps": int | None, "guidance_scale": int | float, "seed": int}]
    fix = "give another --output, or remove it to measure from scratch"
    known = without_credentials(read_json(path, {"settings": dict, "rows": rows}, fix))
    if changed := differing(known["settings"], record, {"model": "weights", "reference": "images"}):
        listed = ", ".join(changed)
        raise ValueError(f"{path} was measured otherwise ({listed}); give the same flags, or another --output.")
    return known["rows"]


def _save(settings: SweepSettings, chosen: Row) -> str:
    """Saves the choice where that makes sense; says what became of it."""
    if settings.no_save:
        return ""
    if not settings.condition_unet:
        return "Nothing is saved: by default this pipeline conditions its UNet on the class, and here it did not."
    if not Path(settings.model).is_dir():
        return f"{settings.model} is not a folder, so nothing is saved; download it first to have it keep this."
    return f"{settings.model} keeps by default: {save_choice(settings.model, chosen)}"
