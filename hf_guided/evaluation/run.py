"""What `hf-guided evaluate` and `inspect-classifier` do: from names of models and images to results on disk.

`sweep` opens models and images in the same way.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForImageClassification

from ..credentials import without_credentials
from ..data import DataArguments, load_labelled_images, source_argument
from ..data.npz import read_samples
from ..files import check_outside, check_parent, check_place, check_replaceable, has_json, write_json
from ..generation.grids import save_png
from ..generation.options import check_compile, labels_to_sample, pipeline_arguments
from ..generation.runs import check_destination
from ..generation.samples import read_record
from ..generation.sampling import sample_to_file
from ..loading import check_cover, read_config
from ..models.classifier_adm import image_size  # which makes our classifier known to transformers
from ..pipelines.auto_pipeline import is_pipeline, load_pipeline, load_saved
from ..processes import join_processes, print_once, resumable
from .classifier_inspection import inspect_classifier, noise_schedule, with_classes_of
from .evaluate import Evaluation, check_independent, evaluate, find_warnings
from .features import feature_sets
from .features.extractors import FeatureExtractor, load_features
from .features.feature_sets import FeatureSet, collect_features, is_saved
from .features.image_sets import ArrayImages, ImageSet, SampledImages, has_images, open_images
from .likelihood import likelihood, likelihood_labels
from .memorisation import closest_pairs
from .plots import classifier_curves, likelihood_curve


@dataclass(kw_only=True)
class MeasuringSettings:
    """What the commands that sample and measure share."""

    features: Sequence[str] = ("inception",)  # feature extractors, see [`load_features`]
    labels: Sequence[str] | None = None  # classes to sample, by id or name; all in turn, by default
    condition_unet: bool = True  # goes to the pipeline
    batch_size: int = 64  # images at once
    compile: bool = False  # compile the pipeline's models first
    num_workers: int = 0  # processes that decode images
    no_cache: bool = False  # compute the features of real images again

    def collecting(self) -> dict[str, Any]:
        """Options of [`collect_features`]."""
        cache_dir = None if self.no_cache else feature_sets.CACHE_DIR
        return {"batch_size": self.batch_size, "num_workers": self.num_workers, "cache_dir": cache_dir}


@dataclass
class EvaluationSettings(MeasuringSettings):
    """What [`run_evaluation`] compares and how, beside [`MeasuringSettings`]; `report.json` keeps it."""

    generated: str  # a pipeline's folder or name on the Hub, or images as [`open_images`] takes them
    reference: str  # real images: the same, or a file of statistics
    output: str = "evaluation"  # folder of the results
    held_out: str | None = None  # real images that the model never saw: looks for copies of `reference`
    likelihood: bool = False  # also bits per dimension of `reference` under the pipeline
    interval: bool = False  # see [`evaluate`]
    distance_dtype: str = "float32"  # see [`evaluate`]
    save_statistics: str | None = None  # `.npz` file for the reference's statistics, to be given in its place
    num_images: int = 10_000  # samples to draw of a pipeline
    guidance_scale: float | None = None  # goes to the pipeline, as the next four; None is its saved default
    num_inference_steps: int | None = None
    respacing: str | None = None
    truncation: float | None = None
    temperature: float | None = None
    seed: int = 0  # of all samples together


def run_evaluation(settings: EvaluationSettings) -> Evaluation | None:
    """Measures samples of a pipeline, or images, against real images, over all processes that run this.

    The folder `output` gets `report.json`, pictures of the closest pairs and of the likelihood where these are asked
    for, and the samples of a pipeline as `samples.npz`. Rerunning it resumes the sampling.

    Returns:
        [`Evaluation`]: In the main process; `None` in the others.

    Raises:
        `ValueError`: For inputs that cannot be opened or measured, or an output that would replace another's file.
    """
    started = time.monotonic()
    _check_outputs(settings)
    output = Path(settings.output)
    pipeline, extractors, generated, reference, held_out = _open(settings)
    bits_labels = likelihood_labels(pipeline, reference) if settings.likelihood else None
    print_once(*(f"Note: {note}" for note in find_warnings(generated, reference, held_out)))

    output.mkdir(parents=True, exist_ok=True)
    with resumable():
        if isinstance(generated, SampledImages):
            path = output / "samples.npz"
            options = {name: getattr(settings, name) for name in ("batch_size", "seed", "compile")}
            sample_to_file(pipeline, generated.sampled_labels, path, **options, **generated.arguments)
            PartialState().wait_for_everyone()
            generated = ArrayImages(*read_samples(path), generated.id2label, without_credentials(settings.generated))
        seconds = {"sampling": time.monotonic() - started}
        options = {"interval": settings.interval, "distance_dtype": settings.distance_dtype, **settings.collecting()}
        result = evaluate(generated, reference, extractors, held_out=held_out, **options)
        seconds["measuring"] = time.monotonic() - started - sum(seconds.values())
        bits = None
        if settings.likelihood:
            bits = likelihood(pipeline, reference, bits_labels, settings.respacing, settings.batch_size, settings.seed)
            seconds["likelihood"] = time.monotonic() - started - sum(seconds.values())
        if settings.save_statistics:
            features = collect_features(reference, extractors[0], **settings.collecting())
            if features is not None:
                features.save(settings.save_statistics)
    if result is None:
        return None  # another process reports
    result.likelihood = bits
    rounded = {stage: round(value, 1) for stage, value in seconds.items()}
    shown = {**vars(settings), "labels": settings.labels or ["all"]}
    write_json({**result.to_dict(), "seconds": rounded, "settings": shown}, output / "report.json")
    for name, found in result.memorisation.items():
        save_png(closest_pairs(found, generated, reference), output / f"closest-pairs-{name}.png")
    if bits is not None and bits.timesteps:
        likelihood_curve(bits.timesteps, bits.vb, output / "likelihood.png")
    return result


def _check_outputs(settings: EvaluationSettings) -> None:
    """Refuses, before anything is loaded, outputs that cannot be written or are another's."""
    output = Path(settings.output)
    sources = paths_of(settings.generated, settings.reference, settings.held_out, *settings.features)
    check_outside(output, sources)
    is_report = has_json(output / "report.json", "generated", "reference", "metrics", "settings")
    pictures = output.glob("closest-pairs-*.png") if settings.held_out else ()
    curve = [output / "likelihood.png"] if settings.likelihood else []
    check_replaceable([output / "report.json", *curve, *pictures], lambda path: is_report, sources)
    if settings.save_statistics:
        check_parent(settings.save_statistics, "--save_statistics", ".npz")
        if len(settings.features) > 1:
            raise ValueError("--save_statistics keeps one kind of features; give one to --features.")
        sampled = output / "samples.npz"  # which another check is of
        written = [sampled, Path(settings.save_statistics)]
        check_replaceable(written, lambda path: path == sampled or is_saved(path), sources)
    check_place(settings.output)
    if output.is_dir() and is_pipeline(settings.generated):
        check_destination(output / "samples.npz")


def _open(settings: EvaluationSettings) -> tuple[Any, list[FeatureExtractor], ImageSet, Any, Any]:
    """The pipeline, if any, the extractors, the samples, the reference and the held-out images."""
    state = join_processes()
    pipeline = load_pipeline(settings.generated, state) if is_pipeline(settings.generated) else None
    extractors = load_extractors(settings.features, pipeline, state)
    drawn: dict[str, Any] = {"num_images": settings.num_images, "seed": settings.seed}
    generated: ImageSet
    if pipeline is not None:
        labels = labels_to_sample(pipeline, settings.labels, default="all", **drawn)
        names = ("guidance_scale", "condition_unet", "num_inference_steps", "respacing", "temperature", "truncation")
        arguments = pipeline_arguments(pipeline, **{name: getattr(settings, name) for name in names})
        generated = SampledImages(pipeline, labels, settings.seed, **arguments)
        check_compile(pipeline, settings.compile)
    elif settings.likelihood or settings.compile:
        flag = "--likelihood" if settings.likelihood else "--compile"
        raise ValueError(f"{flag} is of a pipeline, and {settings.generated} is none.")
    else:
        generated = open_images(settings.generated)
    size = generated.size
    reference = open_real(settings.reference, size, state, settings.labels, **drawn)
    held_out = open_real(settings.held_out, size, state, settings.labels, **drawn) if settings.held_out else None
    for name in ("held_out", "likelihood", "save_statistics"):
        if getattr(settings, name) and any(isinstance(images, FeatureSet) for images in (reference, held_out)):
            raise ValueError(f"--{name} needs images, and statistics alone were given.")
    return pipeline, extractors, generated, reference, held_out


def paths_of(*specs: str | None) -> list[str]:
    """What images and features, given as `name:part` and `NAME=MODEL` too, may be as paths."""
    return [path for spec in specs if spec for path in (spec, spec.rpartition(":")[0], spec.partition("=")[2])]


def load_extractors(specs: Sequence[str], pipeline: Any, state: PartialState) -> list[FeatureExtractor]:
    """What images are measured in: [`load_features`] of each, of different names, none of which guides the pipeline."""
    extractors: dict[str, FeatureExtractor] = {}
    for extractor in (load_features(spec, state.device) for spec in specs):
        if extractor.name in extractors:
            raise ValueError(f"Two of --features are called {extractor.name}; name them apart, as NAME=MODEL.")
        extractors[extractor.name] = extractor
        check_independent(pipeline, extractor)
    return list(extractors.values())


def open_real(
    spec: str, size: tuple[int, int], state: PartialState, labels: Sequence[str] | None, num_images: int, seed: int = 0
) -> Any:
    """Images to measure against, brought to a size; a pipeline's samples; or statistics, of a file without images."""
    if is_pipeline(spec):
        pipeline = load_pipeline(spec, state)
        if pipeline.sample_size != size:
            raise ValueError(f"{spec} makes images of {pipeline.sample_size} pixels, and those to measure have {size}.")
        which = labels_to_sample(pipeline, labels, default="all", num_images=num_images, seed=seed)
        return SampledImages(pipeline, which, seed)
    if spec.endswith(".npz") and Path(spec).is_file() and not has_images(spec):
        return FeatureSet.load(spec)
    return open_images(spec, size)


def run_inspection(
    model: str,
    data: str,
    output: str = "inspection.png",
    *,
    num_images: int = 2000,
    batch_size: int = 64,
    seed: int = 0,
    **arguments: Any,
) -> str | None:
    """Measures a noisy classifier at each noise level, in the main process; writes a picture and numbers.

    Args:
        model (`str`): A classifier's or a pipeline's folder, or its name on the Hub.
        data (`str`): A built-in dataset, a folder with one sub-folder of images per class, or a dataset of the Hub.
        output (`str`, defaults to `"inspection.png"`): The picture; the numbers go beside it as `.json`.
        num_images (`int`, defaults to 2000): Held-out images, at most.
        batch_size (`int`, defaults to 64): Images at once.
        seed (`int`, defaults to 0): Seed of the noise.
        arguments: Those of [`DataArguments`] that the classifier was trained with: splits and columns.

    Returns:
        `str`: What it found; `None` in the other processes.

    Raises:
        `ValueError`: For a classifier or images that cannot be opened or do not fit, or an output of another command.
    """
    check_parent(output, suffix=".png")
    numbers = Path(output).with_suffix(".json")
    check_outside(output, [data])
    record = {"command": "inspect-classifier"}  # training's have none
    is_marked = read_record(output) == record
    check_replaceable([output], lambda path: is_marked, [model, data])
    check_replaceable([numbers], lambda path: is_marked and has_json(path, "findings", "rows"))
    classifier = load_classifier(model)
    noise_schedule(classifier)  # refuses one of clean images before any are loaded
    arguments |= {"resolution": list(image_size(classifier.config)), "image_channels": classifier.config.in_channels}
    train, held_out = load_labelled_images(DataArguments(**source_argument(data), **arguments), seed)
    if held_out is None:
        raise ValueError(f"Nothing of {data} is held out; give a larger --held_out_fraction, or none.")
    train, held_out = (with_classes_of(classifier, images) for images in (train, held_out))
    state = join_processes()
    print_once(*(f"Note: {note}" for note in train.notes))
    if not state.is_main_process:
        return None
    classifier = classifier.to(state.device)
    inspection = inspect_classifier(
        classifier, held_out, train, seed=seed, batch_size=batch_size, max_images=num_images
    )
    classifier_curves(inspection, output, record)
    write_json(inspection.to_dict(), numbers)
    return (
        f"{model} on {inspection.num_images} held-out images of {train.name} (and "
        f"{inspection.num_train_images} that it was trained on)\n\n{inspection}"
    )


def load_classifier(model: str) -> Any:
    """An image classifier of a folder or of the Hub, or that of a pipeline there, in float32."""
    of_pipeline = is_pipeline(model)
    if Path(model).is_dir() and not of_pipeline and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} is no folder of a classifier or pipeline: neither config.json nor model_index.json.")
    if of_pipeline and Path(model).is_dir():
        read_config(Path(model) / "model_index.json")  # which may be damaged
    subfolder = {"subfolder": "classifier"} if of_pipeline else {}
    try:
        classifier, info = load_saved(
            AutoModelForImageClassification, model, dtype=torch.float32, output_loading_info=True, **subfolder
        )
    except (OSError, ValueError) as error:
        if of_pipeline and (isinstance(error, OSError) or not (Path(model) / "classifier").exists()):
            raise ValueError(f"The pipeline {model} has no classifier to inspect.") from error
        if "Unrecognized" in str(error):
            raise ValueError(f"{model} is no image classifier.") from error
        raise
    check_cover(model, info["missing_keys"])
    return classifier
