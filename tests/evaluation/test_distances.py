import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_guided.evaluation import (
    FeatureStatistics,
    frechet_distance,
    frechet_interval,
    inception_score,
    kernel_distance,
    precision_recall,
)

CASES = json.loads((Path(__file__).parent / "metrics.json").read_text())["cases"]


def reference_case(case):
    """Draws the features exactly as metrics.json says under "how"."""
    g = np.random.default_rng(case["seed"])
    n_ref, n_gen, dim = int(g.integers(1500, 2500)), int(g.integers(1200, 2200)), int(g.choice([32, 64, 96]))
    mix = g.standard_normal((dim, dim)).astype("f4") / dim**0.5
    ref = (g.standard_normal((n_ref, dim)).astype("f4") @ mix + 1).astype("f4")
    gen = (0.9 * g.standard_normal((n_gen, dim)).astype("f4") @ mix + 1.05).astype("f4")
    weight = (g.standard_normal((dim, 100)).astype("f4") * 0.8).astype("f4")
    logits = gen @ weight
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert (n_ref, n_gen, dim) == (case["n_reference"], case["n_generated"], case["dim"])
    return gen, ref, exp / exp.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed {case['seed']}")
def test_published_evaluator(case):
    generated, reference, probabilities = reference_case(case)
    # Drawing the features involves a float32 matmul, so their last bits (and with them a sample at the edge of a ball)
    # differ between machines; the published code also subtracts the means in float32.
    assert frechet_distance(generated, reference) == pytest.approx(case["fid"], rel=1e-6)
    assert frechet_distance(reference, torch.from_numpy(generated)) == pytest.approx(case["fid"], rel=1e-6)
    assert precision_recall(generated, reference) == pytest.approx((case["precision"], case["recall"]), abs=1e-3)
    noisy = precision_recall(generated, reference, distance_dtype="float16")
    assert noisy == pytest.approx((case["precision"], case["recall"]), abs=5e-3)
    score = inception_score(probabilities, split_size=case["inception_split"])
    assert score == pytest.approx(case["inception_score"], rel=1e-6)
    assert inception_score(probabilities) != pytest.approx(case["inception_score"], rel=1e-3)  # the splits matter


def test_frechet_distance_of_known_gaussians():
    # Samples whose mean and covariance are exact: diagonal Gaussians have the distance |m1-m2|^2 + sum (s1-s2)^2.
    g = np.random.default_rng(0)
    x = g.standard_normal((500, 4))
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    s1, s2, shift = np.array([1.0, 2, 3, 4]), np.array([4.0, 0.5, 3, 1]), np.array([1.0, -2, 0, 3])
    expected = (shift**2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(x * s1, x * s2 + shift) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x * s1 + 1e6, x * s2 + shift + 1e6) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_with_fewer_samples_than_features():
    g = np.random.default_rng(1)
    a, b = g.standard_normal((8, 32)), g.standard_normal((9, 32)) + 1
    # Tr (A B)^1/2 is the nuclear norm of (centred a)^T's Gram with b's, which needs no covariance at all.
    ca, cb = (a - a.mean(axis=0)) / 7**0.5, (b - b.mean(axis=0)) / 8**0.5
    nuclear = np.linalg.svd(ca @ cb.T, compute_uv=False).sum()
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + (ca**2).sum() + (cb**2).sum() - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_is_symmetric():
    generated, reference, _ = reference_case(CASES[0])
    distance = frechet_distance(generated, reference)
    assert frechet_distance(reference, generated) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(generated, generated[::-1].copy()) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_statistics():
    generated, reference, _ = reference_case(CASES[0])
    distance = frechet_distance(generated, reference)
    statistics = FeatureStatistics()
    for batch in np.array_split(reference, 30):
        statistics.update(batch)
    assert frechet_distance(generated, statistics) == distance
    published = FeatureStatistics.from_moments(statistics.mean, statistics.covariance)
    assert frechet_distance(published, generated) == pytest.approx(distance, rel=1e-12)
    with pytest.raises(ValueError, match="one width, got 95 and 96"):
        frechet_distance(generated[:, 1:], published)
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        frechet_distance(FeatureStatistics(), published)


def gaussian(generator, n, dim, scale, shift):
    return scale * np.linspace(2, 0.2, dim) * generator.standard_normal((n, dim)) + shift


@pytest.mark.parametrize(
    ("n", "dim", "scale", "shift", "widest"),
    [
        (400, 8, 0.9, 0.2, 1.2),
        (100, 32, 0.9, 0.2, 1.35),  # few samples for the dimension
        (24, 32, 0.9, 0.2, 1.35),  # fewer than features: singular covariances
        (400, 8, 1.0, 0.0, 1.6),  # a perfect model: sqrt(2) too wide
    ],
)
def test_frechet_interval_covers_what_other_samples_give(n, dim, scale, shift, widest):
    g = np.random.default_rng(6)
    reference = FeatureStatistics.from_moments(np.zeros(dim), np.diag(np.linspace(2, 0.2, dim) ** 2))
    draws = [frechet_distance(gaussian(g, n, dim, scale, shift), reference) for _ in range(400)]
    intervals, covered = [], 0
    for _ in range(60):
        low, high = frechet_interval(gaussian(g, n, dim, scale, shift), reference, num_splits=20)
        intervals.append((high - low) / 2)
        covered += low < np.mean(draws) < high
    # 400 draws know the deviation to 4 %, 60 intervals the mean width to about 3 %.
    assert 0.88 < np.mean(intervals) / 1.96 / np.std(draws, ddof=1) < widest
    assert covered >= 54  # of 60, of which 57 are expected


def test_frechet_interval_is_the_mean_over_all_halves():
    g = np.random.default_rng(8)
    generated, reference = g.standard_normal((7, 2)), g.standard_normal((50, 2))
    gaps = []
    for half in itertools.combinations(range(7), 4):
        rest = np.setdiff1d(range(7), half)
        gaps.append(frechet_distance(generated[list(half)], reference) - frechet_distance(generated[rest], reference))
    deviation = np.sqrt(np.mean(np.square(gaps))) / 2
    half_width = frechet_interval(generated, reference, num_splits=3000)[1] - frechet_distance(generated, reference)
    assert half_width / 1.95996 == pytest.approx(deviation, rel=0.05)  # each of the 35 halves about 86 times


def test_frechet_interval_of_samples_in_classes():
    # Of two classes far apart, halves at random hold uneven shares; where the shares are given, that is no uncertainty.
    g = np.random.default_rng(7)
    classes = np.arange(200) % 2
    samples = g.standard_normal((200, 3)) + 20 * classes[:, None]
    reference = g.standard_normal((300, 3)) + 20 * (np.arange(300) % 2)[:, None] + 1
    drawn, given = (frechet_interval(samples, reference, strata=strata) for strata in (None, classes))
    assert given[1] - given[0] < 0.5 * (drawn[1] - drawn[0])
    assert np.mean(given) == pytest.approx(frechet_distance(samples, reference))


def test_frechet_interval_is_seeded_and_grows_with_confidence():
    generated, reference, _ = reference_case(CASES[0])
    numpy_state = np.random.get_state()[1].copy()
    low, high = frechet_interval(generated, reference, num_splits=5)
    assert low < frechet_distance(generated, reference) < high
    assert frechet_interval(torch.from_numpy(generated), reference, num_splits=5) == (low, high)
    assert frechet_interval(generated, reference, num_splits=5, seed=1) != (low, high)
    narrow = frechet_interval(generated, reference, num_splits=5, confidence=0.6827)
    assert (high - low) / (narrow[1] - narrow[0]) == pytest.approx(1.95996, rel=1e-3)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert frechet_interval(generated[:4], generated[4:8])[0] >= 0


def test_kernel_distance_is_the_unbiased_estimate():
    g = np.random.default_rng(2)
    a, b = g.standard_normal((7, 3)), g.standard_normal((5, 3)) + 0.5

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    within = [np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    expected = sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_over_subsets():
    g = np.random.default_rng(3)
    a, b = g.standard_normal((400, 8)), g.standard_normal((300, 8)) + 0.3
    whole = kernel_distance(a, b)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    subsets = kernel_distance(a, b, subset_size=100)
    assert subsets == pytest.approx(whole, rel=0.1)
    assert subsets != whole
    assert subsets == kernel_distance(a, b, subset_size=100)
    assert subsets != kernel_distance(a, b, subset_size=100, seed=1)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)
    # Unbiased: between samples of one distribution it scatters around 0.
    same = [kernel_distance(g.standard_normal((60, 8)), g.standard_normal((60, 8))) for _ in range(40)]
    assert min(same) < 0 < max(same)


def test_inception_score_bounds():
    one_hot = np.eye(10)[np.arange(1000) % 10]
    assert inception_score(one_hot) == pytest.approx(10)
    assert inception_score(np.full((20, 10), 0.1)) == pytest.approx(1)
    # The short last split (one sample: score 1) weighs as much as the first (score 10).
    assert inception_score(one_hot[:11], split_size=10) == pytest.approx(5.5)


def noise(*shape):
    return np.random.default_rng(5).standard_normal(shape)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        (noise(9, 3), noise(9, 4), "one width, got 3 and 4"),
        (noise(9, 3), noise(1, 3), r"at least 2 samples, got \(1, 3\)"),
        (noise(9), noise(9, 3), r"shape \(samples, columns\)"),
        (noise(9, 3), noise(9, 3) * [1, np.nan, 1], "must be finite"),
    ],
)
def test_bad_features(distance, a, b, sentence):
    with pytest.raises(ValueError, match=sentence):
        distance(a, b)


def test_bad_arguments():
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(noise(9, 3) ** 2)
    with pytest.raises(ValueError, match="non-negative"):
        inception_score(np.array([[1.5, -0.5], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="split_size must be at least 1"):
        inception_score(np.eye(3), split_size=0)
    with pytest.raises(ValueError, match="subset_size >= 2"):
        kernel_distance(noise(9, 3), noise(9, 3), subset_size=1)
    with pytest.raises(ValueError, match="num_splits >= 1"):
        frechet_interval(noise(9, 3), noise(9, 3), num_splits=0)
    with pytest.raises(ValueError, match="confidence between 0 and 1, got 40 and 95"):
        frechet_interval(noise(9, 3), noise(9, 3), confidence=95)
    with pytest.raises(ValueError, match="at least 4 samples"):
        frechet_interval(noise(3, 3), noise(9, 3))
    with pytest.raises(ValueError, match=r"strata of shape \(8,\) for 9 samples"):
        frechet_interval(noise(9, 3), noise(9, 3), strata=np.zeros(8))
