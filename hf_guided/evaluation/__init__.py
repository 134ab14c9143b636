"""How good samples and models are: distances between features, an independent judge, likelihood, pictures of it all."""

from .distances import frechet_distance, inception_score, kernel_distance, precision_recall
from .features import classifier_features, judge_features
from .likelihood import bits_per_dim
from .pictures import labelled_grid, save_png, trade_off_curve

__all__ = [
    "bits_per_dim",
    "classifier_features",
    "frechet_distance",
    "inception_score",
    "judge_features",
    "kernel_distance",
    "labelled_grid",
    "precision_recall",
    "save_png",
    "trade_off_curve",
]
