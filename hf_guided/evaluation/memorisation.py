"""Memorisation: the distances of samples to the training images, compared with those of held-out images."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..generation.grids import labelled_grid
from .features.feature_sets import FeatureSet
from .features.image_sets import ImageSet
from .metrics.manifolds import nearest_distances

COPY_QUANTILE = 0.01  # a copy is closer to a training image than all but this fraction of held-out images


@dataclass
class Memorisation:
    """Distances to the nearest training image, in the features of one extractor.

    Attributes:
        features (`str`): The extractor's name.
        closer_share (`float`): Probability that a sample is closer to the training images than a held-out image: 0.5 if
            samples are as new as held-out images, 1 if all are copies.
        z (`float`): The distance of that probability from 0.5 in standard deviations of the null hypothesis: the
            Mann-Whitney statistic of Meehan et al. 2020 (arXiv 2004.05675, section 3), with the opposite sign.
        copied_share (`float`): Fraction of samples closer to a training image than all but 1 % of held-out images; 0.01
            for new images.
        median, held_out_median (`float`): The medians of the distances of samples and held-out images.
        pairs (`list[tuple[int, int, float]]`): The closest pairs, in order of distance: index of the sample, index of
            the training image, distance. Each training image occurs once.
    """

    features: str
    closer_share: float
    z: float
    copied_share: float
    median: float
    held_out_median: float
    pairs: list[tuple[int, int, float]]

    @property
    def finding(self) -> str:
        """The result as a sentence."""
        near = f"nearest training image at {self.median:.3g}, held-out images at {self.held_out_median:.3g}"
        if self.copied_share > 0.05 and self.z > 3:
            verdict = "the model copies training images: check the pairs, train for fewer steps or on more images"
        elif self.z > 3:
            verdict = (
                "samples are closer to the training images than new images are, as with strong guidance, but not "
                "copies of single images"
            )
        else:
            verdict = "no sign of copying"
        return (
            f"Memorisation in {self.features} features: {verdict} ({near} in the median; {self.copied_share:.1%} of "
            f"samples are closer than all but 1 % of held-out images)."
        )

    def to_dict(self) -> dict[str, Any]:
        """The result for a report, as a dict for JSON."""
        names = ("closer_share", "z", "copied_share", "median", "held_out_median")
        return {**{name: getattr(self, name) for name in names}, "finding": self.finding}


def memorisation(generated: FeatureSet, train: FeatureSet, held_out: FeatureSet, num_pairs: int = 10) -> Memorisation:
    """How close samples are to the training images, compared with held-out images.

    Args:
        generated ([`FeatureSet`]): Features of the samples.
        train ([`FeatureSet`]): Features of all training images; copies of missing ones are not detected.
        held_out ([`FeatureSet`]): Features of images from the same source that were not used in training.
        num_pairs (`int`, defaults to 10): Closest pairs to list.

    Returns:
        [`Memorisation`]

    Raises:
        `ValueError`: If a set has only statistics and no features.
    """
    sets = {"generated": generated, "training": train, "held-out": held_out}
    for name, features in sets.items():
        if features.kept is None or features.kept_indices is None:
            raise ValueError(f"The {name} images are only given as statistics; memorisation needs the images.")
    assert generated.kept is not None
    assert train.kept is not None
    assert held_out.kept is not None
    assert generated.kept_indices is not None
    assert train.kept_indices is not None
    ours, nearest = nearest_distances(generated.kept, train.kept)
    theirs, _ = nearest_distances(held_out.kept, train.kept)

    below = np.searchsorted(np.sort(theirs), ours, side="left")  # held-out distances that are smaller
    not_above = np.searchsorted(np.sort(theirs), ours, side="right")
    n, m = len(ours), len(theirs)
    closer_share = float(1 - (below + not_above).mean() / (2 * m))
    deviation = math.sqrt((n + m + 1) / (12 * n * m))
    pairs: list[tuple[int, int, float]] = []
    for row in np.argsort(ours, kind="stable").tolist():
        index = int(train.kept_indices[nearest[row]])
        if len(pairs) < num_pairs and index not in [pair[1] for pair in pairs]:
            pairs.append((int(generated.kept_indices[row]), index, float(ours[row])))
    return Memorisation(
        features=generated.extractor,
        closer_share=closer_share,
        z=(closer_share - 0.5) / deviation,
        copied_share=float((ours < np.quantile(theirs, COPY_QUANTILE)).mean()),
        median=float(np.median(ours)),
        held_out_median=float(np.median(theirs)),
        pairs=pairs,
    )


def closest_pairs(found: Memorisation, generated: ImageSet, train: ImageSet) -> Image.Image:
    """An image of the closest pairs: samples above, the nearest training image of each below."""
    above = [generated.picture(sample) for sample, _, _ in found.pairs]
    below = [train.picture(index) for _, index, _ in found.pairs]
    distances = ", ".join(f"{distance:.2g}" for _, _, distance in found.pairs)
    title = f"Closest pairs in {found.features} features; distances {distances}"
    return labelled_grid(above + below, ["generated", "nearest in training"], title=title)
