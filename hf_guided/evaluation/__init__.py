"""How good samples and models are: distances between features, an independent judge, likelihood, pictures of it all."""

from .classifier_inspection import ClassifierInspection, inspect_classifier
from .distances import frechet_distance, frechet_interval, inception_score, kernel_distance
from .likelihood import bits_per_dim
from .manifolds import ManifoldMetrics, density_coverage, manifold_metrics, nearest_distances, precision_recall
from .pictures import labelled_grid, save_png, trade_off_curve
from .statistics import FeatureStatistics, InceptionScoreStatistics

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
    "labelled_grid",
    "manifold_metrics",
    "nearest_distances",
    "precision_recall",
    "save_png",
    "trade_off_curve",
]
