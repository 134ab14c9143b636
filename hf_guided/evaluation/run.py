"""What `hf-guided evaluate` and `sweep` are given by name: images, pipelines, statistics and feature extractors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..generation.options import labels_to_sample
from ..pipelines.auto_pipeline import is_pipeline, load_pipeline
from .evaluate import check_independent
from .features.extractors import FeatureExtractor, load_features
from .features.feature_sets import FeatureSet
from .features.image_sets import SampledImages, has_images, open_images


def paths_of(*specs: str | None) -> list[str]:
    """What images and features, given as `name:part` and `NAME=MODEL` too, may be as paths."""
    return [path for spec in specs if spec for path in (spec, spec.rpartition(":")[0], spec.partition("=")[2])]


def load_extractors(specs: Sequence[str], pipeline: Any, state: PartialState) -> list[FeatureExtractor]:
    """What images are measured in, none of which guides the pipeline, if there is one.

    Raises:
        `ValueError`: For two of one name, one that guides the pipeline, or what [`load_features`] refuses.
    """
    extractors = [load_features(spec, state.device) for spec in specs]
    names = [extractor.name for extractor in extractors]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two of --features are called {name}; name them apart, as NAME=MODEL.")
    if pipeline is not None:
        for extractor in extractors:
            check_independent(pipeline, extractor)
    return extractors


def open_real(
    spec: str,
    size: tuple[int, int],
    state: PartialState,
    labels: Sequence[str] | None = None,
    num_images: int | None = None,
    seed: int = 0,
) -> Any:
    """Images to measure against, brought to a size; a pipeline's samples; or statistics, of a file without images."""
    if is_pipeline(spec):
        pipeline = load_pipeline(spec, state)
        if pipeline.sample_size != size:
            raise ValueError(f"{spec} makes images of {pipeline.sample_size} pixels, and those to measure have {size}.")
        which = labels_to_sample(pipeline, labels, default="all", num_images=num_images, seed=seed)
        return SampledImages(pipeline, which, seed)
    if spec.endswith(".npz") and Path(spec).is_file() and not has_images(spec):
        return FeatureSet.load(spec)
    return open_images(spec, size)
