"""Measures models in the same way: class-balanced samples against the training images, in the same features."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data import LabelledImages
from ..evaluation.evaluate import check_independent, expected_labels, measure
from ..evaluation.features.extractors import FeatureExtractor
from ..evaluation.features.feature_sets import FeatureSet, collect_features
from ..evaluation.features.image_sets import ImageSet, LoadedImages, SampledImages
from ..evaluation.likelihood import likelihood, likelihood_labels
from ..evaluation.memorisation import memorisation
from ..families import family_of
from ..generation.sampling import sample_batches
from ..labels import match_classes

Images = tuple[LabelledImages, LabelledImages]  # to train on, and held out

_LIKELIHOOD_IMAGES = 128
_PICTURED_CLASSES, _PICTURED = 10, 5  # in the report, and images of each
_MAX_REAL_IMAGES = 10_000


@dataclass
class Measuring:
    """Measures models in the same way."""

    extractor: FeatureExtractor
    images: Images
    num_images: int  # samples of each model
    batch_size: int  # images at once
    guidance_scale: float  # of guided models in the table
    guidance_scales: Sequence[float]  # of their curve

    def __post_init__(self) -> None:
        train, held_out = self.images
        self.held_out_images = LoadedImages(held_out.plain(_MAX_REAL_IMAGES))
        self.id2label = train.id2label
        self.labels = torch.arange(self.num_images) % train.num_classes
        self.train = self.features(LoadedImages(train.plain(_MAX_REAL_IMAGES)))
        self.held_out = self.features(self.held_out_images)
        judged = expected_labels(self.held_out_images, self.extractor, [])
        self.real = {"metrics": self.metrics(self.held_out, judged)}

    def features(self, images: ImageSet) -> FeatureSet:
        collected = collect_features(images, self.extractor, batch_size=self.batch_size)
        assert collected is not None  # a comparison runs in one process
        return collected

    def metrics(self, features: FeatureSet, judged: Any) -> dict[str, float]:
        """Metrics by their plain names, since all are in the same features."""
        return {name.partition("/")[0]: value for name, value in measure(features, self.train, judged).items()}

    def model(self, pipeline: Any) -> dict[str, Any]:
        """All results of a model."""
        check_independent(pipeline, self.extractor)
        size = self.held_out_images.size
        if pipeline.sample_size != size:
            raise ValueError(
                f"A model makes images of {pipeline.sample_size} pixels, but the data's images have {size}; give the "
                f"models' --resolution."
            )
        notes: list[str] = []
        labels = self.labels_of(pipeline, self.labels)
        judged = expected_labels(SampledImages(pipeline, labels), self.extractor, notes)
        features = self.features(SampledImages(pipeline, labels))
        if (width := pipeline.main_config.get("dequantization_width", 1)) > 1:
            notes.append(
                f"its values are dequantised over {width:g} steps of the 8-bit scale, which adds "
                f"{math.log2(width):.2f} to its bits/dim"
            )
        return {
            "metrics": self.metrics(features, judged),
            "copied_share": memorisation(features, self.train, self.held_out).copied_share,
            "seconds_per_image": self.seconds_per_image(pipeline),
            "curve": self.curve(pipeline, labels, judged),
            "notes": notes,
            **self.bits(pipeline),
        }

    def labels_of(self, pipeline: Any, labels: torch.Tensor) -> torch.Tensor:
        """The model's class ids for the data's class ids, matched by name."""
        if not pipeline.id2label:
            return labels
        matched = match_classes(self.id2label, pipeline.id2label, set(labels.tolist()), "of the pipeline")
        return torch.tensor([matched[label] for label in labels.tolist()])

    def curve(self, pipeline: Any, labels: torch.Tensor, judged: Any) -> dict[str, Any] | None:
        """The metrics over the values of what trades variety for fidelity, if the model has such an argument."""
        family = family_of(type(pipeline).__name__)
        is_guided = getattr(pipeline, "classifier", None) is not None
        points = []
        for value in self.guidance_scales if is_guided else family.curve:
            arguments: dict[str, Any] = {family.trade_off: value}
            features = self.features(SampledImages(pipeline, labels, **arguments))
            points.append({"value": value, "metrics": self.metrics(features, judged)})
        return {"name": family.trade_off.replace("_", " "), "points": points} if points else None

    def bits(self, pipeline: Any) -> dict[str, Any]:
        """Bits per dimension of held-out images, or the reason why there are none."""
        found, reason = None, getattr(pipeline, "no_likelihood", None)
        if getattr(pipeline, "classifier", None) is not None:
            reason = "the density of the guided samples is not known"
        if reason is None:
            images = LoadedImages(self.held_out_images.images.plain(_LIKELIHOOD_IMAGES))
            try:
                found = likelihood(pipeline, images, likelihood_labels(pipeline, images), batch_size=self.batch_size)
            except ValueError as error:
                reason = str(error)
        return {"bits_per_dim": found and found.total_bpd, "bits_kind": found and found.kind, "no_bits": reason}

    def seconds_per_image(self, pipeline: Any) -> float:
        """Sampling time in seconds per image, of the fastest of three batches."""
        labels = self.labels_of(pipeline, self.labels[: self.batch_size])
        seconds = []
        for seed in range(3):
            started = time.perf_counter()
            list(sample_batches(pipeline, labels, self.batch_size, seed))
            seconds.append(time.perf_counter() - started)
        return min(seconds) / len(labels)

    def pictures(self, pipeline: Any) -> list[Any]:
        """Samples of the first ten classes, side by side for each."""
        labels = torch.arange(min(_PICTURED_CLASSES, len(self.id2label))).repeat_interleave(_PICTURED)
        return SampledImages(pipeline, self.labels_of(pipeline, labels)).pictures(self.batch_size)

    def real_pictures(self) -> list[Any]:
        """Held-out images of the same classes."""
        classes = range(min(_PICTURED_CLASSES, len(self.id2label)))
        rows = [np.resize(np.flatnonzero(self.held_out_images.labels == label), _PICTURED) for label in classes]
        return [self.held_out_images.picture(int(row)) for row in np.concatenate(rows)]
