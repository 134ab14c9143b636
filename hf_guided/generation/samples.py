"""Files of samples: what is written for each format, and the record of how it was made.

The published layout is a `.npz` file of 8-bit images `arr_0` and, if there are classes, labels `arr_1`. Parquet files
and folders of PNGs are laid out as `datasets.load_dataset` reads them.
"""

import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import replacing
from ..labels import unique_names
from ..models.images import open_file

NO_CLASS = -1  # the label of each image, where there are no classes
RECORD_KEY = "hf_guided"
_RECORD_FILE = ".hf_guided.json"  # hidden, so that load_dataset skips it
_ROW_GROUP = 100  # rows per row group, as datasets writes images


def write_samples(
    path: str | os.PathLike,
    batches: Iterable[np.ndarray],
    shape: tuple[int, int, int, int],
    labels: np.ndarray | None = None,
    *,
    id2label: Mapping[int, str] | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes samples to a file or folder at once, with two batches in memory at a time.

    The same samples give the same file, byte for byte. PNGs are encoded while `batches` makes the next batch.

    Args:
        path (`str` or `os.PathLike`): A `.npz` file; a `.parquet` file with the columns `image` and `label`; otherwise
            a folder of `000000.png` and so on with a `metadata.jsonl`.
        batches (`Iterable[np.ndarray]`): Images of shape `(n, height, width, channels)`, uint8.
        shape (`tuple[int, int, int, int]`): The shape of all batches together.
        labels (`np.ndarray` of shape `(n,)`, *optional*): Class ids.
        id2label (`Mapping[int, str]`, *optional*): Class names, for parquet files and folders.
        record (`Mapping`, *optional*): The settings that produced the samples, which [`read_record`] returns.
    """
    path = Path(path)
    ids, names = None, []
    if labels is not None:
        named, ids = id2label or {}, labels.tolist()
        names = unique_names([named.get(i, str(i)) for i in range(max([*named, *ids]) + 1)])
    text = "" if record is None else json.dumps(record)
    with replacing(path) as temporary:
        if path.suffix == ".npz":
            _write_npz(temporary, batches, shape, labels, text)
        elif path.suffix == ".parquet":
            _write_parquet(temporary, _pngs(batches), ids, names, text)
        else:
            _write_folder(temporary, _pngs(batches), shape[0], ids, names, text)


def read_record(path: str | os.PathLike) -> dict[str, Any] | None:
    """The record in a file or folder of [`write_samples`] or an image of [`save_png`]; `None` if there is none."""
    path = Path(path)
    text: str | bytes
    try:
        if path.is_dir():
            text = (path / _RECORD_FILE).read_text()
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                text = archive.getinfo("arr_0.npy").comment
        elif path.suffix == ".parquet":
            text = import_parquet().read_schema(path).metadata[RECORD_KEY.encode()]
        else:
            with open_file(path) as picture:
                text = picture.info[RECORD_KEY]
        record = json.loads(text)
        return record if isinstance(record, dict) else None
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile):  # includes Pillow's and pyarrow's errors
        return None


def to_picture(image: np.ndarray) -> Image.Image:
    """The Pillow image of an array `(height, width, channels)`, uint8."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _write_npz(
    path: Path, batches: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray | None, record: str
) -> None:
    with zipfile.ZipFile(path, "w") as archive:

        def add(name: str, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str, comment: str = "") -> None:
            entry = zipfile.ZipInfo(f"{name}.npy")  # with the same date in every file
            entry.comment = comment.encode()
            with archive.open(entry, "w", force_zip64=True) as stream:
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for part in parts:
                    stream.write(part.astype(dtype, copy=False).tobytes())

        add("arr_0", batches, shape, "|u1", record)
        if labels is not None:
            add("arr_1", [labels], labels.shape, "<i8")


def _write_parquet(path: Path, pngs: Iterator[bytes], ids: list[int] | None, names: list[str], record: str) -> None:
    parquet = import_parquet()
    import pyarrow
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), **({} if ids is None else {"label": ClassLabel(names=names)})})
    schema = features.arrow_schema
    if record:
        schema = schema.with_metadata({**schema.metadata, RECORD_KEY: record})
    with open(path, "wb") as file, parquet.ParquetWriter(file, schema) as writer:
        start = 0
        while images := [{"bytes": png, "path": None} for png in islice(pngs, _ROW_GROUP)]:
            columns = {"image": images, **({} if ids is None else {"label": ids[start : start + len(images)]})}
            writer.write_table(pyarrow.table(columns, schema=schema))
            start += len(images)


def _write_folder(
    folder: Path, pngs: Iterator[bytes], num_images: int, ids: list[int] | None, names: list[str], record: str
) -> None:
    folder.mkdir()
    digits = max(6, len(str(num_images - 1)))
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for i, png in enumerate(pngs):
            line: dict[str, Any] = {"file_name": f"{i:0{digits}d}.png"}
            (folder / line["file_name"]).write_bytes(png)
            if ids is not None:
                line |= {"label": names[ids[i]], "class_id": ids[i]}
            metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
    if record:
        (folder / _RECORD_FILE).write_text(record + "\n")


def _pngs(batches: Iterable[np.ndarray]) -> Iterator[bytes]:
    """Each image as the bytes of a PNG, encoded by one thread per processor while the next batch is made."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        encoded: Iterator[bytes] = iter(())
        for batch in batches:
            yield from encoded
            encoded = pool.map(_png, batch)
        yield from encoded


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    to_picture(image).save(buffer, format="PNG")
    return buffer.getvalue()


def import_parquet() -> Any:
    """pyarrow's module of parquet files, which comes with datasets."""
    try:
        import datasets  # noqa: F401
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need datasets: pip install 'hf-guided[train]'.") from error
    return pyarrow.parquet
