"""The formulas against torch-fidelity's, which were checked against the TensorFlow code of the papers.

Its metrics import torchvision, which the tests do not need otherwise: where either is missing, this is skipped.
"""

import numpy as np
import pytest
import torch

from hf_guided.evaluation import frechet_distance, inception_score, kernel_distance, precision_recall

try:
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
except Exception as error:  # a torchvision that does not fit torch fails with many kinds
    pytest.skip(f"torch-fidelity and torchvision cannot be imported: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def features():
    """Two sets of correlated features, of 600 and 500 samples, that lie partly apart."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((24, 24)) / 5
    a = random.standard_normal((600, 24)) @ mixing + 1
    b = random.standard_normal((500, 24)) @ (1.2 * mixing) + 1.1
    return torch.from_numpy(a), torch.from_numpy(b)


def test_frechet_distance(features):
    statistics = [metric_fid.fid_features_to_statistics(each) for each in features]
    expected = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet_distance(*features) == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)


def test_kernel_distance(features):
    a, b = features[0][:500], features[1]
    expected = metric_kid.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=500, verbose=False)
    assert kernel_distance(a, b) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)


def test_precision_recall(features):
    expected = metric_prc.prc_features_to_metric(*features, verbose=False)
    assert 0.1 < expected["precision"] < 0.95
    assert 0.1 < expected["recall"] < 0.95
    assert precision_recall(*features) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-7)


@pytest.mark.parametrize("splits", [1, 3])
def test_inception_score(splits):
    logits = 3 * torch.randn(600, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = metric_isc.isc_features_to_metric(logits, splits=splits, shuffle=False)
    score = inception_score(logits.softmax(dim=1), split_size=600 // splits)
    assert score == pytest.approx(expected["inception_score_mean"], rel=1e-9)
