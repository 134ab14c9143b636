"""The table of all reported metrics, which evaluation, comparison, cards, plots and training read.

To add one, write its formula in this room and declare it here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np

from .distances import frechet_distance, kernel_distance
from .manifolds import ManifoldMetrics, manifold_metrics

K, DENSITY_K = 3, 5  # published neighbours: of precision and recall, and of density and coverage


@dataclass
class Compared:
    """The inputs of metrics, by one extractor; see [`measure`]."""

    generated: Any  # FeatureSet of the samples
    reference: Any  # FeatureSet of real images
    labels: np.ndarray | None = None
    distance_dtype: str = "float32"

    @cached_property
    def manifolds(self) -> ManifoldMetrics:
        """Precision, recall, density and coverage, which share their distances."""
        return manifold_metrics(self.generated.kept, self.reference.kept, K, DENSITY_K, self.distance_dtype)


@dataclass(frozen=True)
class Metric:
    """A metric of samples."""

    name: str  # its key in reports, before `/` and the name of the features
    title: str  # in tables and plots
    format: Callable[[float], str]  # of its value
    compute: Callable[[Compared], float] | None = None  # None if it is measured elsewhere
    needs: tuple[str, ...] = ()  # attributes of [`Compared`], by dotted names
    higher_is_better: bool = False
    note: str = ""  # its explanation on model cards, a sentence

    def of(self, compared: Compared) -> float | None:
        """Its value; `None` where something that it needs is missing."""
        if self.compute is None or any(attrgetter(need)(compared) is None for need in self.needs):
            return None
        return self.compute(compared)


def significant(value: float) -> str:
    """Four significant digits, without an exponent for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


share = "{:.3f}".format  # a fraction of 1


def percent(value: float) -> str:
    """A fraction in per cent."""
    return f"{100 * value:.1f} %"


_KEPT = ("generated.kept", "reference.kept")
_SPATIAL = ("generated.spatial_statistics", "reference.spatial_statistics")


def _frechet(name: str) -> Callable[[Compared], float]:
    return lambda x: frechet_distance(getattr(x.generated, name), getattr(x.reference, name))


def _manifold(name: str) -> Metric:
    return Metric(name, name, share, lambda x: getattr(x.manifolds, name), _KEPT, higher_is_better=True)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("fid", "FID", significant, _frechet("statistics")),
        Metric(
            "fd_ratio",
            "FID / held-out",
            "{:.2f}".format,
            note="FID / held-out is FID over that of as many held-out images: 1 is as near as new images are. It may "
            "be compared across features and seeds, which FID may not.",
        ),
        Metric("sfid", "sFID", significant, _frechet("spatial_statistics"), _SPATIAL),
        Metric("kid", "KID", significant, lambda x: kernel_distance(x.generated.kept, x.reference.kept), _KEPT),
        *map(_manifold, ManifoldMetrics._fields),
        Metric(
            "inception_score",
            "Inception Score",
            significant,
            lambda x: x.generated.score.score,
            ("generated.score",),
            higher_is_better=True,
        ),
        Metric(
            "accuracy",
            "accuracy",
            share,
            lambda x: float((x.generated.predictions == x.labels).mean()),
            ("labels", "generated.predictions"),
            higher_is_better=True,
            note="Accuracy is the fraction of samples that an independent evaluation classifier, not the one that "
            "guides, assigns to the class they were conditioned on.",
        ),
        Metric(
            "copied_share",
            "copied",
            percent,
            note="Copied is the fraction of samples closer to a training image than all but 1 % of held-out images.",
        ),
        Metric("bits_per_dim", "bits/dim", "{:.2f}".format),
    )
}
