"""Many upsampled images: the small ones from files, and one file of the large ones."""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.images import open_image
from ..data.npz import read_samples
from ..models.images import BAD_IMAGE_ERRORS
from .grids import labelled_grid
from .runs import Run, check_destination
from .samples import NO_CLASS, to_picture
from .sampling import sample_batches

COMMAND = "upscale"  # by which the records of its outputs are told from those of samples

SmallImages = np.ndarray | list[Image.Image]


def read_small_images(paths: Sequence[str]) -> tuple[SmallImages, np.ndarray | None]:
    """The images to upsample of image files, upright; or of one `.npz` file of samples, see [`read_samples`].

    Raises:
        `ValueError`: Naming a file that cannot be read.
    """
    if len(paths) == 1 and paths[0].endswith(".npz"):
        return read_samples(paths[0])
    images = []
    for path in paths:
        try:
            images.append(open_image({"path": path, "bytes": None}))
        except BAD_IMAGE_ERRORS as error:
            raise ValueError(
                f"{path} is no picture that can be read ({error}); give .png files and the like, or one .npz."
            ) from error
    return images, None


def upscale_to_file(
    pipeline: Any,
    images: SmallImages,
    labels: Any,
    output: str | os.PathLike,
    *,
    batch_size: int = 16,
    seed: int = 0,
    **arguments: Any,
) -> bool:
    """Upsamples into one file, by all processes, resumed as often as it takes, as [`sample_to_file`].

    Args:
        pipeline ([`ClassifierGuidedUpscalePipeline`]): Makes the large images, of 1 or 3 channels.
        images (`np.ndarray` of shape `(n, height, width, channels)`, or a list of PIL images): The small images.
        labels: Their classes by id or name, one for all or one for each; an unconditional UNet takes none, and ignores
            those of an `.npz` file.
        output: A `.png` shows each small image beside its large one.

    Raises:
        `ValueError`: For labels or images that the pipeline does not take.
    """
    check_destination(output, command=COMMAND)
    pipeline.prepare_low_res(images if isinstance(images, list) else images[:1])  # refuses another size
    ids = _class_ids(pipeline, labels, len(images))

    def draw(run: Run) -> Image.Image:
        small = ((pipeline.prepare_low_res(images) + 1) * 127.5).round().to(torch.uint8)  # bytes come back to the bit
        pictures = []
        for index, image in enumerate(small.permute(0, 2, 3, 1).cpu().numpy()):
            pictures += [to_picture(image), to_picture(run.read_image(index))]
        names = ["" if i == NO_CLASS else pipeline.id2label.get(i, str(i)) for i in ids.tolist()]
        return labelled_grid(pictures, names, cell_size=max(pipeline.sample_size))

    planned = {"command": COMMAND, "images": _digest(pipeline, images), **arguments}
    run = Run(output, pipeline, ids, batch_size, seed, planned, draw, verb="upscaling")
    return run.make(partial(sample_batches, pipeline, ids, batch_size, seed, images=images, **arguments))


def _class_ids(pipeline: Any, labels: Any, num_images: int) -> torch.Tensor:
    """The class id of each image, `(num_images,)`; [`NO_CLASS`] if there are no classes, or none given and needed."""
    if labels is not None and pipeline.num_classes is not None:
        ids = pipeline.resolve_labels(labels).cpu()
        if len(ids) not in (1, num_images):
            raise ValueError(f"--labels names {len(ids)} classes for {num_images} images; give one, or one each.")
        return ids.expand(num_images)
    config = pipeline.unet.config
    if config.num_class_embeds is not None and not config.null_class_label:
        raise ValueError("This upsampler is class-conditional: add --labels, one for all images or one for each.")
    return torch.tensor(NO_CLASS).expand(num_images)


def _digest(pipeline: Any, images: SmallImages) -> str:
    """A hash of the small images as the UNet sees them, whatever files they come from."""
    digest = hashlib.sha256()
    for start in range(0, len(images), 1000):
        low_res = pipeline.prepare_low_res(images[start : start + 1000]).cpu()
        digest.update(f"{tuple(low_res.shape[1:])}".encode() + low_res.numpy().tobytes())
    return digest.hexdigest()
