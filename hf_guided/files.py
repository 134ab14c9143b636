"""Files and folders that are whole or not there at all, and never in the place of another's."""

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from .credentials import without_credentials


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Lends a temporary name beside a file, which takes the file's place at the end and is removed after an error.

    What killed processes left of earlier attempts at the same file is removed too.

    Args:
        path (`str` or `os.PathLike`): The file.

    Examples:
        ```py
        with replacing("grid.png") as temporary:
            image.save(temporary, format="PNG")
        ```
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Any, path: str | os.PathLike) -> None:
    """Writes JSON that people can read, without the credentials of addresses in it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(without_credentials(content), indent=2) + "\n")


@contextmanager
def replacing_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Lends an empty temporary folder, which takes the folder's place at the end and is removed after an error.

    The older folder is renamed before the new one takes its name, and deleted last: at every moment one of them is
    whole, and [`recover_folder`] finds it.

    Args:
        folder (`str` or `os.PathLike`): The folder.
    """
    folder = Path(folder)
    if folder.is_symlink():
        folder = folder.resolve()
    recover_folder(folder)
    partial, old = partial_name(folder), folder.with_name(f".{folder.name}.old")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_name(folder: Path) -> Path:
    """What [`replacing_folder`] calls a folder until it is finished."""
    return folder.with_name(f".{folder.name}.partial")


def recover_folder(folder: str | os.PathLike) -> None:
    """Undoes what a kill left in the midst of replacing or removing a folder."""
    folder = Path(folder)
    if folder.is_symlink():
        folder = folder.resolve()
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for ending in ("partial", "old", "removed"):
        shutil.rmtree(folder.with_name(f".{folder.name}.{ending}"), ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Renames before it removes, so that half a folder is never taken for a whole one."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed)


def check_replaceable(
    outputs: Iterable[str | os.PathLike],
    is_own: Callable[[Path], bool],
    inputs: Iterable[str | os.PathLike | None] = (),
) -> None:
    """Refuses, before the work, outputs that would replace an input or a file that this command did not make.

    Args:
        outputs (`Iterable[str]`): The files that will be written.
        is_own (`Callable`): Whether a file that is there already is one that this command makes, and may replace.
        inputs (`Iterable[str]`): What the command reads; names that are no files, such as those of the Hub, and `None`
            are passed over.

    Raises:
        `ValueError`: Naming the file.
    """
    read = [Path(path) for path in inputs if path is not None and os.path.exists(path)]
    written: dict[str, Path] = {}
    for path in map(Path, outputs):
        if other := written.get(real := os.path.realpath(path)):
            raise ValueError(f"{other} and {path} are one file, to which two results would be written; name another.")
        written[real] = path
        if any(path.exists() and path.samefile(source) for source in read):
            raise ValueError(f"{path} is read by this command and would be overwritten; give another output.")
        if os.path.lexists(path) and not is_own(path):
            raise ValueError(
                f"{path} is there already and was not made by this command; remove it, or give another output."
            )


def check_outside(output: str | os.PathLike, folders: Iterable[str | os.PathLike | None]) -> None:
    """Refuses an output that is, or lies in, a folder that the command reads, where it would become a part of it.

    Args:
        output (`str` or `os.PathLike`): A file or folder that will be written.
        folders (`Iterable[str]`): What the command reads; names that are no folders and `None` are passed over.

    Raises:
        `ValueError`: Naming both.
    """
    place = Path(os.path.realpath(output))
    places = [place, *place.parents]
    for folder in folders:
        if folder is None or not os.path.isdir(folder):
            continue
        if any(place.exists() and place.samefile(folder) for place in places):
            raise ValueError(f"The output {output} lies in {folder}, which is read here; give one outside of it.")


def has_json(path: str | os.PathLike, *keys: str) -> bool:
    """Whether a file holds a JSON object with these keys, by which its maker is known."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= set(keys)
