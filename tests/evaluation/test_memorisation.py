"""Copies are found, new images are not accused."""

import numpy as np
import pytest
from evaluation_helpers import Pixels, pixels
from scipy.stats import mannwhitneyu

from hf_guided.evaluation.features.feature_sets import FeatureSet, collect_features
from hf_guided.evaluation.features.image_sets import ArrayImages
from hf_guided.evaluation.memorisation import closest_pairs, memorisation
from hf_guided.evaluation.metrics.moments import FeatureStatistics


def feature_set(features):
    statistics = FeatureStatistics()
    statistics.update(features)
    rows = np.arange(len(features))
    return FeatureSet("these", "", len(features), statistics, kept=features, kept_indices=rows)


def draw(n, seed):
    return np.random.default_rng(seed).standard_normal((n, 6)).astype(np.float32)


def nearest(a, b):
    return np.linalg.norm(a[:, None].astype(float) - b[None], axis=2).min(axis=1)


def test_numbers_by_brute_force():
    train, held_out, generated = draw(200, 0), draw(80, 1), 0.8 * draw(120, 2)
    found = memorisation(feature_set(generated), feature_set(train), feature_set(held_out), num_pairs=4)
    ours, theirs = nearest(generated, train), nearest(held_out, train)
    assert found.closer_share == pytest.approx((ours[:, None] < theirs[None]).mean())
    assert found.copied_share == pytest.approx((ours < np.quantile(theirs, 0.01)).mean())
    assert found.median == pytest.approx(np.median(ours), rel=1e-5)
    assert found.held_out_median == pytest.approx(np.median(theirs), rel=1e-5)
    test = mannwhitneyu(theirs, ours, alternative="greater", use_continuity=False, method="asymptotic")
    from scipy.stats import norm

    assert norm.sf(found.z) == pytest.approx(test.pvalue, rel=1e-6)
    distances = [distance for _, _, distance in found.pairs]
    assert distances == sorted(distances)
    assert len({index for _, index, _ in found.pairs}) == 4
    for sample, index, distance in found.pairs:
        assert distance == pytest.approx(np.linalg.norm(generated[sample] - train[index]), rel=1e-4)


def test_copies_are_found_and_new_images_are_not_accused():
    train, held_out = draw(300, 0), draw(200, 1)
    new = memorisation(feature_set(draw(400, 2)), feature_set(train), feature_set(held_out))
    assert abs(new.z) < 3
    assert new.copied_share < 0.04
    assert "no sign of copying" in new.finding

    copies = np.concatenate([draw(300, 3), train[:100] + 1e-3])
    found = memorisation(feature_set(copies), feature_set(train), feature_set(held_out))
    assert 0.24 < found.copied_share < 0.3
    assert "copies training images" in found.finding

    typical = memorisation(feature_set(0.5 * draw(400, 4)), feature_set(train), feature_set(held_out))
    assert typical.z > 3
    assert "as with strong guidance" in typical.finding or "copies" in typical.finding


def test_samples_as_far_as_held_out_images_are_even():
    held_out = draw(100, 1)
    assert memorisation(feature_set(held_out), feature_set(draw(50, 0)), feature_set(held_out)).closer_share == 0.5


def test_pairs_as_a_picture():
    train = pixels(40)
    generated = np.concatenate([pixels(10, seed=1), train[[7]]])
    sets = [ArrayImages(images) for images in (generated, train, pixels(20, seed=2))]
    found = memorisation(*(collect_features(images, Pixels(dim=8)) for images in sets), num_pairs=3)
    assert found.pairs[0] == (10, 7, 0.0)
    picture = np.asarray(closest_pairs(found, sets[0], sets[1]))
    assert picture.ndim == 3
    pair = np.asarray(sets[0].picture(10).resize((56, 56), 0))
    rows = [y for y in range(picture.shape[0] - 55) for x in range(picture.shape[1] - 55)
            if np.array_equal(picture[y : y + 56, x : x + 56], pair)]  # fmt: skip
    assert len(rows) == 2  # above as it was generated, below as it was trained on


def test_statistics_alone_are_not_enough():
    whole, statistics = feature_set(draw(10, 0)), feature_set(draw(10, 1))
    statistics.kept = None
    with pytest.raises(ValueError, match="training images are only given as statistics"):
        memorisation(whole, statistics, whole)
