"""What the numbers of an inspected classifier say: its faults, what is uncertain, and where to guide.

The code decides what is said; the words stand in `templates/`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

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
_PREVENT_GUIDANCE = {"not_finite", "no_signal", "little_information", "confident_on_noise"}

_TEMPLATES = Environment(loader=PackageLoader("hf_guided.evaluation"), trim_blocks=True, undefined=StrictUndefined)
_TEMPLATES.filters |= {"number": format, "repr": repr}
_say: Any = _TEMPLATES.get_template("inspection.jinja").module


@dataclass(frozen=True)
class NoiseLevel:
    """Metrics of a classifier at one timestep, all on held-out images but `train_accuracy`."""

    timestep: int  # of the training schedule; 0 is the least noisy
    alpha_bar: float  # the fraction of the image's variance that is left in x_t
    accuracy: float
    train_accuracy: float | None
    confidence: float  # mean probability of the predicted class
    calibration_error: float  # see `expected_calibration_error`
    cross_entropy: float  # mean of -log p(y | x_t), in nats
    # Entropy of the labels minus cross entropy, in nats: a lower bound of the mutual information of class and image
    # (Barber & Agakov 2003).
    information: float
    gradient_norm: float  # root mean square over images of the norm of d log p(y | x_t) / d x_t
    # The norm of what guidance of scale 1 adds to epsilon (arXiv 2105.05233, Algorithm 2), sqrt(1 - alpha_bar) times
    # the gradient, relative to the norm of epsilon, the root of the number of pixel values.
    epsilon_shift: float
    broken_images: int  # with a logit or gradient that is not finite; wrong in the accuracy, left out of the others

    @property
    def overfitting(self) -> float:
        """Training accuracy minus held-out accuracy; 0 if the former is unknown."""
        return 0.0 if self.train_accuracy is None else self.train_accuracy - self.accuracy

    @property
    def overconfidence(self) -> float:
        """Confidence minus accuracy."""
        return self.confidence - self.accuracy


@dataclass(frozen=True)
class ClassifierInspection:
    """The result of [`inspect_classifier`]; `str()` is a table and the findings."""

    rows: list[NoiseLevel]  # by timestep, the least noisy first
    confusion: np.ndarray  # (classes, classes): held-out images at the first timestep by true and predicted class
    class_names: list[str]  # by id
    num_images: int  # held-out images measured
    num_train_images: int  # training images measured
    num_held_out: int  # held-out images available
    num_training: int  # training images available
    num_values: int  # pixels of an image times its channels

    @property
    def chance(self) -> float:
        """The accuracy of always predicting the most frequent class."""
        return float(self.confusion.sum(axis=1).max() / self.num_images)

    @property
    def label_entropy(self) -> float:
        """The entropy of the held-out labels in nats, log K for K equally frequent classes."""
        return label_entropy(self.confusion.sum(axis=1))

    @property
    def best(self) -> NoiseLevel:
        """The level with the most information about the class."""
        return max(self.rows, key=lambda row: row.information)

    @property
    def last_signal(self) -> int | None:
        """Index of the last row whose accuracy is above chance by more than 3 standard errors."""
        bound = self.chance + STANDARD_ERRORS * self.standard_error(self.chance)
        return max((i for i, row in enumerate(self.rows) if row.accuracy > bound), default=None)

    @property
    def interval(self) -> tuple[int, int] | None:
        """A suggestion for `ClassifierGuidance(scale, interval=...)`, from the information at each level.

        At the upper end a quarter of the classifier's best information is left; above it the gradient depends more on
        the noise than on the class. At the lower end 99 % are reached: the class is decided. `None` for a classifier
        that should not guide.
        """
        if self.last_signal is None or self.faults.keys() & _PREVENT_GUIDANCE:
            return None
        low, high = (self._last_with(part * self.best.information) for part in (INFORMATION_BELOW, INFORMATION_ABOVE))
        return round(low), round(min(high, self.rows[self.last_signal].timestep))

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong, by name, with its numbers and the fix; without what an earlier fault makes meaningless."""
        faults: dict[str, str] = {}

        def check(name: str, is_found: bool, **numbers: Any) -> bool:
            if is_found:
                faults[name] = getattr(_say, name)(self, **numbers)
            return is_found

        first, last = self.rows[0], self.rows[-1]
        per_class = self.num_training / len(self.class_names)
        is_little = 0 < per_class < FEWEST_TRAINING_PER_CLASS
        check("too_little_training_data", is_little, per_class=per_class, needed=FEWEST_TRAINING_PER_CLASS)

        row = max(self.rows, key=lambda row: row.broken_images)
        if check("not_finite", row.broken_images > 0, row=row):
            return faults

        row = max(self.rows, key=lambda row: row.overfitting)
        training_error = self.standard_error(row.train_accuracy or 0, self.num_train_images)
        error = math.hypot(self.standard_error(row.accuracy), training_error)
        check("overfitting", row.overfitting > max(MEMORISED_GAP, STANDARD_ERRORS * error), row=row)

        if self.last_signal is None:
            predicted = self.confusion.sum(axis=0)
            likeliest, share = self.class_names[int(predicted.argmax())], predicted.max() / self.num_images
            check("no_signal", True, row=first, likeliest=likeliest, share=share)
            return faults

        is_little = self.best.information < LEAST_INFORMATION * self.label_entropy
        check("little_information", is_little, row=self.best)

        collapsed = self._collapsed_classes()
        check("collapsed_classes", bool(collapsed), classes=collapsed)

        is_noise = self.last_signal < len(self.rows) - 1
        if not check("confident_on_noise", is_noise and last.overconfidence > CONFIDENT_ON_NOISE, row=last):
            row = max(self.rows, key=lambda row: (row.confidence > HIGH_CONFIDENCE, row.overconfidence))
            gap = max(OVERCONFIDENCE, STANDARD_ERRORS * self.standard_error(row.accuracy))
            check("overconfident", row.confidence > HIGH_CONFIDENCE and row.overconfidence > gap, row=row)

        row = max(self.rows, key=lambda row: row.epsilon_shift)
        nats = row.epsilon_shift * math.sqrt(self.num_values)
        check("vanishing_gradients", nats < LEAST_GRADIENT, row=row, nats=nats)

        row = self.rows[self.last_signal + 1] if is_noise else last
        check("early_loss_of_signal", is_noise and row.alpha_bar > IMAGE_OUTWEIGHS_NOISE, row=row)
        return faults

    @property
    def findings(self) -> list[str]:
        """Sentences with their numbers: the faults, or that there are none; what is uncertain; where to guide."""
        found = list(self.faults.values())
        if not found:
            found = [_say.no_faults(self, self.rows[0], max(row.calibration_error for row in self.rows))]
        counts = self.confusion.sum(axis=1)
        if self.num_images < FEWEST_HELD_OUT or counts.min() < FEWEST_HELD_OUT_PER_CLASS:
            error, rarest = 0.5 / math.sqrt(self.num_images), self.class_names[int(counts.argmin())]
            found.append(_say.too_little_held_out_data(self, error, rarest, counts.min()))
        if self.last_signal is not None and self.last_signal < len(self.rows) - 1:
            rows = self.rows[self.last_signal : self.last_signal + 2]
            found.append(_say.no_signal_above(self, *rows, STANDARD_ERRORS * self.standard_error(self.chance)))
        if self.interval is None:
            return [*found, _say.no_interval()]
        parts = INFORMATION_ABOVE, 1 - INFORMATION_BELOW
        return [*found, _say.suggested_interval(self, *self.interval, self.best, *parts)]

    def standard_error(self, accuracy: float, num_images: int | None = None) -> float:
        """The standard error of an accuracy on `num_images` images, by default the held-out ones."""
        return math.sqrt(accuracy * (1 - accuracy) / (num_images or self.num_images))

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file. The confusion is a list of `[true class, predicted class, images]` without zeros."""
        return {
            "num_images": self.num_images,
            "num_train_images": self.num_train_images,
            "chance": self.chance,
            "label_entropy": self.label_entropy,
            "interval": self.interval and list(self.interval),
            "findings": self.findings,
            "rows": [  # JSON has no NaN
                {name: value if value is None or math.isfinite(value) else None for name, value in vars(row).items()}
                for row in self.rows
            ],
            "class_names": self.class_names,
            "confusion": [[i, j, int(self.confusion[i, j])] for i, j in np.argwhere(self.confusion).tolist()],
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
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([*aligned, "", *(f"- {finding}" for finding in self.findings)])

    def _last_with(self, information: float) -> float:
        """The last timestep at which the classifier has this much information, linearly interpolated between rows."""
        i = max(i for i, row in enumerate(self.rows) if row.information >= information)
        if i == len(self.rows) - 1:
            return self.rows[i].timestep
        here, after = self.rows[i], self.rows[i + 1]
        part = (here.information - information) / (here.information - after.information)
        return here.timestep + part * (after.timestep - here.timestep)

    def _collapsed_classes(self) -> list[dict[str, Any]]:
        """The classes that are recognised far less often than the others, with their numbers."""
        counts, found = self.confusion.sum(axis=1), self.confusion.diagonal()
        collapsed = []
        for label in np.flatnonzero(counts).tolist():
            others = (found.sum() - found[label] + 1) / (counts.sum() - counts[label] + 2)  # rule of succession
            by_chance = len(counts) * _binomial_tail(int(found[label]), int(counts[label]), float(others))
            is_rare = found[label] < COLLAPSED_RECALL * others * counts[label]
            if is_rare and by_chance < COLLAPSED_PROBABILITY:
                mistakes = self.confusion[label] * (np.arange(len(counts)) != label)
                collapsed.append({
                    "name": self.class_names[label],
                    "found": found[label],
                    "images": counts[label],
                    "others": others,
                    "confused_with": self.class_names[int(mistakes.argmax())],
                    "never_predicted": self.confusion[:, label].sum() == 0,
                })  # fmt: skip
        return collapsed


def label_entropy(counts: np.ndarray) -> float:
    """The entropy in nats of classes with these counts."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _binomial_tail(successes: int, trials: int, probability: float) -> float:
    """The probability of at most this many successes."""
    distribution = torch.distributions.Binomial(trials, torch.tensor(probability, dtype=torch.float64))
    return min(1.0, distribution.log_prob(torch.arange(successes + 1, dtype=torch.float64)).exp().sum().item())
