"""How good a noisy classifier is: against brute force, on classifiers whose faults are known, and as users run it."""

import json
import math
import os
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from PIL import Image
from torch.utils.data import TensorDataset
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hf_guided import (
    ADMClassifierConfig,
    ADMForImageClassification,
    ADMScheduler,
    ADMUNet2DModel,
    ClassifierGuidedPipeline,
)
from hf_guided.cli import main
from hf_guided.data import LabelledImages
from hf_guided.evaluation.classifier_findings import ClassifierInspection, NoiseLevel, _binomial_tail, label_entropy
from hf_guided.evaluation.classifier_inspection import expected_calibration_error, inspect_classifier
from hf_guided.evaluation.plots import classifier_curves
from hf_guided.guidance import ClassifierGuidance
from hf_guided.training.arguments import parse_arguments
from hf_guided.training.train_classifier import ClassifierArguments, train_classifier

NAMES = ["ant", "bee", "cat", "dog"]
PROTOTYPES = torch.eye(4).repeat_interleave(2, dim=1).view(4, 1, 2, 4)  # two pixels of a class are 1, the others 0
LINEAR = ADMScheduler()


class Bayes(torch.nn.Module):
    """The best classifier there is where each class has one image: p(y | x_t) in closed form. Faults are put into it.

    Args:
        change: Takes logits `(batch, 4)`, images and timesteps, and returns other logits.
        knows_noise: Otherwise it takes every image for a clean one.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, change=lambda logits, images, timestep: logits, knows_noise=True):
        super().__init__()
        self.config = ADMClassifierConfig(sample_size=[2, 4], in_channels=1, id2label=dict(enumerate(NAMES)))
        self.change, self.knows_noise = change, knows_noise
        self.told = []

    def forward(self, pixel_values, timestep):
        self.told.append(timestep)
        alpha_bar = LINEAR.alphas_cumprod.double()[timestep.long() if self.knows_noise else torch.zeros_like(timestep)]
        # log N(x_t; sqrt(alpha_bar) prototype, 1 - alpha_bar), whose norm all classes share
        dots = torch.einsum("bchw,kchw->bk", pixel_values.double(), PROTOTYPES.double())
        logits = alpha_bar.sqrt()[:, None] / (1 - alpha_bar)[:, None] * dots
        return ImageClassifierOutput(logits=self.change(logits.float(), pixel_values, timestep))


def images(per_class, num_classes=4):
    labels = torch.arange(num_classes).repeat(per_class)
    return TensorDataset(PROTOTYPES[labels], labels)


def inspect(change=None, knows_noise=True, per_class=100, train_per_class=100, **options):
    classifier = Bayes(knows_noise=knows_noise) if change is None else Bayes(change, knows_noise)
    return inspect_classifier(classifier, images(per_class), images(train_per_class), **options)


def says(inspection, start):
    (found,) = [finding for finding in inspection.findings if finding.startswith(start)]
    return found


def openings(inspection):
    return [finding.split(":")[0].split(" at ")[0] for finding in inspection.findings]


# --- numbers ---


def test_numbers_are_those_of_brute_force(tiny_classifier):
    classifier = tiny_classifier(
        sample_size=8, in_channels=1, attention_resolutions=[4], beta_schedule="squaredcos_cap_v2",
        rescale_timesteps=True, num_train_timesteps=400,
    ).double()  # fmt: skip
    scheduler = ADMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=400, rescale_timesteps=True)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(40, 1, 8, 8, generator=generator) * 2 - 1
    labels = torch.randint(3, (40,), generator=generator)
    inspection = inspect_classifier(
        classifier, TensorDataset(pixels, labels), timesteps=[300, 20, 100], seed=5, batch_size=16
    )

    assert [row.timestep for row in inspection.rows] == [20, 100, 300]
    confusion = np.zeros((3, 3))
    for row in inspection.rows:
        alpha_bar = scheduler.alphas_cumprod[row.timestep].double()

        def log_p(noisy, row=row):
            told = torch.tensor(row.timestep * 1000 / 400)
            return classifier(noisy.double(), told).logits.log_softmax(-1)

        right, confidence, nats, squared_norms = [], [], [], []
        for i in range(40):
            noise = torch.from_numpy(np.random.default_rng((5, i)).standard_normal((1, 8, 8), dtype=np.float32))
            noisy = alpha_bar.sqrt() * pixels[i].double() + (1 - alpha_bar).sqrt() * noise.double()
            scores = log_p(noisy[None])[0].detach()
            right.append(bool(scores.argmax() == labels[i]))
            confidence.append(scores.max().exp().item())
            nats.append(-scores[labels[i]].item())
            if row.timestep == 20:
                confusion[labels[i], scores.argmax()] += 1
            if i < 3:  # every pixel there and back
                steps = 1e-4 * torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
                with torch.no_grad():
                    slopes = (log_p(noisy + steps) - log_p(noisy - steps))[:, labels[i]] / 2e-4
                squared_norms.append((slopes**2).sum().item())
        assert row.accuracy == pytest.approx(np.mean(right))
        assert row.confidence == pytest.approx(np.mean(confidence), rel=1e-5)
        assert row.cross_entropy == pytest.approx(np.mean(nats), rel=1e-5)
        bins = [[] for _ in range(15)]
        for sure, is_right in zip(confidence, right, strict=True):
            bins[next(b for b in range(15) if b / 15 < sure <= (b + 1) / 15)].append((sure, is_right))
        error = sum(len(b) / 40 * abs(np.mean([r for _, r in b]) - np.mean([s for s, _ in b])) for b in bins if b)
        assert row.calibration_error == pytest.approx(error, rel=1e-5)
        few = inspect_classifier(classifier, TensorDataset(pixels[:3], labels[:3]), timesteps=[20, 100, 300], seed=5)
        by_timestep = {row.timestep: row for row in few.rows}
        norm = math.sqrt(np.mean(squared_norms))
        assert by_timestep[row.timestep].gradient_norm == pytest.approx(norm, rel=1e-3)
        shift = math.sqrt(1 - alpha_bar) * norm / 8  # 8 is the root of 64 pixels
        assert by_timestep[row.timestep].epsilon_shift == pytest.approx(shift, rel=1e-3)
    np.testing.assert_array_equal(inspection.confusion, confusion)
    entropy = -sum(p * math.log(p) for p in np.bincount(labels) / 40)
    assert inspection.rows[0].information == pytest.approx(entropy - inspection.rows[0].cross_entropy)
    assert inspection.chance == np.bincount(labels).max() / 40


def test_the_shift_is_what_guidance_adds_to_epsilon(tiny_classifier, randn):
    """Against DDIM's steps of the scheduler, guided at scale 1 and not."""
    classifier, labels = tiny_classifier(), torch.tensor([1, 0])
    pixels, timestep = randn(2, 3, 16, 16).clamp(-1, 1), torch.tensor([400, 400])
    noise = torch.stack([
        torch.from_numpy(np.random.default_rng((0, i)).standard_normal((3, 16, 16), dtype=np.float32)) for i in (0, 1)
    ])  # fmt: skip
    scheduler = ADMScheduler(algorithm_type="ddim", variance_type="fixed_small", clip_sample=False)
    noisy = scheduler.add_noise(pixels, noise, timestep).requires_grad_()
    loss = F.cross_entropy(classifier(noisy, timestep).logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(-loss, noisy)
    plain, guided = (
        scheduler.step(noise.double(), 400, noisy.detach().double(), gradient=scale * gradient.double())
        for scale in (0, 1)
    )
    alpha_bar = scheduler.alphas_cumprod[400]
    moved = guided.pred_original_sample - plain.pred_original_sample
    shift = (moved * (alpha_bar / (1 - alpha_bar)).sqrt()).square().mean().sqrt().item()
    row = inspect_classifier(classifier, TensorDataset(pixels, labels), timesteps=[400, 500]).rows[0]
    assert row.epsilon_shift == pytest.approx(shift, rel=1e-5)
    assert shift > 1e-4


def test_calibration_by_hand():
    confidence = np.array([1.0, 0.97, 0.61, 0.62, 0.2])
    is_right = np.array([False, True, True, False, True])
    # bins of 1/15: (14/15, 1] has the first two, (9/15, 10/15] the next, and (2/15, 3/15] the last, on its upper end
    expected = (abs(1 - 1.97) + abs(1 - 1.23) + abs(1 - 0.2)) / 5
    assert expected_calibration_error(confidence, is_right) == pytest.approx(expected)
    assert expected_calibration_error(confidence, is_right, num_bins=1) == pytest.approx((3.4 - 3) / 5)


def test_entropy_and_chances_by_hand():
    assert label_entropy(np.array([5, 5, 0, 5])) == pytest.approx(math.log(3))
    for successes, trials, p in [(0, 5, 0.9), (3, 10, 0.5), (2, 2, 0.3), (40, 100, 0.6)]:
        exact = sum(math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(successes + 1))
        assert _binomial_tail(successes, trials, p) == pytest.approx(exact)
    assert _binomial_tail(900, 2000, 0.5) < 1e-5  # whose factors no float holds


def test_noise_is_the_same_whatever_the_batches(tiny_classifier, randn):
    classifier = tiny_classifier().train()
    data = TensorDataset(randn(23, 3, 16, 16).clamp(-1, 1), torch.arange(23) % 3)
    trainable = []
    classifier.register_forward_pre_hook(
        lambda module, args: trainable.extend(p for p in module.parameters() if p.requires_grad)
    )
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    runs = [inspect_classifier(classifier, data, data, timesteps=[0, 500], batch_size=size) for size in (4, 23, 23)]
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert classifier.training
    assert not trainable  # during the calls: no activations are kept for weights
    assert all(parameter.requires_grad and parameter.grad is None for parameter in classifier.parameters())
    assert runs[1].to_dict() == runs[2].to_dict()
    np.testing.assert_array_equal(runs[0].confusion, runs[1].confusion)
    for row, other in zip(runs[0].rows, runs[1].rows, strict=True):
        assert row.cross_entropy == pytest.approx(other.cross_entropy, rel=1e-5)
        assert row.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
        assert row.train_accuracy == row.accuracy
    other = inspect_classifier(classifier, data, timesteps=[0, 500], seed=1)
    assert other.rows[1].cross_entropy != runs[1].rows[1].cross_entropy
    assert other.rows[0].train_accuracy is None


def test_of_many_images_the_same_few_are_drawn(tiny_classifier, randn):
    classifier, data = tiny_classifier(), TensorDataset(randn(50, 3, 16, 16), torch.arange(50) % 3)
    few = [inspect_classifier(classifier, data, data, max_images=20, timesteps=[0, 9]) for _ in range(2)]
    assert few[0].to_dict() == few[1].to_dict()
    assert (few[0].num_images, few[0].num_held_out, few[0].num_train_images) == (20, 50, 20)
    assert "measure more of the 50 (--num_images)" in str(few[0])


def test_images_are_not_augmented_and_labels_are_theirs(tiny_classifier):
    random_pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(pixels)} for pixels in random_pixels]
    labels, classifier = np.arange(12) % 3, tiny_classifier()
    names = {0: "a", 1: "b", 2: "c"}

    def labelled(**options):
        return LabelledImages(rows, np.arange(12), labels, names, "pictures", (16, 16), 3, **options)

    plain = TensorDataset(torch.from_numpy(random_pixels).permute(0, 3, 1, 2) / 255 * 2 - 1, torch.from_numpy(labels))
    of_tensors = inspect_classifier(classifier, plain, timesteps=[0, 500])
    for data in (labelled(), labelled(random_flip=True, random_crop=True)):
        found = inspect_classifier(classifier, data, timesteps=[0, 500])
        np.testing.assert_array_equal(found.confusion, of_tensors.confusion)
        assert found.rows[1].cross_entropy == pytest.approx(of_tensors.rows[1].cross_entropy, rel=1e-5)


def test_the_classifier_is_told_its_own_timesteps():
    classifier = Bayes()
    classifier.config.num_train_timesteps = 500
    classifier.config.rescale_timesteps = True
    inspect_classifier(classifier, images(2), timesteps=[0, 100, 499])
    assert [told[0].item() for told in classifier.told] == [0, 200, 998]
    classifier = Bayes()
    inspect_classifier(classifier, images(2))
    assert [told[0].item() for told in classifier.told] == [0, 100, 200, 300, 400, 500, 599, 699, 799, 899, 999]


# --- words ---


def test_the_best_classifier_is_not_accused():
    inspection = inspect()
    assert not inspection.faults
    for row in inspection.rows:
        assert row.calibration_error < 0.06
        assert row.confidence == pytest.approx(row.accuracy, abs=0.05)
        assert row.broken_images == 0
    assert inspection.rows[0].accuracy == 1
    assert inspection.findings[0].startswith(
        "No known fault was found: at timestep 0 the accuracy is 1.00 on held-out images"
    )
    assert openings(inspection)[1:-1] == ["No signal above timestep 599"]
    assert inspection.interval is not None
    low, high = inspection.interval
    assert 0 <= low < high < 999
    assert f"interval=({low}, {high})" in inspection.findings[-1]
    ClassifierGuidance(1.0, interval=inspection.interval)


def test_too_little_data():
    inspection = inspect(per_class=5, train_per_class=10)
    fault = says(inspection, "Too little training data")
    assert "40 images are 10 per class" in fault
    caveat = says(inspection, "Too little held-out data")
    assert "with 20 images the standard error of an accuracy is up to 0.11" in caveat
    assert "hold out more images" in caveat
    missing = inspect_classifier(Bayes(), images(100, num_classes=3), images(100))
    assert "0 of 'dog' say little" in says(missing, "Too little held-out data")


def test_a_collapsed_class():
    def never_cats(logits, images, timestep):
        return logits + torch.tensor([0, 0, -1e6, 0])

    fault = says(inspect(never_cats), "Collapsed class at timestep 0")
    assert "'cat' is recognised in 0 of its 100 images (the others in 100%)" in fault
    assert "and never predicted" in fault

    def cats_and_dogs(logits, images, timestep):  # a tie, which the first wins
        return torch.cat([logits[:, :2], logits[:, 2:].max(dim=1, keepdim=True).values.repeat(1, 2)], dim=1)

    fault = says(inspect(cats_and_dogs), "Collapsed class at timestep 0")
    assert "'dog' is recognised in 0 of its 100 images (the others in 100%), mostly confused with 'cat'" in fault

    def worse(logits, images, timestep):  # one class is found less often than the others, and still found
        index = torch.arange(len(logits))[:, None]
        return torch.where((index % 4 == 0) & (index < 120), -logits, logits)

    found = inspect(worse, batch_size=400)
    assert found.confusion.diagonal().tolist() == [70, 100, 100, 100]
    assert not any("Collapsed" in finding for finding in found.findings)

    def unlucky(logits, images, timestep):  # of the first class one image is wrong
        return torch.where(torch.arange(len(logits))[:, None] == 0, -logits, logits)

    labels = torch.arange(4).repeat_interleave(torch.tensor([1, 50, 50, 50]))  # its only one: nothing to go by
    found = inspect_classifier(Bayes(unlucky), TensorDataset(PROTOTYPES[labels], labels), timesteps=[0, 300])
    assert found.confusion.diagonal().tolist() == [0, 50, 50, 50]
    assert found.last_signal == 1
    assert not any("Collapsed" in finding for finding in found.findings)


def test_a_memorised_training_set():
    held_out = images(100)

    def mislabelled(part):
        wrong = torch.rand(400, generator=torch.Generator().manual_seed(0)) < part
        labels = torch.where(wrong, (held_out.tensors[1] + 1) % 4, held_out.tensors[1])
        return wrong, inspect_classifier(Bayes(), TensorDataset(held_out.tensors[0], labels), held_out)

    wrong, inspection = mislabelled(0.4)
    assert (inspection.rows[0].train_accuracy, inspection.rows[0].accuracy) == (1, 1 - wrong.double().mean().item())
    worst = max(inspection.rows, key=lambda row: row.train_accuracy - row.accuracy)
    fault = says(inspection, f"Overfitting: at timestep {worst.timestep} the accuracy is")
    assert f"{worst.train_accuracy:.2f} on training images and {worst.accuracy:.2f} on held-out ones" in fault
    _, inspection = mislabelled(0.05)  # sure, and small
    assert not any("Overfitting" in finding for finding in inspection.findings)


def test_an_overconfident_one():
    inspection = inspect(lambda logits, images, timestep: 5 * logits)
    fault = says(inspection, "Overconfident")
    assert "EntropyScaling" in fault
    worst = max(inspection.rows, key=lambda row: row.confidence - row.accuracy)
    assert worst.confidence - worst.accuracy > 0.1
    assert (
        f"timestep {worst.timestep} its confidence is {worst.confidence:.2f} and its accuracy {worst.accuracy:.2f}"
        in fault
    )
    seen = inspect(lambda logits, images, timestep: 20 * logits, timesteps=[0, 200, 500])  # where there is signal
    assert seen.rows[-1].confidence - seen.rows[-1].accuracy > 0.2
    assert says(seen, "Overconfident")
    assert not any("pure noise" in finding for finding in seen.findings)


def test_one_without_any_signal():
    inspection = inspect(lambda logits, images, timestep: 0 * logits + torch.tensor([0, 1.0, 0, 0]))
    fault = says(inspection, "No signal at any timestep")
    assert "accuracy is 0.25 at timestep 0 (chance 0.25), and 100% of the images are classified as 'bee'" in fault
    assert inspection.interval is None
    assert inspection.findings[-1].startswith("No interval")


def test_one_with_too_little_information():
    inspection = inspect(lambda logits, images, timestep: torch.where(images.sum((1, 2, 3))[:, None] > 3, logits, 0))
    assert says(inspection, "Little information about the class")
    assert inspection.interval is None
    weak = inspect(lambda logits, images, timestep: 1e-5 * logits)
    assert "of 1.39 nats" in says(weak, "Little information")


def test_one_that_knows_clean_images_only():
    inspection = inspect(knows_noise=False)
    fault = says(inspection, "Confident on pure noise: at timestep 999")
    assert "train_classifier.py --noisy" in fault
    assert not any("Overconfident" in finding for finding in inspection.findings)
    assert inspection.interval is None


def test_findings_begin_with_the_faults():
    inspection = inspect(knows_noise=False)
    assert inspection.faults["confident_on_noise"].startswith("Confident on pure noise")
    assert list(inspection.faults.values()) == inspection.findings[: len(inspection.faults)]


def test_one_that_loses_the_class_early():
    def blind(logits, images, timestep):
        return torch.where(timestep[:, None] < 150, logits, 0)

    inspection = inspect(blind)
    assert "alpha_bar 0.66" in says(inspection, "Early loss of signal: accuracy is 0.25 at timestep 200")
    assert "± 0.06" in says(inspection, "No signal above timestep 100")


def test_gradients_that_vanish_or_are_not_finite():
    def steps(logits, images, timestep):  # right, and flat
        return 3 * F.one_hot(logits.argmax(-1), 4) + 1e-7 * logits.clamp(-100, 100)

    inspection = inspect(steps)
    assert "guidance of scale 1 changes epsilon by" in says(inspection, "Gradients vanish")

    def broken(logits, images, timestep):
        is_first = torch.arange(len(logits))[:, None] == 0
        return torch.where((timestep[:, None] == 500) & is_first, torch.nan, logits)

    inspection = inspect(broken, batch_size=400)
    assert "for 1 of 400 images, logits or gradients are infinite or NaN at timestep 500" in says(
        inspection, "Not finite"
    )
    assert [row.broken_images for row in inspection.rows] == [0] * 5 + [1] + [0] * 5
    assert all(math.isfinite(row.cross_entropy) for row in inspection.rows)
    assert inspection.interval is None

    everywhere = inspect(lambda logits, images, timestep: logits * torch.nan)
    assert says(everywhere, "Not finite")
    written = json.loads(json.dumps(everywhere.to_dict(), allow_nan=False))
    assert written["rows"][0]["cross_entropy"] is None
    assert written["rows"][0]["accuracy"] == 0

    def explodes(logits, images, timestep):  # finite, and with a gradient that is not
        return logits + (images.sum((1, 2, 3))[:, None] * 0).sqrt()

    assert says(inspect(explodes), "Not finite")


def known(information, accuracy=None, confidence=0.5):
    """An inspection of levels 0, 100 ... where the classifier has so much information, of 4 classes."""
    accuracy = accuracy or [0.9] * len(information)
    rows = [
        NoiseLevel(
            timestep=100 * i, alpha_bar=1 - i / 10, accuracy=a, train_accuracy=None, confidence=confidence,
            calibration_error=0.0, cross_entropy=math.log(4) - nats, information=nats, gradient_norm=1.0,
            epsilon_shift=0.1, broken_images=0,
        )
        for i, (nats, a) in enumerate(zip(information, accuracy, strict=True))
    ]  # fmt: skip
    return ClassifierInspection(rows, 100 * np.eye(4, dtype=int), NAMES, 400, 0, 400, 0, 8)


def test_the_interval_follows_from_the_information():
    # 0.99 of the best lies a third of the way from 1.0 to 0.97; a quarter of it half-way from 0.3 to 0.2
    assert known([1.0, 1.0, 0.97, 0.6, 0.3, 0.2, 0.0]).interval == (133, 450)
    # where information returns, the last time counts; it cannot end above the last signal
    assert known([0.9, 1.0, 0.2, 0.8, 0.4, 0.3], [0.9] * 4 + [0.25] * 2, confidence=0.3).interval == (101, 300)
    assert known([1.0, 0.9, 0.8]).interval == (10, 200)
    assert known([0.6, 0.6, 0.1]).interval is None  # it never knows half of log 4


# --- pictures, command line, training ---


def test_pictures_show_the_interval_and_the_confusion(tmp_path):
    pytest.importorskip("matplotlib")
    had_pyplot = "matplotlib.pyplot" in sys.modules

    def draw(name, inspection):
        classifier_curves(inspection, tmp_path / f"{name}.png")
        return np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)

    good = known([1.3, 1.2, 0.9, 0.4, 0.1])
    drawn = {"good": draw("good", good), "poor": draw("poor", known([0.1] * 5))}
    names = [f"class {i}" for i in range(40)]
    confusion = np.diag(np.full(40, 10))
    confusion[3, 7] = 9
    many = replace(good, confusion=confusion, class_names=names, num_images=409)
    drawn["many"] = draw("many", many)
    assert len(list(tmp_path.iterdir())) == 3
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot

    def share(pixels, color):
        return (abs(pixels - color).max(axis=2) < 6).mean()

    shade = (232, 241, 234)
    assert share(drawn["good"], shade) > 0.1 > share(drawn["poor"], shade)
    blue = (8, 48, 107)  # of a class that is always found
    assert share(drawn["good"], blue) > 0.02
    assert share(drawn["many"], blue) < 0.001


@pytest.fixture
def folders(tmp_path, tiny_classifier):
    """A folder of pictures by class, and a classifier that knows these classes in another order."""
    pixels = np.random.default_rng(0)
    for name in ("ape", "bat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            picture = Image.fromarray(pixels.integers(0, 256, (20, 18, 3), dtype=np.uint8))
            picture.save(tmp_path / "photos" / name / f"{i}.png")
    classifier = tiny_classifier()
    classifier.config.id2label = {0: "bat", 1: "cow", 2: "ape"}
    classifier.config.label2id = {"bat": 0, "cow": 1, "ape": 2}
    classifier.save_pretrained(tmp_path / "classifier")
    return tmp_path


def test_the_command_line(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    main(["inspect-classifier", "classifier", "photos", "--held_out_fraction", "0.5", "--output", "noisy.png"])
    shown = capsys.readouterr().out
    assert "classifier on 20 held-out images of photos" in shown
    assert "Saved noisy.png" in shown
    Image.open("noisy.png").verify()
    written = json.loads((folders / "noisy.json").read_text())
    assert [row["timestep"] for row in written["rows"]][::5] == [0, 500, 999]
    assert written["class_names"] == ["bat", "cow", "ape"]
    counts = {}
    for true, _, count in written["confusion"]:
        counts[true] = counts.get(true, 0) + count
    assert counts == {0: 10, 2: 10}  # matched by name
    for finding in written["findings"]:
        assert finding in shown

    shape = {"sample_size": 16, "model_channels": 32, "channel_mult": (1,), "num_heads": 1}
    classifier = ADMForImageClassification.from_pretrained("classifier")
    pipe = ClassifierGuidedPipeline(ADMUNet2DModel(**shape), ADMScheduler(), classifier)
    pipe.save_pretrained("pipeline")
    main(["inspect-classifier", "pipeline", "photos", "--held_out_fraction", "0.5", "--output", "piped.png"])
    assert json.loads((folders / "piped.json").read_text()) == written

    again = ["inspect-classifier", "classifier", "photos", "--held_out_fraction", "0.5", "--output"]
    (folders / "piped.json").write_text("{}")  # not its own any more
    with pytest.raises(SystemExit, match=r"piped.json exists and was not made by this command"):
        main([*again, "piped.png"])
    main([*again, "noisy.png", "--num_images", "6"])  # its own
    assert json.loads((folders / "noisy.json").read_text())["num_images"] == 6


def test_folders_with_odd_names(folders, capsys, monkeypatch):
    """Splits by folder, file names with split words, a name that is not UTF-8; what is left out is said."""
    monkeypatch.chdir(folders)
    root = os.fsdecode(b"caf\xe9 [1]")
    for split, first in (("train", 0), ("val", 5)):
        for name in ("ape", "bat"):
            (folders / root / split / name).mkdir(parents=True)
            for i in range(first, first + 5):
                (folders / "photos" / name / f"{i}.png").rename(folders / root / split / name / f"test {i}.png")
    (folders / root / "train" / "ape" / "x.heic").write_bytes(b"")
    main(["inspect-classifier", "classifier", root, "--validation_split", "val", "--output", "noisy.png"])
    shown = capsys.readouterr().out
    assert "classifier on 10 held-out images of caf\\xe9 [1] (and 10 that it was trained on)" in shown
    assert "Note: split 'train' is the folder train; other splits: val\n" in shown
    assert "supported format (1; .heic 1): train/ape/x.heic\n" in shown
    shown.encode()
    (folders / root / "train" / "stray.png").write_bytes((folders / "photos" / "ape" / "10.png").read_bytes())
    with pytest.raises(SystemExit, match=r"error: .*beside its class folders \(1: train/stray\.png\)"):
        main(["inspect-classifier", "classifier", root])


def test_mistakes_end_in_one_sentence(folders, monkeypatch):
    monkeypatch.chdir(folders)
    shape = {"sample_size": 16, "model_channels": 32, "channel_mult": (1,), "num_heads": 1}
    ClassifierGuidedPipeline(ADMUNet2DModel(**shape), ADMScheduler()).save_pretrained("unguided")
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTForImageClassification(vit).save_pretrained("clean")
    ADMUNet2DModel(**shape).save_pretrained("unet")
    classifier = ADMForImageClassification.from_pretrained("classifier")
    classifier.config.id2label = {0: "bat", 1: "cow", 2: "eel"}
    classifier.save_pretrained("others")
    (folders / "empty").mkdir()
    for argv, message in [
        (["clean", "photos"], "ViTForImageClassification takes no timestep: it is a classifier of clean images"),
        (["unguided", "photos"], "The pipeline unguided has no classifier"),
        (["unet", "photos"], "unet is no image classifier"),
        (["empty", "photos"], "neither config.json nor model_index.json"),
        (["./nowhere", "photos"], "There is no folder ./nowhere"),
        (["classifier", "photos", "--held_out_fraction", "0"], "Nothing of photos is held out"),
        (["classifier", "photos", "--output", "x.jpg"], "must end in .png"),
        (["others", "photos"], "has no class named 'ape'"),
        (["classifier", "digits"], "has no class named '0'"),
    ]:
        with pytest.raises(SystemExit, match="error: ") as caught:
            main(["inspect-classifier", *argv])
        assert message in str(caught.value)
        assert not (folders / "inspection.png").exists()


def test_wrong_images_are_refused(tiny_classifier):
    classifier, good = tiny_classifier(), torch.zeros(4, 3, 16, 16)
    for data, options, message in [
        ((good, torch.tensor([0, 1, 2, 3])), {}, "label 3; the classifier's classes are 0 to 2"),
        ((good, torch.tensor([0, 1, -1, 2])), {}, "label -1"),
        ((good, torch.tensor([1, 1, 1, 1])), {}, "one class"),
        ((good[:, :1], torch.arange(4) % 3), {}, "images of 3 channels"),
        ((good.byte(), torch.arange(4) % 3), {}, "floating-point"),
        ((good[:0], torch.arange(0)), {}, "no images"),
        ((good, torch.arange(4) % 3), {"timesteps": [0, 1000]}, "from 0 to 999"),
        ((good, torch.arange(4) % 3), {"timesteps": [5]}, "two or more"),
        ((good, torch.arange(4) % 3), {"batch_size": 0}, "must be 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            inspect_classifier(classifier, TensorDataset(*data), **options)


def test_training_inspects_its_classifier(folders, monkeypatch, caplog):
    monkeypatch.chdir(folders)
    argv = [
        *("--train_data_dir", "photos", "--resolution", "8", "--held_out_fraction", "0.5", "--output_dir", "out"),
        *("--model_channels", "32", "--channel_mult", "1", "--num_res_blocks", "1", "--attention_resolutions", "4"),
        *("--num_heads", "1", "--max_train_steps", "2", "--train_batch_size", "8", "--report_to", "none"),
        *("--validation_steps", "0"),
    ]

    def train(*flags, name="classifier"):
        data_args, stages = parse_arguments({"classifier": ClassifierArguments}, [*argv, *flags])
        with caplog.at_level("INFO"):
            return train_classifier(data_args, stages["classifier"], name=name)

    folder = train()
    written = json.loads((folder / "inspection.json").read_text())
    assert written["num_images"] == written["num_train_images"] == 20
    main(["inspect-classifier", str(folder), "photos", "--held_out_fraction", "0.5", "--batch_size", "8"])
    assert json.loads((folders / "inspection.json").read_text()) == written
    assert any(finding.startswith("Too little training data: 20 images") for finding in written["findings"])
    assert written["findings"][0] in caplog.text
    Image.open(folder / "inspection.png").verify()
    card = ModelCard.load(folder / "README.md")
    picture = "![Accuracy, calibration, gradients, confusion](inspection.png)"
    table = "| Timestep | Accuracy | Train accuracy |"
    for shown in (picture, table, "`ape`, `bat`", "2 steps of 8 images", *written["findings"]):
        assert shown in card.text
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_name) == ("image-classification", "Accuracy at timestep 0")
    assert result.metric_value == written["rows"][0]["accuracy"]
    assert str(folders) not in card.content

    judge = train("--no_noisy", name="judge")
    assert not list(judge.glob("inspection.*"))
    assert "A classifier of clean images" in (judge / "README.md").read_text()

    alone = train("--held_out_fraction", "0", name="alone")
    assert not list(alone.glob("inspection.*"))
    assert "The classifier is not inspected: no images are held out" in caplog.text
    assert "inspection" not in (alone / "README.md").read_text()
