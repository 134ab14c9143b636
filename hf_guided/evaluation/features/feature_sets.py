"""The features of a set of images: computed by all processes, and cached by the images' content."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME

from ...data.npz import open_npz
from ...files import FullDiskError, replacing
from ...processes import from_main
from ..metrics.moments import FeatureStatistics, InceptionScoreStatistics, read_moments
from .extractors import FeatureExtractor
from .image_sets import ImageSet

logger = logging.getLogger(__name__)

# Samples whose features are stored, for nearest neighbours and kernels: all of the published 50,000.
MAX_KEPT = 50_000
CACHE_DIR = Path(HF_HOME) / "hf-guided" / "features"
_FORMAT = 1  # of the files
_ARRAYS = ("kept", "kept_indices", "predictions")  # of a [`FeatureSet`], in files by the same names


@dataclass
class FeatureSet:
    """The features of a set of images by one extractor: statistics, stored features and predictions."""

    name = "saved statistics"  # in messages

    extractor: str  # its name, part of the name of every metric
    fingerprint: str  # digest of its weights and preprocessing; empty in published files
    num_images: int | None  # unknown in published files
    statistics: FeatureStatistics  # of all features
    spatial_statistics: FeatureStatistics | None = None
    kept: np.ndarray | None = None  # (k, dim): the features of all images, or of 50,000 evenly spaced ones
    kept_indices: np.ndarray | None = None  # (k,): of those images
    score: InceptionScoreStatistics | None = None  # of the class probabilities
    predictions: np.ndarray | None = None  # (num_images,): the predicted class of each image

    @property
    def notes(self) -> list[str]:
        """What limits their use as a reference, in sentences."""
        if self.kept is not None:
            return []
        return ["the reference is statistics without images, so that only metrics that need no images are computed."]

    def digest(self) -> str:
        """A hash of the features, which does not depend on their file."""
        digest = hashlib.sha256(f"{self.extractor} {self.fingerprint} {self.num_images}".encode())
        for statistics in (self.statistics, self.spatial_statistics):
            if statistics is not None:
                digest.update(statistics.mean.tobytes() + statistics.covariance.tobytes())
        if self.kept is not None:
            digest.update(self.kept.tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Writes an `.npz` file atomically; statistics are named as in published reference files."""
        about = {"format": _FORMAT, "extractor": self.extractor, "fingerprint": self.fingerprint, "n": self.num_images}
        arrays: dict[str, Any] = {"about": json.dumps(about)}
        arrays |= {"mu": self.statistics.mean, "sigma": self.statistics.covariance}
        arrays |= {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        if self.spatial_statistics is not None:
            arrays |= {"mu_s": self.spatial_statistics.mean, "sigma_s": self.spatial_statistics.covariance}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureSet":
        """The features in a file that `save` wrote, or in a published one, whose statistics are Inception's.

        Raises:
            `ValueError`: If it is damaged, or holds no statistics.
        """
        with open_npz(path) as file:
            arrays = {name: file[name] for name in file if name not in ("arr_0", "arr_1")}
        if "mu" not in arrays or "sigma" not in arrays:
            raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu and sigma).")
        about: dict[str, Any] = {"extractor": "inception", "fingerprint": "", "n": None}  # as published
        try:
            if "about" in arrays:
                about = json.loads(str(arrays["about"]))
            moments = read_moments(arrays, about["n"])
            return cls(
                extractor=about["extractor"],
                fingerprint=about["fingerprint"],
                num_images=about["n"],
                statistics=moments["features"],
                spatial_statistics=moments.get("spatial"),
                **{name: arrays.get(name) for name in _ARRAYS},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds statistics that are damaged ({error}); write it again.") from error


def is_saved(path: str | os.PathLike) -> bool:
    """Whether [`FeatureSet.save`] wrote a file; published files are not recognised."""
    try:
        with open_npz(path) as file:
            return "about" in file and "arr_0" not in file
    except (ValueError, FileNotFoundError):
        return False


def collect_features(
    images: ImageSet | FeatureSet,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> FeatureSet | None:
    """The features of a set of images, computed by all processes that run this call.

    Whole batches are assigned to the processes by index, so that features do not depend on how many there are, and
    each image counts once.

    Args:
        images ([`ImageSet`] or [`FeatureSet`]): The images; features are returned as they are.
        extractor ([`FeatureExtractor`]): Computes the features.
        batch_size (`int`, defaults to 64): Images at once in each process.
        num_workers (`int`, defaults to 0): Loader workers of each process.
        cache_dir (`str` or `os.PathLike`, *optional*): Folder of cached features, by a hash of the images' content and
            the extractor's weights; none by default.

    Returns:
        [`FeatureSet`]: In the main process; `None` in the others.

    Raises:
        `ValueError`: If features are not finite, naming the image.
    """
    if isinstance(images, FeatureSet):
        return images
    path, cached = None, None
    if cache_dir is not None:
        if PartialState().is_main_process:
            key = [_FORMAT, images.digest(), extractor.name, extractor.fingerprint, MAX_KEPT]
            if hasattr(getattr(extractor, "processor", None), "resizing_steps"):
                key.append("as in training")  # earlier versions resized differently under the same fingerprint
            path = Path(cache_dir) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.npz"
            cached = _load_cached(path, images, extractor)
        if from_main(lambda: cached is not None):
            return cached

    computed = _compute(images, extractor, batch_size, num_workers)
    if path is not None and computed is not None:
        try:
            computed.save(path)
        except (OSError, FullDiskError) as error:
            logger.warning(f"The features of {images.name} are not cached: {error}")
    return computed


def _load_cached(path: Path, images: ImageSet, extractor: FeatureExtractor) -> FeatureSet | None:
    """The features cached in a file; `None` if there is none, or, with a warning, if it cannot be used."""
    try:
        cached = FeatureSet.load(path)
        found = (cached.extractor, cached.fingerprint, cached.num_images, cached.kept is None)
        if found != (extractor.name, extractor.fingerprint, len(images), False):
            raise ValueError(f"{path} holds other features.")
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        logger.warning(f"The features of {images.name} are computed again: {error}")
        return None
    return cached


def gather_to_main(item: Any) -> list[Any] | None:
    """In the main process the items of all processes, in their order; `None` in the others."""
    state = PartialState()
    if state.num_processes == 1:
        return [item]
    gathered: list[Any] | None = [None] * state.num_processes if state.is_main_process else None
    torch.distributed.gather_object(item, gathered, dst=0)
    return gathered


def _compute(images: ImageSet, extractor: FeatureExtractor, batch_size: int, num_workers: int) -> FeatureSet | None:
    is_kept = np.zeros(len(images), dtype=bool)
    is_kept[np.linspace(0, len(images) - 1, min(len(images), MAX_KEPT)).round().astype(int)] = True
    statistics, spatial, score = FeatureStatistics(), FeatureStatistics(), InceptionScoreStatistics()
    kept, predictions = [], []
    for indices, batch in images.share(batch_size, f"{extractor.name} features of {images.name}", num_workers):
        computed = extractor(batch)
        for kind in (computed.features, computed.probabilities, computed.spatial):
            if kind is not None and not np.isfinite(kind).all():
                broken = indices[int(np.flatnonzero(~np.isfinite(kind).all(axis=1))[0])]
                raise ValueError(
                    f"The {extractor.name} features of image {broken} of {images.name} are not finite; compute them in "
                    f"float32, and check that image."
                )
        statistics.update(computed.features)
        kept.append(computed.features[is_kept[indices]])
        if computed.spatial is not None:
            spatial.update(computed.spatial)
        if computed.probabilities is not None:
            score.update(computed.probabilities, indices[0])
            predictions.append(computed.probabilities.argmax(axis=1))

    parts = gather_to_main((statistics, spatial, score, kept, predictions))
    if parts is None:
        return None
    for part in parts[1:]:
        statistics.merge(part[0])
        spatial.merge(part[1])
        score.merge(part[2])
    kept, predictions = ([rows for part in parts for rows in part[i]] for i in (3, 4))
    batches = images.split(batch_size)  # in the order of `parts`: the processes had whole ones, in turn
    order = np.concatenate([batch for i in range(len(parts)) for batch in batches[i :: len(parts)]])
    return FeatureSet(
        extractor=extractor.name,
        fingerprint=extractor.fingerprint,
        num_images=len(images),
        statistics=statistics,
        spatial_statistics=spatial if spatial.num_samples else None,
        kept=np.concatenate(kept)[np.argsort(order[is_kept[order]])],
        kept_indices=np.flatnonzero(is_kept),
        score=score if predictions else None,
        predictions=np.concatenate(predictions)[np.argsort(order)] if predictions else None,
    )
