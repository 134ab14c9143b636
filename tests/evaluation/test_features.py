import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_guided.evaluation.distances import frechet_distance, precision_recall
from hf_guided.evaluation.features import classifier_features, judge_features


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5)
    model = ResNetForImageClassification(config)
    model(torch.randn(64, 1, 16, 16))  # in training mode: gives batch normalisation statistics unlike its defaults
    return model.eval()


def images(n, seed=1):
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_features_are_means_of_the_last_map(classifier):
    x = images(10)
    features, probabilities = classifier_features(classifier, x, batch_size=4)
    with torch.no_grad():
        output = classifier(x, output_hidden_states=True)
    assert features.dtype == probabilities.dtype == np.float32
    assert features.shape == (10, 12)
    np.testing.assert_allclose(features, output.hidden_states[-1].mean(dim=(2, 3)), atol=1e-6)
    np.testing.assert_allclose(probabilities, output.logits.softmax(dim=1), atol=1e-6)


def test_features_of_a_token_model():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, num_channels=1, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    features, _ = classifier_features(model, images(4))
    with torch.no_grad():
        tokens = model(images(4), output_hidden_states=True).hidden_states[-1]
    assert tokens.shape == (4, 5, 8)
    np.testing.assert_allclose(features, tokens.mean(dim=1), atol=1e-6)


def test_mode_and_gradients_are_left_as_they_were(classifier):
    classifier.train()
    try:
        statistics = {name: value.clone() for name, value in classifier.named_buffers()}
        trained, _ = classifier_features(classifier, images(6).requires_grad_())
        assert classifier.training
        assert all(torch.equal(statistics[name], value) for name, value in classifier.named_buffers())
        with pytest.raises(ValueError, match="channel dimension"):  # raised inside the model
            classifier_features(classifier, torch.zeros(2, 2, 16, 16))
        assert classifier.training
    finally:
        classifier.eval()
    evaluated, _ = classifier_features(classifier, images(6))
    assert not classifier.training
    np.testing.assert_array_equal(trained, evaluated)


def test_half_precision_classifier_gives_float32(classifier):
    half = ResNetForImageClassification(classifier.config)
    half.load_state_dict(classifier.state_dict())
    features, probabilities = classifier_features(half.eval().to(torch.bfloat16), images(6))
    assert features.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(features, classifier_features(classifier, images(6))[0], atol=0.05)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_judge_features(classifier):
    reference, _ = classifier_features(classifier, images(50, seed=2))
    generated = images(40, seed=3) * 0.7
    features, probabilities = classifier_features(classifier, generated)
    labels = torch.from_numpy(probabilities.argmax(axis=1))
    labels[:10] = (labels[:10] + 1) % 5  # a quarter asked for something else

    row = judge_features(features, probabilities, labels, reference)
    precision, recall = precision_recall(features, reference)
    assert row == {
        "accuracy": 0.75,
        "fid": pytest.approx(frechet_distance(features, reference)),
        "precision": precision,
        "recall": recall,
    }
    assert {type(value) for value in row.values()} == {float}  # so that json takes them
    assert judge_features(features, probabilities, labels.tolist(), reference)["accuracy"] == 0.75
    # Real images of the same kind are nearer to the reference than the faded ones.
    vivid = classifier_features(classifier, images(40, seed=3))
    assert judge_features(*vivid, labels, reference)["fid"] < row["fid"]


def test_bad_input(classifier):
    reference, _ = classifier_features(classifier, images(5))
    with pytest.raises(ValueError, match=r"floating-point tensor .* got torch.uint8"):
        classifier_features(classifier, torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1, 16, 16\)"):
        classifier_features(classifier, torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) for 4"):
        judge_features(*classifier_features(classifier, images(4)), [0, 1, 2], reference)
