"""Distances between sets of features, and the Inception Score: pure functions in float64, without global randomness.

Features are arrays or tensors of shape `(samples, dim)` from any one network; a number means something only together
with the name of that network ("FID" unqualified means Inception's `pool_3`).
"""

from collections.abc import Iterator

import numpy as np
import torch

Features = np.ndarray | torch.Tensor

# Elements of one block of pairwise distances: 64 MiB in float32, whatever the number of samples.
_BLOCK_ELEMENTS = 2**24


def frechet_distance(a: Features, b: Features) -> float:
    r"""Frechet distance of Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv 1706.08500, eq. 6):

    \\(|\mu_a - \mu_b|^2 + \mathrm{Tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2})\\), covariances with n - 1.

    Args:
        a (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`): Features of one set, at least 2 samples.
        b (`np.ndarray` or `torch.Tensor` of shape `(m, dim)`): Features of the other set, at least 2 samples.

    Returns:
        `float`: The distance, in squared units of the features; symmetric in its arguments, 0 for equal sets.
    """
    x, y = _feature_sets(a, b)
    difference = x.mean(axis=0) - y.mean(axis=0)
    covariance_a, covariance_b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (x, y))

    # Tr (A B)^1/2 is the sum of the roots of the eigenvalues of A^1/2 B A^1/2: symmetric, 5 times faster than sqrtm.
    eigenvalues, eigenvectors = np.linalg.eigh(covariance_a)
    root_a = (eigenvectors * np.sqrt(eigenvalues.clip(min=0))) @ eigenvectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root_a @ covariance_b @ root_a).clip(min=0)).sum()
    distance = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root
    return max(float(distance), 0.0)


def kernel_distance(
    a: Features, b: Features, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> float:
    r"""Kernel distance (KID; Binkowski et al. 2018, arXiv 1801.01401, section 4): the unbiased estimate of the squared
    maximum mean discrepancy (Gretton et al. 2012, eq. 3) under the kernel \\((x \cdot y / dim + 1)^3\\).

    Sets that fit into one subset are used whole; from larger ones the estimate is averaged over random subsets.

    Args:
        a (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`): Features of one set, at least 2 samples.
        b (`np.ndarray` or `torch.Tensor` of shape `(m, dim)`): Features of the other set, at least 2 samples.
        subset_size (`int`, defaults to 1000): The most samples of each set that one estimate uses.
        num_subsets (`int`, defaults to 100): Estimates averaged when a set is larger than `subset_size`.
        seed (`int`, defaults to 0): Seed of the subsets. The global generators are neither used nor changed.

    Returns:
        `float`: The estimate, without unit; being unbiased, it scatters around 0 (and below) for equal distributions.
    """
    x, y = _feature_sets(a, b)
    if subset_size < 2 or num_subsets < 1:
        raise ValueError(f"Needs subset_size >= 2 and num_subsets >= 1, got {subset_size} and {num_subsets}.")
    if max(len(x), len(y)) <= subset_size:
        return _squared_mmd(x, y)

    generator = np.random.default_rng(seed)
    estimates = []
    for _ in range(num_subsets):
        subsets = [generator.choice(features, min(subset_size, len(features)), replace=False) for features in (x, y)]
        estimates.append(_squared_mmd(*subsets))
    return float(np.mean(estimates))


def precision_recall(generated: Features, reference: Features, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eqs. 1 and 2).

    The manifold of a set is the union of balls around its samples, each reaching to the k-th nearest neighbour in the
    set. Distances are squared Euclidean in float32 (the published evaluator rounds them to float16), computed block by
    block, so that memory is bounded for any number of samples.

    Args:
        generated (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`): Features of generated samples, n > k.
        reference (`np.ndarray` or `torch.Tensor` of shape `(m, dim)`): Features of real samples, m > k.
        k (`int`, defaults to 3): The neighbour that sets the radius, not counting the sample itself.

    Returns:
        `tuple[float, float]`: Precision, the fraction of generated samples inside the reference manifold (fidelity),
        and recall, the fraction of reference samples inside the generated manifold (diversity).
    """
    x, y = _feature_sets(generated, reference)
    if not 1 <= k < min(len(x), len(y)):
        raise ValueError(
            f"k must be at least 1 and smaller than both sets, got k={k} for {len(x)} generated and "
            f"{len(y)} reference samples."
        )
    center = y.mean(axis=0)  # distances do not feel a common shift, but their float32 rounding does
    x, y = (x - center).astype(np.float32), (y - center).astype(np.float32)
    radius_x, radius_y = _neighbour_radius(x, k), _neighbour_radius(y, k)

    x_in_y, y_in_x = np.zeros(len(x), dtype=bool), np.zeros(len(y), dtype=bool)
    for rows, distances in _squared_distances(x, y):
        x_in_y[rows] = (distances <= radius_y).any(axis=1)
        y_in_x |= (distances <= radius_x[rows, None]).any(axis=0)
    return float(x_in_y.mean()), float(y_in_x.mean())


def inception_score(probabilities: Features, split_size: int = 5000) -> float:
    r"""Inception Score (Salimans et al. 2016, arXiv 1606.03498, section 4): \\(\exp E_x KL(p(y|x) \| p(y))\\).

    As in the published evaluator: splits are consecutive and unshuffled, a short last one counts like the others.

    Args:
        probabilities (`np.ndarray` or `torch.Tensor` of shape `(n, classes)`): Class probabilities; rows sum to 1.
        split_size (`int`, defaults to 5000): Samples whose mean is taken as p(y).

    Returns:
        `float`: The score, from 1 to the number of classes, averaged over the splits.
    """
    p = _matrix(probabilities, "probabilities")
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, got {split_size}.")
    if (p < 0).any() or not np.allclose(p.sum(axis=1), 1, rtol=0, atol=1e-3):
        raise ValueError("Each row of probabilities must be non-negative and sum to 1; apply the softmax first.")

    scores = []
    for start in range(0, len(p), split_size):
        split = p[start : start + split_size]
        marginal = np.broadcast_to(split.mean(axis=0), split.shape)
        # Where p is 0, p log p is 0: a ratio of 1 says so without warnings.
        log_ratio = np.log(np.divide(split, marginal, out=np.ones_like(split), where=split > 0))
        scores.append(np.exp((split * log_ratio).sum(axis=1).mean()))
    return float(np.mean(scores))


def _squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of `(n, dim)` and `(m, dim)` under the cubic kernel; no sample is compared with itself."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: np.ndarray) -> float:
        gram = kernel(x, x)
        return (gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean())


def _neighbour_radius(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each sample to its k-th nearest neighbour: index k of the sorted row, index 0 is itself."""
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for _, block in _squared_distances(features, features)])


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields blocks of rows: the slice of `a`, and its squared distances to all of `b`, of shape `(rows, len(b))`."""
    squared_a, squared_b = (np.square(features).sum(axis=1) for features in (a, b))
    size = max(1, _BLOCK_ELEMENTS // len(b))
    for start in range(0, len(a), size):
        rows = slice(start, start + size)
        yield rows, (squared_a[rows, None] - 2 * (a[rows] @ b.T) + squared_b).clip(min=0)


def _feature_sets(a: Features, b: Features) -> tuple[np.ndarray, np.ndarray]:
    a, b = _matrix(a, "features"), _matrix(b, "features")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"Both sets must have features of one width, got {a.shape[1]} and {b.shape[1]}.")
    return a, b


def _matrix(values: Features, name: str) -> np.ndarray:
    """Checked float64 copy of `(samples, columns)` values."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or values.shape[1] < 1:
        raise ValueError(f"The {name} must have shape (samples, columns) with at least 2 samples, got {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(f"The {name} must be finite, but hold NaN or infinity.")
    return values
