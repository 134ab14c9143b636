"""The published layout of samples: a `.npz` file of 8-bit images `arr_0` and, if there are classes, labels `arr_1`."""

import os
import zipfile
from pathlib import Path

import numpy as np


def read_samples(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads images and labels.

    Args:
        path (`str` or `os.PathLike`): A `.npz` file.

    Returns:
        Images of shape `(n, height, width, channels)`, uint8, and class ids of shape `(n,)` or `None`.

    Raises:
        `ValueError`: If the file is none, or holds something else.
        `FileNotFoundError`: If there is none.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("arr_0", "arr_1") if name in file}
    except (zipfile.BadZipFile, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no .npz file of samples; write or download it again.") from error
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has no arr_0, where a file of samples keeps its images.")
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"arr_0 of {path} is {images.dtype} of shape {images.shape}; samples are uint8 of shape "
            f"(n, height, width, channels)."
        )
    if len(images) == 0:
        raise ValueError(f"{path} holds no images.")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"arr_1 of {path} is {labels.dtype} of shape {labels.shape}; the labels of {len(images)} images are so "
            f"many integers."
        )
    return images, labels


def write_samples(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Writes a `.npz` file under a temporary name and renames it.

    Args:
        path (`str` or `os.PathLike`): The file.
        images (`np.ndarray` of shape `(n, height, width, channels)`): uint8.
        labels (`np.ndarray` of shape `(n,)`, *optional*): Class ids.
    """
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, images, *([] if labels is None else [labels]))
    os.replace(temporary, path)
