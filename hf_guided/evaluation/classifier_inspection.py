"""Inspection of a noisy-image classifier: metrics per noise level, findings, and a suggested guidance interval."""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import LabelledImages
from ..guidance.base import frozen
from ..labels import match_classes
from ..models.modes import evaluating
from ..schedulers.scheduling_adm import ADMScheduler, model_timesteps

NUM_LEVELS = 11
NUM_BINS = 15  # of confidence, as in the experiments of arXiv 1706.04599

# A difference counts from here on: by chance alone, 1 of 700 normal draws exceeds it.
STANDARD_ERRORS = 3
# With 100 images the standard error of an accuracy is 0.05, so that differences of 0.15 between levels are visible.
FEWEST_HELD_OUT = 100
# Ten images can only show whether a class is recognised at all.
FEWEST_HELD_OUT_PER_CLASS = 10
# On digits 50 per class gave the accuracy of 150; with 20 it fell by 0.03, and with 5 by 0.10.
FEWEST_TRAINING_PER_CLASS = 50
# A class counts as collapsed if its recall is less than half that of the others, and if a class with the recall of the
# others would score so low with at most this probability, corrected for the number of classes (Bonferroni).
COLLAPSED_RECALL = 0.5
COLLAPSED_PROBABILITY = 0.01
# Training accuracy minus held-out accuracy. Digits trained by the recipe have 0.03.
MEMORISED_GAP = 0.1
# Confidence minus accuracy. Digits trained by the recipe have 0.04, with 5 images per class 0.16. It matters where it
# makes the gradient vanish, which is proportional to 1 - p.
OVERCONFIDENCE, HIGH_CONFIDENCE = 0.1, 0.5
# Confidence minus accuracy on pure noise. Trained on noisy digits at most 0.08, on clean ones 0.7.
CONFIDENT_ON_NOISE = 0.2
# The least fraction of the labels' entropy that a classifier must predict at its best noise level. Digits trained by
# the recipe have 0.98, with 5 images per class 0.73, after 40 steps 0.32, and with shuffled labels 0.01.
LEAST_INFORMATION = 0.5
# Nats by which log p(y | x_t) rises along its gradient within one standard deviation of the noise. Digits have up to
# 1.5, with shuffled labels 0.13.
LEAST_GRADIENT = 0.05
# Above this the noise is weaker than an image whose pixels have variance 1, so that the class is still visible.
IMAGE_OUTWEIGHS_NOISE = 0.5  # alpha_bar
# The interval reaches up to the timestep where the classifier has the first fraction of its best information, and down
# to where it has the second. For two runs on digits with 10 steps that is about 150 to 700, 6 of 10 calls: with a
# class-conditional UNet the FID is as with all calls (0.21 and 0.29 against 0.22 and 0.29, each at its best scale);
# with an unconditional UNet it is 0.56 and 0.86 against 0.51 and 0.55. Up to 600, where half of the information is
# left, it would be 1.18 and 1.47.
INFORMATION_ABOVE, INFORMATION_BELOW = 0.25, 0.99


@dataclass(frozen=True)
class NoiseLevel:
    """Metrics of a classifier at one timestep, all on held-out images but `train_accuracy`.

    Attributes:
        timestep (`int`): The timestep of the training schedule; 0 is the least noisy.
        alpha_bar (`float`): The fraction of the image's variance that is left in \\(x_t\\).
        accuracy (`float`): Fraction of images that are classified correctly.
        train_accuracy (`float`, *optional*): The accuracy on training images.
        confidence (`float`): Mean probability of the predicted class.
        calibration_error (`float`): Expected calibration error, arXiv 1706.04599 equation 3, over 15 equally wide bins.
        cross_entropy (`float`): Mean of -log p(y | x_t), in nats.
        information (`float`): The entropy of the labels minus the cross entropy, in nats: a lower bound of the mutual
            information of class and image (Barber & Agakov 2003).
        gradient_norm (`float`): Root mean square over images of the norm of d log p(y | x_t) / d x_t.
        epsilon_shift (`float`): The norm of what guidance of scale 1 adds to epsilon (arXiv 2105.05233, Algorithm 2),
            sqrt(1 - alpha_bar) times the gradient, relative to the norm of epsilon, the root of the number of pixel
            values.
        broken_images (`int`): Images with a logit or gradient that is not finite; they count as wrong in the accuracy
            and not at all in the others.
    """

    timestep: int
    alpha_bar: float
    accuracy: float
    train_accuracy: float | None
    confidence: float
    calibration_error: float
    cross_entropy: float
    information: float
    gradient_norm: float
    epsilon_shift: float
    broken_images: int


@dataclass(frozen=True)
class ClassifierInspection:
    """The result of [`inspect_classifier`]; `str()` is a table and the findings.

    Attributes:
        rows (`list[NoiseLevel]`): By timestep, the least noisy first.
        confusion (`np.ndarray` of shape `(classes, classes)`): Numbers of held-out images at the first timestep, by
            true class (row) and predicted class (column).
        class_names (`list[str]`): The names of the classes by id.
        num_images, num_train_images (`int`): Images measured.
        num_held_out, num_training (`int`): Images available.
        num_values (`int`): Pixels of an image times its channels.
    """

    rows: list[NoiseLevel]
    confusion: np.ndarray
    class_names: list[str]
    num_images: int
    num_train_images: int
    num_held_out: int
    num_training: int
    num_values: int

    @property
    def chance(self) -> float:
        """The accuracy of always predicting the most frequent class."""
        return float(self.confusion.sum(axis=1).max() / self.num_images)

    @property
    def label_entropy(self) -> float:
        """The entropy of the held-out labels in nats, log K for K equally frequent classes."""
        return label_entropy(self.confusion.sum(axis=1))

    @property
    def last_signal(self) -> int | None:
        """Index of the last row whose accuracy is above chance by more than 3 standard errors."""
        bound = self.chance + STANDARD_ERRORS * self.standard_error(self.chance)
        above = [i for i, row in enumerate(self.rows) if row.accuracy > bound]
        return above[-1] if above else None

    @property
    def interval(self) -> tuple[int, int] | None:
        """A suggestion for `ClassifierGuidance(scale, interval=...)`, from the information at each level.

        At the upper end a quarter of the classifier's best information is left; above it the gradient depends more on
        the noise than on the class. At the lower end 99 % are reached: the class is decided. `None` for a classifier
        that should not guide.
        """
        if (
            self._is_broken
            or self.last_signal is None
            or self._has_too_little_information
            or self._is_confident_on_noise
        ):
            return None
        low, high = (self._last_with(part * self._best.information) for part in (INFORMATION_BELOW, INFORMATION_ABOVE))
        return round(low), round(min(high, self.rows[self.last_signal].timestep))

    @property
    def findings(self) -> list[str]:
        """Sentences with their numbers: the faults, or that there are none; what is uncertain; where to guide."""
        faults = self._faults()
        return [*(faults or [self._no_faults()]), *self._caveats(), self._advice()]

    def standard_error(self, accuracy: float, num_images: int | None = None) -> float:
        """The standard error of an accuracy on `num_images` images, by default the held-out ones."""
        return math.sqrt(accuracy * (1 - accuracy) / (num_images or self.num_images))

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file. The confusion is a list of `[true class, predicted class, images]` without zeros."""
        rows = [{name: _or_none(value) for name, value in asdict(row).items()} for row in self.rows]
        confusion = [[*pair, int(self.confusion[tuple(pair)])] for pair in np.argwhere(self.confusion).tolist()]
        return {
            "num_images": self.num_images,
            "num_train_images": self.num_train_images,
            "chance": self.chance,
            "label_entropy": self.label_entropy,
            "interval": self.interval and list(self.interval),
            "findings": self.findings,
            "rows": rows,
            "class_names": self.class_names,
            "confusion": confusion,
        }

    def table(self) -> list[list[str]]:
        """The rows as text, after a row of headings."""
        columns = {
            "timestep": "d", "accuracy": ".3f", "train_accuracy": ".3f", "confidence": ".3f",
            "calibration_error": ".3f", "cross_entropy": ".3f", "gradient_norm": ".3g", "epsilon_shift": ".2%",
        }  # fmt: skip
        if self.num_train_images == 0:
            del columns["train_accuracy"]
        lines = [[f"{getattr(row, name):{style}}" for name, style in columns.items()] for row in self.rows]
        return [[name.replace("_", " ") for name in columns], *lines]

    def __str__(self) -> str:
        table = self.table()
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([*aligned, "", *(f"- {finding}" for finding in self.findings)])

    @property
    def _best(self) -> NoiseLevel:
        return max(self.rows, key=lambda row: row.information)

    @property
    def _is_broken(self) -> bool:
        return any(row.broken_images for row in self.rows)

    @property
    def _has_too_little_information(self) -> bool:
        return self._best.information < LEAST_INFORMATION * self.label_entropy

    @property
    def _is_confident_on_noise(self) -> bool:
        last = self.rows[-1]
        has_no_signal = self.last_signal != len(self.rows) - 1
        return has_no_signal and last.confidence - last.accuracy > CONFIDENT_ON_NOISE

    def _last_with(self, information: float) -> float:
        """The last timestep at which the classifier has this much information, linearly interpolated between rows."""
        i = max(i for i, row in enumerate(self.rows) if row.information >= information)
        if i == len(self.rows) - 1:
            return self.rows[i].timestep
        here, after = self.rows[i], self.rows[i + 1]
        part = (here.information - information) / (here.information - after.information)
        return here.timestep + part * (after.timestep - here.timestep)

    def _faults(self) -> list[str]:
        """The faults, in sentences with their numbers and fixes."""
        faults = []
        first, last, num_classes = self.rows[0], self.rows[-1], len(self.class_names)
        if self.num_training and self.num_training < FEWEST_TRAINING_PER_CLASS * num_classes:
            faults.append(
                f"Too little training data: {self.num_training:,} images are {self.num_training / num_classes:.3g} per "
                f"class; digits needed {FEWEST_TRAINING_PER_CLASS}. Train on more images, or with augmentation "
                f"(--random_flip, --random_crop)."
            )
        if self._is_broken:
            worst = max(self.rows, key=lambda row: row.broken_images)
            faults.append(
                f"Not finite: for {worst.broken_images} of {self.num_images} images, logits or gradients are infinite "
                f"or NaN at timestep {worst.timestep}, where guidance would fail. Load the classifier in float32, "
                f"or train it again with a lower learning rate; then inspect it again."
            )
            return faults
        faults += self._memorised()
        if self.last_signal is None:
            likeliest = int(self.confusion.sum(axis=0).argmax())
            share = self.confusion[:, likeliest].sum() / self.num_images
            faults.append(
                f"No signal at any timestep: accuracy is {first.accuracy:.2f} at timestep {first.timestep} "
                f"(chance {self.chance:.2f}), and {share:.0%} of the images are classified as "
                f"{self.class_names[likeliest]!r}. It cannot guide: check the labels, and train longer."
            )
            return faults
        if self._has_too_little_information:
            faults.append(
                f"Little information about the class: at best, at timestep {self._best.timestep}, "
                f"{max(self._best.information, 0):.2f} of {self.label_entropy:.2f} nats (accuracy "
                f"{self._best.accuracy:.2f}, chance {self.chance:.2f}). Train longer, and check the labels."
            )
        faults += self._collapsed_classes()
        if self._is_confident_on_noise:
            faults.append(
                f"Confident on pure noise: at timestep {last.timestep} its confidence is {last.confidence:.2f} and its "
                f"accuracy {last.accuracy:.2f}, as of a classifier of clean images. Its gradient is misleading there; "
                f"train it on noisy images (train_classifier.py --noisy), or use it with DenoisedClassifierGuidance."
            )
        else:
            faults += self._overconfidence()
        strongest = max(self.rows, key=lambda row: row.epsilon_shift)
        nats = strongest.epsilon_shift * math.sqrt(self.num_values)
        if nats < LEAST_GRADIENT:
            faults.append(
                f"Gradients vanish: along the largest, at timestep {strongest.timestep}, log p rises by {nats:.1g} "
                f"nats within one standard deviation of the noise, and guidance of scale 1 changes epsilon by "
                f"{strongest.epsilon_shift:.1g} of its norm. Such a gradient has no effect; train longer."
            )
        lost = self.rows[min(self.last_signal + 1, len(self.rows) - 1)]
        if lost.timestep > self.rows[self.last_signal].timestep and lost.alpha_bar > IMAGE_OUTWEIGHS_NOISE:
            faults.append(
                f"Early loss of signal: accuracy is {lost.accuracy:.2f} at timestep {lost.timestep} (chance "
                f"{self.chance:.2f}), where the noise is still weaker than the image (alpha_bar {lost.alpha_bar:.2f}). "
                f"Train it longer, make it larger, and train on noisy images (train_classifier.py --noisy)."
            )
        return faults

    def _memorised(self) -> list[str]:
        pairs = [(row, row.train_accuracy) for row in self.rows if row.train_accuracy is not None]
        if not pairs:
            return []
        row, train_accuracy = max(pairs, key=lambda pair: pair[1] - pair[0].accuracy)
        error = math.hypot(
            self.standard_error(row.accuracy), self.standard_error(train_accuracy, self.num_train_images)
        )
        if train_accuracy - row.accuracy <= max(MEMORISED_GAP, STANDARD_ERRORS * error):
            return []
        return [
            f"Overfitting: at timestep {row.timestep} the accuracy is {train_accuracy:.2f} on training images and "
            f"{row.accuracy:.2f} on held-out ones. Samples are new images, so that the lower number counts. Train for "
            f"fewer steps, with dropout and weight decay, or on more images (--random_flip, --random_crop)."
        ]

    def _overconfidence(self) -> list[str]:
        sure = [row for row in self.rows if row.confidence > HIGH_CONFIDENCE]
        if not sure:
            return []
        row = max(sure, key=lambda row: row.confidence - row.accuracy)
        if row.confidence - row.accuracy <= max(OVERCONFIDENCE, STANDARD_ERRORS * self.standard_error(row.accuracy)):
            return []
        return [
            f"Overconfident: at timestep {row.timestep} its confidence is {row.confidence:.2f} and its accuracy "
            f"{row.accuracy:.2f} (calibration error {row.calibration_error:.2f}). Its gradient vanishes for images "
            f"that it classifies too confidently. Train with dropout and weight decay, for fewer steps or on more "
            f"images, or guide with entropy_scaling=EntropyScaling(), which rescales the gradient."
        ]

    def _collapsed_classes(self) -> list[str]:
        counts, found = self.confusion.sum(axis=1), self.confusion.diagonal()
        collapsed = []
        for label in np.flatnonzero(counts).tolist():
            others = (found.sum() - found[label] + 1) / (counts.sum() - counts[label] + 2)  # rule of succession
            by_chance = len(counts) * _binomial_tail(int(found[label]), int(counts[label]), float(others))
            is_rare = found[label] < COLLAPSED_RECALL * others * counts[label]
            if is_rare and by_chance < COLLAPSED_PROBABILITY:
                mistakes = self.confusion[label] * (np.arange(len(counts)) != label)
                collapsed.append(
                    f"{self.class_names[label]!r} is recognised in {found[label]} of its {counts[label]} images (the "
                    f"others in {others:.0%}), mostly confused with {self.class_names[int(mistakes.argmax())]!r}"
                    + (" and never predicted" if self.confusion[:, label].sum() == 0 else "")
                )
        if not collapsed:
            return []
        more = f"; and {len(collapsed) - 3} more" if len(collapsed) > 3 else ""
        return [
            f"Collapsed class{'es' if len(collapsed) > 1 else ''} at timestep {self.rows[0].timestep}: "
            f"{'; '.join(collapsed[:3])}{more}. Guidance towards such a class fails; check that its training "
            f"images exist, are labelled correctly, and are as many as those of the other classes."
        ]

    def _no_faults(self) -> str:
        first = self.rows[0]
        train = f" ({first.train_accuracy:.2f} on training images)" if first.train_accuracy is not None else ""
        return (
            f"No known fault was found: at timestep {first.timestep} the accuracy is {first.accuracy:.2f} on held-out "
            f"images{train}, chance is {self.chance:.2f}, and the calibration error is at most "
            f"{max(row.calibration_error for row in self.rows):.2f}."
        )

    def _caveats(self) -> list[str]:
        """The limits of the measurement, and the timestep where the signal ends, as it does for every classifier."""
        caveats = []
        counts = self.confusion.sum(axis=1)
        fewest = int(counts.argmin())
        if self.num_images < FEWEST_HELD_OUT or counts[fewest] < FEWEST_HELD_OUT_PER_CLASS:
            is_part = self.num_images < self.num_held_out
            fix = f"measure more of the {self.num_held_out:,} (--num_images)" if is_part else "hold out more images"
            caveats.append(
                f"Too little held-out data: with {self.num_images:,} images the standard error of an accuracy is up to "
                f"{0.5 / math.sqrt(self.num_images):.2f}, and {counts[fewest]} of "
                f"{self.class_names[fewest]!r} say little about that class; {fix}."
            )
        if self.last_signal is not None and self.last_signal < len(self.rows) - 1:
            last, lost = self.rows[self.last_signal], self.rows[self.last_signal + 1]
            caveats.append(
                f"No signal above timestep {last.timestep}: accuracy is {last.accuracy:.2f} there and "
                f"{lost.accuracy:.2f} at {lost.timestep}; chance is {self.chance:.2f} ± "
                f"{STANDARD_ERRORS * self.standard_error(self.chance):.2f}. Guidance there adds noise."
            )
        return caveats

    def _advice(self) -> str:
        if self.interval is None:
            return "No interval is suggested for a classifier with these faults."
        low, high = self.interval
        return (
            f"Suggested: ClassifierGuidance(scale, interval=({low}, {high})). Its best information about the "
            f"class is {self._best.information:.2f} of {self.label_entropy:.2f} nats. It has {INFORMATION_ABOVE:.0%} "
            f"of that or more up to timestep {high}, and gains less than {1 - INFORMATION_BELOW:.0%} below {low}. This "
            f"is a suggestion: compare with guidance at all timesteps."
        )


def inspect_classifier(
    classifier: PreTrainedModel,
    held_out: Any,
    train: Any | None = None,
    *,
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    max_images: int = 2000,
) -> ClassifierInspection:
    r"""The metrics of a noisy-image classifier, \\(p(y | x_t)\\), on images noised by the schedule of its config.

    Args:
        classifier ([`ADMForImageClassification`] or one called like it): It is not changed.
        held_out ([`LabelledImages`] or a `Dataset`): Images that it was not trained on, used without augmentation.
            Items are `{"pixel_values", "labels"}` or pairs of these: an image `(channels, height, width)`
            in [-1, 1] and the id of its class.
        train (the same, *optional*): Its training images, to detect overfitting; as many are drawn.
        timesteps (`Sequence[int]`, *optional*): Timesteps, two or more; by default 11, evenly spaced from 0 to the
            last.
        seed (`int`, defaults to 0): Seed of the noise, which depends only on it and on the image's index: it is the
            same at every noise level and for every batch size.
        batch_size (`int`, defaults to 256): Images at once; it only changes speed and memory.
        max_images (`int`, defaults to 2000): If there are more images, a fixed random subset of this size is used.

    Returns:
        [`ClassifierInspection`]

    Raises:
        `ValueError`: For a classifier that takes no timestep; for timesteps outside its schedule; for images of another
            size, labels that it does not have, or images of a single class.
    """
    scheduler = noise_schedule(classifier)
    total = scheduler.config.num_train_timesteps
    if timesteps is None:
        timesteps = np.linspace(0, total - 1, min(NUM_LEVELS, total)).round().astype(int).tolist()
    levels = sorted({int(timestep) for timestep in timesteps})
    if len(levels) < 2 or levels[0] < 0 or levels[-1] >= total:
        raise ValueError(f"timesteps={list(timesteps)} must be two or more from 0 to {total - 1}.")
    if batch_size < 1 or max_images < 1:
        raise ValueError(f"batch_size and max_images must be 1 or more, got {batch_size} and {max_images}.")

    shared = (classifier, scheduler, levels, seed, batch_size)
    measured = _measure(held_out, *shared, max_images, with_gradient=True)
    num_images = len(measured.labels)
    trained = None if train is None else _measure(train, *shared, num_images, with_gradient=False)

    num_classes = classifier.config.num_labels
    entropy = label_entropy(np.bincount(measured.labels))
    if entropy == 0:
        raise ValueError("The held-out images are all of one class; give images of two or more.")
    rows = []
    for i, timestep in enumerate(levels):
        alpha_bar = float(scheduler.alphas_cumprod[timestep])
        is_right = measured.predictions[i] == measured.labels
        whole = np.isfinite(measured.cross_entropy[i]) & np.isfinite(measured.gradient_norm[i])
        confidence = measured.confidence[i][whole]
        cross_entropy = _mean(measured.cross_entropy[i][whole])
        gradient_norm = math.sqrt(_mean(measured.gradient_norm[i][whole] ** 2))
        rows.append(
            NoiseLevel(
                timestep=timestep,
                alpha_bar=alpha_bar,
                accuracy=_mean(is_right & whole),
                train_accuracy=None if trained is None else _mean(trained.predictions[i] == trained.labels),
                confidence=_mean(confidence),
                calibration_error=expected_calibration_error(confidence, is_right[whole]),
                cross_entropy=cross_entropy,
                information=entropy - cross_entropy,
                gradient_norm=gradient_norm,
                epsilon_shift=math.sqrt((1 - alpha_bar) / measured.num_values) * gradient_norm,
                broken_images=int((~whole).sum()),
            )
        )
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (measured.labels, measured.predictions[0]), 1)
    return ClassifierInspection(
        rows=rows,
        confusion=confusion,
        class_names=[str(classifier.config.id2label[label]) for label in range(num_classes)],
        num_images=num_images,
        num_train_images=0 if trained is None else len(trained.labels),
        num_held_out=len(held_out),
        num_training=0 if train is None else len(train),
        num_values=measured.num_values,
    )


def noise_schedule(classifier: PreTrainedModel) -> ADMScheduler:
    """The noise scheduler that a classifier was trained with.

    Raises:
        `ValueError`: If it is a classifier of clean images.
    """
    model = getattr(classifier, "_orig_mod", classifier)  # of torch.compile
    if "timestep" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no timestep: it is a classifier of clean images, without noise levels to "
            f"inspect. Give a noisy-image classifier, such as training/train_classifier.py trains."
        )
    names = ("beta_schedule", "num_train_timesteps", "trained_betas", "rescale_timesteps")
    return ADMScheduler(**{name: getattr(classifier.config, name) for name in names})


def with_classes_of(classifier: PreTrainedModel, images: LabelledImages) -> LabelledImages:
    """The same images with the classifier's class ids, matched by the names of the classes.

    Raises:
        `ValueError`: For a class that the classifier does not know.
    """
    names = {int(label): name for label, name in classifier.config.id2label.items()}
    matched = match_classes(images.id2label, names, set(images.id2label), type(classifier).__name__)
    images = copy.copy(images)
    images.labels = np.array([matched[label] for label in _labels_of(images).tolist()])
    images.id2label = names
    return images


def expected_calibration_error(confidence: np.ndarray, is_right: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equations 2 and 3).

    Args:
        confidence (`np.ndarray` of shape `(n,)`): The probability of each predicted class.
        is_right (`np.ndarray` of shape `(n,)`): Whether the prediction is correct.
        num_bins (`int`, defaults to 15): Bins of equal width, open at their lower end.

    Returns:
        `float`: The mean over images of the absolute difference of accuracy and confidence in their bin.
    """
    bins = np.ceil(confidence * num_bins).astype(int)
    gaps = np.bincount(bins, weights=is_right - confidence, minlength=num_bins + 1)
    return float(np.abs(gaps).sum() / len(confidence)) if len(confidence) else math.nan


def label_entropy(counts: np.ndarray) -> float:
    """The entropy in nats of classes with these counts."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@dataclass
class _Measured:
    """The label of each image, `(n,)`, and the classifier's outputs at each noise level, `(levels, n)`."""

    labels: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    cross_entropy: np.ndarray
    gradient_norm: np.ndarray
    num_values: int


def _measure(
    images: Any,
    classifier: PreTrainedModel,
    scheduler: ADMScheduler,
    levels: Sequence[int],
    seed: int,
    batch_size: int,
    max_images: int,
    with_gradient: bool,
) -> _Measured:
    labels, outputs = [], []
    with evaluating(classifier), frozen(classifier), torch.set_grad_enabled(with_gradient):
        for indices, clean, of_batch in _batches(images, batch_size, max_images):
            _check(clean, of_batch, classifier)
            noise = torch.stack([_noise(seed, index, clean.shape[1:]) for index in indices])
            device = classifier.device
            batch = (clean.to(device, torch.float32), noise.to(device), of_batch.to(device))
            at_levels = [_classify(classifier, scheduler, batch, level, with_gradient) for level in levels]
            labels.append(of_batch)
            outputs.append(torch.stack(at_levels, dim=1))
    predictions, confidence, cross_entropy, gradient_norm = torch.cat(outputs, dim=2).numpy()
    return _Measured(
        labels=torch.cat(labels).numpy(),
        predictions=predictions.astype(np.int64),
        confidence=confidence,
        cross_entropy=cross_entropy,
        gradient_norm=gradient_norm,
        num_values=clean[0].numel(),
    )


def _classify(
    classifier: PreTrainedModel,
    scheduler: ADMScheduler,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    timestep: int,
    with_gradient: bool,
) -> torch.Tensor:
    """Prediction, confidence, cross entropy and norm of the gradient of each image, `(4, batch)` in float64."""
    clean, noise, labels = batch
    timesteps = torch.full((len(clean),), timestep, device=clean.device)
    noisy = scheduler.add_noise(clean, noise, timesteps).requires_grad_(with_gradient)
    logits = classifier(noisy.to(classifier.dtype), model_timesteps(scheduler, timesteps)).logits.float()
    log_p = logits.log_softmax(dim=-1)  # in float32, as in guidance
    of_label = log_p.gather(1, labels[:, None])[:, 0]
    norm = torch.full_like(of_label, torch.nan)
    if with_gradient:
        (gradient,) = torch.autograd.grad(of_label.sum(), noisy)
        norm = gradient.flatten(1).norm(dim=1)
    best, prediction = log_p.detach().max(dim=-1)
    return torch.stack([prediction.double(), best.double().exp(), -of_label.detach().double(), norm.double()]).cpu()


def _batches(images: Any, batch_size: int, max_images: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Indices, images and labels of up to `max_images`."""
    if isinstance(images, LabelledImages):
        _labels_of(images)
        images = images.plain()
    if len(images) == 0:
        raise ValueError("There are no images to inspect the classifier on.")
    indices = np.arange(len(images))
    if len(images) > max_images:
        indices = np.sort(np.random.default_rng(0).choice(len(images), max_images, replace=False))
    parts = [part.tolist() for part in torch.from_numpy(indices).split(batch_size)]
    # Without a generator of its own, a loader draws from the global one.
    loader = DataLoader(images, batch_sampler=parts, generator=torch.Generator())
    progress = tqdm(loader, desc="inspecting", unit="batch", leave=False)
    for part, batch in zip(parts, progress, strict=True):
        pixel_values, labels = (batch["pixel_values"], batch["labels"]) if isinstance(batch, dict) else batch
        yield part, pixel_values, labels


def _labels_of(images: LabelledImages) -> np.ndarray:
    if images.labels is None:
        raise ValueError(f"{images.name!r} has no labels; a classifier is inspected on labelled images.")
    return images.labels


def _noise(seed: int, index: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng((seed, index)).standard_normal(tuple(shape), dtype=np.float32))


def _check(images: torch.Tensor, labels: torch.Tensor, classifier: PreTrainedModel) -> None:
    """Raises for images and labels that do not fit the classifier."""
    channels, num_classes = classifier.config.in_channels, classifier.config.num_labels
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise ValueError(
            f"The classifier takes floating-point images of {channels} channels, batches of shape (n, {channels}, "
            f"height, width); got {images.dtype} of shape {tuple(images.shape)}."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise ValueError(f"An image has the label {wrong}; the classifier's classes are 0 to {num_classes - 1}.")


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _or_none(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _binomial_tail(successes: int, trials: int, probability: float) -> float:
    """The probability of at most this many successes, from logarithms, since the factors overflow floats."""
    logs = [
        math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1)
        + i * math.log(probability) + (trials - i) * math.log1p(-probability)
        for i in range(successes + 1)
    ]  # fmt: skip
    return min(1.0, sum(math.exp(log) for log in logs))
