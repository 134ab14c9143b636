"""Precision, recall, density and coverage, from balls around samples that reach to their nearest neighbours.

Distances between two sets are computed in blocks, so that memory is bounded for any number of samples.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from .moments import Features, feature_pair

_TILE = 10_000  # samples of each set that the published evaluator computes at once, and again where float16 overflows
_BLOCK_ROWS = 1024  # of a tile, whose distances are held at once: 40 MB in float32


class ManifoldMetrics(NamedTuple):
    """Two metrics of fidelity and two of diversity, from [`manifold_metrics`].

    All but density, which may exceed 1, are between 0 and 1.
    """

    precision: float  # the fraction of generated samples inside the reference's manifold
    recall: float  # the fraction of reference samples inside the generated manifold
    density: float  # the average number of the reference's balls that contain a generated sample, divided by k
    coverage: float  # the fraction of reference samples whose ball contains a generated sample


def manifold_metrics(
    generated: Features, reference: Features, k: int = 3, density_k: int = 5, distance_dtype: str = "float32"
) -> ManifoldMetrics:
    """[`precision_recall`] and [`density_coverage`] at once, which is faster, since they share their distances.

    Args:
        generated, reference, k, distance_dtype: As for [`precision_recall`].
        density_k (`int`, defaults to 5): As `k` for [`density_coverage`].

    Raises:
        `ValueError`: For features that are not finite or of one width, too few samples, or another `distance_dtype`.
    """
    x, y = feature_pair(generated, reference)
    neighbours = np.array([k, density_k])
    if neighbours.min() < 1 or neighbours.max() >= min(len(x), len(y)):
        raise ValueError(
            f"k must be at least 1 and smaller than both sets, got k={k if k == density_k else (k, density_k)} for "
            f"{len(x)} generated and {len(y)} reference samples."
        )
    if distance_dtype not in ("float32", "float16"):
        raise ValueError(f'distance_dtype must be "float32" or "float16", got {distance_dtype!r}.')
    dtype = np.dtype(distance_dtype)
    # Distances do not depend on a common shift, but their rounding does; the published rounding is without a shift.
    center = y.mean(axis=0, dtype=np.float64) if dtype == np.float32 else np.zeros(1, dtype=np.float32)
    radius_x, _ = _neighbour_radii(x, neighbours, center, dtype)
    radius_y, density_radius = _neighbour_radii(y, neighbours, center, dtype)

    x_in_y, y_in_x, covered = np.zeros(len(x), dtype=bool), np.zeros(len(y), dtype=bool), np.zeros(len(y), dtype=bool)
    num_inside = 0
    for rows, columns, distances in _squared_distances(y, x, center, dtype):
        x_in_y[columns] |= (distances <= radius_y[rows, None]).any(axis=0)
        y_in_x[rows] |= (distances <= radius_x[columns]).any(axis=1)
        inside = distances < density_radius[rows, None]
        num_inside += int(np.count_nonzero(inside))
        covered[rows] |= inside.any(axis=1)
    return ManifoldMetrics(
        precision=float(x_in_y.mean()),
        recall=float(y_in_x.mean()),
        density=num_inside / (density_k * len(x)),
        coverage=float(covered.mean()),
    )


def precision_recall(
    generated: Features, reference: Features, k: int = 3, distance_dtype: str = "float32"
) -> tuple[float, float]:
    r"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eqs. 1 and 2).

    The manifold of a set is the union of balls around its samples, each reaching to the k-th nearest neighbour in the
    set.

    Published values of ADM include rounding errors of float16, which `distance_dtype="float16"` reproduces: features
    are rounded, and so is the result of each step of \\(|u|^2 - 2 u \cdot v + |v|^2\\), over 10,000 by 10,000 samples
    at once; a tile in which anything overflows (above 65504) is computed again in float32. Single samples at the edge
    of a ball may still differ, since TensorFlow's rounding within the sum of a squared norm depends on the device; here
    sums are accumulated in float32 and rounded once.

    Args:
        generated, reference (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`): Features of generated and of real
            samples, each n > k.
        k (`int`, defaults to 3): The neighbour that sets the radius, not counting the sample itself.
        distance_dtype (`str`, defaults to `"float32"`): The type in which squared distances are computed;
            `"float16"` for comparisons with published values.

    Returns:
        `tuple[float, float]`: Precision (fidelity) and recall (diversity), see [`ManifoldMetrics`].
    """
    return manifold_metrics(generated, reference, k, k, distance_dtype)[:2]


def density_coverage(generated: Features, reference: Features, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, section 3).

    Both use only the balls around real samples, without their edges as in the authors' code. An outlier among these has
    a large ball, which raises precision but counts as one of many for density. Outliers among the generated samples
    raise recall but not coverage. For equal distributions the expected density is 1, and the expected coverage of
    equally many samples about `1 - 2**-k`.

    Args:
        generated, reference, k: As for [`precision_recall`].

    Returns:
        `tuple[float, float]`: Density (fidelity) and coverage (diversity), see [`ManifoldMetrics`].
    """
    return manifold_metrics(generated, reference, k, k)[2:]


def nearest_distances(a: Features, b: Features) -> tuple[np.ndarray, np.ndarray]:
    """For each sample of one set, the distance to the nearest sample of another, and its index.

    Args:
        a (`np.ndarray` or `torch.Tensor` of shape `(n, dim)`), b (of shape `(m, dim)`): Features of the two sets.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Euclidean distances, float64 of shape `(n,)`, exactly 0 for an equal sample;
        and the indices of the nearest in `b`, int64 of shape `(n,)`.
    """
    x, y = feature_pair(a, b, at_least=1)
    smallest, indices = np.full(len(x), np.inf), np.zeros(len(x), dtype=np.int64)
    for rows, columns, distances in _squared_distances(x, y, y.mean(axis=0, dtype=np.float64), np.dtype(np.float64)):
        nearest = distances.argmin(axis=1)
        found = distances[np.arange(len(nearest)), nearest]
        closer = found < smallest[rows]
        indices[rows] = np.where(closer, columns.start + nearest, indices[rows])
        smallest[rows] = np.where(closer, found, smallest[rows])
    # From differences, since the expanded square loses small distances to rounding.
    for start in range(0, len(x), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        smallest[rows] = np.linalg.norm(x[rows].astype(np.float64) - y[indices[rows]], axis=1)
    return smallest, indices


def _neighbour_radii(features: np.ndarray, neighbours: np.ndarray, center: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Squared distances of each sample to its k-th nearest neighbours, of shape `(k's, samples)`: index k of the sorted
    row; index 0 is the sample itself."""
    count = int(neighbours.max()) + 1
    smallest = np.full((len(features), count), np.inf, dtype=np.float32)
    for rows, _, distances in _squared_distances(features, features, center, dtype):
        block = torch.from_numpy(distances)  # topk is five times as fast as np.partition
        candidates = block.topk(min(count, block.shape[1]), largest=False).values.numpy()
        smallest[rows] = np.sort(np.concatenate([smallest[rows], candidates], axis=1), axis=1)[:, :count]
    return smallest[:, neighbours].T


def _squared_distances(
    a: np.ndarray, b: np.ndarray, center: np.ndarray, dtype: np.dtype
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yields all squared distances in blocks: rows of `a`, rows of `b`, and their distances, float32 or wider.

    `center` is subtracted first. A tile that overflows float16 is computed in float32, as published.
    """
    with tqdm(total=len(a) * len(b), desc="distances", unit="pair", unit_scale=True, delay=5, leave=False) as progress:
        for top, left in product(range(0, len(a), _TILE), range(0, len(b), _TILE)):
            tile = a[top : top + _TILE], b[left : left + _TILE]
            columns = slice(left, left + len(tile[1]))
            blocks = _tile_distances(*tile, center, dtype)
            if dtype == np.float16:
                halves = list(blocks)
                overflows = not all(np.isfinite(half).all() for half in halves)
                blocks = _tile_distances(*tile, center, np.dtype(np.float32)) if overflows else iter(halves)
            start = top
            for block in blocks:
                yield slice(start, start + len(block)), columns, block.astype(np.result_type(dtype, np.float32))
                start += len(block)
                progress.update(block.size)


def _tile_distances(u: np.ndarray, v: np.ndarray, center: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yields blocks of rows of |u|^2 - 2 u.v + |v|^2, clipped at 0, where the result of each step is of `dtype`."""
    with np.errstate(over="ignore", invalid="ignore"):  # float16 may overflow
        u, v = (u - center).astype(dtype), (v - center).astype(dtype)
        wide = np.result_type(dtype, np.float32)  # the type of sums
        norm_u, norm_v = (np.square(w).sum(axis=1, dtype=wide).astype(dtype) for w in (u, v))
        u, v = u.astype(wide, copy=False), v.astype(wide, copy=False)
    for start in range(0, len(u), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        with np.errstate(over="ignore", invalid="ignore"):
            distances = (u[rows] @ v.T).astype(dtype, copy=False)
            distances *= -2
            distances += norm_u[rows, None]
            distances += norm_v
            np.maximum(distances, 0, out=distances)
        yield distances
