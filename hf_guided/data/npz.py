"""`.npz` files of samples, as OpenAI's scripts write them, read without unpickling anything."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.lib import format as npy

# What numpy and zipfile raise.
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(KeyError, TypeError, ValueError, AttributeError, NotImplementedError, MemoryError),
)


def read_samples(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Images `(n, height, width, channels)`, uint8, of a file of samples, and class ids `(n,)` if there are any.

    Raises:
        `ValueError`: If it is not a .npz file of samples.
        `FileNotFoundError`: If there is no such file.
    """
    with open_npz(path) as file:
        arrays = {name: map_array(path, name) for name in ("arr_0", "arr_1") if name in file}
    if "arr_0" not in arrays:
        raise ValueError(f"{path} is not a file of samples: it has no arr_0, the array of images.")
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.ndim != 4 or images.dtype != np.uint8:
        given = f"{images.dtype} of shape {images.shape}"
        raise ValueError(f"arr_0 of {path} is {given}; samples are uint8 of shape (n, height, width, channels).")
    if len(images) == 0:
        raise ValueError(f"{path} holds no images.")
    if labels is None:
        return images, None
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        given = f"{labels.dtype} of shape {labels.shape}"
        raise ValueError(f"arr_1 of {path} is {given}; labels are an integer for each of the {len(images)} images.")
    for wrong in (labels.min(), labels.max()):
        if not 0 <= int(wrong) < 2**31:
            raise ValueError(f"arr_1 of {path} has the label {wrong}, which is not a class id; ids start at 0.")
    return images, labels.astype(np.int64)


@contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[Any]:
    """Opens a `.npz` file without unpickling anything; if it is damaged, opening or reading it is a `ValueError`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise ValueError(f"{path} is damaged or not a .npz file; write or download it again.") from error


def map_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """An array of a `.npz` file: memory-mapped if it is stored uncompressed, as `np.savez` does, otherwise read."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            with archive.open(member) as stream:
                is_first = npy.read_magic(stream) == (1, 0)
                read_header = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
                shape, is_fortran, dtype = read_header(stream)
                header_size = stream.tell()
            with open(path, "rb") as file:  # the local header ends with its own lengths of a name and extras
                file.seek(member.header_offset)
                name_length, extra_length = struct.unpack("<26x2H", file.read(30))
            start = member.header_offset + 30 + name_length + extra_length + header_size
            if 0 not in shape and not dtype.hasobject:
                return np.memmap(path, dtype, "r", start, shape, order="F" if is_fortran else "C")
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[name]
