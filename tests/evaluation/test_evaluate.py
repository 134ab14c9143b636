"""All numbers of one set against another, and the warnings about them."""

import json

import numpy as np
import pytest
from evaluation_helpers import Pixels, pixels

from hf_guided.evaluation import frechet_distance, kernel_distance, precision_recall
from hf_guided.evaluation.evaluate import evaluate, find_warnings, measure
from hf_guided.evaluation.features.feature_sets import collect_features
from hf_guided.evaluation.features.image_sets import ArrayImages
from hf_guided.evaluation.metrics.distances import inception_score
from hf_guided.evaluation.metrics.manifolds import density_coverage

NAMES = {0: "dark", 1: "gray", 2: "bright"}


def images(n, seed, names=NAMES, **arguments):
    labels = np.arange(n) % 3
    return ArrayImages(pixels(n, seed, **arguments), labels, names, name=f"set {seed}")


def test_every_number_carries_its_features_and_is_the_formula():
    generated, reference = images(60, 1), images(80, 2)
    extractor = Pixels(spatial=True)
    ours, real = (collect_features(images, extractor) for images in (generated, reference))
    metrics = measure(ours, real, generated.labels)
    a, b = ours.kept, real.kept
    precision, recall = precision_recall(a, b)
    density, coverage = density_coverage(a, b)
    probabilities = np.concatenate([extractor(batch).probabilities for batch in generated.batches([range(60)])])
    assert metrics == {
        "accuracy/pixels": float((probabilities.argmax(axis=1) == generated.labels).mean()),
        "fid/pixels": pytest.approx(frechet_distance(a, b), rel=1e-9),
        "sfid/pixels": pytest.approx(metrics["sfid/pixels"]),
        "inception_score/pixels": pytest.approx(inception_score(probabilities), rel=1e-6),
        "kid/pixels": pytest.approx(kernel_distance(a, b)),
        "precision/pixels": precision,
        "recall/pixels": recall,
        "density/pixels": density,
        "coverage/pixels": coverage,
    }
    spatial = [np.concatenate([extractor(batch).spatial for batch in s.batches([range(len(s))])])
               for s in (generated, reference)]  # fmt: skip
    assert metrics["sfid/pixels"] == pytest.approx(frechet_distance(*spatial), rel=1e-6)
    json.dumps(metrics)


def test_numbers_of_other_features_are_not_compared():
    generated, reference = (collect_features(images(20, seed), Pixels()) for seed in (1, 2))
    reference.fingerprint = "pixels of version 2"
    with pytest.raises(ValueError, match="or of other weights"):
        measure(generated, reference)


def test_evaluation_of_several_features_with_held_out_images(tmp_path):
    other = Pixels(dim=2)
    other.name = "few"
    generated = images(120, 1)
    result = evaluate(
        generated, images(90, 2), [Pixels(), other], held_out=images(40, 3), interval=True, cache_dir=tmp_path
    )
    assert {name.partition("/")[2] for name in result.metrics} == {"pixels", "few"}
    assert result.num_generated == 120
    assert result.num_reference == 90
    low, high = result.intervals["fid/pixels"]
    assert low < result.metrics["fid/pixels"] < high
    accuracies = result.class_accuracy["pixels"]
    assert list(accuracies) == ["dark", "gray", "bright"]
    assert np.mean(list(accuracies.values())) == pytest.approx(result.metrics["accuracy/pixels"])
    assert set(result.memorisation) == {"pixels", "few"}
    saved = json.loads(json.dumps(result.to_dict()))
    assert saved["metrics"] == result.metrics
    assert saved["memorisation"]["few"]["copied_share"] == result.memorisation["few"].copied_share
    printed = str(result)
    assert "120 images of set 1 against 90 of set 2" in printed
    assert f"{result.metrics['fid/few']:.4g}" in printed
    assert result.memorisation["few"].finding in printed
    assert not any("fewer" in note for note in result.notes)
    assert any("balanced over the classes" in note for note in result.notes)
    drawn = ArrayImages(generated.images, np.random.default_rng(0).integers(0, 3, 120), NAMES)
    assert not any("balanced over the classes" in note for note in find_warnings(drawn, generated))


def test_accuracy_is_of_names_and_not_of_ids():
    swapped = {0: "Bright", 1: "gray", 2: "dark"}
    generated = images(60, 1, swapped)
    result = evaluate(generated, images(60, 2), [Pixels()])
    predictions = collect_features(generated, Pixels()).predictions
    meant = np.array([2, 1, 0])[generated.labels]
    assert result.metrics["accuracy/pixels"] == pytest.approx((predictions == meant).mean())

    unknown = evaluate(images(60, 1, {0: "cat", 1: "dog", 2: "bird"}), images(60, 2), [Pixels()])
    assert "accuracy/pixels" not in unknown.metrics
    assert any("no accuracy by pixels" in note and "'cat'" in note for note in unknown.notes)
    ids = evaluate(images(60, 1, None), images(60, 2), [Pixels()])
    predictions = collect_features(images(60, 1), Pixels()).predictions
    assert ids.metrics["accuracy/pixels"] == pytest.approx((predictions == generated.labels).mean())


def test_what_must_be_known_is_told(tmp_path):
    class Wide(Pixels):
        name = "wide"

    few = evaluate(images(20, 1), images(60, 2), [Wide(dim=40)])
    assert any("20 samples are fewer than the 40 features of wide" in note for note in few.notes)
    assert any("compare this one, of 20 samples, only" in note for note in few.notes)

    gray = evaluate(images(60, 1, channels=1, size=4), images(60, 2), [GrayOrRGB()])
    assert any("set 1 is gray and set 2 is RGB" in note for note in gray.notes)

    two_of_three = ArrayImages(pixels(60, 1), np.arange(60) % 2, NAMES, name="two")
    missing = evaluate(two_of_three, images(60, 2), [Pixels()])
    assert any("of the reference's 3 classes 1 have no sample: bright" in note for note in missing.notes)

    with pytest.raises(ValueError, match="set 1 has 5 images; at least 6"):
        evaluate(images(5, 1), images(60, 2), [Pixels()])


class GrayOrRGB(Pixels):
    """Repeats gray values, as extractors of RGB images do."""

    def __call__(self, batch):
        return super().__call__(batch.expand(-1, 3, -1, -1))


def test_published_statistics_are_used_for_inception_alone():
    class Inception(Pixels):
        name = "inception"

    generated, reference = images(60, 1), images(80, 2)
    whole = collect_features(images(500, 3), Inception(spatial=True))
    reference.statistics = {"features": whole.statistics, "spatial": whole.spatial_statistics}
    ours = collect_features(generated, Inception(spatial=True))
    result = evaluate(generated, reference, [Inception(spatial=True), Pixels(spatial=True)])
    assert result.metrics["fid/inception"] == frechet_distance(ours.statistics, whole.statistics)
    assert result.metrics["sfid/inception"] == frechet_distance(ours.spatial_statistics, whole.spatial_statistics)
    assert result.metrics["fid/pixels"] != result.metrics["fid/inception"]
    for metric in ("kid", "precision", "recall", "density", "coverage"):  # of the images themselves
        assert result.metrics[f"{metric}/inception"] == result.metrics[f"{metric}/pixels"]
    assert any("statistics in set 2" in note for note in result.notes)


def test_saved_statistics_tell_what_they_can(tmp_path):
    generated, reference = images(60, 1), collect_features(images(80, 2), Pixels())
    reference.kept = reference.kept_indices = None
    result = evaluate(generated, reference, [Pixels()])
    ours = collect_features(generated, Pixels())
    assert result.metrics["fid/pixels"] == frechet_distance(ours.statistics, reference.statistics)
    assert {name.partition("/")[0] for name in result.metrics} == {"accuracy", "fid", "inception_score"}
    assert any("statistics without images" in note for note in result.notes)
