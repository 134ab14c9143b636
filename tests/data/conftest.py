import numpy as np
import pytest
from PIL import Image

from hf_guided.data import DataArguments


@pytest.fixture
def noise_image():
    """Makes an image of noise."""

    def make(seed: int, height: int = 20, width: int = 24, mode: str = "RGB") -> Image.Image:
        values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(values).convert(mode)

    return make


@pytest.fixture
def pets(tmp_path, noise_image):
    """A folder of two classes, cat and dog, of ten images each."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            noise_image(10 * label + i).save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


@pytest.fixture
def arguments(tmp_path):
    """Makes arguments for a folder, with a cache of its own."""

    def make(folder, **kwargs) -> DataArguments:
        kwargs.setdefault("resolution", [16])
        return DataArguments(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"), **kwargs)

    return make
