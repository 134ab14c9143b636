"""Many samples: the label and noise of each image, and a resumable run of several processes into one file."""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from tqdm.auto import tqdm

from ..credentials import without_credentials
from ..files import (
    FullDiskError,
    check_parent,
    check_place,
    differing,
    full_disk,
    read_json,
    recover_folder,
    remove_folder,
    replacing,
    write_json,
)
from ..processes import from_main
from .grids import labelled_grid, save_png
from .samples import import_parquet, read_record, to_picture, write_samples

COMPILING = "Compiling: the first batch takes a minute or more longer; later runs use the cache."
PLAN_FILE = "plan.json"
_PLANNED = {"num_images", "size", "seed"}  # keys of every plan, which identify a record as one
_CONTENT_OF = {"model": "model_files"}  # a folder may be moved, or its path spelled differently
MAX_PICTURED = 1000  # images in one grid
_GRID_ROWS = _GRID_COLUMNS = 10  # of the grid saved beside a file
_BLOCK = 4096  # bytes that even a small file takes
_TIMEOUT = 600  # seconds without progress of the other processes, in addition to the time of twenty batches


def generator_at(seed: int, index: int) -> torch.Generator:
    """A generator that gives a pipeline the seeds of image `index` and of the images after it.

    Args:
        seed (`int`): Seed of all images together.
        index (`int`): Index of the image, the number of integers that are drawn before.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.randint(2**63 - 1, (index,), generator=generator)
    return generator


def to_8_bit(samples: torch.Tensor) -> torch.Tensor:
    """Samples in 8 bits, rounded down as in the published scripts.

    Args:
        samples (`torch.Tensor`): In [-1, 1], of any shape.

    Returns:
        `torch.Tensor`: uint8 of the same shape.
    """
    return ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def sample_labels(which: str | Sequence[int], num_images: int, num_classes: int, seed: int = 0) -> torch.Tensor:
    """The class of each image. It depends on the image's index alone, so that more images start with the same labels.

    Args:
        which (`str` or `Sequence[int]`): `"uniform"` draws classes uniformly, as the published scripts do;
            `"all"` cycles through all classes; a sequence of ids is cycled through.
        num_images (`int`): Number of images.
        num_classes (`int`): Number of classes.
        seed (`int`, defaults to 0): Seed of all images together, for `"uniform"`.

    Returns:
        `torch.Tensor` of shape `(num_images,)`: Class ids.
    """
    if which == "uniform":
        generator = torch.Generator().manual_seed(~seed)  # a different stream from the images' seeds
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
    """Samples batch by batch. Image i of a seed has the same noise, bit for bit, for every batch size.

    Args:
        pipeline ([`ClassifierGuidedPipeline`] or one called like it): Makes the images.
        labels (`torch.Tensor` of shape `(n,)`, or `int`): The class of each image, or the number of images without a
            class.
        batch_size (`int`): Images at once.
        seed (`int`, defaults to 0): Seed of all images together.
        batches (`Iterable[int]`, *optional*): The batches to make, all by default. Batch b starts at image
            b * batch_size.
        arguments: Passed to the pipeline.

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
    """Context that runs a batch that is not full without the compiler, so that nothing is compiled again for it."""
    return nullcontext() if is_full else torch.compiler.set_stance("force_eager")


def check_destination(output: str | os.PathLike) -> None:
    """Raises if [`sample_to_file`] could not write to an output; called before a model is loaded.

    Args:
        output (`str` or `os.PathLike`): The file or folder.

    Raises:
        `ValueError`: If the extension is unknown, its folder cannot be written, or the name is taken.
        `ImportError`: If parquet files cannot be written.
    """
    path, kind = Path(output), _kind(output)
    check_parent(output) if kind else check_place(path.absolute().parent)
    if os.path.ismount(path):
        raise ValueError(f"--output {output} is a whole disk; give a name on it.")
    if kind == ".parquet":
        import_parquet()
    parts = _parts_folder(path)
    if os.path.lexists(parts) and not (parts.is_dir() and _may_hold_parts(parts)):
        raise ValueError(f"{parts} was not made by this command; remove it, or give another --output.")
    for name in (path, _picture_path(path, kind)):
        is_empty_folder = name == path and not kind and name.is_dir() and not any(name.iterdir())
        if os.path.lexists(name) and not is_empty_folder and not (read_record(name) or {}).keys() >= _PLANNED:
            raise ValueError(
                f"{name} already exists and is not a file of samples; remove it, or give another --output."
            )


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
    """Samples into one file with all processes. An interrupted run resumes, and the file is the same byte for byte.

    Each finished batch is kept in a folder `<output>.parts` until all are finished. After an interruption the same call
    makes the missing ones. A grid of some samples is saved beside the file, with the extension `.png`.

    Args:
        pipeline ([`ClassifierGuidedPipeline`] or one called like it): Makes the images, of 1 or 3 channels.
        labels (`torch.Tensor` of shape `(n,)`, or `int`): The class of each image, or the number of images without a
            class.
        output (`str` or `os.PathLike`): The format follows the extension: `.npz` as published, `.parquet`, a folder of
            PNGs without one, see [`write_samples`]; or `.png`, a grid of all images with one row per class.
        batch_size (`int`, defaults to 64): Images at once. Whole batches are assigned to the processes in turn.
        seed (`int`, defaults to 0): Seed of all images together.
        compile (`bool`, defaults to `False`): Compile the pipeline's models first, see
            [`ClassifierGuidedPipeline.compile`]. It pays for many batches.
        arguments: Passed to the pipeline.

    Returns:
        `bool`: `True` if the output was made, `False` if it already existed.

    Raises:
        `ValueError`: If the output or its parts exist with other settings, or the disk has too little free space.
        `FullDiskError`: If the disk is full; finished batches are kept.
        `RuntimeError`: If another process has ended; finished batches are kept.
    """
    check_destination(output)
    path, kind = Path(output), _kind(output)
    channels = pipeline.image_channels
    num_images = labels if isinstance(labels, int) else len(labels)
    if channels not in (1, 3):
        raise ValueError(
            f"Images of {channels} channels cannot be written as images, which have 1 or 3; call the pipeline instead."
        )
    if kind == ".png" and num_images > MAX_PICTURED:
        raise ValueError(
            f"{num_images} images are too many for one grid of at most {MAX_PICTURED}; give an --output of .npz, "
            f".parquet or a folder."
        )
    shape = (num_images, *pipeline.sample_size, channels)
    parts = _Parts(_parts_folder(path), shape, batch_size)
    plan = _plan(pipeline, labels, parts, seed, {**arguments, "compile": compile or None})

    # 1. The missing batches, listed by the main process for all
    state = PartialState()
    missing = from_main(lambda: _missing_batches(path, kind, parts, plan))
    if missing is None:
        return False

    # 2. The samples; the main process assembles the output meanwhile
    if compile:
        pipeline.compile()
        if state.is_main_process:
            tqdm.write(COMPILING)
    own = missing[state.process_index :: state.num_processes]
    batches = sample_batches(pipeline, labels, batch_size, seed, batches=own, **arguments)
    try:
        if state.is_main_process:
            _assemble(path, kind, _every_batch(batches, parts), parts, labels, pipeline.id2label, plan)
        else:
            for batch, images in batches:
                parts.write(batch, images)
    except FullDiskError as error:
        raise FullDiskError(
            f"The disk is {full_disk(error)}: {parts.num_finished()} of {num_images} images are kept in "
            f"{parts.folder}. Make room and rerun the same command to resume."
        ) from error
    finally:
        if state.is_main_process and parts.folder.is_dir() and not parts.num_finished():
            remove_folder(parts.folder)
    return True


@dataclass(frozen=True)
class _Parts:
    """The finished batches of an output, each a file of raw 8-bit pixels."""

    folder: Path
    shape: tuple[int, int, int, int]  # images, height, width, channels
    batch_size: int

    @property
    def num_batches(self) -> int:
        return math.ceil(self.shape[0] / self.batch_size)

    @property
    def image_bytes(self) -> int:
        return math.prod(self.shape[1:])

    def path(self, batch: int) -> Path:
        return self.folder / f"{batch:06d}.raw"

    def size(self, batch: int) -> int:
        """Number of images of a batch."""
        return min(self.batch_size, self.shape[0] - batch * self.batch_size)

    def finished(self) -> list[int]:
        """The batches whose file is complete."""
        bytes_of = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
        batches = range(self.num_batches)
        return [b for b in batches if bytes_of.get(self.path(b).name) == self.size(b) * self.image_bytes]

    def num_finished(self) -> int:
        """Number of images in finished batches."""
        return sum(self.size(batch) for batch in self.finished())

    def write(self, batch: int, images: torch.Tensor) -> None:
        """Writes a batch `(n, channels, height, width)`."""
        with replacing(self.path(batch)) as temporary:
            temporary.write_bytes(images.permute(0, 2, 3, 1).numpy().tobytes())

    def read(self, batch: int) -> np.ndarray:
        """A batch `(n, height, width, channels)`."""
        return np.fromfile(self.path(batch), np.uint8).reshape(-1, *self.shape[1:])

    def read_image(self, index: int) -> np.ndarray:
        """An image `(height, width, channels)`."""
        batch, position = divmod(index, self.batch_size)
        start = position * self.image_bytes
        return np.fromfile(self.path(batch), np.uint8, self.image_bytes, offset=start).reshape(self.shape[1:])


def _kind(output: str | os.PathLike) -> str:
    """The extension, which gives the format; empty for a folder."""
    name = os.fspath(output)
    kind = "" if name.endswith(os.sep) else Path(name).suffix
    if kind not in ("", ".npz", ".parquet", ".png"):
        raise ValueError(f"--output {output} must end in .npz, .parquet or .png, or in / for a folder.")
    return kind


def _parts_folder(path: Path) -> Path:
    """The folder of an output's finished batches."""
    return path.with_name(f"{path.name}.parts")


def _may_hold_parts(folder: Path) -> bool:
    """Whether a folder holds batches, or only temporary files of an interrupted run, and may be removed."""
    return (folder / PLAN_FILE).is_file() or all(path.suffix == ".tmp" for path in folder.iterdir())


def _picture_path(path: Path, kind: str) -> Path:
    """Path of the grid beside a file or folder."""
    return path.with_suffix(".png") if kind else path.with_name(f"{path.name}.png")


def _plan(
    pipeline: Any, labels: torch.Tensor | int, parts: _Parts, seed: int, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """All settings that samples depend on, as read back from JSON."""
    model = getattr(pipeline, "name_or_path", None)
    model = None if model is None else str(model)
    height, width, channels = parts.shape[1:]
    plan = {
        "model": model,
        "model_files": None if model is None else _stamp(model),
        "num_images": parts.shape[0],
        "size": f"{height}x{width}x{channels}",
        "labels": None if isinstance(labels, int) else hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        "seed": seed,
        "batch_size": parts.batch_size,
        **{name: value for name, value in arguments.items() if value is not None},
    }
    return without_credentials(json.loads(json.dumps(plan, default=repr)))


def _stamp(model: str) -> str | None:
    """A fingerprint of a model: a hash of its files' names, sizes and times, or the commit of a model on the Hub."""
    if not Path(model).is_dir():
        index = try_to_load_from_cache(model, "model_index.json")
        return Path(index).parent.name if isinstance(index, str) else None
    digest = hashlib.sha256()
    for path in sorted(Path(model).rglob("*")):
        if path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(f"{path.relative_to(model)} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The differences of two plans, in words; empty if they make the same samples."""
    hashes = {"labels": "the labels were different", "model_files": "the model's files were different"}
    return "; ".join(
        hashes.get(name, f"{name} was {old.get(name)} and is now {new.get(name)}")
        for name in differing(old, new, _CONTENT_OF)
    )


def _missing_batches(path: Path, kind: str, parts: _Parts, plan: dict[str, Any]) -> list[int] | None:
    """The batches to make, after creating a folder for them; `None` if the output exists."""
    recover_folder(parts.folder)  # partly removed if a kill came in between
    record = without_credentials(read_record(path))
    if record is not None and not _differences(record, plan):
        if parts.folder.is_dir():
            remove_folder(parts.folder)  # a kill may have left it
        return None
    if record is not None and kind != ".png":
        raise ValueError(
            f"{path} already exists and was made with other settings: {_differences(record, plan)}. Give another "
            f"--output, or remove it."
        )

    plan_file, old = parts.folder / PLAN_FILE, None
    if plan_file.is_file():
        shape = {"num_images": int, "size": str, "seed": int, "batch_size": int}
        old = without_credentials(
            read_json(plan_file, shape, f"remove the folder {parts.folder} to start from scratch")
        )
        if (changes := _differences(old, plan)) and any(parts.folder.glob("*.raw")):
            raise ValueError(
                f"{parts.folder} holds samples made with other settings: {changes}. Give the same flags to resume, or "
                f"remove the folder to start from scratch."
            )
    finished = set()
    if parts.folder.is_dir():
        finished.update(parts.finished())
        for left in set(parts.folder.iterdir()) - {plan_file, *map(parts.path, finished)}:
            shutil.rmtree(left) if left.is_dir() else left.unlink()  # files that a kill left incomplete
    missing = [batch for batch in range(parts.num_batches) if batch not in finished]
    needed = sum(parts.size(batch) * parts.image_bytes + _BLOCK for batch in missing) + _largest_size(kind, parts)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)  # for a folder
    free = shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise ValueError(
            f"The samples need up to {needed / 1e9:.3g} GB on the disk of {path.absolute().parent}, parts and "
            f"output together, and {free / 1e9:.3g} GB are free; make room, or give an --output on another disk."
        )
    parts.folder.mkdir(exist_ok=True)
    if old != plan:
        write_json(plan, plan_file)
    return missing


def _largest_size(kind: str, parts: _Parts) -> int:
    """Upper bound of an output's size in bytes: PNGs of noise, which cannot be compressed."""
    num_images, height = parts.shape[:2]
    png = parts.image_bytes * 1001 // 1000 + height + 200
    of_image = {".npz": parts.image_bytes + 8, ".parquet": png + 50, "": math.ceil(png / _BLOCK) * _BLOCK + 200}
    return num_images * of_image.get(kind, 0) + 100 * _BLOCK


def _every_batch(own: Iterator[tuple[int, torch.Tensor]], parts: _Parts) -> Iterator[np.ndarray]:
    """All batches in order, each as soon as it is finished. Meanwhile the main process makes and keeps its `own`, waits
    for those of the others, and shows the progress of all."""
    num_images = parts.shape[0]
    finished = set(parts.finished())
    there = sum(map(parts.size, finished))
    with tqdm(total=num_images, initial=there, desc="sampling", unit="image") as bar:
        longest, looked, last_news = 0.0, 0.0, time.monotonic()
        for batch in range(parts.num_batches):
            while batch not in finished:
                started, new = time.monotonic(), set()
                if (made := next(own, None)) is not None:
                    parts.write(*made)
                    new.add(made[0])
                    seconds = time.monotonic() - started
                    if not longest:
                        bar.set_postfix({"first batch": f"{seconds:.1f}s"})
                    longest = max(longest, seconds)
                else:
                    time.sleep(0.1)
                if made is None or started - looked > 1:  # small batches are many files to list
                    looked = started
                    new.update(parts.finished())
                new -= finished
                if new:
                    finished |= new
                    bar.update(sum(map(parts.size, new)))
                    last_news = time.monotonic()
                elif time.monotonic() - last_news > _TIMEOUT + 20 * longest:
                    raise RuntimeError(
                        f"The other processes stopped making progress: {bar.n} of {num_images} images are kept in "
                        f"{parts.folder}. Rerun the same command to resume."
                    )
            yield parts.read(batch)


def _assemble(
    path: Path,
    kind: str,
    batches: Iterator[np.ndarray],
    parts: _Parts,
    labels: torch.Tensor | int,
    id2label: Mapping[int, str],
    plan: Mapping[str, Any],
) -> None:
    """Writes the output batch by batch, and the grid beside it, and removes the parts."""
    whole = parts.folder / f"whole{kind}"
    if kind == ".png":
        for _ in batches:
            pass  # the grid alone
    else:
        ids = None if isinstance(labels, int) else labels.numpy().astype(np.int64)
        write_samples(whole, batches, parts.shape, ids, id2label=id2label, record=plan)
    save_png(_grid(parts, labels, id2label, everything=kind == ".png"), _picture_path(path, kind), record=plan)
    if kind != ".png":
        os.replace(whole, path)
    remove_folder(parts.folder)


def _grid(parts: _Parts, labels: torch.Tensor | int, id2label: Mapping[int, str], everything: bool) -> Image.Image:
    """All samples, with one row per class in the order of the labels; or ten of each of the first ten classes."""
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
