"""What the evaluation tests share: an extractor that can be computed by hand."""

import numpy as np
import torch

from hf_guided.evaluation.features.extractors import FeatureBatch


class Pixels:
    """Features are projections of pixels; probabilities say by the first pixel which of three classes it is."""

    name = "pixels"
    fingerprint = "pixels of version 1"
    id2label = {0: "dark", 1: "gray", 2: "bright"}

    def __init__(self, dim: int = 4, spatial: bool = False):
        self.dim, self.spatial = dim, spatial
        self.calls = 0

    def __call__(self, images: torch.Tensor) -> FeatureBatch:
        assert images.dtype == torch.uint8
        self.calls += 1
        values = images.flatten(1).double().numpy() / 255
        rng = np.random.default_rng(0)
        projected = values @ rng.standard_normal((values.shape[1], self.dim))
        nearness = -((values[:, :1] - np.array([[0.0, 0.5, 1.0]])) ** 2) * 50
        probabilities = np.exp(nearness) / np.exp(nearness).sum(axis=1, keepdims=True)
        return FeatureBatch(
            features=projected.astype(np.float32),
            probabilities=probabilities.astype(np.float32),
            spatial=projected[:, :2].astype(np.float32) if self.spatial else None,
        )


def pixels(n: int, seed: int = 0, channels: int = 3, size: int = 4) -> np.ndarray:
    """Random images `(n, size, size, channels)`."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8)
