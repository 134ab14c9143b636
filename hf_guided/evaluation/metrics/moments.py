"""Statistics of features and probabilities, collected batch by batch in constant memory and merged over processes."""

import numpy as np
import torch

Features = np.ndarray | torch.Tensor

# Rows whose covariance is computed at once, so that the result does not depend on the batch size. They take as much
# memory as the covariance of 4096 features.
_ROWS = 4096


class FeatureStatistics:
    """Mean and covariance of features in float64, the inputs of [`frechet_distance`].

    Blocks are centred before they are squared, and merged by the formula of Chan, Golub and LeVeque (1979, "Updating
    formulae and a pairwise algorithm for computing sample variances", eq. 2.1), so that a mean far from 0 loses no
    precision.

    ```python
    statistics = FeatureStatistics()
    for images in batches:
        statistics.update(extractor(images).features)
    ```
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
            mean (`np.ndarray` of shape `(dim,)`): Mean of the features.
            covariance (`np.ndarray` of shape `(dim, dim)`): Their covariance, with n - 1.
            num_samples (`int`, *optional*): Number of samples. Without it no samples can be added.

        Returns:
            [`FeatureStatistics`]

        Raises:
            `ValueError`: If shapes do not fit, a value is not finite, or `num_samples` is less than 2.
        """
        mean, covariance = np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
            raise ValueError(
                f"A mean of shape (dim,) needs a covariance of shape (dim, dim), got {mean.shape} and "
                f"{covariance.shape}."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("The mean and covariance must be finite, but hold NaN or infinity.")
        if num_samples is not None and num_samples < 2:
            raise ValueError(f"A covariance needs at least 2 samples, got num_samples={num_samples}.")
        statistics = cls()
        statistics._num_folded, statistics._mean, statistics._covariance = num_samples, mean, covariance
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
        """Adds samples.

        Args:
            features (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`): Features of at least 1 sample.

        Raises:
            `ValueError`: If they are not finite, or have another width than earlier ones.
        """
        rows = feature_matrix(features, at_least=1)
        self._prepare(rows.shape[1])
        while len(rows):
            part, rows = np.split(rows, [_ROWS - sum(map(len, self._pending))])
            self._pending.append(part.astype(np.float64))
            if sum(map(len, self._pending)) == _ROWS:
                self._fold()

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the samples of another instance, which is not changed and may be empty.

        Args:
            other ([`FeatureStatistics`]): Statistics of other samples, such as another process's.

        Raises:
            `ValueError`: If it has another width, or if one of the two has an unknown number of samples.
        """
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


class InceptionScoreStatistics:
    r"""Sums of class probabilities for the Inception Score (Salimans et al. 2016, arXiv 1606.03498, section 4).

    Splits are those of the published evaluator: by the image's index, consecutive and unshuffled.

    For each split it keeps the sums of \\(p\\) and of \\(p \log p\\), since
    \\(E_x KL(p(y|x) \| p(y)) = E_x \sum_y p \log p - \sum_y E_x[p] \log E_x[p]\\). Batches may come in any order.

    Args:
        split_size (`int`, defaults to 5000): Images whose mean is taken as p(y).
    """

    def __init__(self, split_size: int = 5000) -> None:
        if split_size < 1:
            raise ValueError(f"split_size must be at least 1, got {split_size}.")
        self.split_size = split_size
        self._counts: dict[int, int] = {}
        self._probabilities: dict[int, np.ndarray] = {}
        self._negative_entropies: dict[int, float] = {}

    def update(self, probabilities: Features, start: int) -> None:
        """Adds consecutive images.

        Args:
            probabilities (`np.ndarray` or `torch.Tensor` of shape `(n, classes)`): Class probabilities; rows sum to 1.
            start (`int`): Index of the first of them in the whole set.

        Raises:
            `ValueError`: If they are not probabilities, have another number of classes, or add images twice.
        """
        p = feature_matrix(probabilities, "probabilities", at_least=1).astype(np.float64)
        if (p < 0).any() or not np.allclose(p.sum(axis=1), 1, rtol=0, atol=1e-3):
            raise ValueError("Each row of probabilities must be non-negative and sum to 1; apply the softmax first.")
        # p log p is 0 where p is 0: log 1 gives that without warnings.
        negative_entropies = (p * np.log(np.where(p > 0, p, 1))).sum(axis=1)
        splits = np.arange(start, start + len(p)) // self.split_size
        for split in np.unique(splits).tolist():
            rows = splits == split
            self._add(split, int(rows.sum()), p[rows].sum(axis=0), float(negative_entropies[rows].sum()))

    def merge(self, other: "InceptionScoreStatistics") -> None:
        """Adds other images of the same set from another instance, which is not changed.

        Args:
            other ([`InceptionScoreStatistics`]): Such as another process's.

        Raises:
            `ValueError`: If it has another split size or number of classes, or adds images twice.
        """
        if other.split_size != self.split_size:
            raise ValueError(f"Both must have one split_size, got {self.split_size} and {other.split_size}.")
        for split, count in other._counts.items():
            self._add(split, count, other._probabilities[split], other._negative_entropies[split])

    @property
    def score(self) -> float:
        """The Inception Score: the mean over the splits, where a short last one counts like the others.

        Raises:
            `ValueError`: If images are missing.
        """
        if not self._counts:
            raise ValueError("The Inception Score needs at least 1 image.")
        last = max(self._counts)
        for split in range(last):
            if (count := self._counts.get(split, 0)) < self.split_size:
                start = split * self.split_size
                raise ValueError(
                    f"Of the images {start} to {start + self.split_size - 1} only {count} were added; the Inception "
                    f"Score needs all of them."
                )
        scores = []
        for split in range(last + 1):
            marginal = self._probabilities[split] / self._counts[split]
            negative_entropy = (marginal * np.log(np.where(marginal > 0, marginal, 1))).sum()
            scores.append(np.exp(self._negative_entropies[split] / self._counts[split] - negative_entropy))
        return float(np.mean(scores))

    def _add(self, split: int, count: int, probabilities: np.ndarray, negative_entropy: float) -> None:
        known = next(iter(self._probabilities.values()), probabilities)
        if known.size != probabilities.size:
            raise ValueError(
                f"All probabilities must have the same number of classes, got {known.size} and {probabilities.size}."
            )
        self._counts[split] = self._counts.get(split, 0) + count
        if self._counts[split] > self.split_size:
            start = split * self.split_size
            raise ValueError(f"Images among {start} to {start + self.split_size - 1} were added twice.")
        self._probabilities[split] = self._probabilities.get(split, 0) + probabilities
        self._negative_entropies[split] = self._negative_entropies.get(split, 0) + negative_entropy


def feature_matrix(values: Features, name: str = "features", at_least: int = 2) -> np.ndarray:
    """Validated `(samples, columns)` values as an array on the CPU, float32 or float64.

    Args:
        values (`np.ndarray` or `torch.Tensor`): The values; integers become float64, shorter floats float32.
        name (`str`, defaults to `"features"`): Their name in errors.
        at_least (`int`, defaults to 2): The least number of samples.

    Returns:
        `np.ndarray` of shape `(samples, columns)`

    Raises:
        `ValueError`: If there are too few samples, another number of axes, NaN or infinity.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
    values = np.asarray(values)
    values = values.astype(np.result_type(values.dtype, np.float32), copy=False)
    if values.ndim != 2 or len(values) < at_least or values.shape[1] < 1:
        raise ValueError(
            f"The {name} must have shape (samples, columns) with at least {at_least} "
            f"{'sample' if at_least == 1 else 'samples'}, got {values.shape}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"The {name} must be finite, but hold NaN or infinity.")
    return values


def feature_pair(a: Features, b: Features, at_least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features of the same width, validated as by [`feature_matrix`]."""
    x, y = feature_matrix(a, at_least=at_least), feature_matrix(b, at_least=at_least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"Both sets must have features of one width, got {x.shape[1]} and {y.shape[1]}.")
    return x, y
