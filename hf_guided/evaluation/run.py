"""From names of models and images to results on disk: what `hf-guided evaluate` and `inspect-classifier` do, and what
`sweep` opens in the same way."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForImageClassification

from ..credentials import without_credentials
from ..data import DataArguments, load_labelled_images, source_argument
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
from .features.image_sets import ImageSet, SampledImages, has_images, open_images
from .likelihood import likelihood, likelihood_labels
from .memorisation import closest_pairs
from .plots import classifier_curves, likelihood_curve


@dataclass
class EvaluationSettings:
    """What [`run_evaluation`] compares and how; `report.json` keeps it.

    Attributes:
        generated (`str`): A pipeline's folder or name on the Hub, or images as [`open_images`] takes them.
        reference (`str`): Real images: the same, or a file of statistics.
        output (`str`, defaults to `"evaluation"`): Folder of the results.
        held_out (`str`, *optional*): Real images that the model never saw: looks for copies of `reference`.
        likelihood (`bool`, defaults to `False`): Also bits per dimension of `reference` under the pipeline.
        interval, distance_dtype: As for [`evaluate`].
        save_statistics (`str`, *optional*): `.npz` file for the reference's statistics, to be given in its place.
        num_images (`int`, defaults to 10,000): Samples to draw of a pipeline.
        guidance_scale, num_inference_steps, respacing, truncation, temperature, condition_unet: Go to the pipeline;
            `None` is its saved default.
        seed (`int`, defaults to 0): Seed of all samples together.
        features (`Sequence[str]`, defaults to `("inception",)`): Feature extractors, see [`load_features`].
        labels (`Sequence[str]`, *optional*): Classes to sample, by id or name; all in turn, by default.
        batch_size (`int`, defaults to 64): Images at once.
        compile (`bool`, defaults to `False`): Compile the pipeline's models first.
        num_workers (`int`, defaults to 0): Processes that decode images.
        no_cache (`bool`, defaults to `False`): Compute the features of real images again.
    """

    generated: str
    reference: str
    output: str = "evaluation"
    held_out: str | None = None
    likelihood: bool = False
    interval: bool = False
    distance_dtype: str = "float32"
    save_statistics: str | None = None
    num_images: int = 10_000
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    respacing: str | None = None
    truncation: float | None = None
    temperature: float | None = None
    condition_unet: bool = True
    seed: int = 0
    features: Sequence[str] = ("inception",)
    labels: Sequence[str] | None = None
    batch_size: int = 64
    compile: bool = False
    num_workers: int = 0
    no_cache: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "labels": self.labels or ["all"]}


@dataclass
class _Inputs:
    """What the settings of an evaluation name, opened."""

    pipeline: Any  # None where the samples are images
    extractors: list[FeatureExtractor]
    generated: ImageSet
    reference: Any  # ImageSet or FeatureSet
    held_out: Any


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
    inputs = _open(settings)
    bits_labels = likelihood_labels(inputs.pipeline, inputs.reference) if settings.likelihood else None
    print_once(*(f"Note: {note}" for note in find_warnings(inputs.generated, inputs.reference, inputs.held_out)))

    output.mkdir(parents=True, exist_ok=True)
    with resumable():
        if inputs.pipeline is not None:
            inputs.generated = _sample(settings, inputs)
        seconds = {"sampling": time.monotonic() - started}
        options: dict[str, Any] = {"batch_size": settings.batch_size, "num_workers": settings.num_workers}
        options["cache_dir"] = None if settings.no_cache else feature_sets.CACHE_DIR
        result = evaluate(
            inputs.generated,
            inputs.reference,
            inputs.extractors,
            held_out=inputs.held_out,
            interval=settings.interval,
            distance_dtype=settings.distance_dtype,
            **options,
        )
        seconds["measuring"] = time.monotonic() - started - sum(seconds.values())
        bits = None
        if settings.likelihood:
            how = (settings.respacing, settings.batch_size, settings.seed)
            bits = likelihood(inputs.pipeline, inputs.reference, bits_labels, *how)
            seconds["likelihood"] = time.monotonic() - started - sum(seconds.values())
        if settings.save_statistics:
            features = collect_features(inputs.reference, inputs.extractors[0], **options)
            if isinstance(features, FeatureSet):
                features.save(settings.save_statistics)
    if result is None:
        return None  # another process reports
    result.likelihood = bits
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    write_json({**result.to_dict(), "seconds": rounded, "settings": settings.to_dict()}, output / "report.json")
    for name, found in result.memorisation.items():
        save_png(closest_pairs(found, inputs.generated, inputs.reference), output / f"closest-pairs-{name}.png")
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


def _open(settings: EvaluationSettings) -> _Inputs:
    """Loads models and opens images.

    Raises:
        `ValueError`: For those that are not there, or that do not go together with the settings.
    """
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
    return _Inputs(pipeline, extractors, generated, reference, held_out)


def _sample(settings: EvaluationSettings, inputs: _Inputs) -> ImageSet:
    """The pipeline's samples, drawn into a file by all processes, with the names that the file lacks."""
    asked, path = inputs.generated, Path(settings.output) / "samples.npz"
    assert isinstance(asked, SampledImages)
    sample_to_file(
        inputs.pipeline,
        asked.sampled_labels,
        path,
        batch_size=settings.batch_size,
        seed=settings.seed,
        compile=settings.compile,
        **asked.arguments,
    )
    PartialState().wait_for_everyone()
    samples = open_images(str(path))
    samples.id2label, samples.name = asked.id2label, without_credentials(settings.generated)
    return samples


def paths_of(*specs: str | None) -> list[str]:
    """What images and features, given as `name:part` and `NAME=MODEL` too, may be as paths."""
    return [path for spec in specs if spec for path in (spec, spec.rpartition(":")[0], spec.partition("=")[2])]


def load_extractors(specs: Sequence[str], pipeline: Any, state: PartialState) -> list[FeatureExtractor]:
    """What images are measured in, none of which guides the pipeline, if there is one.

    Raises:
        `ValueError`: For two of one name, one that guides the pipeline, or what [`load_features`] refuses.
    """
    extractors = [load_features(spec, state.device) for spec in specs]
    names = [extractor.name for extractor in extractors]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two of --features are called {name}; name them apart, as NAME=MODEL.")
    if pipeline is not None:
        for extractor in extractors:
            check_independent(pipeline, extractor)
    return extractors


def open_real(
    spec: str,
    size: tuple[int, int],
    state: PartialState,
    labels: Sequence[str] | None = None,
    num_images: int | None = None,
    seed: int = 0,
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


@dataclass
class InspectionSettings:
    """What [`run_inspection`] measures, and on which images.

    Attributes:
        model (`str`): A classifier's or a pipeline's folder, or its name on the Hub.
        data (`str`): A built-in dataset, a folder with one sub-folder of images per class, or a dataset of the Hub.
        output (`str`, defaults to `"inspection.png"`): PNG; the numbers go beside it as `.json`.
        train_split, validation_split, held_out_fraction, image_column, label_column: As the classifier was trained, see
            [`DataArguments`].
        num_images (`int`, defaults to 2000): Held-out images, at most.
        batch_size (`int`, defaults to 64): Images at once.
        seed (`int`, defaults to 0): Seed of the noise and of the split.
    """

    model: str
    data: str
    output: str = "inspection.png"
    train_split: str = "train"
    validation_split: str | None = None
    held_out_fraction: float | None = None
    image_column: str | None = None
    label_column: str | None = None
    num_images: int = 2000
    batch_size: int = 64
    seed: int = 0


def run_inspection(settings: InspectionSettings) -> str | None:
    """Measures a noisy classifier at each noise level, in the main process; writes a picture and numbers.

    Returns:
        `str`: What it found; `None` in the other processes.

    Raises:
        `ValueError`: For a classifier or images that cannot be opened or do not fit, or an output that would replace
            another's file.
    """
    check_parent(settings.output, suffix=".png")
    numbers = Path(settings.output).with_suffix(".json")
    check_outside(settings.output, [settings.data])
    record = {"command": "inspect-classifier"}  # training's have none
    is_marked = read_record(settings.output) == record
    check_replaceable([settings.output], lambda path: is_marked, [settings.model, settings.data])
    check_replaceable([numbers], lambda path: is_marked and has_json(path, "findings", "rows"))
    classifier = load_classifier(settings.model)
    noise_schedule(classifier)  # refuses one of clean images before any are loaded
    train, held_out = load_labelled_images(
        DataArguments(
            **source_argument(settings.data),
            train_split=settings.train_split,
            validation_split=settings.validation_split,
            held_out_fraction=settings.held_out_fraction,
            image_column=settings.image_column,
            label_column=settings.label_column,
            resolution=list(image_size(classifier.config)),
            image_channels=classifier.config.in_channels,
        ),
        seed=settings.seed,
    )
    if held_out is None:
        raise ValueError(f"Nothing of {settings.data} is held out; give a larger --held_out_fraction, or none.")
    train, held_out = (with_classes_of(classifier, images) for images in (train, held_out))
    state = join_processes()
    print_once(*(f"Note: {note}" for note in train.notes))
    if not state.is_main_process:
        return None
    inspection = inspect_classifier(
        classifier.to(state.device),
        held_out,
        train,
        seed=settings.seed,
        batch_size=settings.batch_size,
        max_images=settings.num_images,
    )
    classifier_curves(inspection, settings.output, record)
    write_json(inspection.to_dict(), numbers)
    return (
        f"{settings.model} on {inspection.num_images} held-out images of {train.name} (and "
        f"{inspection.num_train_images} that it was trained on)\n\n{inspection}"
    )


def load_classifier(model: str) -> Any:
    """An image classifier of a folder or of the Hub, or that of a pipeline there, in float32.

    Raises:
        `ValueError`: If there is none, or its weights do not cover it.
    """
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
