"""One output of many images, which several processes make, resumed as often as it takes.

Each finished batch is kept in a folder `<output>.parts` until all are there, beside a plan of what they depend on.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from .samples import NO_CLASS, import_parquet, read_record, write_samples

PLAN_FILE = "plan.json"
_PLANNED = {"num_images": int, "size": str, "seed": int}  # of every plan, by which a record is known as one
_CONTENT_OF = {"model": "model_files"}  # a folder may be moved, or its path spelled otherwise
_HASHED = {"labels": "labels", "model_files": "model's files", "images": "small images"}
MAX_PICTURED = 1000  # images in one grid
_BLOCK = 4096  # bytes that even a small file takes
_TIMEOUT = 600  # seconds without news of the other processes, beside twenty batches' time

Batches = Iterator[tuple[int, torch.Tensor]]


def kind_of(output: str | os.PathLike) -> str:
    """The ending that says what to write: `".npz"`, `".parquet"` or `".png"`; empty for a folder."""
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
        command (`str`, *optional*): By which the records of its outputs are told from those of samples.
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
    if os.path.lexists(parts):
        is_begun = parts.is_dir() and all(left.suffix == ".tmp" for left in parts.iterdir())  # by a killed process
        if not is_begun and not (parts / PLAN_FILE).is_file():
            raise ValueError(f"{parts} was not made by this command; remove it, or give another --output.")

    def is_own(name: Path) -> bool:
        if name == path and not kind and name.is_dir() and not any(name.iterdir()):
            return True
        record = read_record(name) or {}
        return record.keys() >= _PLANNED.keys() and record.get("command") == command

    picture = _picture_path(path, kind, command)
    check_replaceable([path] if picture in (None, path) else [path, picture], is_own, inputs)


class Run:
    """An output and its finished batches, each a file of 8-bit pixels and nothing else.

    Args:
        output, pipeline, labels, batch_size, seed: As of [`sample_to_file`].
        planned (`Mapping[str, Any]`): What else the images depend on, by name; those that are `None` are left out.
        draw (`Callable`): Draws the picture that is put beside samples, or is the output.
        verb (`str`, defaults to `"sampling"`): What the progress bar says.

    Raises:
        `ValueError`: For an output that [`check_destination`] refuses, or images that it cannot hold.
    """

    def __init__(
        self,
        output: str | os.PathLike,
        pipeline: Any,
        labels: torch.Tensor,
        batch_size: int,
        seed: int,
        planned: Mapping[str, Any],
        draw: "Callable[[Run], Image.Image]",
        verb: str = "sampling",
    ):
        command = planned.get("command")
        check_destination(output, command=command)
        self.path, self.kind, self.folder = Path(output), kind_of(output), _parts_folder(Path(output))
        self.picture = _picture_path(self.path, self.kind, command)
        (height, width), channels, num_images = pipeline.sample_size, pipeline.image_channels, len(labels)
        if channels not in (1, 3):
            raise ValueError(f"Images of {channels} channels are no pictures; only the pipeline itself can make them.")
        if self.kind == ".png" and num_images > MAX_PICTURED:
            raise ValueError(
                f"{num_images} images are too many for one grid; give an --output of .npz, .parquet or a folder."
            )
        self.shape = (num_images, height, width, channels)
        self.image_bytes = math.prod(self.shape[1:])
        self.batch_size, self.num_batches = batch_size, math.ceil(num_images / batch_size)
        self.labels = None if labels[0] == NO_CLASS else labels.numpy()
        self.id2label, self.draw, self.verb = pipeline.id2label, draw, verb

        model = getattr(pipeline, "name_or_path", None)
        model = None if model is None else str(model)
        plan = {
            "model": model,
            "model_files": None if model is None else _stamp(model),
            "num_images": num_images,
            "size": f"{height}x{width}x{channels}",
            "labels": None if self.labels is None else hashlib.sha256(self.labels.tobytes()).hexdigest(),
            "seed": seed,
            "batch_size": batch_size,
            **{name: value for name, value in planned.items() if value is not None},
        }
        self.plan: dict[str, Any] = without_credentials(json.loads(json.dumps(plan, default=repr)))

    def make(self, make_batches: Callable[..., Batches]) -> bool:
        """Makes the output, by all processes: the same to the byte for any number of processes, resumed or not.

        Args:
            make_batches (`Callable`): Yields the `batches` of some indices, as [`sample_batches`].

        Returns:
            `bool`: `True` if it was made, `False` if it was there already.

        Raises:
            `ValueError`: If the output or its parts exist with other settings, or the disk has too little space.
            `FullDiskError`: If the disk is full; what is made is kept.
            `RuntimeError`: If another process has ended; what is made is kept.
        """
        state = PartialState()
        missing = from_main(self._missing)
        if missing is None:
            return False
        batches = make_batches(batches=missing[state.process_index :: state.num_processes])
        try:
            if state.is_main_process:
                self._put_together(self._every_batch(batches))
            else:
                for batch, images in batches:
                    self._write(batch, images)
        except FullDiskError as error:
            raise FullDiskError(
                f"The disk is {full_disk(error)}: {self._num_finished()} of {self.shape[0]} images are kept in "
                f"{self.folder}. Make room and rerun the same command to resume."
            ) from error
        finally:
            if state.is_main_process and self.folder.is_dir() and not self._num_finished():
                remove_folder(self.folder)
        return True

    def read_image(self, index: int) -> np.ndarray:
        """A finished image `(height, width, channels)`."""
        batch, position = divmod(index, self.batch_size)
        start = position * self.image_bytes
        return np.fromfile(self._part(batch), np.uint8, self.image_bytes, offset=start).reshape(self.shape[1:])

    def _part(self, batch: int) -> Path:
        return self.folder / f"{batch:06d}.raw"

    def _size(self, batch: int) -> int:
        """Images of a batch."""
        return min(self.batch_size, self.shape[0] - batch * self.batch_size)

    def _finished(self) -> set[int]:
        """The batches that are there, whole."""
        bytes_of = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
        batches = range(self.num_batches)
        return {b for b in batches if bytes_of.get(self._part(b).name) == self._size(b) * self.image_bytes}

    def _num_finished(self) -> int:
        return sum(map(self._size, self._finished()))

    def _write(self, batch: int, images: torch.Tensor) -> None:
        with replacing(self._part(batch)) as temporary:
            temporary.write_bytes(images.permute(0, 2, 3, 1).numpy().tobytes())

    def _differences(self, old: Mapping[str, Any]) -> str:
        """What another plan differs in, in words; empty if it makes the same images."""
        return "; ".join(
            f"the {_HASHED[name]} were different"
            if name in _HASHED
            else f"{name} was {old.get(name)} and is now {self.plan.get(name)}"
            for name in differing(old, self.plan, _CONTENT_OF)
        )

    def _missing(self) -> list[int] | None:
        """The batches to make, with a folder ready for them; `None` if the output is there."""
        recover_folder(self.folder)  # removed in part, if a kill came between
        record = without_credentials(read_record(self.path))
        if record is not None:
            changes = self._differences(record)
            if not changes:
                if self.folder.is_dir():
                    remove_folder(self.folder)  # a kill may have left it
                return None
            if self.kind != ".png":
                raise ValueError(
                    f"{self.path} already exists with other settings: {changes}. Give another --output, or remove it."
                )

        plan_file, old = self.folder / PLAN_FILE, None
        if plan_file.is_file():
            fix = f"remove the folder {self.folder} to start from scratch"
            old = without_credentials(read_json(plan_file, _PLANNED, fix))
            if (changes := self._differences(old)) and any(self.folder.glob("*.raw")):
                raise ValueError(
                    f"{self.folder} holds images with other settings: {changes}. Give the same flags to resume, or "
                    f"remove the folder to start from scratch."
                )
        finished: set[int] = set()
        if self.folder.is_dir():
            finished = self._finished()
            for left in set(self.folder.iterdir()) - {plan_file, *map(self._part, finished)}:
                shutil.rmtree(left) if left.is_dir() else left.unlink()  # what a kill cut off
        missing = [batch for batch in range(self.num_batches) if batch not in finished]
        self._check_space(sum(self._size(batch) * self.image_bytes + _BLOCK for batch in missing))
        self.folder.mkdir(exist_ok=True)
        if old != self.plan:
            write_json(self.plan, plan_file)
        return missing

    def _check_space(self, of_parts: int) -> None:
        """Refuses a disk that is too full for so many bytes of parts and the output."""
        num_images, height = self.shape[:2]
        png = self.image_bytes * 1001 // 1000 + height + 200  # of noise, which cannot be made smaller
        of_image = {".npz": self.image_bytes + 8, ".parquet": png + 50, "": math.ceil(png / _BLOCK) * _BLOCK + 200}
        needed = of_parts + num_images * of_image.get(self.kind, 0) + 100 * _BLOCK
        place = self.path.absolute().parent
        place.mkdir(parents=True, exist_ok=True)  # of a folder
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"The images need up to {needed / 1e9:.3g} GB on the disk of {place}, in parts and put together, and "
                f"{free / 1e9:.3g} GB are free; make room, or give an --output elsewhere."
            )

    def _every_batch(self, own: Batches) -> Iterator[np.ndarray]:
        """All batches in order `(n, height, width, channels)`, each as soon as it is there. Until then makes and keeps
        the main process's `own`, waits for those of the others, and shows how far all of them are."""
        finished = self._finished()
        with tqdm(total=self.shape[0], initial=self._num_finished(), desc=self.verb, unit="image") as bar:
            longest, looked, last_news = 0.0, 0.0, time.monotonic()
            for batch in range(self.num_batches):
                while batch not in finished:
                    started, new = time.monotonic(), set()
                    if (made := next(own, None)) is not None:
                        self._write(*made)
                        new.add(made[0])
                        seconds = time.monotonic() - started
                        if not longest:
                            bar.set_postfix({"first batch": f"{seconds:.1f}s"})
                        longest = max(longest, seconds)
                    else:
                        time.sleep(0.1)
                    if made is None or started - looked > 1:  # small batches are many files to look at
                        looked = started
                        new.update(self._finished())
                    new -= finished
                    if new:
                        finished |= new
                        bar.update(sum(map(self._size, new)))
                        last_news = time.monotonic()
                    elif time.monotonic() - last_news > _TIMEOUT + 20 * longest:
                        raise RuntimeError(
                            f"The other processes finish nothing more: {bar.n} of {self.shape[0]} images are kept in "
                            f"{self.folder}. Rerun the same command to resume."
                        )
                yield np.fromfile(self._part(batch), np.uint8).reshape(-1, *self.shape[1:])

    def _put_together(self, batches: Iterator[np.ndarray]) -> None:
        """Makes the output of its batches as they come, and the picture, and removes the parts."""
        whole = self.folder / f"whole{self.kind}"
        if self.kind == ".png":
            for _ in batches:
                pass  # the picture alone
        else:
            write_samples(whole, batches, self.shape, self.labels, id2label=self.id2label, record=self.plan)
        if self.picture is not None:
            save_png(self.draw(self), self.picture, record=self.plan)
        if self.kind != ".png":
            os.replace(whole, self.path)
        remove_folder(self.folder)


def _parts_folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _picture_path(path: Path, kind: str, command: str | None) -> Path | None:
    """The picture beside a file or folder of samples; of a picture, itself; `None` for outputs of other commands."""
    if command is not None and kind != ".png":
        return None
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
