"""Many samples: which image has which label and noise, and one file of them."""

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..processes import print_once
from .grids import labelled_grid
from .runs import Batches, Run
from .samples import NO_CLASS, to_picture

COMPILING = "Compiling: the first batch takes a minute or more longer, the next runs find it in the cache."
_GRID_ROWS = _GRID_COLUMNS = 10  # of the picture beside a file


def generator_at(seed: int, index: int) -> torch.Generator:
    """A generator from which a pipeline draws the seeds of the image of an index and of those after it."""
    generator = torch.Generator().manual_seed(seed)
    torch.randint(2**63 - 1, (index,), generator=generator)
    return generator


def to_8_bit(samples: torch.Tensor) -> torch.Tensor:
    """Samples in [-1, 1] as uint8, truncated as by the published scripts."""
    return ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def sample_labels(which: str | Sequence[int], num_images: int, num_classes: int, seed: int = 0) -> torch.Tensor:
    """The class of each image. It depends on the image's index alone: more images begin with the same labels.

    Args:
        which (`str` or `Sequence[int]`): `"uniform"` draws classes, all equally likely, as the published scripts do;
            `"all"` takes all classes in turn; or ids, taken in turn.
        num_images, num_classes (`int`): How many there are.
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
    labels: torch.Tensor,
    batch_size: int,
    seed: int = 0,
    *,
    batches: Iterable[int] | None = None,
    images: Sequence[Any] | np.ndarray | None = None,
    compile: bool = False,
    **arguments: Any,
) -> Batches:
    """Makes images batch by batch; image i of a seed has the same noise, to the bit, for every batch size.

    Args:
        pipeline, labels, batch_size, seed, compile, arguments: As of [`sample_to_file`].
        batches (`Iterable[int]`, *optional*): The batches to make, of which batch b begins with image b * batch_size;
            all, by default.
        images (a list or array of n images, *optional*): The small ones to upsample.

    Yields:
        The index of a batch, and its images: uint8 of shape `(batch_size or fewer, channels, height, width)`, on the
        CPU.
    """
    if compile:
        pipeline.compile()
        print_once(COMPILING)
    for batch in range(math.ceil(len(labels) / batch_size)) if batches is None else batches:
        part = slice(batch * batch_size, (batch + 1) * batch_size)
        ids = labels[part]
        inputs: dict[str, Any] = {} if images is None else {"image": images[part]}
        if not (ids == NO_CLASS).all():
            inputs["class_labels"] = ids
        elif images is None:
            inputs["num_images_per_label"] = len(ids)
        options = {"generator": generator_at(seed, part.start), "output_type": "latent", "return_dict": False}
        with compiled_if(len(ids) == batch_size):
            samples = pipeline(**inputs, **options, **arguments)[0]
        yield batch, to_8_bit(samples).cpu()


def compiled_if(is_full: bool) -> AbstractContextManager:
    """Runs a batch that is not full without the compiler, which would compile again for its size."""
    return nullcontext() if is_full else torch.compiler.set_stance("force_eager")


def sample_to_file(
    pipeline: Any,
    labels: torch.Tensor,
    output: str | os.PathLike,
    *,
    batch_size: int = 64,
    seed: int = 0,
    compile: bool = False,
    **arguments: Any,
) -> bool:
    """Samples into one file, by all processes, resumed as often as it takes: the file is the same, to the byte.

    Each finished batch is kept in a folder `<output>.parts` until all are there. After a stop or a kill the same call
    makes those that are missing. A picture of some samples is put beside the file, with the ending `.png`.

    Args:
        pipeline ([`ClassifierGuidedPipeline`] or one called like it): Makes the images, of 1 or 3 channels.
        labels (`torch.Tensor` of shape `(n,)`): The class of each image, or [`NO_CLASS`] for each.
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
        `ValueError`, `FullDiskError`, `RuntimeError`: As [`Run.make`]; what is made is kept.
    """
    run = Run(output, pipeline, labels, batch_size, seed, {**arguments, "compile": compile or None}, _grid)
    return run.make(partial(sample_batches, pipeline, labels, batch_size, seed, compile=compile, **arguments))


def _grid(run: Run) -> Image.Image:
    """All samples, a row for each class in the order of the labels; beside a file, ten of each of the first ten."""
    is_all = run.kind == ".png"
    rows: list[Any]
    if run.labels is None:
        indices = range(run.shape[0] if is_all else min(run.shape[0], _GRID_ROWS * _GRID_COLUMNS))
        rows = [indices[start : start + _GRID_COLUMNS] for start in range(0, len(indices), _GRID_COLUMNS)]
        names = ["samples", *[""] * (len(rows) - 1)]
    else:
        classes = list(dict.fromkeys(run.labels.tolist()))
        classes = classes if is_all else sorted(classes)[:_GRID_ROWS]
        rows = [np.flatnonzero(run.labels == label)[: None if is_all else _GRID_COLUMNS] for label in classes]
        names = [run.id2label.get(label, str(label)) for label in classes]
    columns = max(map(len, rows))
    blank = np.full(run.shape[1:], 255, np.uint8)
    images = [[*map(run.read_image, row), *[blank] * (columns - len(row))] for row in rows]
    return labelled_grid([to_picture(image) for row in images for image in row], names)
