"""Many samples: which image has which label and noise, and one file of them."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..processes import print_once
from .grids import labelled_grid
from .runs import Parts, check_destination, kind_of, plan_of, run_to_file
from .samples import to_picture

COMPILING = "Compiling: the first batch takes a minute or more longer, the next runs find it in the cache."
_GRID_ROWS = _GRID_COLUMNS = 10  # of the picture beside a file


def generator_at(seed: int, index: int) -> torch.Generator:
    """A generator from which a pipeline draws the seeds of an image and of those after it.

    Args:
        seed (`int`): Seed of all images together.
        index (`int`): Of the image: so many integers are drawn before.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.randint(2**63 - 1, (index,), generator=generator)
    return generator


def to_8_bit(samples: torch.Tensor) -> torch.Tensor:
    """Samples in 8 bits as the published scripts round them: what lies between two values is cut off.

    Args:
        samples (`torch.Tensor`): In [-1, 1], of any shape.

    Returns:
        `torch.Tensor`: uint8 of the same shape.
    """
    return ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def sample_labels(which: str | Sequence[int], num_images: int, num_classes: int, seed: int = 0) -> torch.Tensor:
    """The class of each image. It depends on the image's index alone: more images begin with the same labels.

    Args:
        which (`str` or `Sequence[int]`): `"uniform"` draws classes, all equally likely, as the published scripts do;
            `"all"` takes all classes in turn; or ids, taken in turn.
        num_images (`int`): How many.
        num_classes (`int`): Classes that there are.
        seed (`int`, defaults to 0): Seed of all images together, for `"uniform"`.

    Returns:
        `torch.Tensor` of shape `(num_images,)`: Class ids.
    """
    if which == "uniform":
        generator = torch.Generator().manual_seed(~seed)  # another stream than that of the images' seeds
        return torch.randint(num_classes, (num_images,), generator=generator)
    ids = torch.arange(num_classes) if isinstance(which, str) else torch.tensor(which)
    return ids[torch.arange(num_images) % len(ids)]


def sample_batches(
    pipeline: Any,
    labels: torch.Tensor | int,
    batch_size: int,
    seed: int = 0,
    *,
    batches: Iterable[int] | None = None,
    **arguments: Any,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Samples batch by batch; image i of a seed has the same noise, to the bit, for every batch size.

    Args:
        pipeline ([`ClassifierGuidedPipeline`] or one called like it): Makes the images.
        labels (`torch.Tensor` of shape `(n,)`, or `int`): The class of each image; or so many images without a class.
        batch_size (`int`): Images at once.
        seed (`int`, defaults to 0): Seed of all images together.
        batches (`Iterable[int]`, *optional*): The batches to make, of which batch b begins with image b * batch_size;
            all, by default.
        arguments: Go to the pipeline.

    Yields:
        The index of a batch, and its images: uint8 of shape `(batch_size or fewer, channels, height, width)`, on the
        CPU.
    """
    num_images = labels if isinstance(labels, int) else len(labels)
    for batch in range(math.ceil(num_images / batch_size)) if batches is None else batches:
        part = slice(batch * batch_size, (batch + 1) * batch_size)
        size = min(batch_size, num_images - part.start)
        which = {"num_images_per_label": size} if isinstance(labels, int) else {"class_labels": labels[part]}
        options = {**which, "generator": generator_at(seed, part.start), "output_type": "latent", "return_dict": False}
        with compiled_if(size == batch_size):
            samples = pipeline(**options, **arguments)[0]
        yield batch, to_8_bit(samples).cpu()


def compiled_if(is_full: bool) -> AbstractContextManager:
    """Not to compile anew for the last few images, runs a batch that is not full without the compiler."""
    return nullcontext() if is_full else torch.compiler.set_stance("force_eager")


def sample_to_file(
    pipeline: Any,
    labels: torch.Tensor | int,
    output: str | os.PathLike,
    *,
    batch_size: int = 64,
    seed: int = 0,
    compile: bool = False,
    **arguments: Any,
) -> bool:
    """Samples into one file, by all processes, in as many sittings as it takes: the file is the same, to the byte.

    Each finished batch is kept in a folder `<output>.parts` until all are there. After a stop or a kill the same call
    makes those that are missing. A picture of some samples is put beside the file, with the ending `.png`.

    Args:
        pipeline ([`ClassifierGuidedPipeline`] or one called like it): Makes the images, of 1 or 3 channels.
        labels (`torch.Tensor` of shape `(n,)`, or `int`): The class of each image; or so many images without a class.
        output (`str` or `os.PathLike`): By its ending `.npz` as published, `.parquet`, or without one a folder of PNGs,
            see [`write_samples`]; or `.png`, a picture of all images, a row for each class.
        batch_size (`int`, defaults to 64): Images at once. Whole batches go to the processes in turn.
        seed (`int`, defaults to 0): Seed of all images together.
        compile (`bool`, defaults to `False`): Compile the pipeline's models first, see
            [`ClassifierGuidedPipeline.compile`]: worth it for many batches.
        arguments: Go to the pipeline.

    Returns:
        `bool`: `True` if it was made, `False` if it was there already.

    Raises:
        `ValueError`: If the output, or its parts exist with other settings, or the disk has too little space.
        `FullDiskError`: If the disk is full; what is made is kept.
        `RuntimeError`: If another process has ended; what is made is kept.
    """
    check_destination(output)
    check_destination(output)
    everything = kind_of(output) == ".png"
    ids = None if isinstance(labels, int) else labels
    shape = (labels if isinstance(labels, int) else len(labels), *pipeline.sample_size, pipeline.image_channels)

    def make(batches: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        if compile:
            pipeline.compile()
            print_once(COMPILING)
        return sample_batches(pipeline, labels, batch_size, seed, batches=batches, **arguments)

    return run_to_file(
        output,
        shape,
        batch_size,
        plan_of(pipeline, ids, shape, batch_size, seed, {**arguments, "compile": compile or None}),
        make,
        labels=ids,
        id2label=pipeline.id2label,
        draw=lambda parts: _grid(parts, labels, pipeline.id2label, everything),
    )


def _grid(parts: Parts, labels: torch.Tensor | int, id2label: Mapping[int, str], everything: bool) -> Image.Image:
    """All samples, a row for each class in the order of the labels; or ten of each of the first ten classes."""
    if isinstance(labels, int):
        shown = torch.arange(labels if everything else min(labels, _GRID_ROWS * _GRID_COLUMNS))
        rows = [row.tolist() for row in shown.split(_GRID_COLUMNS)]
        names = ["samples", *[""] * (len(rows) - 1)]
    else:
        ids = labels.tolist()
        classes = list(dict.fromkeys(ids)) if everything else sorted(set(ids))[:_GRID_ROWS]
        rows = [(labels == label).nonzero()[: None if everything else _GRID_COLUMNS, 0].tolist() for label in classes]
        names = [id2label.get(label, str(label)) for label in classes]
    columns = max(map(len, rows))
    blank = np.full(parts.shape[1:], 255, np.uint8)
    images = [[*map(parts.read_image, row), *[blank] * (columns - len(row))] for row in rows]
    return labelled_grid([to_picture(image) for row in images for image in row], names)
