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

    `z` is the Mann-Whitney statistic of Meehan et al. 2020 (arXiv 2004.05675, section 3), with the opposite sign.
    """

    features: str  # the extractor's name
    closer_share: float  # P(a sample is closer than a held-out image): 0.5 for new images, 1 if all are copies
    z: float  # the distance of that probability from 0.5, in standard deviations of the null hypothesis
    copied_share: float  # samples closer than all but 1 % of held-out images, as a fraction; 0.01 for new images
    median: float  # of the samples' distances
    held_out_median: float
    pairs: list[tuple[int, int, float]]  # sample, training image (each once) and distance, the closest first

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

    Raises:
        `ValueError`: If a set has only statistics and no features.
    """
    samples, sample_indices = _kept(generated, "generated")
    real, real_indices = _kept(train, "training")
    ours, nearest = nearest_distances(samples, real)
    theirs = np.sort(nearest_distances(_kept(held_out, "held-out")[0], real)[0])

    # Held-out distances that are smaller than each of ours, and that are not larger
    below, not_above = (np.searchsorted(theirs, ours, side=side) for side in ("left", "right"))
    n, m = len(ours), len(theirs)
    closer_share = float(1 - (below + not_above).mean() / (2 * m))
    deviation = math.sqrt((n + m + 1) / (12 * n * m))
    closest: dict[int, tuple[int, int, float]] = {}  # by training image
    for row in np.argsort(ours, kind="stable").tolist():
        index = int(real_indices[nearest[row]])
        closest.setdefault(index, (int(sample_indices[row]), index, float(ours[row])))
    return Memorisation(
        features=generated.extractor,
        closer_share=closer_share,
        z=(closer_share - 0.5) / deviation,
        copied_share=float((ours < np.quantile(theirs, COPY_QUANTILE)).mean()),
        median=float(np.median(ours)),
        held_out_median=float(np.median(theirs)),
        pairs=list(closest.values())[:num_pairs],
    )


def _kept(features: FeatureSet, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The stored features, and the indices of their images."""
    if features.kept is None or features.kept_indices is None:
        raise ValueError(f"The {name} images are only given as statistics; memorisation needs the images.")
    return features.kept, features.kept_indices


def closest_pairs(found: Memorisation, generated: ImageSet, train: ImageSet) -> Image.Image:
    """An image of the closest pairs: samples above, the nearest training image of each below."""
    above = [generated.picture(sample) for sample, _, _ in found.pairs]
    below = [train.picture(index) for _, index, _ in found.pairs]
    distances = ", ".join(f"{distance:.2g}" for _, _, distance in found.pairs)
    title = f"Closest pairs in {found.features} features; distances {distances}"
    return labelled_grid(above + below, ["generated", "nearest in training"], title=title)
