"""All metrics of one set of images against another, with warnings for their interpretation."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..labels import composed, match_classes
from ..loading import weights_digest
from .features.extractors import FeatureExtractor
from .features.feature_sets import FeatureSet, collect_features
from .features.image_sets import ArrayImages, ImageSet, LoadedImages
from .likelihood import Likelihood
from .memorisation import Memorisation, memorisation
from .metrics.distances import frechet_interval
from .metrics.table import DENSITY_K, METRICS, Compared, K

PUBLISHED_NUM_IMAGES = 50_000  # of published FIDs
FEWEST_IMAGES = max(K, DENSITY_K) + 1


def measure(
    generated: FeatureSet,
    reference: FeatureSet,
    labels: np.ndarray | None = None,
    distance_dtype: str = "float32",
) -> dict[str, float]:
    """The metrics of samples in the features of one extractor.

    Args:
        generated ([`FeatureSet`]): Features of the samples.
        reference ([`FeatureSet`]): Features of real images, by the same extractor.
        labels (`np.ndarray` of shape `(n,)`, *optional*): The class that each sample was conditioned on, as an id among
            the extractor's classes.
        distance_dtype (`str`, defaults to `"float32"`): `"float16"` reproduces the rounding of the published
            evaluator's precision and recall, see [`precision_recall`].

    Returns:
        `dict[str, float]`: Those of [`METRICS`] whose inputs are available, by name, `/` and the extractor's name:
        `"fid/inception"`.

    Raises:
        `ValueError`: If the two come from different extractors.
    """
    check_features(reference, generated.extractor, generated.fingerprint)
    compared = Compared(generated, reference, labels, distance_dtype)
    return {
        f"{metric.name}/{generated.extractor}": metric.compute(compared)
        for metric in METRICS.values()
        if metric.compute is not None and metric.applies_to(compared)
    }


@dataclass
class Evaluation:
    """The result of [`evaluate`]; `str()` is a table and the notes.

    Attributes:
        generated, reference (`str`): Names of the two sets.
        num_generated (`int`), num_reference (`int`, *optional*): Images in each; unknown for
            some statistics.
        metrics (`dict[str, float]`): Metrics by name, with the features: `"fid/inception"`.
        intervals (`dict[str, tuple[float, float]]`): 95 % confidence intervals, if requested.
        class_accuracy (`dict[str, dict[str, float]]`): Accuracy of each class by extractor.
        memorisation (`dict[str, Memorisation]`): By extractor, if there are held-out images.
        notes (`list[str]`): Warnings for the interpretation of the numbers.
        likelihood ([`Likelihood`], *optional*): Of the reference under the pipeline, if requested.
    """

    generated: str
    reference: str
    num_generated: int
    num_reference: int | None
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    class_accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    memorisation: dict[str, Memorisation] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    likelihood: Likelihood | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        memorised = {name: found.to_dict() for name, found in self.memorisation.items()}
        return {**vars(self), "memorisation": memorised, "likelihood": self.likelihood and self.likelihood.to_dict()}

    def __str__(self) -> str:
        extractors = list(dict.fromkeys(name.partition("/")[2] for name in self.metrics))
        names = list(dict.fromkeys(name.partition("/")[0] for name in self.metrics))
        count = "unknown" if self.num_reference is None else f"{self.num_reference:,}"
        lines = [f"{self.num_generated:,} images of {self.generated} against {count} of {self.reference}", ""]
        width = max(12, *(len(extractor) + 2 for extractor in extractors))
        lines.append(f"{'features':16}" + "".join(f"{extractor:>{width}}" for extractor in extractors))
        for name in names:
            values = (self.metrics.get(f"{name}/{extractor}") for extractor in extractors)
            cells = ("" if value is None else METRICS[name].format(value) for value in values)
            lines.append(f"{METRICS[name].title:16}" + "".join(f"{cell:>{width}}" for cell in cells))
        lines.append("")
        for name, (low, high) in self.intervals.items():
            metric, _, extractor = name.partition("/")
            lines.append(
                f"{METRICS[metric].title} in {extractor} features: {low:.4g} to {high:.4g} with 95 % confidence."
            )
        for extractor, accuracies in self.class_accuracy.items():
            worst = sorted(accuracies.items(), key=lambda item: item[1])[:5]
            listed = ", ".join(f"{name} {accuracy:.2f}" for name, accuracy in worst)
            lines.append(f"Lowest accuracies by {extractor}: {listed}.")
        lines += [found.finding for found in self.memorisation.values()]
        lines += [f"Note: {note}" for note in self.notes]
        lines += [] if self.likelihood is None else [str(self.likelihood)]
        return "\n".join(lines).rstrip()


def evaluate(
    generated: ImageSet,
    reference: ImageSet | FeatureSet,
    extractors: Sequence[FeatureExtractor],
    *,
    held_out: ImageSet | None = None,
    interval: bool = False,
    distance_dtype: str = "float32",
    batch_size: int = 64,
    num_workers: int = 0,
    cache_dir: Any = None,
) -> Evaluation | None:
    """All metrics of samples against real images in one or several kinds of features, computed by all processes.

    Args:
        generated ([`ImageSet`]): The samples.
        reference ([`ImageSet`] or [`FeatureSet`]): Real images, or statistics of them.
        extractors (`Sequence[FeatureExtractor]`): Compute the features. A classifier also gives the accuracy, if the
            samples have labels; it must not be the classifier that guided them.
        held_out ([`ImageSet`], *optional*): Real images that the model was not trained on. Then `reference` must be the
            training images, and memorisation is measured, too, see [`memorisation`].
        interval (`bool`, defaults to `False`): Whether to compute a confidence interval of each FID, see
            [`frechet_interval`].
        distance_dtype (`str`, defaults to `"float32"`): See [`measure`].
        batch_size (`int`, defaults to 64), num_workers (`int`, defaults to 0): See [`collect_features`].
        cache_dir (`str` or `os.PathLike`, *optional*): Where to cache features of real images, see
            [`collect_features`].

    Returns:
        [`Evaluation`]: In the main process; `None` in the others.

    Raises:
        `ValueError`: For too few images, classes that an extractor lacks, or features that are not finite.
    """
    notes = find_warnings(generated, reference, held_out)
    for extractor in extractors:
        if isinstance(reference, FeatureSet):
            check_features(reference, extractor.name, extractor.fingerprint)
    labels = {extractor.name: judged_labels(generated, extractor, notes) for extractor in extractors}
    result = None
    for extractor in extractors:
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        ours = collect_features(generated, extractor, **options)
        real: FeatureSet | None
        if isinstance(reference, ImageSet):
            real = collect_features(reference, extractor, cache_dir=cache_dir, **options)
        else:
            real = reference
        unseen = None if held_out is None else collect_features(held_out, extractor, cache_dir=cache_dir, **options)
        if ours is None or real is None:
            continue  # not the main process
        if result is None:
            name = reference.name if isinstance(reference, ImageSet) else "saved statistics"
            result = Evaluation(generated.name, name, len(generated), real.num_images, notes=notes)
        if isinstance(reference, ArrayImages) and reference.statistics and extractor.name == "inception":
            real = with_published_statistics(real, reference, notes)

        result.metrics |= measure(ours, real, labels[extractor.name], distance_dtype)
        if len(generated) <= ours.statistics.mean.size:
            notes.append(
                f"{len(generated):,} samples are fewer than the {ours.statistics.mean.size:,} features of "
                f"{extractor.name}, so that the FID is unreliable; KID is not affected."
            )
        if interval and ours.kept is not None:
            strata = balanced_labels(generated)
            strata = None if strata is None else strata[ours.kept_indices]
            result.intervals[f"fid/{extractor.name}"] = frechet_interval(ours.kept, real.statistics, strata=strata)
        if (asked := labels[extractor.name]) is not None and ours.predictions is not None:
            names = extractor.id2label or {}
            result.class_accuracy[extractor.name] = {
                names.get(label, str(label)): float((ours.predictions[asked == label] == label).mean())
                for label in np.unique(asked).tolist()
            }
        if unseen is not None:
            result.memorisation[extractor.name] = memorisation(ours, real, unseen)
    for images in (generated, reference, held_out):
        if isinstance(images, LoadedImages) and (bad := images.images.bad_files):
            notes.append(f"{len(bad)} files of {images.name} cannot be read and were replaced by others: {bad[0]} ...")
    return result


def find_warnings(generated: ImageSet, reference: ImageSet | FeatureSet, held_out: ImageSet | None = None) -> list[str]:
    """Warnings about the sets that affect the numbers, found before any computation; raises for too few images."""
    for images in (generated, reference):
        if isinstance(images, ImageSet) and len(images) < FEWEST_IMAGES:
            raise ValueError(f"{images.name} has {len(images)} images; at least {FEWEST_IMAGES} are needed.")
    notes = list(generated.notes)
    if len(generated) < PUBLISHED_NUM_IMAGES:
        notes.append(
            f"FID falls with the number of samples: compare this one, of {len(generated):,} samples, only with others "
            f"of as many; published ones use {PUBLISHED_NUM_IMAGES:,}."
        )
    if balanced_labels(generated) is not None:
        notes.append(
            "the samples are balanced over the classes: FID and KID are lower than for randomly drawn classes (KID, "
            "which is unbiased for those, can be below 0)."
        )
    if not isinstance(reference, ImageSet):
        if reference.kept is None:
            notes.append(
                "the reference is statistics without images, so that only metrics that need no images are computed."
            )
        return notes
    notes += [note for note in reference.notes if note not in notes]
    if held_out is not None:
        notes += [note for note in held_out.notes if note not in notes]  # mostly the same folder's
    if generated.channels != reference.channels:
        gray, rgb = sorted((generated, reference), key=lambda images: images.channels)
        notes.append(
            f"{gray.name} is gray and {rgb.name} is RGB; gray values are repeated, and the missing colour affects the "
            f"metrics."
        )
    if generated.labels is not None and reference.labels is not None and reference.id2label:
        names = {label: composed(name) for label, name in generated.id2label.items()}
        ours = {names.get(label, label) for label in np.unique(generated.labels).tolist()}
        theirs = sorted(reference.id2label.items())
        missing = [name for label, name in theirs if composed(name) not in ours and label not in ours]
        if missing:
            listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            notes.append(
                f"of the reference's {len(reference.id2label)} classes {len(missing)} have no sample: {listed}. This "
                f"worsens recall and FID; sample all classes, or use a reference without these."
            )
    return notes


def check_features(reference: FeatureSet, name: str, fingerprint: str) -> None:
    """Raises for features of another extractor; published statistics do not record their weights."""
    if reference.extractor != name or reference.fingerprint not in ("", fingerprint):
        raise ValueError(
            f"The reference has features of {reference.extractor} and the samples of {name}, or of other weights; "
            f"only numbers in the same features can be compared. Compute the reference's features again."
        )


def check_independent(pipeline: Any, extractor: FeatureExtractor) -> None:
    """Raises for an evaluation classifier that guides the pipeline, since guidance raises its own accuracy.

    Raises:
        `ValueError`: If the extractor has the weights of one of the pipeline's classifiers.
    """
    model = getattr(extractor, "model", None)
    for name in ("classifier", "clean_classifier"):
        guide = getattr(pipeline, name, None)
        if model is not None and guide is not None and weights_digest(model) == weights_digest(guide):
            raise ValueError(
                f"{extractor.name} is the pipeline's own {name}, which guides the samples and is therefore biased; "
                f"evaluate with a model that was trained separately."
            )


def balanced_labels(generated: ImageSet) -> np.ndarray | None:
    """The samples' labels if all classes have equally many samples; `None` otherwise."""
    if generated.labels is None:
        return None
    counts = np.unique(generated.labels, return_counts=True)[1]
    return generated.labels if counts.max() - counts.min() <= 1 else None


def judged_labels(generated: ImageSet, extractor: FeatureExtractor, notes: list[str]) -> np.ndarray | None:
    """The samples' labels as class ids of an evaluation classifier; `None`, with a note, if they do not match."""
    if generated.labels is None or extractor.id2label is None:
        return None
    wanted = set(np.unique(generated.labels).tolist())
    names = generated.id2label
    if not names and max(wanted) < len(extractor.id2label):  # ids without names, as in files of samples
        return generated.labels
    try:
        matched = match_classes(names, extractor.id2label, wanted, extractor.name)
    except ValueError as error:
        notes.append(f"no accuracy by {extractor.name}: {error}")
        return None
    return np.array([matched[label] for label in generated.labels.tolist()])


def with_published_statistics(features: FeatureSet, images: ArrayImages, notes: list[str]) -> FeatureSet:
    """The features of a published reference batch with the statistics in its file, of the whole dataset."""
    assert images.statistics is not None
    notes.append(
        f"FID uses the statistics in {images.name}, which are of its whole dataset; precision, recall and the like use "
        f"its {len(images):,} images."
    )
    statistics = images.statistics
    return replace(features, statistics=statistics["features"], spatial_statistics=statistics.get("spatial"))
