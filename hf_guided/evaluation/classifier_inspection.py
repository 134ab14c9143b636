"""Inspection of a noisy-image classifier: its metrics at each noise level."""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import LabelledImages
from ..guidance.base import frozen
from ..labels import match_classes
from ..models.modes import evaluating
from ..schedulers.scheduling_adm import ADMScheduler, model_timesteps
from .classifier_findings import ClassifierInspection, NoiseLevel, label_entropy

Batch = tuple[list[int], torch.Tensor, torch.Tensor]  # indices, images and labels

NUM_LEVELS = 11
NUM_BINS = 15  # of confidence, as in the experiments of arXiv 1706.04599


def inspect_classifier(
    classifier: PreTrainedModel,
    held_out: Any,
    train: Any | None = None,
    *,
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    max_images: int = 2000,
) -> ClassifierInspection:
    r"""The metrics of a noisy-image classifier, \\(p(y | x_t)\\), on images noised by the schedule of its config.

    Args:
        classifier ([`ADMForImageClassification`] or one called like it): It is not changed.
        held_out ([`LabelledImages`] or a `Dataset`): Images that it was not trained on, used without augmentation.
            Items are `{"pixel_values", "labels"}` or pairs of these: an image `(channels, height, width)` in [-1, 1]
            and the id of its class.
        train (the same, *optional*): Its training images, to detect overfitting; as many are drawn.
        timesteps (`Sequence[int]`, *optional*): Two or more; by default 11, evenly spaced from 0 to the last.
        seed (`int`, defaults to 0): Seed of the noise of each image, the same at every noise level and for every batch
            size.
        batch_size (`int`, defaults to 256): Images at once; it only changes speed and memory.
        max_images (`int`, defaults to 2000): Of more images, a fixed random subset of this size is used.

    Raises:
        `ValueError`: For a classifier without a timestep, timesteps outside its schedule, images of another size,
            labels that it does not have, or images of a single class.
    """
    scheduler = noise_schedule(classifier)
    total = scheduler.config.num_train_timesteps
    if timesteps is None:
        timesteps = np.linspace(0, total - 1, min(NUM_LEVELS, total)).round().astype(int).tolist()
    levels = sorted({int(timestep) for timestep in timesteps})
    if len(levels) < 2 or levels[0] < 0 or levels[-1] >= total:
        raise ValueError(f"timesteps={list(timesteps)} must be two or more from 0 to {total - 1}.")
    if batch_size < 1 or max_images < 1:
        raise ValueError(f"batch_size and max_images must be 1 or more, got {batch_size} and {max_images}.")

    batches = _batches(held_out, batch_size, max_images)
    labels, outputs, num_values = _measure(batches, classifier, levels, seed, with_gradient=True)
    if len(np.unique(labels)) == 1:
        raise ValueError("The held-out images are all of one class; give images of two or more.")
    num_train_images, train_accuracies = 0, [None] * len(levels)
    if train is not None:
        batches = _batches(train, batch_size, len(labels))
        train_labels, trained, _ = _measure(batches, classifier, levels, seed, with_gradient=False)
        num_train_images = len(train_labels)
        train_accuracies = (trained[0] == train_labels).mean(axis=1).tolist()

    rows = [
        _noise_level(timestep, float(scheduler.alphas_cumprod[timestep]), labels, outputs[:, i], num_values, accuracy)
        for i, (timestep, accuracy) in enumerate(zip(levels, train_accuracies, strict=True))
    ]
    names = classifier.config.id2label
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (labels, outputs[0, 0].astype(int)), 1)
    return ClassifierInspection(
        rows=rows,
        confusion=confusion,
        class_names=[str(names[label]) for label in range(len(names))],
        num_images=len(labels),
        num_train_images=num_train_images,
        num_held_out=len(held_out),
        num_training=0 if train is None else len(train),
        num_values=num_values,
    )


def _noise_level(
    timestep: int,
    alpha_bar: float,
    labels: np.ndarray,
    outputs: np.ndarray,
    num_values: int,
    train_accuracy: float | None,
) -> NoiseLevel:
    """The metrics at a timestep of `outputs`: prediction, confidence, cross-entropy, gradient norm of each image."""
    predictions, *of_images = outputs
    whole = np.isfinite(of_images).all(axis=0)
    confidence, cross_entropy, gradient_norm = (values[whole] for values in of_images)
    is_right = predictions == labels
    nats, norm = _mean(cross_entropy), math.sqrt(_mean(gradient_norm**2))
    return NoiseLevel(
        timestep=timestep,
        alpha_bar=alpha_bar,
        accuracy=_mean(is_right & whole),
        train_accuracy=train_accuracy,
        confidence=_mean(confidence),
        calibration_error=expected_calibration_error(confidence, is_right[whole]),
        cross_entropy=nats,
        information=label_entropy(np.bincount(labels)) - nats,
        gradient_norm=norm,
        epsilon_shift=math.sqrt((1 - alpha_bar) / num_values) * norm,
        broken_images=int((~whole).sum()),
    )


def noise_schedule(classifier: PreTrainedModel) -> ADMScheduler:
    """The noise scheduler that a classifier was trained with; a `ValueError` for one of clean images."""
    model = getattr(classifier, "_orig_mod", classifier)  # of torch.compile
    if "timestep" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no timestep: it is a classifier of clean images, without noise levels to "
            f"inspect. Give a noisy-image classifier, such as training/train_classifier.py trains."
        )
    names = ("beta_schedule", "num_train_timesteps", "trained_betas", "rescale_timesteps")
    return ADMScheduler(**{name: getattr(classifier.config, name) for name in names})


def with_classes_of(classifier: PreTrainedModel, images: LabelledImages) -> LabelledImages:
    """The same images with the classifier's class ids, matched by name; a `ValueError` for a class that it lacks."""
    names = {int(label): name for label, name in classifier.config.id2label.items()}
    matched = match_classes(images.id2label, names, set(images.id2label), type(classifier).__name__)
    images = copy.copy(images)
    images.labels = np.array([matched[label] for label in _labels_of(images).tolist()])
    images.id2label = names
    return images


def expected_calibration_error(confidence: np.ndarray, is_right: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equations 2 and 3).

    It is the mean over images, `(n,)`, of the absolute difference of accuracy and confidence in their bin. The bins are
    of equal width, open at their lower end.
    """
    bins = np.ceil(confidence * num_bins).astype(int)
    gaps = np.bincount(bins, weights=is_right - confidence, minlength=num_bins + 1)
    return float(np.abs(gaps).sum() / len(confidence)) if len(confidence) else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _measure(
    batches: Iterator[Batch], classifier: PreTrainedModel, levels: list[int], seed: int, with_gradient: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels `(n,)`, outputs of [`_classify`] at each level `(4, levels, n)`, and the number of values of an image."""
    scheduler, device = noise_schedule(classifier), classifier.device
    labels, outputs = [], []
    with evaluating(classifier), frozen(classifier), torch.set_grad_enabled(with_gradient):
        for indices, clean, of_batch in batches:
            _check(clean, of_batch, classifier)
            noises = [np.random.default_rng((seed, index)) for index in indices]
            noise = np.stack([rng.standard_normal(clean.shape[1:], dtype=np.float32) for rng in noises])
            batch = clean.to(device, torch.float32), torch.from_numpy(noise).to(device)
            at_levels = []
            for level in levels:
                timesteps = torch.full((len(clean),), level, device=device)
                noisy = scheduler.add_noise(*batch, timesteps).requires_grad_(with_gradient)
                given = model_timesteps(scheduler, timesteps)
                at_levels.append(_classify(classifier, noisy, given, of_batch.to(device)))
            labels.append(of_batch)
            outputs.append(torch.stack(at_levels, dim=1))
    return torch.cat(labels).numpy(), torch.cat(outputs, dim=2).numpy(), clean[0].numel()


def _classify(
    classifier: PreTrainedModel, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Prediction, confidence, cross entropy and norm of the gradient of each image, `(4, batch)` in float64."""
    logits = classifier(noisy.to(classifier.dtype), timesteps).logits.float()
    log_p = logits.log_softmax(dim=-1)  # in float32, as in guidance
    of_label = log_p.gather(1, labels[:, None])[:, 0]
    norm = torch.full_like(of_label, torch.nan)
    if noisy.requires_grad:
        (gradient,) = torch.autograd.grad(of_label.sum(), noisy)
        norm = gradient.flatten(1).norm(dim=1)
    best, prediction = log_p.detach().max(dim=-1)
    return torch.stack([prediction.double(), best.double().exp(), -of_label.detach().double(), norm.double()]).cpu()


def _batches(images: Any, batch_size: int, max_images: int) -> Iterator[Batch]:
    if isinstance(images, LabelledImages):
        _labels_of(images)
        images = images.plain()
    if len(images) == 0:
        raise ValueError("There are no images to inspect the classifier on.")
    indices = np.arange(len(images))
    if len(images) > max_images:
        indices = np.sort(np.random.default_rng(0).choice(len(images), max_images, replace=False))
    parts = [part.tolist() for part in torch.from_numpy(indices).split(batch_size)]
    # Without a generator of its own, a loader draws from the global one.
    loader = DataLoader(images, batch_sampler=parts, generator=torch.Generator())
    progress = tqdm(loader, desc="inspecting", unit="batch", leave=False)
    for part, batch in zip(parts, progress, strict=True):
        pixel_values, labels = (batch["pixel_values"], batch["labels"]) if isinstance(batch, dict) else batch
        yield part, pixel_values, labels


def _labels_of(images: LabelledImages) -> np.ndarray:
    if images.labels is None:
        raise ValueError(f"{images.name!r} has no labels; a classifier is inspected on labelled images.")
    return images.labels


def _check(images: torch.Tensor, labels: torch.Tensor, classifier: PreTrainedModel) -> None:
    """Raises for images and labels that do not fit the classifier."""
    channels, num_classes = classifier.config.in_channels, classifier.config.num_labels
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise ValueError(
            f"The classifier takes floating-point images of {channels} channels, batches of shape (n, {channels}, "
            f"height, width); got {images.dtype} of shape {tuple(images.shape)}."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise ValueError(f"An image has the label {wrong}; the classifier's classes are 0 to {num_classes - 1}.")
