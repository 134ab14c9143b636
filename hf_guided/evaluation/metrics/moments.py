"""Statistics of features and probabilities, collected batch by batch in constant memory and merged over processes."""

from collections.abc import Mapping

import numpy as np
import torch

Features = np.ndarray | torch.Tensor

_ROWS = 4096  # whose covariance is computed at once, so that the result does not depend on the batch size


class FeatureStatistics:
    """Mean and covariance of features in float64, the inputs of [`frechet_distance`].

    Blocks are centred before they are squared, and merged by the formula of Chan, Golub and LeVeque (1979, "Updating
    formulae and a pairwise algorithm for computing sample variances", eq. 2.1), so that a mean far from 0 loses no
    precision. Features are added by `update`, batch by batch.
    """

    def __init__(self) -> None:
        self._num_folded: int | None = 0
        self._mean = np.zeros(0)
        self._covariance = np.zeros((0, 0))
        self._pending: list[np.ndarray] = []

    @classmethod
    def from_moments(
        cls, mean: np.ndarray, covariance: np.ndarray, num_samples: int | None = None
    ) -> "FeatureStatistics":
        """Statistics that were computed elsewhere, such as `mu` and `sigma` of a published reference file.

        Args:
            mean (`np.ndarray` of shape `(dim,)`), covariance (`np.ndarray` of shape `(dim, dim)`): With n - 1.
            num_samples (`int`, *optional*): Number of samples, at least 2. Without it no samples can be added.
        """
        mean, covariance = np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64)
        if mean.ndim != 1 or covariance.shape != mean.shape * 2 or not len(mean):
            given = f"{mean.shape} and {covariance.shape}"
            raise ValueError(f"A mean of shape (dim,) needs a covariance of shape (dim, dim), got {given}.")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("The mean and covariance must be finite, but hold NaN or infinity.")
        if num_samples is not None and num_samples < 2:
            raise ValueError(f"A covariance needs at least 2 samples, got num_samples={num_samples}.")
        statistics = cls()
        statistics._num_folded, statistics._mean, statistics._covariance = num_samples, mean, covariance
        return statistics

    @classmethod
    def of(cls, features: Features) -> "FeatureStatistics":
        """Statistics of features of shape `(n, dim)`."""
        statistics = cls()
        statistics.update(features)
        return statistics

    @property
    def num_samples(self) -> int | None:
        """Number of samples; `None` if unknown."""
        return None if self._num_folded is None else self._num_folded + sum(map(len, self._pending))

    @property
    def mean(self) -> np.ndarray:
        """Mean of the features, float64 of shape `(dim,)`."""
        self._finish()
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of the features with n - 1, float64 of shape `(dim, dim)`."""
        self._finish()
        return self._covariance

    def update(self, features: Features) -> None:
        """Adds features of shape `(n, dim)`, finite and of the width of earlier ones."""
        rows = feature_matrix(features, at_least=1)
        self._prepare(rows.shape[1])
        while len(rows):
            part, rows = np.split(rows, [_ROWS - sum(map(len, self._pending))])
            self._pending.append(part.astype(np.float64))
            if sum(map(len, self._pending)) == _ROWS:
                self._fold()

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the samples of another instance, which is not changed and may be empty."""
        if other.num_samples == 0:
            return
        if other.num_samples is None:
            raise ValueError("Statistics whose num_samples is unknown cannot be merged.")
        self._prepare(other._mean.size)
        self._fold()
        other._fold()
        self._join(other.num_samples, other._mean, other._covariance * (other.num_samples - 1))

    def _prepare(self, width: int) -> None:
        if self.num_samples is None:
            raise ValueError("Samples cannot be added to statistics whose num_samples is unknown.")
        if self.num_samples == 0:
            self._mean, self._covariance = np.zeros(width), np.zeros((width, width))
        if width != self._mean.size:
            raise ValueError(f"All features must have one width, got {self._mean.size} and {width}.")

    def _fold(self) -> None:
        if self._pending:
            rows = np.concatenate(self._pending)
            self._pending = []
            mean = rows.mean(axis=0)
            rows -= mean
            self._join(len(rows), mean, rows.T @ rows)

    def _join(self, num_samples: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        """Adds samples with the given mean and scatter matrix, which is overwritten."""
        before = self._num_folded or 0
        total = before + num_samples
        difference = mean - self._mean
        self._num_folded = total
        self._mean = self._mean + difference * (num_samples / total)
        if before:
            scatter += self._covariance * (before - 1)
            scatter += np.outer(difference * (before * num_samples / total), difference)
        scatter /= max(total - 1, 1)
        self._covariance = scatter

    def _finish(self) -> None:
        if self.num_samples is not None and self.num_samples < 2:
            raise ValueError(f"Statistics of features need at least 2 samples, got {self.num_samples}.")
        self._fold()


def read_moments(arrays: Mapping[str, np.ndarray], num_samples: int | None = None) -> dict[str, FeatureStatistics]:
    """Statistics of `"features"` and, if there are any, `"spatial"` ones, of arrays named as in published files."""
    names = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    return {
        kind: FeatureStatistics.from_moments(arrays[mean], arrays[covariance], num_samples)
        for kind, (mean, covariance) in names.items()
        if mean in arrays
    }


class InceptionScoreStatistics:
    r"""Sums of class probabilities for [`inception_score`], of batches in any order.

    Of each split it keeps the sums of \\(p\\) and of \\(p \log p\\), since
    \\(E_x KL(p(y|x) \| p(y)) = E_x \sum_y p \log p - \sum_y E_x[p] \log E_x[p]\\).

    Args:
        split_size (`int`, defaults to 5000): Images whose mean is taken as p(y).
    """

    def __init__(self, split_size: int = 5000) -> None:
        if split_size < 1:
            raise ValueError(f"split_size must be at least 1, got {split_size}.")
        self.split_size = split_size
        self._sums: dict[int, np.ndarray] = {}  # of each split: images, p log p, and p by class

    def update(self, probabilities: Features, start: int) -> None:
        """Adds consecutive images.

        Args:
            probabilities (`np.ndarray` or `torch.Tensor` of shape `(n, classes)`): Class probabilities; rows sum to 1.
            start (`int`): Index of the first of them in the whole set.
        """
        p = feature_matrix(probabilities, "probabilities", at_least=1).astype(np.float64)
        if (p < 0).any() or not np.allclose(p.sum(axis=1), 1, rtol=0, atol=1e-3):
            raise ValueError("Each row of probabilities must be non-negative and sum to 1; apply the softmax first.")
        negative_entropies = _p_log_p(p).sum(axis=1)
        splits = np.arange(start, start + len(p)) // self.split_size
        for split in np.unique(splits).tolist():
            rows = splits == split
            self._add(split, np.array([rows.sum(), negative_entropies[rows].sum(), *p[rows].sum(axis=0)]))

    def merge(self, other: "InceptionScoreStatistics") -> None:
        """Adds other images of the same set from another instance, which is not changed."""
        if other.split_size != self.split_size:
            raise ValueError(f"Both must have one split_size, got {self.split_size} and {other.split_size}.")
        for split, sums in other._sums.items():
            self._add(split, sums)

    @property
    def score(self) -> float:
        """The Inception Score: the mean over the splits, where a short last one counts like the others."""
        if not self._sums:
            raise ValueError("The Inception Score needs at least 1 image.")
        scores = []
        for split in range(max(self._sums) + 1):
            count, negative_entropy = self._sums.get(split, np.zeros(2))[:2]
            if count < self.split_size and split < max(self._sums):
                added = f"Of the images {self._images(split)} only {count:.0f} were added"
                raise ValueError(f"{added}; the Inception Score needs all of them.")
            scores.append(np.exp(negative_entropy / count - _p_log_p(self._sums[split][2:] / count).sum()))
        return float(np.mean(scores))

    def _add(self, split: int, sums: np.ndarray) -> None:
        known = next(iter(self._sums.values()), sums)
        if known.size != sums.size:
            numbers = f"{known.size - 2} and {sums.size - 2}"
            raise ValueError(f"All probabilities must have the same number of classes, got {numbers}.")
        self._sums[split] = self._sums.get(split, 0) + sums
        if self._sums[split][0] > self.split_size:
            raise ValueError(f"Images among {self._images(split)} were added twice.")

    def _images(self, split: int) -> str:
        return f"{split * self.split_size} to {(split + 1) * self.split_size - 1}"


def _p_log_p(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1))  # p log p is 0 where p is 0: log 1 gives that without warnings


def feature_matrix(values: Features, name: str = "features", at_least: int = 2) -> np.ndarray:
    """Validated values `(samples, columns)` on the CPU; integers become float64, shorter floats float32.

    Raises:
        `ValueError`: If there are fewer samples than `at_least`, another number of axes, NaN or infinity.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
    values = np.asarray(values)
    values = values.astype(np.result_type(values.dtype, np.float32), copy=False)
    if values.ndim != 2 or len(values) < at_least or values.shape[1] < 1:
        least = f"at least {at_least} sample{'s' if at_least > 1 else ''}"
        raise ValueError(f"The {name} must have shape (samples, columns) with {least}, got {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(f"The {name} must be finite, but hold NaN or infinity.")
    return values


def feature_pair(a: Features, b: Features, at_least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features of the same width, validated as by [`feature_matrix`]."""
    x, y = feature_matrix(a, at_least=at_least), feature_matrix(b, at_least=at_least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"Both sets must have features of one width, got {x.shape[1]} and {y.shape[1]}.")
    return x, y
