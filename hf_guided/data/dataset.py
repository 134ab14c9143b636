"""From the name of a dataset to two sets of images: training images and held-out images."""

import glob
import hashlib
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..credentials import without_credentials
from ..fields import CheckedFields, Length, Range, Share, Width, flag
from ..files import check_place
from ..labels import composed
from .built_in import BUILT_IN, DIGITS, PHOTOGRAPHS, import_extra, load_digits, load_photographs
from .folders import TEXT_TYPES, FolderScan, ImageFiles, printable, read_split, scan_folder
from .images import (
    BAD_IMAGE_ERRORS,
    foreign_files,
    open_image,
    resize_and_crop,
    stored_bytes,
    to_channels,
    to_pixel_values,
)

logger = logging.getLogger(__name__)

NUM_DIGITS_HELD_OUT = 297  # of 1,797
PHOTOGRAPHS_HELD_OUT = 0.2  # of each one's width
HELD_OUT_SEED = 0  # never the training seed: every run is measured on the same images
DIGESTED_BYTES = 2**30  # read of a dataset to identify it, which takes seconds
USUAL_IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo")
USUAL_LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "category", "target")


@dataclass
class DataArguments(CheckedFields):
    """Which images to train on, and how they are resized; each field is a command-line flag."""

    dataset_name: str | None = flag(
        None,
        "Dataset on the Hub, or a local path that `datasets` can load, a .parquet file too. Built in, from "
        "scikit-learn: 'digits' of 8x8, also used when neither this nor --train_data_dir is given; 'photographs', "
        "crops of two.",
    )
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, for datasets that have several.")
    train_data_dir: str | None = flag(
        None,
        "Folder with one sub-folder of images per class, at any depth below it, or with a metadata.jsonl; or folders "
        "'train', 'val', 'test' of such.",
    )
    train_split: str = flag("train", "Split to train on.")
    validation_split: str | None = flag(
        None, "Split to hold out. Without it, a part of the training split is held out."
    )
    held_out_fraction: Share | None = flag(
        None,
        "Fraction of the training split to hold out if there is no --validation_split, the same fraction of each "
        "class and the same images for every seed. Default: 0.1, 297 images of the digits, and 0.2 of the width of "
        "each photograph. 0: none.",
    )
    image_column: str | None = flag(None, "Column of the images. Default: found by its type or usual name.")
    label_column: str | None = flag(None, "Column of the class labels. Default: found by its type or usual name.")
    resolution: Annotated[list[Width], Length(1, 2)] | None = flag(
        None,
        "Side of the images in pixels, or their height and width. Default: 8 for the digits, 32 for the photographs.",
    )
    image_channels: int | None = flag(None, "1 (gray) or 3 (RGB). Default: 3, and 1 for the digits.", choices=(1, 3))
    random_crop: bool = flag(False, "Crop training images at random scales and places instead of at the centre.")
    random_flip: bool = flag(False, "Mirror half of the training images left to right.")
    dataloader_num_workers: Annotated[int, Range(at_least=0, at_most=1024)] = flag(
        0, "Processes that load images; any number gives the same batches. 0: the main one."
    )
    cache_dir: str | None = flag(None, "Where `datasets` keeps what it downloads and prepares.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dataset_name", "train_data_dir", "cache_dir"):  # shells keep the ~ of --train_data_dir=~/photos
            setattr(self, name, getattr(self, name) and os.path.expanduser(getattr(self, name)))
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError(
                f"Both --dataset_name '{self.dataset_name}' and --train_data_dir '{self.train_data_dir}' are given; "
                "give only one."
            )
        if self.dataset_config_name is not None and (self.train_data_dir is not None or self.built_in):
            raise ValueError(
                f"--dataset_config_name '{self.dataset_config_name}' is for a dataset on the Hub; "
                f"'{self.source}' has no configurations; leave it out, or give another --dataset_name."
            )
        if self.cache_dir is not None:
            check_place(self.cache_dir, "--cache_dir")
        if self.built_in and self.validation_split is not None:
            raise ValueError(
                f"The {self.built_in} have no split '{self.validation_split}'; use --held_out_fraction instead."
            )
        if self.validation_split == self.train_split:
            raise ValueError(
                f"--validation_split {self.validation_split} is the split to train on; give another, or leave it out "
                "to hold out a part."
            )

    @property
    def source(self) -> str:
        """The source of the images: the folder, the dataset's name without credentials, or 'digits'."""
        return printable(without_credentials(self.train_data_dir or self.dataset_name or DIGITS))

    @property
    def title(self) -> str:
        """The data's name on cards: the last part of its name or, for a folder, of its absolute path."""
        folder = self.train_data_dir or self.dataset_name
        return Path(printable(os.path.abspath(folder)) if folder and os.path.exists(folder) else self.source).name

    @property
    def built_in(self) -> str | None:
        """The name of the built-in dataset that is requested, or `None`."""
        return self.source if self.train_data_dir is None and self.source in BUILT_IN else None


def source_argument(source: str) -> dict[str, str]:
    """The argument of [`DataArguments`] for a folder, or for any other dataset."""
    is_folder = source not in BUILT_IN and os.path.isdir(source)
    return {"train_data_dir" if is_folder else "dataset_name": source}


class LabelledImages(Dataset):
    """
    Images of one size, with or without labels. Made by `load_labelled_images`.

    `dataset[index, epoch]` is `{"pixel_values": tensor, "labels": int}`: float32 of shape (channels, height, width) in
    -1..1, without "labels" if the dataset has none. Crops and flips depend on `(seed, index, epoch)` and nothing else;
    a bare index means epoch 0. An image that cannot be decoded is replaced by the next one that can, with its label.

    Args:
        images (`Sequence`): Rows whose "image" is what `open_image` takes.
        rows (`numpy.ndarray`): The rows of `images` that belong to this dataset, shape (length,).
        labels (`numpy.ndarray`, *optional*): The class of each of these rows from 0, shape (length,). None: no labels.
        id2label (`dict[int, str]`): The name of each class. Empty without labels.
        name (`str`): What the dataset is called in messages.
        resolution (`tuple[int, int]`): Height and width in pixels to scale and crop the images to.
        image_channels (`int`): 1 (gray) or 3 (RGB).
        seed (`int`, defaults to 0): Seed of crops and flips.
        random_crop (`bool`, defaults to False): Crop at random scales and places instead of at the centre.
        random_flip (`bool`, defaults to False): Mirror half of the images left to right.
    """

    def __init__(
        self,
        images: Sequence[dict[str, Any]],
        rows: np.ndarray,
        labels: np.ndarray | None,
        id2label: dict[int, str],
        name: str,
        resolution: tuple[int, int],
        image_channels: int,
        seed: int = 0,
        random_crop: bool = False,
        random_flip: bool = False,
    ):
        self.images = images
        self.rows = rows
        self.labels = labels
        self.id2label = id2label
        self.name = name
        self.resolution = resolution
        self.image_channels = image_channels
        self.seed = seed
        self.random_crop = random_crop
        self.random_flip = random_flip
        # In shared memory, so that the main process knows which files its loader's workers found bad.
        self._is_bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 without labels."""
        return len(self.id2label)

    @property
    def notes(self) -> list[str]:
        """How a folder was read and which files are skipped, one sentence each; empty for other datasets."""
        return getattr(self.images, "notes", [])

    @property
    def bad_files(self) -> list[str]:
        """The files that could not be decoded and were replaced, as far as any loader worker has read."""
        return [self.file_name(index) for index in self._is_bad.nonzero().flatten().tolist()]

    @cached_property
    def digest(self) -> str:
        """A hash of the images and labels in their order; it does not depend on the location or name of their folder.

        Up to 1 GiB it covers every byte; beyond, every file's size and the bytes of evenly spaced images.
        """
        digest = hashlib.sha256(b"" if self.labels is None else self.labels.tobytes())

        def stored(index: int) -> bytes:
            return stored_bytes(self.images[int(self.rows[index])]["image"])

        if isinstance(self.images, ImageFiles):
            sizes = self.images.sizes(self.rows)
        else:  # of evenly spaced rows, since sizes are only known after reading
            spaced = range(0, len(self), math.ceil(len(self) / 100))
            sizes = np.array([len(stored(index)) for index in spaced])
        digest.update(sizes.tobytes())
        step = max(1, math.ceil(sizes.mean() * len(self) / DIGESTED_BYTES))
        for index in tqdm(range(0, len(self), step), desc=f"Reading {self.name}", unit="image", leave=False):
            content = stored(index)
            digest.update(len(content).to_bytes(8) + content)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def plain(self, most: int | None = None) -> "LabelledImages":
        """These images without augmentation; if there are more than `most`, a fixed random subset of that many."""
        chosen = np.arange(len(self))
        if most is not None and most < len(self):
            chosen = np.sort(np.random.default_rng(0).choice(len(self), most, replace=False))
        labels = None if self.labels is None else self.labels[chosen]
        return LabelledImages(
            self.images, self.rows[chosen], labels, self.id2label, self.name, self.resolution, self.image_channels
        )

    def open(self, index: int) -> Image.Image:
        """The image as it is in the file, upright. Raises one of `BAD_IMAGE_ERRORS` if there is none."""
        return open_image(self.images[int(self.rows[index])]["image"])

    def file_name(self, index: int) -> str:
        """The file's path, or the row's number where the image has no path."""
        record = self.images[int(self.rows[index])]["image"]
        path = isinstance(record, dict) and record["path"]
        return printable(without_credentials(path)) if path else f"row {self.rows[index]}"

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is not in 0 to {len(self) - 1}.")
        index, image = self._next_good_image(index)

        rng = np.random.default_rng((self.seed, index, epoch)) if self.random_crop or self.random_flip else None
        image = resize_and_crop(image, self.resolution, crop_rng=rng if self.random_crop else None)
        pixel_values = to_pixel_values(image, self.image_channels)
        if self.random_flip and rng is not None and rng.random() < 0.5:
            pixel_values = pixel_values[:, :, ::-1]

        item: dict[str, Any] = {"pixel_values": torch.from_numpy(np.ascontiguousarray(pixel_values))}
        if self.labels is not None:
            item["labels"] = int(self.labels[index])
        return item

    def _next_good_image(self, index: int) -> tuple[int, Image.Image]:
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            if self._is_bad.numpy()[candidate]:  # faster to index than the tensor
                continue
            try:
                return candidate, to_channels(self.open(candidate), self.image_channels)
            except BAD_IMAGE_ERRORS as error:
                self._is_bad[candidate] = True
                logger.warning("Substituting a bad image of '%s': %s (%s)", self.name, self.file_name(candidate), error)
        raise ValueError(f"None of the {len(self)} images of '{self.name}' can be decoded; give another dataset.")


def load_labelled_images(
    args: DataArguments, seed: int, require_labels: bool = True
) -> tuple[LabelledImages, LabelledImages | None]:
    """
    Loads the training images and the held-out ones.

    The held-out images are the validation split, or a part of the training split: the same fraction of each class, and
    the same images for every `seed`. They are never augmented. At least one image of each class stays in training.

    Args:
        args (`DataArguments`): Which images, and how they are resized to the model's resolution.
        seed (`int`): Seed of the augmentation only.
        require_labels (`bool`, defaults to True): Whether labels of two or more classes are required. If False, a
            dataset without usable labels is read without labels (`labels` is None).

    Returns:
        `tuple[LabelledImages, LabelledImages | None]`: the training images and the held-out ones; None if there is no
        validation split and the held-out fraction is 0.

    Raises:
        `FileNotFoundError`: if the folder does not exist.
        `ValueError`: if the dataset, its columns or its labels cannot be used.
        `ImportError`: if `datasets` or `scikit-learn` is not installed.
    """
    image_channels = args.image_channels if args.image_channels is not None else (1 if args.built_in == DIGITS else 3)

    images: Any
    labels: np.ndarray | None
    is_held_out: np.ndarray | None = None  # where the images themselves decide
    if args.built_in == PHOTOGRAPHS:
        resolution = _check_resolution(args, [32], [])
        fraction = PHOTOGRAPHS_HELD_OUT if args.held_out_fraction is None else args.held_out_fraction
        images, labels, names, is_held_out = load_photographs(resolution, fraction)
    else:
        is_digits = args.built_in == DIGITS
        folder = None if is_digits else _scan_folder(args)
        images, labels, names = (
            load_digits() if is_digits else _load_split(args, args.train_split, require_labels, folder)
        )
        resolution = _check_resolution(args, [8] if is_digits else None, images)
    if require_labels and len(names) < 2:
        raise ValueError(
            f"'{args.source}' has the single class '{names[0]}', but guidance needs two or more; "
            "add images of another class."
        )

    if args.validation_split is not None:
        rows = np.arange(len(images))
        held_out_images, held_out_labels, _ = _load_split(
            args, args.validation_split, labels is not None, folder, names
        )
        held_out_rows = np.arange(len(held_out_images))
        if folder is not None:
            images.notes += [note for note in held_out_images.notes if note not in images.notes]
    elif is_held_out is not None:
        rows, held_out_rows = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        held_out_images, held_out_labels = images, labels
    else:
        num_held_out = _num_held_out(args, len(images))
        rows, held_out_rows = split_by_class(np.zeros(len(images), int) if labels is None else labels, num_held_out)
        held_out_images, held_out_labels = images, labels

    shared: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "name": args.source,
        "resolution": resolution,
        "image_channels": image_channels,
    }
    train = LabelledImages(
        images,
        rows,
        None if labels is None else labels[rows],
        seed=seed,
        random_crop=args.random_crop,
        random_flip=args.random_flip,
        **shared,
    )
    if len(held_out_rows) == 0:
        return train, None
    if labels is None or held_out_labels is None:
        return train, LabelledImages(held_out_images, held_out_rows, None, **shared)
    return train, LabelledImages(held_out_images, held_out_rows, held_out_labels[held_out_rows], **shared)


def split_by_class(labels: np.ndarray, num_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Training rows and held-out rows, with each class held out in proportion; the split is deterministic.

    Args:
        labels (`numpy.ndarray`): The class of each row, shape (rows,).
        num_held_out (`int`): Rows to hold out. Fewer are held out if a class would keep no row.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray]`: the rows to train on and the rows held out, both ascending.
    """
    shuffled = np.random.default_rng(HELD_OUT_SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    first_of_class = np.unique(labels[by_class], return_index=True)[1]
    candidates = np.delete(by_class, first_of_class)
    num_held_out = min(num_held_out, len(candidates))
    # Evenly spaced along the sorted classes: each class's share is rounded up or down, and the total is exact.
    held_out = np.sort(candidates[(2 * np.arange(num_held_out) + 1) * len(candidates) // max(1, 2 * num_held_out)])
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _num_held_out(args: DataArguments, num_images: int) -> int:
    if args.held_out_fraction is None and args.built_in == DIGITS:
        return NUM_DIGITS_HELD_OUT
    fraction = 0.1 if args.held_out_fraction is None else args.held_out_fraction
    return max(1, round(fraction * num_images)) if fraction > 0 else 0


def _load_split(
    args: DataArguments,
    split: str,
    require_labels: bool,
    folder: FolderScan | None,
    known_names: list[str] | None = None,
) -> tuple[Any, np.ndarray | None, list[str]]:
    """The images of a split, one undecoded "image" a row, with their labels and the names of the classes."""
    if folder is not None:
        return _load_folder_split(args, split, require_labels, folder, known_names)
    datasets = import_extra("datasets")
    path, where = args.dataset_name, f"split '{split}' of '{args.source}'"
    data_files = None
    if path is not None and path.endswith(".parquet"):
        # A file's name is not a glob pattern; other patterns and URLs are left to `datasets`.
        path, data_files = "parquet", glob.escape(path) if os.path.isfile(path) else path
    try:
        dataset = datasets.load_dataset(
            path,
            args.dataset_config_name,
            data_files=data_files,
            split=split,
            cache_dir=args.cache_dir,
        )
    except (FileNotFoundError, ValueError, ConnectionError, datasets.exceptions.DatasetGenerationError) as error:
        is_wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)  # its own text gives no reason
        reason = without_credentials(" ".join(str(error.__cause__ if is_wrapped else error).split()).rstrip("."))
        raise ValueError(f"Cannot load {where} ({reason}); check the name and the split.") from error
    columns = ", ".join(dataset.column_names)

    image_column = _find_column(dataset, "image", args.image_column, datasets.Image, USUAL_IMAGE_COLUMNS, where)
    if image_column is None:
        raise ValueError(f"Found no column of images in {where} (columns: {columns}); name it with --image_column.")
    feature = dataset.features[image_column]
    kind = getattr(feature, "dtype", "")
    if not isinstance(feature, datasets.Image) and kind not in (*TEXT_TYPES, "binary"):
        raise ValueError(
            f"Column '{image_column}' of {where} holds {feature}, not images; name another --image_column."
        )
    images = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    if image_column != "image":
        images = images.rename_column(image_column, "image")
    _refuse_foreign_files(images, args, dataset.info.builder_name, where)

    return images, *_labels_of(dataset, args, require_labels, where, known_names)


def _scan_folder(args: DataArguments) -> FolderScan | None:
    """The requested folder of images; None if `datasets` is to load the data."""
    if args.train_data_dir is not None:
        if not os.path.isdir(args.train_data_dir):
            raise FileNotFoundError(
                f"--train_data_dir '{args.source}' is not a folder; a folder needs one sub-folder of images per class."
            )
        return scan_folder(args.train_data_dir)
    if args.dataset_name is None or args.dataset_config_name is not None or not os.path.isdir(args.dataset_name):
        return None
    if _has_configs(os.path.join(args.dataset_name, "README.md")):
        return None
    scan = scan_folder(args.dataset_name)
    return scan if scan.images and not scan.holds_data_files else None


def _has_configs(card: str) -> bool:
    """Whether a dataset card says which files hold the data."""
    if not os.path.isfile(card):
        return False
    with open(card, encoding="utf-8", errors="replace") as file:
        parts = file.read().split("---\n", 2)
    return len(parts) == 3 and not parts[0] and any(line.startswith("configs:") for line in parts[1].splitlines())


def _load_folder_split(
    args: DataArguments, split: str, require_labels: bool, scan: FolderScan, known_names: list[str] | None
) -> tuple[Any, np.ndarray | None, list[str]]:
    """As `_load_split`, for a folder of images."""
    where = f"split '{split}' of '{args.source}'"
    part = read_split(scan, split, args.image_column, known_names or None)
    if part.metadata is not None:
        dataset = import_extra("datasets").Dataset(part.metadata)
        return part.images, *_labels_of(dataset, args, require_labels, where, known_names)
    for kind, column in (("image", args.image_column), ("label", args.label_column)):
        if column not in (None, kind):
            raise ValueError(
                f"There is no column '{column}' in {where}, which has no metadata file; drop --{kind}_column."
            )
    if part.labels is None and require_labels:
        raise ValueError(part.why_unlabelled)
    return part.images, part.labels, part.names


def _labels_of(
    dataset: Any, args: DataArguments, require_labels: bool, where: str, known_names: list[str] | None
) -> tuple[np.ndarray | None, list[str]]:
    """The labels of a dataset and the names of the classes; None and no names if it has none and none are required."""
    feature_type = import_extra("datasets").ClassLabel
    column = _find_column(dataset, "label", args.label_column, feature_type, USUAL_LABEL_COLUMNS, where)
    if column is None:
        if require_labels:
            raise ValueError(
                f"Found no column of labels in {where} (columns: {', '.join(dataset.column_names)}); "
                f"name it with --label_column."
            )
        return None, []
    try:
        return _read_labels(dataset, column, where, known_names)
    except ValueError as error:
        if require_labels:
            raise
        logger.warning("Loading without labels: %s", error)
        return None, []


def _refuse_foreign_files(images: Any, args: DataArguments, builder: str | None, where: str) -> None:
    """Raises for data that reference files outside their own folder and the caches of `datasets` and the Hub."""
    config, hub = import_extra("datasets").config, import_extra("huggingface_hub").constants
    caches = [config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH]
    caches += [hub.HF_HUB_CACHE, *([] if args.cache_dir is None else [args.cache_dir])]
    source = args.dataset_name or ""
    folder = source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source))
    is_local = os.path.exists(source)
    for row, path in foreign_files(images, [*([folder] if is_local else []), *caches]):
        metadata = (name for _, _, names in os.walk(folder) for name in names if name.startswith("metadata."))
        if is_local and builder == "imagefolder" and not any(metadata):
            return  # found in the folder, not listed in a file: the links are the user's own
        raise ValueError(
            f"Row {row} of {where} names '{path}', which is not a file below {folder if is_local else caches[0]}. Put "
            "the images there, with a metadata.csv that lists them in a column file_name, or store them in the rows "
            "as bytes."
        )


def _find_column(
    dataset: Any, kind: str, requested: str | None, feature_type: type, usual_names: Sequence[str], where: str
) -> str | None:
    columns = dataset.column_names
    if requested is not None:
        if requested not in columns:
            raise ValueError(
                f"There is no column '{requested}' in {where}; set --{kind}_column to one of: {', '.join(columns)}."
            )
        return requested
    typed = [column for column in columns if isinstance(dataset.features[column], feature_type)]
    if len(typed) == 1:
        return typed[0]
    usual = [column for column in usual_names if column in (typed or columns)]
    if typed and not usual:
        raise ValueError(f"Several columns of {where} are {kind}s; set --{kind}_column to one of: {', '.join(typed)}.")
    return usual[0] if usual else None


def _read_labels(dataset: Any, column: str, where: str, known_names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """
    Labels from 0 and the names of the classes. `known_names` are the classes of the training split; another split may
    use only these, and need not use all.
    """
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:
        raise ValueError(
            f"Column '{column}' of {where} lacks {values.null_count:,} of its labels; "
            "fill them in, or remove these images."
        )
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
        unknown = sorted(set(texts) - set(label_of))
        if unknown:
            raise ValueError(
                f"Column '{column}' of {where} has the label '{unknown[0]}', which the training split lacks; remove it."
            )
        labels = np.array([label_of[text] for text in texts], dtype=np.int64)
    else:
        raise ValueError(
            f"Column '{column}' of {where} holds {feature}, not integers or strings; name another --label_column."
        )

    if labels.min() < 0 or labels.max() >= len(names):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(
            f"Column '{column}' of {where} has the label {wrong}, outside 0 to {len(names) - 1}; "
            "choose a split whose labels are public, or renumber them."
        )
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if known_names is None and len(empty):
        raise ValueError(
            f"Class {empty[0]} ('{names[empty[0]]}'), one of {len(empty):,} such, has no image in {where}; "
            f"column '{column}' must use every label from 0 to {len(names) - 1}: renumber them, or take more rows."
        )
    return labels, list(names)


def _check_resolution(
    args: DataArguments, default: list[int] | None, images: Sequence[dict[str, Any]]
) -> tuple[int, int]:
    sides = args.resolution or default
    if sides is None:
        raise ValueError(
            f"--resolution is needed for '{args.source}'; most of its images are {_most_common_size(images)} pixels."
        )
    return sides[0], sides[-1]


def _most_common_size(images: Sequence[dict[str, Any]], num_looked_at: int = 100) -> str:
    sizes: Counter[str] = Counter()
    for row in np.linspace(0, len(images) - 1, min(num_looked_at, len(images))).astype(int).tolist():
        try:
            image = open_image(images[row]["image"])
        except BAD_IMAGE_ERRORS:
            continue
        sizes[f"{image.height} x {image.width} (height x width)"] += 1
    return sizes.most_common(1)[0][0] if sizes else "unreadable, and none has a known number of"
