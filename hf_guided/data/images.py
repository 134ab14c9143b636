"""One row of a dataset: decoding its image, and the files that it may reference."""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..models.images import open_file, upright, upright_size

Rows = Sequence[dict[str, Any]]  # whose "image" is what [`open_image`] takes


def open_image(record: Any) -> Image.Image:
    """Decodes one image, in the mode of its file, and turns it upright, as its EXIF orientation says.

    Args:
        record (`dict` or `PIL.Image.Image`): What `datasets` gives for a column of `Image(decode=False)`, `{"bytes":
            ..., "path": ...}` of which one may be None; or an image that is already decoded.

    Raises:
        One of `BAD_IMAGE_ERRORS`: if there is no image, or it cannot be decoded.
    """
    with open_record(record) as image:
        return upright(image)


def open_record(record: Any) -> Image.Image:
    """Opens an image as `open_file` does, without decoding it."""
    if isinstance(record, Image.Image):
        return record
    if record is None or (record["path"] is None and record["bytes"] is None):
        raise ValueError("the image is missing")
    return open_file(record["path"] if record["bytes"] is None else record["bytes"])


def look(record: Any) -> tuple[tuple[int, int], int]:
    """Height and width of an image once it is upright, and its channels, 1 (gray) or 3, in most cases from its header.

    Raises:
        One of `BAD_IMAGE_ERRORS`: as [`open_image`].
    """
    with open_record(record) as image:
        is_gray = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
        return upright_size(image), 1 if is_gray else 3


def stored_bytes(record: Any) -> bytes:
    """The undecoded bytes of a row that [`open_image`] decodes, for comparing images; empty if the image is missing."""
    if isinstance(record, Image.Image):
        return record.mode.encode() + record.tobytes()
    if record is None:
        return b""
    if record["bytes"] is not None:
        return record["bytes"]
    return Path(record["path"]).read_bytes() if record["path"] and os.path.isfile(record["path"]) else b""


def foreign_files(images: Any, folders: Sequence[str | os.PathLike]) -> Iterator[tuple[int, str]]:
    """The rows of a dataset that reference a URL or a file outside the given folders, and what they reference.

    Its column "image" is one of `Image(decode=False)`. Links and ".." are resolved, relative paths from the working
    directory.
    """
    roots = [os.path.realpath(folder) for folder in folders]
    real_folder = cache(os.path.realpath)

    def is_foreign(path: str) -> bool:
        if "://" in path or "::" in path or "\0" in path:
            return True
        folder, name = os.path.split(path)
        real = os.path.join(real_folder(folder), name)
        if name in (".", "..") or os.path.islink(real):
            real = os.path.realpath(real)
        return not any(os.path.commonpath([root, real]) == root for root in roots)

    column = images.with_format("arrow")[:]["image"]
    parts = dict(zip(column.type.names, column.flatten(), strict=True))
    is_named = np.asarray(parts["bytes"].is_null()) & np.asarray(parts["path"].is_valid())
    for row in np.flatnonzero(is_named).tolist():
        if is_foreign(path := parts["path"][row].as_py()):
            yield row, path
