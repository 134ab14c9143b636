"""One output of many images, which several processes make in as many sittings as it takes.

Each finished batch is kept in a folder `<output>.parts` until all are there, beside a plan of what they depend on.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    check_replaceable,
    differing,
    full_disk,
    read_json,
    recover_folder,
    remove_folder,
    replacing,
    write_json,
)
from ..processes import from_main
from .grids import save_png
from .samples import import_parquet, read_record, write_samples

PLAN_FILE = "plan.json"
_PLANNED = {"num_images", "size", "seed"}  # of every plan, by which a record is known as one
_CONTENT_OF = {"model": "model_files"}  # a folder may be moved, or its path spelled otherwise
MAX_PICTURED = 1000  # images in one grid
_BLOCK = 4096  # bytes that even a small file takes
_TIMEOUT = 600  # seconds without news of the other processes, beside twenty batches' time

MakeBatches = Callable[[list[int]], Iterator[tuple[int, torch.Tensor]]]


def kind_of(output: str | os.PathLike) -> str:
    """The ending that says what to write: `".npz"`, `".parquet"` or `".png"`; empty for a folder.

    Raises:
        `ValueError`: For other endings.
    """
    name = os.fspath(output)
    kind = "" if name.endswith(os.sep) else Path(name).suffix
    if kind not in ("", ".npz", ".parquet", ".png"):
        raise ValueError(f"--output {output} must end in .npz, .parquet or .png, or in / for a folder.")
    return kind


def check_destination(
    output: str | os.PathLike, *, command: str | None = None, inputs: Iterable[str | os.PathLike] = ()
) -> None:
    """Refuses a name that could not be written to, before a model is loaded.

    Args:
        output (`str` or `os.PathLike`): The file or folder; for samples, a picture is put beside it.
        command (`str`, *optional*): Of the plan, by which its outputs are told from samples.
        inputs (`Iterable[str]`): Files that are read.

    Raises:
        `ValueError`: If the ending is unknown, there is nowhere to put it, or something else has its name.
        `ImportError`: If parquet files cannot be written.
    """
    path, kind = Path(output), kind_of(output)
    check_parent(output) if kind else check_place(path.absolute().parent)
    if os.path.ismount(path):
        raise ValueError(f"--output {output} is a whole disk; give a name on it.")
    if kind == ".parquet":
        import_parquet()
    parts = _parts_folder(path)
    if os.path.lexists(parts) and not (parts.is_dir() and _may_hold_parts(parts)):
        raise ValueError(f"{parts} was not made by this command; remove it, or give another --output.")

    def is_own(name: Path) -> bool:
        record = read_record(name) or {}
        is_empty_folder = name == path and not kind and name.is_dir() and not any(name.iterdir())
        return is_empty_folder or (record.keys() >= _PLANNED and record.get("command") == command)

    beside = [_picture_path(path, kind)] if command is None and kind != ".png" else []
    check_replaceable([path, *beside], is_own, inputs)


def plan_of(
    pipeline: Any,
    labels: torch.Tensor | None,
    shape: tuple[int, int, int, int],
    batch_size: int,
    seed: int,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """All that images depend on, as JSON gives it back.

    Args:
        pipeline: Makes them.
        labels (`torch.Tensor` of shape `(n,)`, *optional*): Their classes.
        shape (`tuple[int, int, int, int]`): Images, height, width, channels.
        batch_size (`int`): Images at once, on which the last bits depend.
        seed (`int`): Of all images together.
        arguments (`Mapping[str, Any]`): What else is part of the plan, by name; those that are `None` are left out.
    """
    model = getattr(pipeline, "name_or_path", None)
    model = None if model is None else str(model)
    num_images, height, width, channels = shape
    plan = {
        "model": model,
        "model_files": None if model is None else _stamp(model),
        "num_images": num_images,
        "size": f"{height}x{width}x{channels}",
        "labels": None if labels is None else hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        "seed": seed,
        "batch_size": batch_size,
        **{name: value for name, value in arguments.items() if value is not None},
    }
    return without_credentials(json.loads(json.dumps(plan, default=repr)))


def run_to_file(
    output: str | os.PathLike,
    shape: tuple[int, int, int, int],
    batch_size: int,
    plan: dict[str, Any],
    make: MakeBatches,
    *,
    labels: torch.Tensor | None = None,
    id2label: Mapping[int, str] | None = None,
    draw: "Callable[[Parts], Image.Image] | None" = None,
    verb: str = "sampling",
) -> bool:
    """Makes images into one file or folder, by all processes: the same to the byte for any number of processes and
    sittings. After a stop or a kill the same call makes what is missing.

    Args:
        output (`str` or `os.PathLike`): By its ending `.npz`, `.parquet`, or without one a folder of PNGs, see
            [`write_samples`]; or `.png`, the picture alone.
        shape (`tuple[int, int, int, int]`): Images, height, width, channels: 1 or 3.
        batch_size (`int`): Images at once. Whole batches go to the processes in turn.
        plan (`dict`): Of [`plan_of`]; is kept in the output.
        make (`Callable`): Is given indices of batches, of which batch b begins with image b * batch_size; yields each
            with its images, uint8 of shape `(n, channels, height, width)`, on the CPU.
        labels (`torch.Tensor` of shape `(n,)`, *optional*), id2label (`Mapping[int, str]`, *optional*): Their classes.
        draw (`Callable`, *optional*): Draws the picture that is put beside the output, or is it.
        verb (`str`, defaults to `"sampling"`): What the progress bar says.

    Returns:
        `bool`: `True` if it was made, `False` if it was there already.

    Raises:
        `ValueError`: If the output, or its parts exist with other settings, or the disk has too little space.
        `FullDiskError`: If the disk is full; what is made is kept.
        `RuntimeError`: If another process has ended; what is made is kept.
    """
    path, kind = Path(output), kind_of(output)
    num_images, channels = shape[0], shape[3]
    if channels not in (1, 3):
        raise ValueError(f"Images of {channels} channels are no pictures; only the pipeline itself can make them.")
    if kind == ".png" and num_images > MAX_PICTURED:
        raise ValueError(
            f"{num_images} images are too many for one grid; give an --output of .npz, .parquet or a folder."
        )
    parts = Parts(_parts_folder(path), shape, batch_size)

    # 1. What is missing: the main process looks, and tells the others
    state = PartialState()
    missing = from_main(lambda: _missing_batches(path, kind, parts, plan))
    if missing is None:
        return False

    # 2. Make it; the main process puts it together meanwhile
    batches = make(missing[state.process_index :: state.num_processes])
    try:
        if state.is_main_process:
            _put_together(path, kind, _every_batch(batches, parts, verb), parts, labels, id2label, draw, plan)
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
class Parts:
    """The finished batches of an output, each a file of 8-bit pixels and nothing else."""

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
        """Images of a batch."""
        return min(self.batch_size, self.shape[0] - batch * self.batch_size)

    def finished(self) -> list[int]:
        """The batches that are there, whole."""
        bytes_of = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
        batches = range(self.num_batches)
        return [b for b in batches if bytes_of.get(self.path(b).name) == self.size(b) * self.image_bytes]

    def num_finished(self) -> int:
        """Images that are there."""
        return sum(self.size(batch) for batch in self.finished())

    def write(self, batch: int, images: torch.Tensor) -> None:
        """Keeps a batch `(n, channels, height, width)`."""
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


def _parts_folder(path: Path) -> Path:
    """The folder of an output's finished batches."""
    return path.with_name(f"{path.name}.parts")


def _may_hold_parts(folder: Path) -> bool:
    """Whether a folder is one of batches, or empty but for what a kill left: all in it may be removed."""
    return (folder / PLAN_FILE).is_file() or all(path.suffix == ".tmp" for path in folder.iterdir())


def _picture_path(path: Path, kind: str) -> Path:
    """The picture beside a file or folder; of a picture, itself."""
    return path.with_suffix(".png") if kind else path.with_name(f"{path.name}.png")


def _stamp(model: str) -> str | None:
    """What changes with a model: a hash of its files' names, sizes and times; of one on the Hub, the commit."""
    if not Path(model).is_dir():
        index = try_to_load_from_cache(model, "model_index.json")
        return Path(index).parent.name if isinstance(index, str) else None
    digest = hashlib.sha256()
    for path in sorted(Path(model).rglob("*")):
        if path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(f"{path.relative_to(model)} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What two plans differ in, in words; empty if they make the same samples."""
    kinds = {"labels": "labels", "model_files": "model's files", "images": "small images"}
    hashes = {name: f"the {what} were different" for name, what in kinds.items()}
    return "; ".join(
        hashes.get(name, f"{name} was {old.get(name)} and is now {new.get(name)}")
        for name in differing(old, new, _CONTENT_OF)
    )


def _missing_batches(path: Path, kind: str, parts: Parts, plan: dict[str, Any]) -> list[int] | None:
    """The batches to make, with a folder ready for them; `None` if the output is there."""
    recover_folder(parts.folder)  # removed in part, if a kill came between
    record = without_credentials(read_record(path))
    if record is not None and not _differences(record, plan):
        if parts.folder.is_dir():
            remove_folder(parts.folder)  # a kill may have left it
        return None
    if record is not None and kind != ".png":
        raise ValueError(
            f"{path} already exists with other settings: {_differences(record, plan)}. Give another --output, or "
            f"remove it."
        )

    plan_file, old = parts.folder / PLAN_FILE, None
    if plan_file.is_file():
        shape = {"num_images": int, "size": str, "seed": int, "batch_size": int}
        old = without_credentials(
            read_json(plan_file, shape, f"remove the folder {parts.folder} to start from scratch")
        )
        if (changes := _differences(old, plan)) and any(parts.folder.glob("*.raw")):
            raise ValueError(
                f"{parts.folder} holds images with other settings: {changes}. Give the same flags to resume, or remove "
                f"the folder to start from scratch."
            )
    finished = set()
    if parts.folder.is_dir():
        finished.update(parts.finished())
        for left in set(parts.folder.iterdir()) - {plan_file, *map(parts.path, finished)}:
            shutil.rmtree(left) if left.is_dir() else left.unlink()  # what a kill cut off
    missing = [batch for batch in range(parts.num_batches) if batch not in finished]
    needed = sum(parts.size(batch) * parts.image_bytes + _BLOCK for batch in missing) + _largest_size(kind, parts)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)  # of a folder
    free = shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise ValueError(
            f"The images need up to {needed / 1e9:.3g} GB on the disk of {path.absolute().parent}, in parts and put "
            f"together, and {free / 1e9:.3g} GB are free; make room, or give an --output elsewhere."
        )
    parts.folder.mkdir(exist_ok=True)
    if old != plan:
        write_json(plan, plan_file)
    return missing


def _largest_size(kind: str, parts: Parts) -> int:
    """Bytes that an output takes at most; of PNGs of noise, which cannot be made smaller."""
    num_images, height = parts.shape[:2]
    png = parts.image_bytes * 1001 // 1000 + height + 200
    of_image = {".npz": parts.image_bytes + 8, ".parquet": png + 50, "": math.ceil(png / _BLOCK) * _BLOCK + 200}
    return num_images * of_image.get(kind, 0) + 100 * _BLOCK


def _every_batch(own: Iterator[tuple[int, torch.Tensor]], parts: Parts, verb: str) -> Iterator[np.ndarray]:
    """All batches in order, each as soon as it is there. Until then makes and keeps the main process's `own`, waits for
    those of the others, and shows how far all of them are."""
    num_images = parts.shape[0]
    finished = set(parts.finished())
    there = sum(map(parts.size, finished))
    with tqdm(total=num_images, initial=there, desc=verb, unit="image") as bar:
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
                if made is None or started - looked > 1:  # small batches are many files to look at
                    looked = started
                    new.update(parts.finished())
                new -= finished
                if new:
                    finished |= new
                    bar.update(sum(map(parts.size, new)))
                    last_news = time.monotonic()
                elif time.monotonic() - last_news > _TIMEOUT + 20 * longest:
                    raise RuntimeError(
                        f"The other processes finish nothing more: {bar.n} of {num_images} images are kept in "
                        f"{parts.folder}. Rerun the same command to resume."
                    )
            yield parts.read(batch)


def _put_together(
    path: Path,
    kind: str,
    batches: Iterator[np.ndarray],
    parts: Parts,
    labels: torch.Tensor | None,
    id2label: Mapping[int, str] | None,
    draw: Callable[[Parts], Image.Image] | None,
    plan: Mapping[str, Any],
) -> None:
    """Makes the output of its batches as they come, and the picture, and removes the parts."""
    whole = parts.folder / f"whole{kind}"
    if kind == ".png":
        for _ in batches:
            pass  # the picture alone
    else:
        ids = None if labels is None else labels.numpy().astype(np.int64)
        write_samples(whole, batches, parts.shape, ids, id2label=id2label, record=plan)
    if draw is not None:
        save_png(draw(parts), _picture_path(path, kind), record=plan)
    if kind != ".png":
        os.replace(whole, path)
    remove_folder(parts.folder)
