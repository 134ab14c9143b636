"""All metrics of one set of images against another, with warnings for their interpretation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ..labels import composed, match_classes
from ..loading import weights_digest
from ..messages import first_few
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
    generated: FeatureSet, reference: FeatureSet, labels: np.ndarray | None = None, distance_dtype: str = "float32"
) -> dict[str, float]:
    """The metrics of samples in the features of one extractor.

    Args:
        generated, reference ([`FeatureSet`]): Features of the samples, and of real images.
        labels (`np.ndarray` of shape `(n,)`, *optional*): The class that each sample was conditioned on, as an id among
            the extractor's classes.
        distance_dtype (`str`, defaults to `"float32"`): `"float16"` reproduces the rounding of the published
            evaluator's precision and recall, see [`precision_recall`].

    Returns:
        `dict[str, float]`: Those of [`METRICS`] whose inputs are available, as `"fid/inception"`: name / extractor.

    Raises:
        `ValueError`: If the two come from different extractors.
    """
    check_features(reference, generated.extractor, generated.fingerprint)
    compared = Compared(generated, reference, labels, distance_dtype)
    values = {name: metric.of(compared) for name, metric in METRICS.items()}
    return {f"{name}/{generated.extractor}": value for name, value in values.items() if value is not None}


@dataclass
class Evaluation:
    """The result of [`evaluate`]; `str()` is a table and the notes."""

    generated: str  # name of the samples
    reference: str  # name of the real images
    num_generated: int
    num_reference: int | None  # unknown for some statistics
    metrics: dict[str, float] = field(default_factory=dict)  # as from [`measure`]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of 95 % confidence, by metric
    class_accuracy: dict[str, dict[str, float]] = field(default_factory=dict)  # of each class, by extractor
    memorisation: dict[str, Memorisation] = field(default_factory=dict)  # by extractor, if there are held-out images
    notes: list[str] = field(default_factory=list)  # warnings for the interpretation of the numbers
    likelihood: Likelihood | None = None  # of the reference under the pipeline, if requested

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        memorised = {name: found.to_dict() for name, found in self.memorisation.items()}
        return {**vars(self), "memorisation": memorised, "likelihood": self.likelihood and asdict(self.likelihood)}

    def __str__(self) -> str:
        names, extractors = (dict.fromkeys(key.split("/", 1)[part] for key in self.metrics) for part in (0, 1))
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
            span = f"{low:.4g} to {high:.4g}"
            lines.append(f"{METRICS[metric].title} in {extractor} features: {span} with 95 % confidence.")
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
        interval (`bool`, defaults to `False`): Whether to compute a [`frechet_interval`] of each FID.
        distance_dtype (`str`, defaults to `"float32"`): See [`measure`].
        batch_size, num_workers, cache_dir: See [`collect_features`]; features of samples are not cached.

    Returns:
        [`Evaluation`]: In the main process; `None` in the others.

    Raises:
        `ValueError`: For too few images, classes that an extractor lacks, or features that are not finite.
    """
    notes = find_warnings(generated, reference, held_out)
    if isinstance(reference, FeatureSet):
        for extractor in extractors:
            check_features(reference, extractor.name, extractor.fingerprint)
    judged = {extractor.name: expected_labels(generated, extractor, notes) for extractor in extractors}
    result = None
    for extractor in extractors:
        name, labels = extractor.name, judged[extractor.name]
        collect = partial(collect_features, extractor=extractor, batch_size=batch_size, num_workers=num_workers)
        ours, real = collect(generated), collect(reference, cache_dir=cache_dir)
        unseen = None if held_out is None else collect(held_out, cache_dir=cache_dir)
        if ours is None or real is None:
            continue  # not the main process
        result = result or Evaluation(generated.name, reference.name, len(generated), real.num_images, notes=notes)
        if isinstance(reference, ArrayImages) and (published := reference.statistics) and name == "inception":
            notes.append(
                f"FID uses the statistics in {reference.name}, which are of its whole dataset; precision, recall and "
                f"the like use its {len(reference):,} images."
            )
            real = replace(real, statistics=published["features"], spatial_statistics=published.get("spatial"))
        result.metrics |= measure(ours, real, labels, distance_dtype)
        if len(generated) <= ours.statistics.mean.size:
            notes.append(
                f"{len(generated):,} samples are fewer than the {ours.statistics.mean.size:,} features of {name}, so "
                f"that the FID is unreliable; KID is not affected."
            )
        if interval and ours.kept is not None:
            strata = balanced_labels(generated)
            strata = None if strata is None else strata[ours.kept_indices]
            result.intervals[f"fid/{name}"] = frechet_interval(ours.kept, real.statistics, strata=strata)
        if labels is not None and ours.predictions is not None:
            names = extractor.id2label or {}
            result.class_accuracy[name] = {
                names.get(label, str(label)): float((ours.predictions[labels == label] == label).mean())
                for label in np.unique(labels).tolist()
            }
        if unseen is not None:
            result.memorisation[name] = memorisation(ours, real, unseen)
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
    # held-out images are mostly of the same folder
    notes = list(dict.fromkeys([*notes, *reference.notes, *(held_out.notes if held_out is not None else ())]))
    if isinstance(reference, FeatureSet):
        return notes
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
            notes.append(
                f"of the reference's {len(reference.id2label)} classes {len(missing)} have no sample: "
                f"{first_few(missing)}. This worsens recall and FID; sample all classes, or use a reference "
                f"without these."
            )
    return notes


def check_features(reference: FeatureSet, name: str, fingerprint: str) -> None:
    """Raises for features of another extractor; published statistics do not record their weights."""
    if reference.extractor != name or reference.fingerprint not in ("", fingerprint):
        raise ValueError(
            f"The reference has features of {reference.extractor} and the samples of {name}, or of other weights; "
            f"compute the reference's features again."
        )


def check_independent(pipeline: Any, extractor: FeatureExtractor) -> None:
    """Raises for an evaluation classifier with the weights of one that guides the pipeline: its accuracy is biased."""
    model = getattr(extractor, "model", None)
    for name in ("classifier", "clean_classifier"):
        guide = getattr(pipeline, name, None)
        if model is not None and guide is not None and weights_digest(model) == weights_digest(guide):
            raise ValueError(
                f"{extractor.name} is the pipeline's own {name}, which guides the samples; evaluate with a model that "
                f"was trained separately."
            )


def balanced_labels(generated: ImageSet) -> np.ndarray | None:
    """The samples' labels if all classes have equally many samples; `None` otherwise."""
    if generated.labels is None:
        return None
    counts = np.unique(generated.labels, return_counts=True)[1]
    return generated.labels if counts.max() - counts.min() <= 1 else None


def expected_labels(generated: ImageSet, extractor: FeatureExtractor, notes: list[str]) -> np.ndarray | None:
    """The class ids that an evaluation classifier should predict; `None`, with a note, if the classes do not match."""
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
