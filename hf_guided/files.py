"""Atomic writes of files and folders, and checks that they do not overwrite foreign ones."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from .credentials import without_credentials

# Names of temporary files hold host and process: on a shared disk, only dead processes of this host can be detected.
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(rf"\..+\.{_MACHINE}-([0-9]+)\.tmp", re.DOTALL)
_TORCH_SAVE = re.compile(r"PytorchStreamWriter failed|basic_ios::clear|unexpected pos \d+ vs \d+")


class FullDiskError(RuntimeError):
    """A disk is full or read-only; the message names the file and the fix."""


def full_disk(error: BaseException) -> str | None:
    """`"full"` or `"read-only"` if such a disk caused an error, be it hidden in another one; else `None`."""
    reasons = {errno.ENOSPC: "full", errno.EDQUOT: "full", errno.EFBIG: "full", errno.EROFS: "read-only"}
    current: BaseException | None = error
    while current is not None:
        in_rust = re.search(r"\(os error (\d+)\)", str(current))  # as safetensors says it
        number = current.errno if isinstance(current, OSError) else int(in_rust[1]) if in_rust else None
        if number in reasons:
            return reasons[number]
        if _TORCH_SAVE.search(str(current)):  # torch gives no errno
            return "full"
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return None


@contextmanager
def naming_full_disk(path: str | os.PathLike | None = None) -> Iterator[None]:
    """Turns errors of a full or read-only disk into a [`FullDiskError`] that names `path`, or the error's file."""
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        named = path or getattr(error, "filename", None)
        raise FullDiskError(
            f"The disk is {reason}: {f'{named} cannot be written' if named else error}. "
            f"{'Free some space' if reason == 'full' else 'Make it writable'} and rerun the same command."
        ) from error


def is_hub_id(name: str) -> bool:
    """Whether it may name a repository on the Hub: `user/name` or `name`, and no file or folder here."""
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII) is not None and not os.path.exists(name)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path next to a file or folder; renamed to it at the end, removed after an error.

    What killed processes left in the same folder is removed too. A full disk is a [`FullDiskError`].
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_MACHINE}-{os.getpid()}.tmp")
    with naming_full_disk(path):
        for left in path.parent.glob(".*.tmp"):
            match = _TEMPORARY.fullmatch(left.name)
            if match and not psutil.pid_exists(int(match[1])):
                _remove(left)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            if os.path.lexists(temporary):
                _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(content: Any, path: str | os.PathLike) -> None:
    """Writes indented JSON, without credentials in URLs."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(without_credentials(content), indent=2) + "\n")


def read_json(path: str | os.PathLike, shape: Any = dict, fix: str = "remove it") -> Any:
    """The content of a JSON file written by this package.

    Args:
        path (`str` or `os.PathLike`): The file.
        shape (`Any`, defaults to `dict`): Of the content: a type; `[shape]` of a list; or a dict from required keys to
            their shapes, where a type as key stands for all keys.
        fix (`str`, defaults to `"remove it"`): What to do if it is damaged, for the message.

    Raises:
        `ValueError`: If it is damaged, naming the file and the fix.
        `FileNotFoundError`: If it does not exist.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is damaged: it is truncated or not JSON; {fix}.") from error
    if not _has_shape(content, shape):
        raise ValueError(f"{path} is damaged: its content is not as written; {fix}.")
    return content


def _has_shape(content: Any, shape: Any) -> bool:
    if isinstance(shape, list):
        return isinstance(content, list) and all(_has_shape(item, shape[0]) for item in content)
    if not isinstance(shape, dict):
        return isinstance(content, shape)
    return isinstance(content, dict) and all(
        all(_has_shape(value, inner) for value in content.values())
        if isinstance(key, type)
        else key in content and _has_shape(content[key], inner)
        for key, inner in shape.items()
    )


@contextmanager
def replacing_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """An empty temporary folder; replaces the folder at the end, removed after an error.

    The old folder is renamed before, and deleted after: at any time one of them is complete, and [`recover_folder`]
    finds it. A full disk is a [`FullDiskError`].
    """
    folder = recover_folder(folder)
    partial, old = partial_name(folder), _beside(folder, "old")
    with naming_full_disk(folder):
        try:
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


def partial_name(folder: Path) -> Path:
    """The temporary name that [`replacing_folder`] gives a folder."""
    return _beside(folder, "partial")


def recover_folder(folder: str | os.PathLike) -> Path:
    """Restores or finishes a folder whose replacement or removal was killed; returns it, without a link to it."""
    folder = Path(folder)
    if folder.is_symlink():
        folder = folder.resolve()
    if _beside(folder, "old").exists() and not folder.exists():
        os.replace(_beside(folder, "old"), folder)
    for ending in ("partial", "old", "removed"):
        shutil.rmtree(_beside(folder, ending), ignore_errors=True)
    return folder


def remove_folder(folder: Path) -> None:
    """Removes a folder, renamed first, so that a partial one is never taken as complete."""
    removed = _beside(folder, "removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed)


# Checks of outputs before the work. Each raises a `ValueError` that names what is in the way.


def check_replaceable(
    outputs: Iterable[str | os.PathLike],
    is_own: Callable[[Path], bool],
    inputs: Iterable[str | os.PathLike | None] = (),
) -> None:
    """Refuses outputs that are the same, or that would overwrite an input or a foreign file.

    `is_own` says whether an existing file was made by this command. Inputs that are `None` or no files are ignored.
    """
    read = [Path(path) for path in inputs if path is not None and os.path.exists(path)]
    written: dict[str, Path] = {}
    for path in map(Path, outputs):
        if (other := written.setdefault(os.path.realpath(path), path)) is not path:
            raise ValueError(f"{other} and {path} are the same file, but two outputs; give another name.")
        if any(path.exists() and path.samefile(source) for source in read):
            raise ValueError(f"{path} is read by this command and would be overwritten; give another output.")
        if os.path.lexists(path) and not is_own(path):
            raise ValueError(f"{path} exists and was not made by this command; remove it, or give another output.")


def check_kind(paths: Iterable[str | os.PathLike], is_folder: bool) -> None:
    """Refuses a file where a folder is to be written, or a folder where a file is."""
    for path in map(Path, paths):
        if os.path.lexists(path) and path.is_dir() != is_folder:
            here, wanted = ("file", "folder") if is_folder else ("folder", "file")
            raise ValueError(f"{path} is a {here}, and a {wanted} of results goes there; remove or rename it.")


def check_outside(output: str | os.PathLike, folders: Iterable[str | os.PathLike | None]) -> None:
    """Refuses an output in a folder that the command reads, or that folder; what is `None` or no folder is ignored."""
    place = Path(os.path.realpath(output))
    places = [path for path in (place, *place.parents) if path.exists()]
    for folder in folders:
        if folder is not None and os.path.isdir(folder) and any(path.samefile(folder) for path in places):
            raise ValueError(f"The output {output} lies in {folder}, which is read here; give one outside of it.")


def check_place(folder: str | os.PathLike, flag: str = "--output") -> Path:
    """The output folder, if it can be made and written to; it is not made yet. `flag` is its name in errors."""
    if not os.fspath(folder).strip():
        raise ValueError(f"{flag} is empty; give a folder.")
    place = Path(folder).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{flag} {folder} cannot be made ({place} is not a folder); give another folder.")
    _check_writable(place, f"{flag} {folder}")
    return Path(folder)


def check_parent(path: str | os.PathLike, flag: str = "--output", suffix: str = "") -> None:
    """Refuses an output file of another ending than `suffix`, or whose folder does not exist or is not writable."""
    if not os.fspath(path).endswith(suffix):
        raise ValueError(f"{flag} {path} must end in {suffix}.")
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: the folder {folder} does not exist; make it first.")
    _check_writable(folder, f"{flag} {path}")


def _check_writable(folder: Path, what: str) -> None:
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{what}: {folder} is not writable; give another, or make it writable.")


def differing(old: Mapping[str, Any], new: Mapping[str, Any], content_of: Mapping[str, str]) -> list[str]:
    """Names of the settings in which two records differ; files are compared by content, not by name.

    `content_of` gives, for a setting that names a file, the entry with the hash of its content. Where both records have
    it (older versions may not), only the hashes are compared.
    """
    hashed = {entry for entry in content_of.values() if None not in (old.get(entry), new.get(entry))}
    equal = {entry for entry in hashed if old[entry] == new[entry]}
    return [
        name
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
        and content_of.get(name) not in equal
        and (name in hashed or name not in content_of.values())
    ]


_locks: set[int] = set()  # descriptors of folders that this process has locked


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Locks a folder against other processes, without a file; a `ValueError` if another one has locked it.

    Where folders cannot be locked (Windows, some network disks), it does nothing.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is writing to {folder}; wait until it has ended, or give another folder."
            ) from None
        except OSError:  # a disk without locks
            pass
        yield
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def _leave_locks() -> None:
    """Closes the locks in a forked worker: one that outlives its killed parent would keep the folder locked."""
    while _locks:
        os.close(_locks.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_locks)


def has_json(path: str | os.PathLike, *keys: str) -> bool:
    """Whether a file holds a JSON object with these keys, which identify what wrote it."""
    try:
        read_json(path, dict.fromkeys(keys, object))
    except (OSError, ValueError):
        return False
    return True
