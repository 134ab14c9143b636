"""Sets of images to compare, from files of samples, folders, datasets and pipelines: 8-bit images of one size."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ...credentials import without_credentials
from ...data import BUILT_IN, DataArguments, LabelledImages, load_labelled_images, source_argument
from ...data.images import look, stored_bytes
from ...data.npz import open_npz, read_samples
from ...generation.samples import NO_CLASS, to_picture
from ...generation.sampling import sample_batches
from ...loading import weights_digest
from ...messages import printable
from ...models.images import BAD_IMAGE_ERRORS, resize_and_crop
from ..metrics.moments import FeatureStatistics, read_moments

HELD_OUT, TRAIN = "held_out", "train"
_MODES = {1: "L", 3: "RGB"}


class ImageSet(Dataset, ABC):
    """Images of one size; `image_set[i]` is uint8 of shape `(channels, height, width)`."""

    images: Any  # what stores them, of their number
    name: str  # in messages
    size: tuple[int, int]  # height and width in pixels
    channels: int  # 1 or 3
    labels: np.ndarray | None  # (n,): the class id of each image
    id2label: dict[int, str]  # names of the classes; empty if they have no names
    notes: list[str]  # how the images were changed, in sentences

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @abstractmethod
    def contents(self) -> Iterator[bytes]:
        """The content that identifies the set, for [`digest`]."""

    def digest(self) -> str:
        """A hash of the images' content, which does not depend on their names."""
        digest = hashlib.sha256(f"{len(self)} {self.size} {self.channels}".encode())
        for content in self.contents():
            digest.update(content)
        return digest.hexdigest()

    def share(self, batch_size: int, task: str, num_workers: int = 0) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The batches of this process, each with the indices of its images: every process has whole ones, in turn."""
        state = PartialState()
        mine = self.split(batch_size)[state.process_index :: state.num_processes]
        shown = {"desc": task, "unit": "image", "leave": False, "disable": not state.is_main_process}
        with tqdm(total=len(self), **shown) as progress:
            for indices, batch in zip(mine, self.batches(mine, num_workers), strict=True):
                yield indices, batch
                progress.update(min(len(indices) * state.num_processes, len(self) - progress.n))

    def split(self, batch_size: int) -> list[list[int]]:
        """The indices of all images, batch by batch."""
        return [part.tolist() for part in torch.arange(len(self)).split(batch_size)]

    def batches(self, indices: Sequence[Sequence[int]], num_workers: int = 0) -> Iterable[torch.Tensor]:
        """Batches `(n, channels, height, width)` of the images with these indices."""
        generator = torch.Generator()  # without its own, a loader draws from the global one
        return DataLoader(self, batch_sampler=list(map(list, indices)), num_workers=num_workers, generator=generator)

    def picture(self, index: int) -> Image.Image:
        """One of the images."""
        return to_picture(self[index].permute(1, 2, 0).numpy())

    def pictures(self, batch_size: int = 64) -> list[Image.Image]:
        """All of the images."""
        batches = self.batches(self.split(batch_size))
        return [to_picture(image.permute(1, 2, 0).numpy()) for batch in batches for image in batch]


class ArrayImages(ImageSet):
    """Images in an array, in memory or mapped from a file.

    Args:
        images (`np.ndarray` of shape `(n, height, width, channels)`): uint8.
        labels, id2label, name: See [`ImageSet`].
        size (`tuple[int, int]`, *optional*): Height and width to resize the images to, as in training; by default their
            own.
        statistics (`dict[str, FeatureStatistics]`, *optional*): Published statistics of Inception's features:
            `"features"`, and `"spatial"`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        id2label: dict[int, str] | None = None,
        name: str = "the images",
        size: tuple[int, int] | None = None,
        statistics: dict[str, FeatureStatistics] | None = None,
    ):
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in _MODES or len(images) == 0:
            given = f"{images.dtype} of shape {images.shape}"
            raise ValueError(f"{name}: images are uint8 of shape (n, height, width, 1 or 3), got {given}.")
        own = (images.shape[1], images.shape[2])
        self.images, self.labels, self.id2label, self.name = images, labels, id2label or {}, name
        self.size, self.channels, self.statistics = size or own, images.shape[3], statistics
        self.notes = [] if self.size == own else [_resized(name, [own], self.size)]

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = self.images[index]
        if pixels.shape[:2] != self.size:
            picture = resize_and_crop(Image.fromarray(pixels.squeeze(), _MODES[self.channels]), self.size)
            pixels = np.asarray(picture).reshape(*self.size, self.channels)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def contents(self) -> Iterator[bytes]:
        for part in np.array_split(self.images, -(-self.images.nbytes // 2**26)):
            yield np.ascontiguousarray(part).tobytes()
        for statistics in (self.statistics or {}).values():
            yield from (statistics.mean.tobytes(), statistics.covariance.tobytes())


class LoadedImages(ImageSet):
    """Images of a folder or dataset, without augmentation, decoded on access and resized as in training."""

    def __init__(self, images: LabelledImages, name: str | None = None):
        self.images, self.labels, self.id2label = images, images.labels, images.id2label
        self.name = name or images.name
        self.size, self.channels = images.resolution, images.image_channels
        self.notes = [f"{images.name}: {note}." for note in images.notes]

    def __getitem__(self, index: int) -> torch.Tensor:
        values = self.images[index]["pixel_values"]
        return ((values + 1) * 127.5).round().to(torch.uint8)  # restores the bytes exactly

    def contents(self) -> Iterator[bytes]:
        for index in tqdm(range(len(self)), desc=f"reading {self.name}", unit="image", leave=False):
            yield stored_bytes(self.images.record(index))


class SampledImages(ImageSet):
    """Samples of a pipeline, generated on access and not stored.

    Args:
        pipeline ([`ClassifierGuidedPipeline`] or one called like it): Generates them.
        labels (`torch.Tensor` of shape `(n,)`): The class of each, or [`NO_CLASS`] for each.
        seed (`int`, defaults to 0): Seed of all samples together.
        arguments: Passed to the pipeline.
    """

    def __init__(self, pipeline: Any, labels: torch.Tensor, seed: int = 0, **arguments: Any):
        self.pipeline, self.sampled_labels, self.seed, self.arguments = pipeline, labels, seed, arguments
        self.name, self.notes, self.id2label = "the samples", [], dict(pipeline.id2label)
        self.labels = None if labels[0] == NO_CLASS else labels.numpy()
        self.size, self.channels = pipeline.sample_size, pipeline.image_channels

    def __len__(self) -> int:
        return len(self.sampled_labels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return next(self.batches([[index]]))[0]

    def batches(self, indices: Sequence[Sequence[int]], num_workers: int = 0) -> Iterator[torch.Tensor]:
        """Samples of whole batches, each as long as the first."""
        if indices:
            size = len(indices[0])
            wanted = [batch[0] // size for batch in indices]
            made = sample_batches(self.pipeline, self.sampled_labels, size, self.seed, batches=wanted, **self.arguments)
            yield from (images for _, images in made)

    def contents(self) -> Iterator[bytes]:
        labels = len(self) if self.labels is None else self.labels.tolist()
        arguments = {**(self.pipeline.config.get("sampling_defaults") or {}), **self.arguments}
        components = self.pipeline.components
        scheduler = components["scheduler"].config if "scheduler" in components else ""
        yield f"{scheduler} {labels} {self.seed} {arguments}".encode()
        for component in components.values():
            if isinstance(component, torch.nn.Module):
                yield weights_digest(component).encode()


def open_images(spec: str, size: tuple[int, int] | None = None) -> ImageSet:
    """The set of images of a name on the command line.

    Args:
        spec (`str`): A `.npz` file of samples or a published reference batch; a `.parquet` file of samples; a folder of
            images; `"digits"` or `"photographs"`; or a dataset on the Hub. Folders and datasets may end in a part:
            `":train"` and `":held_out"` are what training uses by default, any other is a split of the dataset.
            Without one it is a whole folder, or a dataset's split "train".
        size (`tuple[int, int]`, *optional*): Height and width to resize the images to, as in training. By default their
            own, which must then be the same for all.

    Returns:
        [`ImageSet`]: Gray if all of its images are. Its `notes` say how they were changed.

    Raises:
        `ValueError`: If there are no such images, or they differ in size and none is given.
    """
    if spec.endswith(".npz"):
        if not Path(spec).is_file():
            raise ValueError(f"There is no file {spec}.")
        pixels, labels = read_samples(spec)
        with open_npz(spec) as file:
            statistics = read_moments(file)
        return ArrayImages(pixels, labels, name=spec, size=size, statistics=statistics or None)
    source, _, part = spec.rpartition(":")
    if not source or Path(spec).exists() or "/" in part or "@" in part:  # no part, but a name or URL with a colon
        source, part = spec, ""
    if Path(source).is_file() and not source.endswith(".parquet"):
        raise ValueError(f"{source} is not a set of images; give a .npz or .parquet file of samples, or a folder.")
    arguments = {**source_argument(source), "image_channels": 3}  # until their own are known
    if size is not None or source not in BUILT_IN:
        arguments["resolution"] = [1] if size is None else list(size)  # 1 until their own is known
    is_split = part not in ("", TRAIN, HELD_OUT) or (part == HELD_OUT and Path(source, HELD_OUT).is_dir())
    if is_split:
        if source in BUILT_IN:
            raise ValueError(f"The {source} have no part {part!r}; give {source}:{TRAIN} or {source}:{HELD_OUT}.")
        arguments["train_split"] = part
    if is_split or not part:
        arguments["held_out_fraction"] = 0.0
    train, held_out = load_labelled_images(DataArguments(**arguments), seed=0, require_labels=False)
    images = held_out if part == HELD_OUT and not is_split else train
    if images is None:
        raise ValueError(f"{train.name} has no held-out images; give other images.")
    sizes, images.image_channels = _look(images)
    spec = without_credentials(spec)
    if size is None and len(sizes) > 1:
        (first, one), (second, other) = list(sizes.items())[:2]
        raise ValueError(
            f"The images of {printable(spec)} differ in size: {one} has {first[0]}x{first[1]} pixels and {other} "
            f"{second[0]}x{second[1]}; resize them to one size first."
        )
    images.resolution = size or next(iter(sizes))
    loaded = LoadedImages(images, printable(spec))
    if set(sizes) != {images.resolution}:
        loaded.notes.append(_resized(loaded.name, list(sizes), images.resolution))
    return loaded


def has_images(path: str) -> bool:
    """Whether a `.npz` file holds images, and not only statistics."""
    with open_npz(path) as file:
        return "arr_0" in file


def _look(images: LabelledImages) -> tuple[dict[tuple[int, int], str], int]:
    """The sizes in the set, each with the name of one such file, and the channels, from the files' headers."""
    sizes: dict[tuple[int, int], str] = {}
    channels = 1
    for index in range(len(images)):
        try:
            size, of_image = look(images.record(index))
        except BAD_IMAGE_ERRORS:
            continue  # reported when its pixels are read
        sizes.setdefault(size, images.file_name(index))
        channels = max(channels, of_image)
    if not sizes:
        raise ValueError(f"None of the {len(images)} files of {images.name} is an image that can be read.")
    return sizes, channels


def _resized(name: str, found: list[tuple[int, int]], size: tuple[int, int]) -> str:
    """A sentence on the effect of resizing images of the sizes found."""
    smallest, largest = min(found, key=math.prod), max(found, key=math.prod)
    span = f"{smallest[0]}x{smallest[1]}" + ("" if smallest == largest else f" to {largest[0]}x{largest[1]}")
    upscaled = smallest[0] < size[0] or smallest[1] < size[1]
    effect = "which upscales small ones and affects the metrics" if upscaled else "shrunk and cropped at the centre"
    return f"{name} has images of {span} pixels; they are resized to {size[0]}x{size[1]} as in training, {effect}."
