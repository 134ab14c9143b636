"""Distances between sets of features, and the Inception Score: pure functions in float64, without global randomness.

Features are arrays or tensors of shape `(samples, dim)` from any one network; a number means something only together
with the name of that network ("FID" unqualified means Inception's `pool_3`).
"""

from statistics import NormalDist

import numpy as np
from tqdm.auto import tqdm

from .statistics import Features, FeatureStatistics, InceptionScoreStatistics, feature_matrix, feature_pair


def frechet_distance(a: Features | FeatureStatistics, b: Features | FeatureStatistics) -> float:
    r"""Frechet distance of Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv 1706.08500, eq. 6):

    \\(|\mu_a - \mu_b|^2 + \mathrm{Tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2})\\), covariances with n - 1.

    Args:
        a (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`, or [`FeatureStatistics`]): Features of one set, at least
            2 samples, or their statistics.
        b (`np.ndarray` or `torch.Tensor` of shape `(m, dim)`, or [`FeatureStatistics`]): The same of the other set.

    Returns:
        `float`: The distance, in squared units of the features; symmetric in its arguments, 0 for equal sets.

    Raises:
        `ValueError`: If a set has fewer than 2 samples, NaN or infinity, or if the two differ in width.
    """
    x, y = _statistics(a), _statistics(b)
    _check_width(x, y)
    factor = _factor(x.covariance)
    difference = x.mean - y.mean
    traces = np.trace(x.covariance) + np.trace(y.covariance)
    return max(float(difference @ difference + traces - 2 * _trace_of_root(factor.T @ y.covariance @ factor)), 0.0)


def frechet_interval(
    generated: Features,
    reference: Features | FeatureStatistics,
    *,
    strata: np.ndarray | None = None,
    num_resamples: int = 100,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of the Frechet distance, from a bootstrap of the generated samples (Efron and Tibshirani
    1993, "An Introduction to the Bootstrap", sections 6.2 and 12.3).

    Samples drawn with replacement are less diverse, which raises each resampled distance. So only their standard
    deviation is used, in a normal interval around the distance itself.

    The interval covers what other samples of the same model, as many, would give: two models whose intervals are apart
    differ. It does not cover the bias of few samples, which raises the distance at any number and falls with it, nor
    the choice of the reference, which is taken as given.

    Args:
        generated (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`): Features of generated samples, at least 2.
        reference (`np.ndarray` or `torch.Tensor` of shape `(m, dim)`, or [`FeatureStatistics`]): Features of real
            samples, at least 2, or their statistics.
        strata (`np.ndarray` of shape `(n,)`, *optional*): The class of each generated sample, where it was given how
            many there are of each and not drawn: then resampling keeps these numbers, too.
        num_resamples (`int`, defaults to 100): Resampled sets; the width of the interval is uncertain by about
            `1 / sqrt(2 * num_resamples)` of itself.
        seed (`int`, defaults to 0): Seed of the resampling. The global generators are neither used nor changed.
        confidence (`float`, defaults to 0.95): The share of such intervals that hold the expected distance.

    Returns:
        `tuple[float, float]`: The lower end, not below 0, and the upper end.

    Raises:
        `ValueError`: As [`frechet_distance`], or if there are fewer than 2 resamples, `confidence` is no share, or
        `strata` are of another number of samples.
    """
    if num_resamples < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"Needs num_resamples >= 2 and a confidence between 0 and 1, got {num_resamples} and {confidence}."
        )
    x = feature_matrix(generated).astype(np.float64)
    n = len(x)
    if strata is not None and np.shape(strata) != (n,):
        raise ValueError(f"Each sample needs one class, got strata of shape {np.shape(strata)} for {n} samples.")
    groups = [np.arange(n)] if strata is None else [np.flatnonzero(strata == group) for group in np.unique(strata)]
    a, b = _statistics(x), _statistics(reference)
    _check_width(a, b)
    x -= a.mean
    squared_norms = np.square(x).sum(axis=1)
    difference = a.mean - b.mean
    # With A = F F^T of the reference, once for all resamples, F^T B F is the covariance of the samples times F.
    factor = _factor(b.covariance)
    projected = x @ factor

    generator = np.random.default_rng(seed)
    counts = np.zeros(n, dtype=np.int64)  # how often each sample is drawn
    distances = []
    for _ in tqdm(range(num_resamples), desc="confidence interval", unit="resample", delay=5, leave=False):
        for group in groups:
            counts[group] = generator.multinomial(len(group), np.full(len(group), 1 / len(group)))
        shift = counts @ x / n  # of the mean
        trace = (counts @ squared_norms - n * shift @ shift) / (n - 1)
        drawn = np.flatnonzero(counts)
        rows = projected[drawn]
        rows *= np.sqrt(counts[drawn])[:, None]
        projected_shift = shift @ factor
        product = (rows.T @ rows - n * np.outer(projected_shift, projected_shift)) / (n - 1)
        moved = difference + shift
        distances.append(moved @ moved + trace - 2 * _trace_of_root(product))  # and Tr A, the same for all
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(distances, ddof=1))
    distance = frechet_distance(a, b)
    return max(distance - half, 0.0), distance + half


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
    x, y = feature_pair(a, b)
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


def inception_score(probabilities: Features, split_size: int = 5000) -> float:
    r"""Inception Score (Salimans et al. 2016, arXiv 1606.03498, section 4): \\(\exp E_x KL(p(y|x) \| p(y))\\).

    As in the published evaluator: splits are consecutive and unshuffled, a short last one counts like the others.
    [`InceptionScoreStatistics`] gives the same for probabilities that come in batches.

    Args:
        probabilities (`np.ndarray` or `torch.Tensor` of shape `(n, classes)`): Class probabilities; rows sum to 1.
        split_size (`int`, defaults to 5000): Samples whose mean is taken as p(y).

    Returns:
        `float`: The score, from 1 to the number of classes, averaged over the splits.

    Raises:
        `ValueError`: If there are fewer than 2 samples, rows that are no probabilities, or no split size.
    """
    statistics = InceptionScoreStatistics(split_size)
    statistics.update(feature_matrix(probabilities, "probabilities"), start=0)
    return statistics.score


def _statistics(features: Features | FeatureStatistics) -> FeatureStatistics:
    if isinstance(features, FeatureStatistics):
        return features
    statistics = FeatureStatistics()
    statistics.update(feature_matrix(features))
    return statistics


def _check_width(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.mean.size != b.mean.size:
        raise ValueError(f"Both sets must have features of one width, got {a.mean.size} and {b.mean.size}.")


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F with F F^T = covariance."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:  # singular, as with fewer samples than features; takes ten times as long
        eigenvalues, eigenvectors = np.linalg.eigh(covariance)
        return eigenvectors * np.sqrt(eigenvalues.clip(min=0))


def _trace_of_root(product: np.ndarray) -> float:
    """Tr (A B)^1/2 from F^T B F, A = F F^T: its eigenvalues are those of A B, but it is symmetric."""
    return float(np.sqrt(np.linalg.eigvalsh(product).clip(min=0)).sum())


def _squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of `(n, dim)` and `(m, dim)` under the cubic kernel; no sample is compared with itself."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: np.ndarray) -> float:
        gram = kernel(x, x)
        return (gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean())
