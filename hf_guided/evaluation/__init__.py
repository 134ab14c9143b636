"""Evaluation of samples and models: metrics, features, classifier inspection, likelihood, sweeps and plots.

No training, and no sampling of its own: samples come from `generation`.
"""

from .classifier_findings import ClassifierInspection
from .classifier_inspection import inspect_classifier
from .likelihood import bits_per_dim
from .metrics.distances import frechet_distance, frechet_interval, inception_score, kernel_distance
from .metrics.manifolds import ManifoldMetrics, density_coverage, manifold_metrics, nearest_distances, precision_recall
from .metrics.moments import FeatureStatistics, InceptionScoreStatistics
from .plots import trade_off_curve

__all__ = [
    "ClassifierInspection",
    "FeatureStatistics",
    "InceptionScoreStatistics",
    "ManifoldMetrics",
    "bits_per_dim",
    "density_coverage",
    "frechet_distance",
    "frechet_interval",
    "inception_score",
    "inspect_classifier",
    "kernel_distance",
    "manifold_metrics",
    "nearest_distances",
    "precision_recall",
    "trade_off_curve",
]
