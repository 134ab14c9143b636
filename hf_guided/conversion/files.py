"""Reading `.pt` files and writing safetensors one tensor at a time, without a whole model in memory."""

import ctypes
import filecmp
import json
import mmap
import os
import pickle
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..loading import foreign_content

# Pages of a mapped file count as the process's memory until they are released.
RESIDENT_BYTES = 128 * 2**20

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors of a `.pt` state dict by their published names, and whether they are mapped, see [`release_pages`].

    Code in a pickle is never run. The file is memory-mapped, so that tensors are read on use; only files of PyTorch
    before 1.6 are read completely.

    Raises:
        `ValueError`: If the file is missing or damaged, or holds anything but the tensors of a model.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the .pt file.")
    if not path.exists():
        raise ValueError(f"There is no file {path}.")
    if what := foreign_content(path):
        raise ValueError(f"{path} is {what}, not a checkpoint: download it again.")
    size = f"{path.stat().st_size:,} bytes"
    with path.open("rb") as file:
        start = file.read(4)
    mapped = start == b"PK\x03\x04"
    if mapped and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} ends too early ({size}): download it again.")
    if not mapped and start[:1] != b"\x80":  # the first byte of a pickle
        raise ValueError(f"{path} is not a PyTorch checkpoint; give the .pt file that the published code saved.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            what = "more than tensors (code or objects), so it was not loaded"
            raise ValueError(f"{path} holds {what}; give the state dict that the published code saved.") from None
        raise ValueError(f"{path} is damaged: download it again.") from None
    except MemoryError:
        raise
    except Exception:  # an incomplete pickle can raise any error
        raise ValueError(f"{path} is damaged or ends too early ({size}): download it again.") from None
    return _check_state_dict(loaded, path), mapped and _has_this_byte_order(path)


def _check_state_dict(loaded: object, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict; give a model's .pt file.")
    if loaded.keys() == {"state", "param_groups"}:
        raise ValueError(f"{path} holds the state of an optimizer; give the ema_*.pt or model*.pt beside it.")
    for name, value in loaded.items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"{path} holds a state dict inside another, under {name!r}; save the inner one by itself: "
                f"torch.save(torch.load({path.name!r})[{name!r}], 'model.pt')."
            )
        dense = torch.is_tensor(value) and value.layout == torch.strided
        if not isinstance(name, str) or not dense or not value.is_floating_point():
            what = f"{value.dtype} values" if dense else f"a {type(value).__name__}"
            raise ValueError(f"{path} holds {what} under {name!r}, but a model's state dict has only weights.")
    if not loaded:
        raise ValueError(f"{path} holds no tensors.")
    return dict(loaded)


def _has_this_byte_order(path: Path) -> bool:
    """Whether a file has this machine's byte order; otherwise PyTorch converts a copy in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    except zipfile.BadZipFile:  # saved without checksums
        return False
    return all(order.decode() == sys.byteorder for order in orders)


def one_by_one(
    tensors: Iterable[tuple[str, torch.Tensor]], source: Mapping[str, torch.Tensor], mapped: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors, and regularly releases the pages of their mapped file."""
    resident = 0
    for name, tensor in tensors:
        yield name, tensor
        resident += tensor.nbytes
        if mapped and resident > RESIDENT_BYTES:
            release_pages(source.values())
            resident = 0


def release_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Releases the pages of tensors of a mapped file; they are read again on use.

    Not for other tensors, whose values would be lost. Systems without this call keep the pages, which only costs
    memory.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        storage = tensor.untyped_storage()
        before = storage.data_ptr() % mmap.PAGESIZE
        start, length = ctypes.c_void_p(storage.data_ptr() - before), ctypes.c_size_t(storage.nbytes() + before)
        madvise(start, length, mmap.MADV_DONTNEED)


def same_content(one: Path, other: Path) -> bool:
    """Whether two files, or all files of two folders, have the same names and bytes."""
    if one.is_file():
        return other.is_file() and filecmp.cmp(one, other, shallow=False)
    inside = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (one, other)]
    return inside[0] == inside[1] and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in inside[0] if (one / name).is_file()
    )


@contextmanager
def in_new_folders(path: Path) -> Iterator[None]:
    """After an error, removes the parent folders of a path that did not exist before, if they are empty."""
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def write_safetensors(
    path: Path, shapes: Mapping[str, torch.Size], tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> None:
    """Writes tensors in any order into one safetensors file; one that is not finite in `dtype` is a `ValueError`."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data is aligned
    missing = set(shapes)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            converted = tensor.to(dtype).contiguous()
            if not converted.isfinite().all():
                reason = f"{dtype} cannot hold; convert with --dtype bf16 or fp32."
                if not tensor.isfinite().all():
                    reason = "are not finite: its training diverged, or the file is damaged."
                raise ValueError(f"The tensor {name} has values that {reason}")
            file.seek(8 + len(encoded) + header[name]["data_offsets"][0])
            file.write(converted.view(torch.uint8).numpy().data)
            missing.remove(name)
    assert not missing, missing
