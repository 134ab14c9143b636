"""From the name of a dataset to two sets of images: training images and held-out images."""

import hashlib
import itertools
import logging
import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..credentials import without_credentials
from ..messages import printable
from ..models.images import BAD_IMAGE_ERRORS, resize_and_crop, to_channels, to_pixel_values
from .arguments import DataArguments
from .built_in import DIGITS, MNIST, PHOTOGRAPHS, load_digits, load_mnist, load_photographs
from .folders import ImageFiles
from .images import Rows, look, open_image, stored_bytes
from .tables import load_split, requested_folder

logger = logging.getLogger(__name__)

# Sides in pixels, the held-out fraction and channels, unless flags give them.
_DEFAULTS: dict[str, tuple[list[int], float, int]] = {
    DIGITS: ([8], 297 / 1797, 1),
    MNIST: ([28], 0.2, 1),
    PHOTOGRAPHS: ([32], 0.2, 3),
}
HELD_OUT_SEED = 0  # never the training seed: every run is measured on the same images
DIGESTED_BYTES = 2**30  # read of a dataset to identify it, which takes seconds


@dataclass(eq=False, repr=False)
class LabelledImages(Dataset):
    """Images of one size, with or without labels. Made by `load_labelled_images`.

    `dataset[index, epoch]` is `{"pixel_values": tensor, "labels": int}`: float32 of shape (channels, height, width) in
    -1..1, without "labels" if the dataset has none. Crops and flips depend on `(seed, index, epoch)` and nothing else;
    a bare index means epoch 0. An image that cannot be decoded is replaced by the next one that can, with its label.

    Args:
        images (`Sequence[dict]`): Rows whose "image" is what `open_image` takes.
        rows (`numpy.ndarray`): The rows of `images` that belong to this dataset, shape (length,).
        labels (`numpy.ndarray`, *optional*): The class of each of these rows from 0, shape (length,). None: no labels.
        id2label (`dict[int, str]`): The name of each class. Empty without labels.
        name (`str`): What the dataset is called in messages.
        resolution (`tuple[int, int]`): Height and width in pixels to scale and crop the images to.
        image_channels (`int`): 1 (gray) or 3 (RGB).
        seed (`int`, defaults to 0): Seed of crops and flips.
        random_crop, random_flip (`bool`, default to False): As in [`DataArguments`].
    """

    images: Rows
    rows: np.ndarray
    labels: np.ndarray | None
    id2label: dict[int, str]
    name: str
    resolution: tuple[int, int]
    image_channels: int
    seed: int = 0
    random_crop: bool = False
    random_flip: bool = False

    def __post_init__(self) -> None:
        # In shared memory, so that the main process knows which files its loader's workers found bad.
        self._is_bad = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()

    @property
    def num_classes(self) -> int:
        return len(self.id2label)

    @property
    def notes(self) -> list[str]:
        """How a folder was read and which files are skipped, one sentence each; empty for other datasets."""
        return getattr(self.images, "notes", [])

    @property
    def bad_files(self) -> list[str]:
        """The files that were replaced, as far as any loader worker has read."""
        return [self.file_name(index) for index in self._is_bad.nonzero().flatten().tolist()]

    @cached_property
    def digest(self) -> str:
        """A hash of the images and labels in their order; it does not depend on the location or name of their folder.

        Up to 1 GiB it covers every byte; beyond, every file's size and the bytes of evenly spaced images.
        """
        digest = hashlib.sha256(b"" if self.labels is None else self.labels.tobytes())
        if isinstance(self.images, ImageFiles):
            sizes = self.images.sizes(self.rows)
        else:  # of evenly spaced rows, since sizes are only known after reading
            spaced = range(0, len(self), math.ceil(len(self) / 100))
            sizes = np.array([len(stored_bytes(self.record(index))) for index in spaced])
        digest.update(sizes.tobytes())
        step = max(1, math.ceil(sizes.mean() * len(self) / DIGESTED_BYTES))
        for index in tqdm(range(0, len(self), step), desc=f"Reading {self.name}", unit="image", leave=False):
            content = stored_bytes(self.record(index))
            digest.update(len(content).to_bytes(8) + content)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def plain(self, most: int | None = None) -> "LabelledImages":
        """These images without augmentation; of more than `most` a fixed subset, each class in proportion."""
        chosen = np.arange(len(self))
        if most is not None and most < len(self):
            by_class = shuffled_by_class(np.zeros(len(self), int) if self.labels is None else self.labels)
            chosen = np.sort(by_class[spaced(most, len(self))])
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, rows=self.rows[chosen], labels=labels, seed=0, random_crop=False, random_flip=False)

    def record(self, index: int) -> Any:
        """What is stored of the image, as `open_image` takes it."""
        return self.images[int(self.rows[index])]["image"]

    def open(self, index: int) -> Image.Image:
        """The image as it is in the file, upright. Raises one of `BAD_IMAGE_ERRORS` if there is none."""
        return open_image(self.record(index))

    def file_name(self, index: int) -> str:
        """The file's path, or the row's number where the image has no path."""
        record = self.record(index)
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
    """Loads the training images and the held-out ones.

    The held-out images are the validation split, or a part of the training split: the same fraction of each class, and
    the same images for every `seed`. They are never augmented. At least one image of each class stays in training.

    Args:
        args (`DataArguments`): Which images, and how they are resized to the model's resolution.
        seed (`int`): Seed of the augmentation only.
        require_labels (`bool`, defaults to True): Whether labels of two or more classes are required. If False, a
            dataset without usable labels is read without labels (`labels` is None).

    Returns:
        The training images and the held-out ones; None if there is no validation split and the held-out fraction is 0.

    Raises:
        `FileNotFoundError`: if the folder does not exist.
        `ValueError`: if the dataset, its columns or its labels cannot be used.
        `ImportError`: if `datasets`, `scikit-learn` or `mlxtend` is not installed.
    """
    images: Any
    labels: np.ndarray | None
    is_held_out: np.ndarray | None = None  # where the images themselves decide
    sides, fraction, channels = _DEFAULTS.get(args.built_in or "", ([], 0.1, 0))
    sides, channels = args.resolution or sides, args.image_channels or channels
    fraction = fraction if args.held_out_fraction is None else args.held_out_fraction
    folder = requested_folder(args)
    if args.built_in == PHOTOGRAPHS:
        images, labels, names, is_held_out = load_photographs((sides[0], sides[-1]), fraction)
    elif args.built_in is not None:
        images, labels, names = {DIGITS: load_digits, MNIST: load_mnist}[args.built_in]()
    else:
        images, labels, names = load_split(args, args.train_split, require_labels, folder)
    if not sides or not channels:
        own_sides, own_channels = own_shape(images)
        sides, channels = sides or own_sides, channels or own_channels
    if not sides:
        raise ValueError(f"No image of '{args.source}' can be opened; give other images.")
    if require_labels and len(names) < 2:
        raise ValueError(
            f"'{args.source}' has the single class '{names[0]}', but guidance needs two or more; add images of another "
            f"class, or draw without classes: training/train_diffusion.py --no_class_conditional."
        )

    def part(images: Any, labels: np.ndarray | None, rows: np.ndarray, **augmentation: Any) -> LabelledImages:
        labels = labels[rows] if names and labels is not None else None
        what = dict(enumerate(names)), args.source, (sides[0], sides[-1]), channels
        return LabelledImages(images, rows, labels, *what, **augmentation)

    if args.validation_split is not None:
        rows = np.arange(len(images))
        others, other_labels, _ = load_split(args, args.validation_split, labels is not None, folder, names)
        held_out = part(others, other_labels, np.arange(len(others)))
        if folder is not None:
            images.notes += [note for note in others.notes if note not in images.notes]
    elif is_held_out is not None:
        rows, held_out = np.flatnonzero(~is_held_out), part(images, labels, np.flatnonzero(is_held_out))
    else:
        number = max(1, round(fraction * len(images))) if fraction > 0 else 0
        rows, held_out_rows = split_by_class(np.zeros(len(images), int) if labels is None else labels, number)
        held_out = part(images, labels, held_out_rows)
    train = part(images, labels, rows, seed=seed, random_crop=args.random_crop, random_flip=args.random_flip)
    return train, held_out if len(held_out) else None


def split_by_class(labels: np.ndarray, num_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, ascending, each class in proportion; the split is deterministic.

    `labels` (rows,) are their classes. Fewer rows are held out if a class would keep none.
    """
    by_class = shuffled_by_class(labels)
    first_of_class = np.unique(labels[by_class], return_index=True)[1]
    candidates = np.delete(by_class, first_of_class)
    num_held_out = min(num_held_out, len(candidates))
    held_out = np.sort(candidates[spaced(num_held_out, len(candidates))])
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def shuffled_by_class(labels: np.ndarray) -> np.ndarray:
    """The rows of the first class in random order, then those of the next, and so on; always the same order."""
    shuffled = np.random.default_rng(HELD_OUT_SEED).permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def spaced(count: int, size: int) -> np.ndarray:
    """Evenly spaced indices: of rows sorted by class, each class's share is rounded up or down, the total is exact."""
    return (2 * np.arange(count) + 1) * size // max(1, 2 * count)


def own_shape(images: Rows) -> tuple[list[int], int]:
    """Height and width, and channels, to train on: those of the images themselves, of which up to 1,000 are opened.

    The sides are those of most images, or else a square of the median shorter side, and networks can halve them; none
    if no image can be opened. There is one channel if all are grey.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    channels = 1
    for row in np.linspace(0, len(images) - 1, min(1000, len(images))).astype(int).tolist():
        with suppress(*BAD_IMAGE_ERRORS):
            size, of_image = look(images[row]["image"])
            sizes[size] += 1
            channels = max(channels, of_image)
    if not sizes:
        return [], 3
    (own, count), *_ = sizes.most_common(1)
    if count <= sizes.total() / 2:
        own = (sorted(min(size) for size in sizes.elements())[sizes.total() // 2],) * 2
    return [halvable(own[0]), halvable(own[1])], channels


def halvable(side: int, lowest: int = 16) -> int:
    """The nearest side that can be halved, at least once and down to about `lowest`; of two, that of more halvings."""
    multiple = 2
    while side / multiple > lowest:
        multiple *= 2
    below = side // multiple * multiple
    candidates = [candidate for candidate in (below, below + multiple) if candidate]
    return min(candidates, key=lambda candidate: (abs(candidate - side), -(candidate & -candidate)))
