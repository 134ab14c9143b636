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
    """The inputs of metrics: the features of samples and of real images, by one extractor.

    Attributes:
        generated, reference ([`FeatureSet`]): Features of the samples, and of real images.
        labels (`np.ndarray` of shape `(n,)`, *optional*): The class that each sample was conditioned on, as an id among
            the extractor's classes.
        distance_dtype (`str`): Precision of the distances between features, see [`precision_recall`].
    """

    generated: Any
    reference: Any
    labels: np.ndarray | None = None
    distance_dtype: str = "float32"

    @cached_property
    def manifolds(self) -> ManifoldMetrics:
        """Precision, recall, density and coverage, which share their distances."""
        return manifold_metrics(self.generated.kept, self.reference.kept, K, DENSITY_K, self.distance_dtype)


@dataclass(frozen=True)
class Metric:
    """A metric of samples.

    Attributes:
        name (`str`): Its key in reports, before `/` and the name of the features.
        title (`str`): Its title in tables and plots.
        format (`Callable[[float], str]`): Formats its value.
        higher_is_better (`bool`): Whether higher values are better.
        needs (`tuple[str, ...]`): Attributes of [`Compared`] that it needs, by dotted names.
        compute (`Callable`, *optional*): Computes it from [`Compared`]; `None` if it is measured elsewhere.
        note (`str`): Its explanation on model cards, a sentence.
    """

    name: str
    title: str
    format: Callable[[float], str]
    higher_is_better: bool = False
    needs: tuple[str, ...] = ()
    compute: Callable[[Compared], float] | None = None
    note: str = ""

    def applies_to(self, compared: Compared) -> bool:
        """Whether it can be computed."""
        return self.compute is not None and all(attrgetter(need)(compared) is not None for need in self.needs)


def significant(value: float) -> str:
    """Four significant digits, without an exponent for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(value: float) -> str:
    """A fraction of 1, with three decimals."""
    return f"{value:.3f}"


def percent(value: float) -> str:
    """A fraction in per cent."""
    return f"{100 * value:.1f} %"


_KEPT = ("generated.kept", "reference.kept")

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "fid",
            "FID",
            significant,
            compute=lambda compared: frechet_distance(compared.generated.statistics, compared.reference.statistics),
        ),
        Metric(
            "sfid",
            "sFID",
            significant,
            needs=("generated.spatial_statistics", "reference.spatial_statistics"),
            compute=lambda compared: frechet_distance(
                compared.generated.spatial_statistics, compared.reference.spatial_statistics
            ),
        ),
        Metric(
            "kid",
            "KID",
            significant,
            needs=_KEPT,
            compute=lambda compared: kernel_distance(compared.generated.kept, compared.reference.kept),
        ),
        *(
            Metric(
                name,
                name,
                share,
                higher_is_better=True,
                needs=_KEPT,
                compute=lambda compared, name=name: getattr(compared.manifolds, name),  # type: ignore[misc]
            )
            for name in ManifoldMetrics._fields
        ),
        Metric(
            "inception_score",
            "Inception Score",
            significant,
            higher_is_better=True,
            needs=("generated.score",),
            compute=lambda compared: compared.generated.score.score,
        ),
        Metric(
            "accuracy",
            "accuracy",
            share,
            higher_is_better=True,
            needs=("labels", "generated.predictions"),
            compute=lambda compared: float((compared.generated.predictions == compared.labels).mean()),
            note="Accuracy is the fraction of samples that an independent evaluation classifier, not the one that "
            "guides, assigns to the class they were conditioned on.",
        ),
        Metric(
            "copied_share",
            "copied",
            percent,
            note="Copied is the fraction of samples closer to a training image than all but 1 % of held-out images.",
        ),
        Metric("bits_per_dim", "bits/dim", lambda value: f"{value:.2f}"),
    )
}
