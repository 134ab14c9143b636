"""Does a model copy its training images? Their distance to its samples, against what new images have."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..generation.grids import labelled_grid
from .features.feature_sets import FeatureSet
from .features.image_sets import ImageSet
from .metrics.manifolds import nearest_distances

COPY_QUANTILE = 0.01  # nearer to a training image than all but this share of new images: as good as a copy


@dataclass
class Memorisation:
    """Distances to the nearest training image, in the features of one extractor.

    Attributes:
        features (`str`): The extractor's name.
        closer_share (`float`): How often a sample is nearer to the training images than a held-out image is: 0.5 where
            samples are as new as held-out images, 1 where all are copies.
        z (`float`): That share's distance from 0.5 in standard deviations, if they were equally new: the Mann-Whitney
            statistic of Meehan et al. 2020 (arXiv 2004.05675, section 3), with the sign turned.
        copied_share (`float`): Samples nearer to a training image than all but 1 % of held-out images are; 0.01 is what
            new images have.
        median, held_out_median (`float`): The medians of both distances.
        pairs (`list[tuple[int, int, float]]`): The closest pairs, nearest first: which sample, which training image,
            and their distance. Each training image once.
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
        """The numbers in words."""
        near = f"nearest training image at {self.median:.3g}, held-out images at {self.held_out_median:.3g}"
        if self.copied_share > 0.05 and self.z > 3:
            verdict = "the model copies training images: look at the pairs, train for fewer steps or on more images"
        elif self.z > 3:
            verdict = (
                "samples are nearer to the training images than new ones, as strong guidance makes them, but are not "
                "copies of single ones"
            )
        else:
            verdict = "no sign of copying"
        return (
            f"Memorisation in {self.features} features: {verdict} ({near} in the median; {self.copied_share:.1%} of "
            f"samples are nearer than all but 1 % of held-out images)."
        )

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
        names = ("closer_share", "z", "copied_share", "median", "held_out_median")
        return {**{name: getattr(self, name) for name in names}, "finding": self.finding}


def memorisation(generated: FeatureSet, train: FeatureSet, held_out: FeatureSet, num_pairs: int = 10) -> Memorisation:
    """Compares how near samples and held-out images are to the training images.

    Args:
        generated ([`FeatureSet`]): Of the samples.
        train ([`FeatureSet`]): Of the training images, all of them: a copy of one that is missing is not found.
        held_out ([`FeatureSet`]): Of images from the same source that the model never saw.
        num_pairs (`int`, defaults to 10): Closest pairs to list.

    Returns:
        [`Memorisation`]

    Raises:
        `ValueError`: If a set has no features of its own, only statistics.
    """
    sets = {"generated": generated, "training": train, "held-out": held_out}
    for name, features in sets.items():
        if features.kept is None or features.kept_indices is None:
            raise ValueError(f"The {name} images are known by their statistics alone; memorisation needs the images.")
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
    """The closest pairs as a picture: samples above, the training image nearest to each below."""
    above = [generated.picture(sample) for sample, _, _ in found.pairs]
    below = [train.picture(index) for _, index, _ in found.pairs]
    distances = ", ".join(f"{distance:.2g}" for _, _, distance in found.pairs)
    title = f"Closest pairs in {found.features} features; distances {distances}"
    return labelled_grid(above + below, ["generated", "nearest in training"], title=title)
