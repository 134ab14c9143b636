"""Distances between sets of features, and the Inception Score: pure functions in float64, without global randomness.

Features are arrays or tensors of shape `(samples, dim)` from one network. A distance has a meaning only together with
the name of that network ("FID" alone means Inception's `pool_3`).
"""

from statistics import NormalDist

import numpy as np
from tqdm.auto import tqdm

from .moments import Features, FeatureStatistics, InceptionScoreStatistics, feature_matrix, feature_pair


def frechet_distance(a: Features | FeatureStatistics, b: Features | FeatureStatistics) -> float:
    r"""Frechet distance of Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv 1706.08500, eq. 6):

    \\(|\mu_a - \mu_b|^2 + \mathrm{Tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2})\\), covariances with n - 1.

    Args:
        a, b (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`, or [`FeatureStatistics`]): Features of each set, at
            least 2 samples, or their statistics.

    Returns:
        `float`: In squared units of the features; symmetric in its arguments, 0 for equal sets.

    Raises:
        `ValueError`: For a set of fewer than 2 samples, NaN or infinity, or two widths.
    """
    x, y = _fitted(a, b)
    factor = _factor(x.covariance)
    difference = x.mean - y.mean
    traces = np.trace(x.covariance) + np.trace(y.covariance)
    return max(float(difference @ difference + traces - 2 * _trace_of_root(factor.T @ y.covariance @ factor)), 0.0)


def frechet_interval(
    generated: Features,
    reference: Features | FeatureStatistics,
    *,
    strata: np.ndarray | None = None,
    num_splits: int = 40,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    r"""Confidence interval of the Frechet distance, from random halves of the generated samples.

    Two halves are independent sets of n / 2 samples, so \\((d_1 - d_2)^2 / 2\\) of their distances is an unbiased
    estimate of the variance at n / 2. Its mean over random splits, halved, is the variance at n, in a normal interval
    around the distance itself. (A bootstrap adds its own noise to the covariance: for Gaussian features its standard
    deviations are up to 4 times too large.)

    The interval covers the distances of other sample sets of this size from the same model: two models whose intervals
    do not overlap differ. For equal distributions it is up to sqrt(2) too wide, since the spread then falls with 1 / n.
    It covers neither the bias of few samples, which raises the distance, nor the choice of the reference.

    Args:
        generated (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`): Features of generated samples, at least 4.
        reference (`np.ndarray` or `torch.Tensor` of shape `(m, dim)`, or [`FeatureStatistics`]): Of real samples.
        strata (`np.ndarray` of shape `(n,)`, *optional*): The class of each generated sample, if the classes are
            balanced and not drawn at random: then each half gets half of each class.
        num_splits (`int`, defaults to 40): Random splits; the width is uncertain by a tenth, with 10 by a quarter.
        seed (`int`, defaults to 0): Seed of the splits; the global generators are not used.
        confidence (`float`, defaults to 0.95): The fraction of such intervals that contain the expected distance.

    Returns:
        `tuple[float, float]`: The lower end, not below 0, and the upper end.

    Raises:
        `ValueError`: As [`frechet_distance`], and for arguments out of range.
    """
    if num_splits < 1 or not 0 < confidence < 1:
        raise ValueError(f"Needs num_splits >= 1 and a confidence between 0 and 1, got {num_splits} and {confidence}.")
    x = feature_matrix(generated, at_least=4).astype(np.float64)
    n = len(x)
    if strata is not None and np.shape(strata) != (n,):
        raise ValueError(f"Each sample needs one class, got strata of shape {np.shape(strata)} for {n} samples.")
    groups = [np.arange(n)] if strata is None else [np.flatnonzero(strata == group) for group in np.unique(strata)]
    a, b = _fitted(FeatureStatistics.of(x), reference)
    x -= a.mean
    difference = a.mean - b.mean
    # With B = F F^T the reference's covariance, factored once, F^T A F is the covariance of the projected samples x F.
    factor = _factor(b.covariance)
    projected = x @ factor
    squared_norms, gram = np.square(x).sum(axis=1), projected.T @ projected

    def distance_of_part(count: int, total: np.ndarray, squares: float, part_gram: np.ndarray) -> float:
        """The distance without the trace of B, which all parts share, from sums over samples that are centred as x."""
        shift = total / count
        moved, projected_shift = difference + shift, shift @ factor
        product = (part_gram - count * np.outer(projected_shift, projected_shift)) / (count - 1)
        return float(moved @ moved + (squares - count * shift @ shift) / (count - 1) - 2 * _trace_of_root(product))

    generator = np.random.default_rng(seed)
    squared_gaps = []
    for _ in tqdm(range(num_splits), desc="confidence interval", unit="split", delay=5, leave=False):
        half = np.concatenate([generator.permutation(group) for group in groups])[::2]
        is_half = np.zeros(n)
        is_half[half] = 1
        rows = projected[half]
        total, squares, half_gram = is_half @ x, is_half @ squared_norms, rows.T @ rows
        first = distance_of_part(len(half), total, squares, half_gram)
        second = distance_of_part(n - len(half), -total, squared_norms.sum() - squares, gram - half_gram)
        squared_gaps.append((first - second) ** 2)
    deviation = float(np.sqrt(np.mean(squared_gaps) / 4))
    half_width = NormalDist().inv_cdf((1 + confidence) / 2) * deviation
    distance = frechet_distance(a, b)
    return max(distance - half_width, 0.0), distance + half_width


def kernel_distance(
    a: Features, b: Features, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> float:
    r"""Kernel distance (KID; Binkowski et al. 2018, arXiv 1801.01401, section 4): the unbiased estimate of the squared
    maximum mean discrepancy (Gretton et al. 2012, eq. 3) under the kernel \\((x \cdot y / dim + 1)^3\\).

    Sets that fit into one subset are used completely; for larger ones the estimate is averaged over random subsets.

    Args:
        a, b (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`): Features of each set, at least 2 samples.
        subset_size (`int`, defaults to 1000): Maximal number of samples of each set in one estimate.
        num_subsets (`int`, defaults to 100): Estimates averaged when a set is larger than `subset_size`.
        seed (`int`, defaults to 0): Seed of the subsets; the global generators are not used.

    Returns:
        `float`: Without unit; for equal distributions it scatters around 0, also below.
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

    As in the published evaluator, splits are consecutive and unshuffled, and a short last one counts like the others.
    [`InceptionScoreStatistics`] gives the same for probabilities in batches.

    Args:
        probabilities (`np.ndarray` or `torch.Tensor` of shape `(n, classes)`): Class probabilities; rows sum to 1.
        split_size (`int`, defaults to 5000): Samples whose mean is taken as p(y).

    Returns:
        `float`: From 1 to the number of classes.
    """
    statistics = InceptionScoreStatistics(split_size)
    statistics.update(feature_matrix(probabilities, "probabilities"), start=0)
    return statistics.score


def _fitted(
    a: Features | FeatureStatistics, b: Features | FeatureStatistics
) -> tuple[FeatureStatistics, FeatureStatistics]:
    """The statistics of two sets, of one width."""
    x, y = (s if isinstance(s, FeatureStatistics) else FeatureStatistics.of(feature_matrix(s)) for s in (a, b))
    if x.mean.size != y.mean.size:
        raise ValueError(f"Both sets must have features of one width, got {x.mean.size} and {y.mean.size}.")
    return x, y


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F with F F^T = covariance."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:  # singular, as with fewer samples than features; ten times slower
        eigenvalues, eigenvectors = np.linalg.eigh(covariance)
        return eigenvectors * np.sqrt(eigenvalues.clip(min=0))


def _trace_of_root(product: np.ndarray) -> float:
    """Tr (A B)^1/2 from F^T B F, A = F F^T: its eigenvalues are those of A B, but it is symmetric."""
    return float(np.sqrt(np.linalg.eigvalsh(product).clip(min=0)).sum())


def _squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of `(n, dim)` and `(m, dim)` under the cubic kernel; no sample is compared with itself."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        gram = x @ y.T
        gram /= x.shape[1]
        gram += 1
        cube = gram * gram  # faster in numpy than a power
        cube *= gram
        return cube

    def mean_of_pairs(x: np.ndarray) -> float:
        gram = kernel(x, x)
        return (gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean())
