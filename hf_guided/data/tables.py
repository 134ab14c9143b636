"""One split of a dataset: its images, one a row, their labels, and the names of the classes."""

import glob
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants

from ..credentials import without_credentials
from ..labels import composed
from .arguments import DataArguments
from .built_in import import_extra
from .folders import NOT_IMAGES, FolderScan, read_split, scan_folder
from .images import foreign_files
from .metadata import TEXT_TYPES

logger = logging.getLogger(__name__)

USUAL_COLUMNS = {
    "image": ("image", "img", "images", "picture", "photo"),
    "label": ("label", "labels", "class", "fine_label", "category", "target"),
}


def requested_folder(args: DataArguments) -> FolderScan | None:
    """The requested folder of images; `None` if `datasets` is to load the data, or the data are built in.

    `datasets` loads a folder that is given as --dataset_name if its card says which files hold the data, or if it has
    files that may hold them, or no images.
    """
    if args.train_data_dir is not None:
        if not os.path.isdir(args.train_data_dir):
            raise FileNotFoundError(
                f"--train_data_dir '{args.source}' is not a folder; a folder needs one sub-folder of images per class."
            )
        return scan_folder(args.train_data_dir)
    folder = args.dataset_name or ""
    if args.built_in or args.dataset_config_name is not None or not os.path.isdir(folder):
        return None
    card = Path(folder, "README.md")
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2) if card.is_file() else []
    if len(parts) == 3 and not parts[0] and re.search("^configs:", parts[1], re.MULTILINE):
        return None
    scan = scan_folder(folder)
    holds_data = any(path.endswith((".parquet", ".arrow")) for path in scan.left_out[NOT_IMAGES])
    return scan if scan.images and not holds_data else None


def load_split(
    args: DataArguments,
    split: str,
    require_labels: bool,
    folder: FolderScan | None,
    known_names: list[str] | None = None,
) -> tuple[Any, np.ndarray | None, list[str]]:
    """The undecoded images of a split, their labels, and the names of the classes; a `ValueError` if it is unusable.

    Args:
        args ([`DataArguments`]): Which dataset and columns.
        split (`str`): Of the dataset.
        require_labels (`bool`): Refuse a split without usable labels; otherwise it has `None` and no names.
        folder ([`FolderScan`], *optional*): The dataset, if it is a folder of images.
        known_names (`list[str]`, *optional*): The classes of the training split: another may use only these, not all.
    """
    where = f"split '{split}' of '{args.source}'"
    if folder is None:
        dataset = _load_dataset(args, split, where)
        images = _images_of(dataset, args, where)
    else:
        part = read_split(folder, split, args.image_column, known_names or None)
        if part.metadata is None:
            for kind in USUAL_COLUMNS:
                if (name := getattr(args, f"{kind}_column")) not in (None, kind):
                    raise ValueError(
                        f"There is no column '{name}' in {where}, which has no metadata file; drop --{kind}_column."
                    )
            if part.labels is None and require_labels:
                raise ValueError(part.why_unlabelled)
            return part.images, part.labels, part.names
        dataset, images = import_extra("datasets").Dataset(part.metadata), part.images
    column = _find_column(dataset, "label", args, import_extra("datasets").ClassLabel, where)
    if column is None:
        if not require_labels:
            return images, None, []
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"Found no column of labels in {where} (columns: {columns}); name it with --label_column.")
    try:
        return images, *_read_labels(dataset, column, where, known_names)
    except ValueError as error:
        if require_labels:
            raise
        logger.warning("Loading without labels: %s", error)
        return images, None, []


def _load_dataset(args: DataArguments, split: str, where: str) -> Any:
    """A split as `datasets` loads it."""
    datasets = import_extra("datasets")
    path, data_files = args.dataset_name, None
    if path is not None and path.endswith(".parquet"):
        # A file's name is not a glob pattern; other patterns and URLs are left to `datasets`.
        path, data_files = "parquet", glob.escape(path) if os.path.isfile(path) else path
    try:
        return datasets.load_dataset(
            path, args.dataset_config_name, data_files=data_files, split=split, cache_dir=args.cache_dir
        )
    except (FileNotFoundError, ValueError, ConnectionError, datasets.exceptions.DatasetGenerationError) as error:
        is_wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)  # its own text gives no reason
        reason = without_credentials(" ".join(str(error.__cause__ if is_wrapped else error).split()).rstrip("."))
        raise ValueError(f"Cannot load {where} ({reason}); check the name and the split.") from error


def _images_of(dataset: Any, args: DataArguments, where: str) -> Any:
    """The images alone, undecoded, as the column "image"; refuses files outside their own folder and the caches."""
    datasets = import_extra("datasets")
    column = _find_column(dataset, "image", args, datasets.Image, where)
    if column is None:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"Found no column of images in {where} (columns: {columns}); name it with --image_column.")
    feature = dataset.features[column]
    if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", "") not in (*TEXT_TYPES, "binary"):
        raise ValueError(f"Column '{column}' of {where} holds {feature}, not images; name another --image_column.")
    images = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if column != "image":
        images = images.rename_column(column, "image")

    config, source = datasets.config, str(args.dataset_name)
    folders = [config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH]
    folders += [constants.HF_HUB_CACHE, *filter(None, [args.cache_dir])]
    if is_local := os.path.exists(source):
        folders.insert(0, source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source)))
    for row, path in foreign_files(images, folders):
        is_found = is_local and dataset.info.builder_name == "imagefolder"
        if is_found and not any(Path(folders[0]).rglob("metadata.*")):
            break  # found in the folder, not listed in a file: the links are the user's own
        raise ValueError(
            f"Row {row} of {where} names '{path}', which is not a file below {folders[0]}. Put the images there, with "
            f"a metadata.csv that lists them in a column file_name, or store them in the rows as bytes."
        )
    return images


def _find_column(dataset: Any, kind: str, args: DataArguments, feature_type: type, where: str) -> str | None:
    """The requested column; or the only one of the type, or else the first of a usual name, if any."""
    columns, requested = dataset.column_names, getattr(args, f"{kind}_column")
    if requested is not None and requested not in columns:
        known = ", ".join(columns)
        raise ValueError(f"There is no column '{requested}' in {where}; set --{kind}_column to one of: {known}.")
    if requested is not None:
        return requested
    typed = [column for column in columns if isinstance(dataset.features[column], feature_type)]
    if len(typed) == 1:
        return typed[0]
    usual = [column for column in USUAL_COLUMNS[kind] if column in (typed or columns)]
    if typed and not usual:
        raise ValueError(f"Several columns of {where} are {kind}s; set --{kind}_column to one of: {', '.join(typed)}.")
    return usual[0] if usual else None


def _read_labels(dataset: Any, column: str, where: str, known_names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels from 0, and the names of the classes."""
    what = f"Column '{column}' of {where}"
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:
        raise ValueError(f"{what} lacks {values.null_count:,} of its labels; fill them in, or remove these images.")
    feature = dataset.features[column]
    names = getattr(feature, "names", None) or known_names  # `names`: of a ClassLabel
    kind = getattr(feature, "dtype", "")
    if "int" in kind:
        labels = values.to_numpy().astype(np.int64)
        if names is None:
            names = [str(label) for label in range(labels.max() + 1)]
    elif kind in (*TEXT_TYPES, "bool"):
        texts = [composed(str(value)) for value in values.to_pylist()]
        names = names or sorted(set(texts))
        label_of = {composed(name): label for label, name in enumerate(names)}
        if unknown := sorted(set(texts) - set(label_of)):
            raise ValueError(f"{what} has the label '{unknown[0]}', which the training split lacks; remove it.")
        labels = np.array([label_of[text] for text in texts], dtype=np.int64)
    else:
        raise ValueError(f"{what} holds {feature}, not integers or strings; name another --label_column.")

    for label in (labels.min(), labels.max()):
        if not 0 <= label < len(names):
            raise ValueError(
                f"{what} has the label {label}, outside 0 to {len(names) - 1}; choose a split whose labels are public, "
                f"or renumber them."
            )
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if known_names is None and len(empty):
        raise ValueError(
            f"Class {empty[0]} ('{names[empty[0]]}'), one of {len(empty):,} such, has no image in {where}; "
            f"column '{column}' must use every label from 0 to {len(names) - 1}: renumber them, or take more rows."
        )
    return labels, list(names)
