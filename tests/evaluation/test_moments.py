import pickle

import numpy as np
import pytest
import torch

from hf_guided.evaluation import FeatureStatistics, InceptionScoreStatistics, inception_score


def collected(features, batch_size=None):
    statistics = FeatureStatistics()
    for start in range(0, len(features), batch_size or len(features)):
        statistics.update(features[start : start + (batch_size or len(features))])
    return statistics


def relative(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


def drawn(n=9000, dim=5, seed=0):
    g = np.random.default_rng(seed)
    return g.standard_normal((n, dim)) @ g.standard_normal((dim, dim)) + g.standard_normal(dim)


@pytest.mark.parametrize("n", [2, 3, 4096, 4097, 9000])
def test_batches_give_numpys_mean_and_covariance(n):
    features = drawn(n)
    statistics = collected(features, 7)
    assert statistics.num_samples == n
    assert relative(statistics.mean, features.mean(axis=0)) < 1e-13
    assert relative(statistics.covariance, np.cov(features, rowvar=False)) < 1e-13
    for batch_size in (1000, None):  # to the bit, whatever the batch size
        other = collected(features, batch_size)
        assert (other.mean == statistics.mean).all()
        assert (other.covariance == statistics.covariance).all()


def test_float32_is_summed_in_float64():
    features = drawn().astype(np.float32)
    assert relative(collected(features, 64).covariance, np.cov(features.astype(np.float64), rowvar=False)) < 1e-13
    assert (collected(torch.from_numpy(features)).covariance == collected(features).covariance).all()
    half = torch.from_numpy(features).bfloat16()
    assert (collected(half).covariance == collected(half.double().numpy()).covariance).all()


def test_a_mean_a_million_times_the_deviation_costs_no_digits():
    features = np.random.default_rng(1).standard_normal((9000, 4)) + 1e6
    expected = np.cov(features - 1e6, rowvar=False)  # the subtraction is exact
    statistics, other = collected(features[:500], 100), collected(features[500:], 100)
    statistics.merge(other)
    for covariance in (collected(features, 100).covariance, statistics.covariance):
        assert relative(covariance, expected) < 1e-10
    assert relative((features.T @ features - 9000 * np.outer(*[features.mean(axis=0)] * 2)) / 8999, expected) > 1e-5


def test_uneven_shares_merge_to_the_whole():
    features = drawn()
    whole = collected(features)
    shares = [collected(part) if len(part) else FeatureStatistics() for part in np.split(features, [1, 1, 5000, 5300])]
    assert [share.num_samples for share in shares] == [1, 0, 4999, 300, 3700]
    for order in ([0, 1, 2, 3, 4], [1, 4, 3, 0, 2]):
        merged = FeatureStatistics()
        for index in order:
            merged.merge(pickle.loads(pickle.dumps(shares[index])))  # as processes send them
        assert merged.num_samples == whole.num_samples
        assert relative(merged.mean, whole.mean) < 1e-13
        assert relative(merged.covariance, whole.covariance) < 1e-13
    kept = shares[3].covariance.copy()
    shares[4].merge(shares[3])
    shares[4].update(features[:5000])
    assert relative(shares[4].covariance, whole.covariance) < 1e-13  # updates after a merge
    assert shares[3].num_samples == 300
    assert (shares[3].covariance == kept).all()


def test_memory_is_constant():
    statistics = FeatureStatistics()
    sizes = []
    for seed in range(40):
        statistics.update(drawn(1000, 16, seed))
        sizes.append(len(pickle.dumps(statistics)))
    assert max(sizes) < 4096 * 16 * 8 + 16 * 16 * 8 + 5000


def test_updated_arrays_may_be_used_again():
    features, buffer = drawn(100), np.empty((10, 5))
    statistics = FeatureStatistics()
    for batch in np.split(features, 10):
        buffer[:] = batch
        statistics.update(buffer)
    assert (statistics.covariance == collected(features).covariance).all()


def test_moments_from_elsewhere():
    features = drawn()
    known = collected(features[:4000])
    same = FeatureStatistics.from_moments(known.mean, known.covariance, 4000)
    assert (same.mean == known.mean).all()
    assert (same.covariance == known.covariance).all()
    same.update(features[4000:])
    assert relative(same.covariance, np.cov(features, rowvar=False)) < 1e-13
    assert (known.covariance == collected(features[:4000]).covariance).all()

    published = FeatureStatistics.from_moments(known.mean, known.covariance)
    assert published.num_samples is None
    assert (published.covariance == known.covariance).all()
    with pytest.raises(ValueError, match="num_samples is unknown"):
        published.update(features)
    with pytest.raises(ValueError, match="num_samples is unknown"):
        published.merge(known)
    with pytest.raises(ValueError, match="num_samples is unknown"):
        known.merge(published)


def test_what_statistics_refuse():
    statistics = collected(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        _ = statistics.covariance
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        _ = FeatureStatistics().mean
    with pytest.raises(ValueError, match="one width, got 3 and 4"):
        statistics.update(np.zeros((5, 4)))
    with pytest.raises(ValueError, match="one width, got 3 and 4"):
        statistics.merge(collected(np.zeros((5, 4))))
    with pytest.raises(ValueError, match="NaN"):
        statistics.update(np.array([[0, np.nan, 0]]))
    assert statistics.num_samples == 1
    with pytest.raises(ValueError, match=r"covariance of shape \(dim, dim\), got \(3,\) and \(3,\)"):
        FeatureStatistics.from_moments(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        FeatureStatistics.from_moments(np.zeros(1), np.array([[np.nan]]))
    with pytest.raises(ValueError, match="num_samples=1"):
        FeatureStatistics.from_moments(np.zeros(1), np.eye(1), 1)


def class_probabilities(n, classes=12, seed=0):
    logits = 3 * np.random.default_rng(seed).standard_normal((n, classes))
    logits[::5, 3] = -np.inf  # probabilities of exactly 0
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def score_by_definition(p, split_size):
    """The mean over splits of exp(mean KL(p(y|x) || p(y))), sample by sample."""
    scores = []
    for start in range(0, len(p), split_size):
        split = p[start : start + split_size]
        marginal = split.mean(axis=0)
        divergences = [sum(v * np.log(v / m) for v, m in zip(row, marginal, strict=True) if v > 0) for row in split]
        scores.append(np.exp(np.mean(divergences)))
    return np.mean(scores)


def test_inception_score_of_batches_in_any_order_from_several_processes():
    p = class_probabilities(1234)
    expected = score_by_definition(p, 100)
    assert inception_score(p, split_size=100) == pytest.approx(expected, rel=1e-12)
    starts = list(range(0, len(p), 37))  # most batches end within a split, some span two
    starts = [starts[i] for i in np.random.default_rng(0).permutation(len(starts))]
    processes = [InceptionScoreStatistics(100) for _ in range(3)]
    for index, start in enumerate(starts):
        processes[index % 2].update(p[start : start + 37], start)  # the third gets nothing
    merged = InceptionScoreStatistics(100)
    for process in processes:
        merged.merge(pickle.loads(pickle.dumps(process)))
    assert merged.score == pytest.approx(expected, rel=1e-12)
    whole = InceptionScoreStatistics(100)
    whole.update(torch.from_numpy(p), 0)
    assert whole.score == inception_score(p, split_size=100)


def test_inception_score_keeps_sums_alone():
    statistics = InceptionScoreStatistics()
    p = class_probabilities(5000, 10)
    statistics.update(p, 0)
    assert len(pickle.dumps(statistics)) < 1000


def test_what_the_inception_score_refuses():
    p = class_probabilities(250)
    statistics = InceptionScoreStatistics(100)
    with pytest.raises(ValueError, match="at least 1 image"):
        _ = statistics.score
    statistics.update(p[150:], 150)
    with pytest.raises(ValueError, match="images 0 to 99 only 0 were added"):
        _ = statistics.score
    statistics.update(p[:100], 0)
    with pytest.raises(ValueError, match="images 100 to 199 only 50 were added"):
        _ = statistics.score
    other = InceptionScoreStatistics(100)
    other.update(p[90:150], 90)
    with pytest.raises(ValueError, match="among 0 to 99 were added twice"):
        statistics.merge(other)
    with pytest.raises(ValueError, match="got 12 and 7"):
        statistics.update(class_probabilities(5, 7), 300)
    with pytest.raises(ValueError, match="got 100 and 50"):
        statistics.merge(InceptionScoreStatistics(50))
    with pytest.raises(ValueError, match="sum to 1"):
        statistics.update(2 * p, 0)
    with pytest.raises(ValueError, match="split_size must be at least 1"):
        InceptionScoreStatistics(0)
