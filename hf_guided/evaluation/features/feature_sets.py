"""The features of a set of images: computed by all processes, and cached by the images' content."""

import dataclasses
import hashlib
import json
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from ...data.npz import open_npz
from ...files import FullDiskError, replacing
from ...processes import from_main
from ..metrics.moments import FeatureStatistics, InceptionScoreStatistics
from .extractors import FeatureExtractor
from .image_sets import ImageSet

logger = logging.getLogger(__name__)

# Samples whose features are stored, for nearest neighbours and kernels: all of the published 50,000.
MAX_KEPT = 50_000
CACHE_DIR = Path(HF_HOME) / "hf-guided" / "features"
_FORMAT = 1  # of the files


@dataclass
class FeatureSet:
    """The features of a set of images by one extractor: statistics, stored features and predictions.

    Attributes:
        extractor (`str`): The extractor's name, part of the name of every metric.
        fingerprint (`str`): Digest of its weights and preprocessing.
        num_images (`int`): Number of images.
        statistics ([`FeatureStatistics`]): Mean and covariance of all features.
        spatial_statistics ([`FeatureStatistics`], *optional*): The same for spatial features.
        kept (`np.ndarray` of shape `(k, dim)`, *optional*): The features of all images, or of 50,000 evenly spaced
            ones.
        kept_indices (`np.ndarray` of shape `(k,)`): The indices of those images.
        score ([`InceptionScoreStatistics`], *optional*): Statistics of the class probabilities.
        predictions (`np.ndarray` of shape `(num_images,)`, *optional*): The predicted class of each image.
    """

    extractor: str
    fingerprint: str
    num_images: int
    statistics: FeatureStatistics
    spatial_statistics: FeatureStatistics | None = None
    kept: np.ndarray | None = None
    kept_indices: np.ndarray | None = None
    score: InceptionScoreStatistics | None = None
    predictions: np.ndarray | None = None

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
        """Writes an `.npz` file under a temporary name and renames it. `mu`, `sigma` and, with spatial features,
        `mu_s` and `sigma_s` are stored as in published reference files."""
        arrays: dict[str, Any] = {
            "about": json.dumps(
                {"format": _FORMAT, "extractor": self.extractor, "fingerprint": self.fingerprint, "n": self.num_images}
            ),
            "mu": self.statistics.mean,
            "sigma": self.statistics.covariance,
            "kept": self.kept,
            "kept_indices": self.kept_indices,
            "predictions": self.predictions,
        }
        if self.spatial_statistics is not None:
            arrays |= {"mu_s": self.spatial_statistics.mean, "sigma_s": self.spatial_statistics.covariance}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: array for name, array in arrays.items() if array is not None})

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
            spatial = None
            if "mu_s" in arrays:
                spatial = FeatureStatistics.from_moments(arrays["mu_s"], arrays["sigma_s"], about["n"])
            return cls(
                extractor=about["extractor"],
                fingerprint=about["fingerprint"],
                num_images=about["n"],
                statistics=FeatureStatistics.from_moments(arrays["mu"], arrays["sigma"], about["n"]),
                spatial_statistics=spatial,
                **{name: arrays.get(name) for name in ("kept", "kept_indices", "predictions")},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds statistics that are damaged ({error}); write it again.") from error


def is_saved(path: str | os.PathLike) -> bool:
    """Whether [`FeatureSet.save`] wrote a file; published files are not recognised."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return "about" in file and "arr_0" not in file
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile):
        return False


def collect_features(
    images: ImageSet,
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
        images ([`ImageSet`]): The images.
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
    state = PartialState()
    path, cached = None, None
    if cache_dir is not None:
        if state.is_main_process:
            path = Path(cache_dir) / f"{_key(images, extractor)}.npz"
            cached = _load_cached(path, images, extractor)
        if from_main(lambda: cached is not None):
            return cached

    parts = gather_to_main(_collect_share(images, extractor, batch_size, num_workers, state))
    if parts is None:
        return None
    collected = _merge(parts, images, extractor)
    if path is not None:
        try:
            collected.save(path)
        except (OSError, FullDiskError) as error:
            logger.warning(f"The features of {images.name} are not cached: {error}")
    return collected


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


@dataclass
class _Share:
    """The results of one process."""

    statistics: FeatureStatistics | None = None
    spatial_statistics: FeatureStatistics | None = None
    score: InceptionScoreStatistics | None = None
    kept: list[np.ndarray] = dataclasses.field(default_factory=list)
    kept_indices: list[np.ndarray] = dataclasses.field(default_factory=list)
    predictions: list[np.ndarray] = dataclasses.field(default_factory=list)
    indices: list[np.ndarray] = dataclasses.field(default_factory=list)


def _collect_share(
    images: ImageSet, extractor: FeatureExtractor, batch_size: int, num_workers: int, state: PartialState
) -> _Share:
    share = _Share()
    is_kept = np.zeros(len(images), dtype=bool)
    is_kept[np.linspace(0, len(images) - 1, min(len(images), MAX_KEPT)).round().astype(int)] = True
    batches = [part.tolist() for part in torch.arange(len(images)).split(batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    progress = tqdm(
        total=len(images),
        desc=f"{extractor.name} features of {images.name}",
        unit="image",
        disable=not state.is_main_process,
        leave=False,
    )
    for indices, batch in zip(mine, images.batches(mine, num_workers), strict=True):
        computed = extractor(batch)
        for kind in (computed.features, computed.probabilities, computed.spatial):
            if kind is not None and not np.isfinite(kind).all():
                broken = indices[int(np.flatnonzero(~np.isfinite(kind).all(axis=1))[0])]
                raise ValueError(
                    f"The {extractor.name} features of image {broken} of {images.name} are not finite; compute them in "
                    f"float32, and check that image."
                )
        rows = np.array(indices)
        share.statistics = _updated(share.statistics, computed.features)
        if computed.spatial is not None:
            share.spatial_statistics = _updated(share.spatial_statistics, computed.spatial)
        if computed.probabilities is not None:
            share.score = share.score or InceptionScoreStatistics()
            share.score.update(computed.probabilities, indices[0])
            share.predictions.append(computed.probabilities.argmax(axis=1))
        share.kept.append(computed.features[is_kept[rows]])
        share.kept_indices.append(rows[is_kept[rows]])
        share.indices.append(rows)
        progress.update(min(len(indices) * state.num_processes, len(images) - progress.n))
    progress.close()
    return share


def _updated(statistics: FeatureStatistics | None, features: np.ndarray) -> FeatureStatistics:
    statistics = statistics or FeatureStatistics()
    statistics.update(features)
    return statistics


def _merge(parts: list[_Share], images: ImageSet, extractor: FeatureExtractor) -> FeatureSet:
    """The merged results of all processes, in the order of the images."""
    parts = [part for part in parts if part.indices]
    first = parts[0]
    for part in parts[1:]:
        for name in ("statistics", "spatial_statistics", "score"):
            if getattr(first, name) is not None:
                getattr(first, name).merge(getattr(part, name))
    kept_indices = np.concatenate([rows for part in parts for rows in part.kept_indices])
    order = np.argsort(kept_indices)
    predictions = None
    if first.score is not None:
        predictions = np.empty(len(images), dtype=np.int64)
        rows = np.concatenate([rows for part in parts for rows in part.indices])
        predictions[rows] = np.concatenate([batch for part in parts for batch in part.predictions])
    assert first.statistics is not None
    return FeatureSet(
        extractor=extractor.name,
        fingerprint=extractor.fingerprint,
        num_images=len(images),
        statistics=first.statistics,
        spatial_statistics=first.spatial_statistics,
        kept=np.concatenate([batch for part in parts for batch in part.kept])[order],
        kept_indices=kept_indices[order],
        score=first.score,
        predictions=predictions,
    )


def _key(images: ImageSet, extractor: FeatureExtractor) -> str:
    parts = [_FORMAT, images.digest(), extractor.name, extractor.fingerprint, MAX_KEPT]
    if hasattr(getattr(extractor, "processor", None), "resizing_steps"):
        parts.append("as in training")  # earlier versions resized differently under the same fingerprint
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
