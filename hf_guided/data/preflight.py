"""Checks of a dataset before training: unreadable files, small classes, sizes and modes."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from ..messages import first_few
from ..models.images import BAD_IMAGE_ERRORS, to_channels
from .dataset import LabelledImages

NUM_DRAWN = 1_000  # images decoded of a dataset that is too large to decode in full
MAX_BAD_FRACTION = 0.1
FEW_PER_CLASS = 10
NAMES_SHOWN = 20  # of classes


@dataclass
class ImageReport:
    """The findings of `check_images`; `str(report)` is a summary of a few lines."""

    name: str
    num_images: int
    num_checked: int  # decoded, or failed to decode
    resolution: tuple[int, int]  # height and width in pixels that the images are resized to
    class_counts: dict[str, int]  # images per class name, of the whole dataset; empty without labels
    sizes: Counter[tuple[int, int]]  # checked images per height and width in pixels
    modes: Counter[str]  # checked images per Pillow mode
    bad_files: list[str]  # each with the reason
    notes: list[str]  # of `LabelledImages`

    @property
    def num_upscaled(self) -> int:
        """Checked images smaller than the resolution in height or width, which are upscaled."""
        height, width = self.resolution
        return sum(count for (h, w), count in self.sizes.items() if h < height or w < width)

    @property
    def small_classes(self) -> list[str]:
        return [name for name, count in self.class_counts.items() if count < FEW_PER_CLASS]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.num_images:,} images, {self.num_checked:,} checked, {len(self.bad_files):,} bad"]
        if self.class_counts:
            counts, names = self.class_counts.values(), first_few(list(self.class_counts), NAMES_SHOWN)
            lines.append(f"classes: {len(counts):,}, with {min(counts):,} to {max(counts):,} images each: {names}")
        lines += self.notes
        by_area = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        sizes = [by_area[0], by_area[-1], self.sizes.most_common(1)[0][0], self.resolution]
        smallest, largest, usual, resized = (f"{height}x{width}" for height, width in sizes)
        lines.append(f"height x width: {smallest} to {largest}, most often {usual}, resized to {resized}")
        lines.append("modes: " + ", ".join(f"{mode} ({count:,})" for mode, count in self.modes.most_common()))
        if self.num_upscaled:
            lines.append(f"warning: {self.num_upscaled:,} are smaller than {resized} and are upscaled")
        if small := self.small_classes:
            few = f"fewer than {FEW_PER_CLASS} images in {len(small):,} of the classes"
            lines.append(f"warning: {few}: {first_few(small)}")
        if self.bad_files:
            lines.append(f"warning: bad files are replaced by other images: {first_few(self.bad_files)}")
        return "\n  ".join(lines)


def check_images(dataset: LabelledImages, whole_up_to: int = 10_000) -> ImageReport:
    """Counts, sizes, modes and bad files of a dataset, found by decoding it before training.

    Args:
        dataset (`LabelledImages`): The images, as training will see them.
        whole_up_to (`int`, defaults to 10,000): Datasets of up to this many images are decoded in full. Of larger
            ones a fixed random sample of 1,000 is.

    Raises:
        `ValueError`: if more than 10 % of the checked files are bad, naming the first few.
    """
    indices = np.arange(len(dataset))
    if len(indices) > whole_up_to:
        indices = np.sort(np.random.default_rng(0).choice(indices, min(NUM_DRAWN, len(indices)), replace=False))

    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    bad_files = []
    for index in tqdm(indices.tolist(), desc=f"Checking {dataset.name}", unit="image", leave=False):
        try:
            image = dataset.open(index)
            to_channels(image, dataset.image_channels)
        except BAD_IMAGE_ERRORS as error:
            bad_files.append(f"{dataset.file_name(index)} ({error})")
            continue
        sizes[image.height, image.width] += 1
        modes[image.mode] += 1

    if len(bad_files) > MAX_BAD_FRACTION * len(indices):
        raise ValueError(
            f"{len(bad_files):,} of {len(indices):,} checked images of '{dataset.name}' cannot be used, more than "
            f"{MAX_BAD_FRACTION:.0%}; repair or remove them, first of all {first_few(bad_files)}."
        )

    class_counts = {}
    if dataset.labels is not None:
        counts = np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()
        class_counts = {name: counts[label] for label, name in dataset.id2label.items()}
    known = dataset.name, len(dataset), len(indices), dataset.resolution, class_counts
    return ImageReport(*known, sizes, modes, bad_files, dataset.notes)
