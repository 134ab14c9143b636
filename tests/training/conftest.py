"""A folder of pictures to train on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """60 RGB pictures of three classes, of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for label, name in enumerate(["apple", "banana", "cherry"]):
        (folder / name).mkdir()
        for i in range(20):
            shape = (int(random.integers(9, 20)), int(random.integers(9, 20)), 3)
            pixels = random.integers(0, 120, shape, dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder
