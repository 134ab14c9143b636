import tracemalloc

import numpy as np
import pytest
import torch

from hf_guided.evaluation import density_coverage, manifold_metrics, nearest_distances, precision_recall


def drawn(n, dim, seed, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal((n, dim))).astype(np.float32)


def by_definition(generated, reference, distances, k=3, density_k=5):
    """Precision, recall, density and coverage from whole matrices of distances between and within the sets."""
    between, within_generated, within_reference = distances
    radius_generated = np.sort(within_generated, axis=1)[:, k]  # index 0 is the sample itself
    radius_reference = np.sort(within_reference, axis=1)[:, k]
    inside = between < np.sort(within_reference, axis=1)[:, density_k][:, None]
    return (
        (between <= radius_reference[:, None]).any(axis=0).mean(),
        (between <= radius_generated).any(axis=1).mean(),
        inside.sum() / (density_k * len(generated)),
        inside.any(axis=1).mean(),
    )


def euclidean(a, b):
    return np.sqrt(((a[:, None].astype(np.float64) - b) ** 2).sum(axis=2))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and tiles that do not divide the sets, so that each set spans several."""
    monkeypatch.setattr("hf_guided.evaluation.metrics.manifolds._BLOCK_ROWS", 17)
    monkeypatch.setattr("hf_guided.evaluation.metrics.manifolds._TILE", 70)


def test_all_four_are_those_of_the_definition():
    generated, reference = drawn(300, 5, 0, 0.8), drawn(260, 5, 1)
    distances = euclidean(reference, generated), euclidean(generated, generated), euclidean(reference, reference)
    expected = by_definition(generated, reference, distances)
    assert manifold_metrics(generated, reference) == pytest.approx(expected)
    assert manifold_metrics(torch.from_numpy(generated), reference.astype(np.float64)) == pytest.approx(expected)
    assert precision_recall(generated, reference) == pytest.approx(expected[:2])
    assert density_coverage(generated, reference) == pytest.approx(expected[2:])
    assert len({round(value, 2) for value in expected}) == 4


@pytest.mark.usefixtures("small_blocks")
def test_blocks_change_nothing():
    test_all_four_are_those_of_the_definition()
    # A tile narrower than k + 1.
    assert precision_recall(drawn(71, 3, 2), drawn(71, 3, 2), k=40) == (1.0, 1.0)


def test_precision_recall_by_hand():
    reference = np.array([[0.0], [1.0], [2.0], [10.0]])  # radii for k=1: 1, 1, 1, 8
    generated = np.array([[2.9], [3.1], [-1.5], [-40.0]])  # radii for k=1: 0.2, 0.2, 4.4, 38.5
    # 2.9 is in the ball of 2, and 2.9 and 3.1 are in that of 10; -1.5 and -40 are in none.
    # 0, 1 and 2 are in the ball of -1.5; 10 is in none (the ball of -40 ends at -1.5).
    assert precision_recall(generated, reference, k=1) == (0.5, 0.75)
    # k=2 reaches the second neighbour: radii 2, 1, 2, 9, and 4.4, 4.6, 4.6, 42.9.
    assert precision_recall(generated, reference, k=2) == (0.75, 0.75)
    assert precision_recall(reference, reference, k=1) == (1.0, 1.0)


def test_density_coverage_by_hand():
    reference = np.array([[0.0], [1.0], [2.0], [10.0]])  # radii for k=1: 1, 1, 1, 8
    generated = np.array([[0.5], [2.5], [5.0], [20.0]])
    # 0.5 is in the balls of 0 and 1; 2.5 in those of 2 and 10; 5 in that of 10; 20 in none.
    assert density_coverage(generated, reference, k=1) == (5 / 4, 1.0)
    # Edges belong to a ball for precision, not for density: 3 is at the edges of 2 alone, 18 of 10, -1 of 0.
    edges = np.array([[3.0], [18.0], [-1.0]])
    assert precision_recall(edges, reference, k=1)[0] == 1.0
    assert density_coverage(edges, reference, k=1) == (1 / 3, 1 / 4)  # 3 is inside the ball of 10


def test_density_coverage_of_equal_distributions():
    # Naeem et al. 2020, section 3: of N real and M generated samples, whatever the distribution.
    n, m, k = 60, 90, 5
    rows = [density_coverage(drawn(m, 3, 2 * seed), drawn(n, 3, 2 * seed + 1), k) for seed in range(200)]
    coverage = 1 - np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    deviations = np.std(rows, axis=0) / len(rows) ** 0.5
    assert (np.abs(np.mean(rows, axis=0) - [1, coverage]) < 4 * deviations).all()
    assert (deviations < 0.02).all()


def test_density_resists_an_outlier_that_fools_precision():
    reference, generated = drawn(200, 4, 3), drawn(200, 4, 4) + 30  # nowhere near
    reference[0] = 60
    precision, recall, density, coverage = manifold_metrics(generated, reference)
    assert precision == 1
    assert density < 0.3
    assert coverage == 1 / 200
    assert recall < 0.01


def test_a_common_shift_is_not_felt():
    g = np.random.default_rng(4)
    generated, reference = 0.8 * g.standard_normal((300, 6)), g.standard_normal((300, 6))
    assert manifold_metrics(generated + 1e5, reference + 1e5) == manifold_metrics(generated, reference)


def published_distances(u, v, overflow_to_float32=True):
    """The published evaluator's squared distances of two sets of at most 10,000: each step rounds to float16."""
    half = np.float16
    with np.errstate(over="ignore", invalid="ignore"):
        u16, v16 = u.astype(half), v.astype(half)
        norms_u, norms_v = (np.array([sum(row.astype(np.float64)) for row in rows**2], half) for rows in (u16, v16))
        inner = np.array([[sum(x * y for x, y in zip(a, b, strict=True)) for b in v16.tolist()] for a in u16.tolist()])
        from_u = norms_u[:, None] - half(2) * inner.astype(half)
        distances = np.maximum(from_u + norms_v, half(0))
        assert distances.dtype == from_u.dtype == half
    if np.isfinite(distances).all() or not overflow_to_float32:
        return distances.astype(np.float32)
    return np.maximum((u**2).sum(axis=1)[:, None] - 2 * (u @ v.T) + (v**2).sum(axis=1), 0)


def far_from_zero():
    """Two sets whose norms' rounding to float16 decides who is whose neighbour. Being multiples of 1/16, they have
    sums of products that are exact in float32, in whatever order."""
    return tuple((features * 16).round() / 16 + 15 for features in (drawn(190, 8, 11, 0.8), drawn(180, 8, 12)))


def test_float16_is_the_published_noise():
    generated, reference = far_from_zero()
    pairs = (reference, generated), (generated, generated), (reference, reference)
    expected = by_definition(generated, reference, [published_distances(*pair) for pair in pairs])
    assert manifold_metrics(generated, reference, distance_dtype="float16") == pytest.approx(expected)
    assert precision_recall(generated, reference, distance_dtype="float16") == pytest.approx(expected[:2])
    exact = manifold_metrics(generated, reference)
    assert all(abs(a - b) > 1e-3 for a, b in zip(expected, exact, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_float16_noise_is_the_same_in_blocks():
    test_float16_is_the_published_noise()


def test_a_tile_that_overflows_float16_is_computed_in_float32(monkeypatch):
    generated, reference = far_from_zero()
    reference[70] = 100  # squared norm 80,000
    pairs = (reference, generated), (generated, generated), (reference, reference)
    expected = by_definition(generated, reference, [published_distances(*pair) for pair in pairs])
    assert not np.isfinite(published_distances(reference, generated, overflow_to_float32=False)).all()
    whole = manifold_metrics(generated, reference, distance_dtype="float16")
    assert whole == pytest.approx(expected)
    # Within the generated set nothing overflows, so recall's radii keep the noise.
    assert whole != manifold_metrics(generated, reference)

    # Only the tile that overflows: with tiles of 70, those that hold reference[70].
    monkeypatch.setattr("hf_guided.evaluation.metrics.manifolds._TILE", 70)
    tiled = [
        np.block([[published_distances(u, v) for v in np.split(b, [70, 140])] for u in np.split(a, [70, 140])])
        for a, b in pairs
    ]
    expected_tiled = by_definition(generated, reference, tiled)
    assert manifold_metrics(generated, reference, distance_dtype="float16") == pytest.approx(expected_tiled)
    assert expected_tiled != expected


def test_features_that_overflow_float16_themselves():
    generated, reference = 1e5 * drawn(60, 4, 7), 1e5 * drawn(60, 4, 8)
    assert precision_recall(generated, reference, distance_dtype="float16") == precision_recall(generated, reference)


def test_nearest_distances():
    a, b = drawn(130, 6, 9), drawn(150, 6, 10)
    expected = euclidean(a, b)
    distances, indices = nearest_distances(a, b)
    assert (indices == expected.argmin(axis=1)).all()
    assert distances == pytest.approx(expected.min(axis=1), rel=1e-13)
    assert nearest_distances(torch.from_numpy(a[:1]), b)[1] == indices[:1]


@pytest.mark.usefixtures("small_blocks")
def test_nearest_distances_in_blocks():
    test_nearest_distances()


def test_nearest_distances_tell_a_copy_from_what_is_close():
    b = drawn(500, 64, 11) + 1000
    a = b[[7, 400, 3]].copy()
    a[1, 0] += np.float32(0.01)
    distances, indices = nearest_distances(a, b)
    assert indices.tolist() == [7, 400, 3]
    assert distances[[0, 2]].tolist() == [0, 0]
    assert distances[1] == abs(float(a[1, 0]) - float(b[400, 0]))


def test_memory_does_not_grow_with_the_pairs(monkeypatch):
    monkeypatch.setattr("hf_guided.evaluation.metrics.manifolds._BLOCK_ROWS", 64)
    monkeypatch.setattr("hf_guided.evaluation.metrics.manifolds._TILE", 500)
    a, b = drawn(3000, 2, 12), drawn(3000, 2, 13)
    for function, options in (
        (manifold_metrics, {}),
        (manifold_metrics, {"distance_dtype": "float16"}),
        (nearest_distances, {}),
    ):
        tracemalloc.start()
        function(a, b, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3e6  # all distances at once: 36 MB in float32


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        (drawn(9, 3, 0), drawn(9, 4, 0), "one width, got 3 and 4"),
        (drawn(9, 3, 0), drawn(1, 3, 0), r"at least 2 samples, got \(1, 3\)"),
        (drawn(9, 3, 0)[0], drawn(9, 3, 0), r"shape \(samples, columns\)"),
        (drawn(9, 3, 0), drawn(9, 3, 0) * [1, np.nan, 1], "must be finite"),
        (drawn(9, 3, 0), drawn(3, 3, 0), "k must be at least 1 and smaller than both sets"),
    ],
)
@pytest.mark.parametrize("function", [manifold_metrics, precision_recall, density_coverage])
def test_bad_features(function, a, b, sentence):
    with pytest.raises(ValueError, match=sentence):
        function(a, b)


def test_bad_arguments():
    with pytest.raises(ValueError, match="got k=5 for 9 generated and 5 reference samples"):
        precision_recall(drawn(9, 3, 0), drawn(5, 3, 0), k=5)
    with pytest.raises(ValueError, match="got k=0"):
        density_coverage(drawn(9, 3, 0), drawn(5, 3, 0), k=0)
    with pytest.raises(ValueError, match='must be "float32" or "float16", got \'bfloat16\''):
        precision_recall(drawn(9, 3, 0), drawn(9, 3, 0), distance_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"at least 1 sample, got \(0, 3\)"):
        nearest_distances(drawn(9, 3, 0), drawn(0, 3, 0))
