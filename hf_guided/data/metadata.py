"""Metadata files, which list the images of a folder and describe them."""

import json
import os
import re
from pathlib import Path
from typing import Any

from ..messages import printable
from .built_in import import_extra

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TEXT_TYPES = ("string", "large_string")


def read_metadata(root: str, path: str, image_column: str | None) -> tuple[list[str], Any] | None:
    """The images that a metadata file lists, and its other columns as a `pyarrow.Table`; `None` if it lists no files.

    Its path and those of the images are relative to `root`. The `image_column` `"mask"` takes the files in the column
    `mask_file_name`. A file that cannot be read, or lists files outside of `root`, is a `ValueError`.
    """
    import_extra("datasets")
    import pandas
    import pyarrow
    import pyarrow.parquet

    full = os.path.join(root, path)
    where = f"'{printable(full)}'"
    try:
        if path.endswith(".csv"):
            table = pyarrow.Table.from_pandas(pandas.read_csv(full), preserve_index=False)
        elif path.endswith(".parquet"):
            with open(full, "rb") as file:
                table = pyarrow.parquet.read_table(file)
        else:
            with open(full, encoding="utf-8-sig") as file:
                rows = [json.loads(line) for line in file if line.strip()]
            names = dict.fromkeys(name for row in rows for name in row)
            table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"Cannot read {where} ({error}); repair or remove it.") from error
    columns = [f.name for f in table.schema if re.search("(^|_)file_name$", f.name) and str(f.type) in TEXT_TYPES]
    if not columns:
        return None
    wanted = "file_name" if image_column in (None, "image") else f"{image_column}_file_name"
    if wanted not in columns and (len(columns) > 1 or image_column is not None):
        known = ", ".join(name.removesuffix("file_name").rstrip("_") or "image" for name in columns)
        raise ValueError(f"Several columns of {where} list files; set --image_column to one of: {known}.")
    column = wanted if wanted in columns else columns[0]
    folder, real_root, paths = os.path.dirname(path), os.path.realpath(root), []
    for name in table[column].to_pylist():
        inside = os.path.normpath((name or "").replace("\\", "/"))
        is_inside = name and "://" not in name and not os.path.isabs(inside) and inside.split(os.sep)[0] != os.pardir
        if not is_inside or not Path(os.path.realpath(os.path.join(root, folder, inside))).is_relative_to(real_root):
            raise ValueError(f"{where} lists the image {name!r}, which is not the name of a file below its folder.")
        paths.append(os.path.join(folder, inside))
    return paths, table.drop_columns([column])
