"""Folders of images: which files are images, of which split and class, and which are skipped and why.

photos/cat/1.png, photos/dog/2023/2.jpg        the top folder names the class, at any depth
photos/train/cat/1.png, photos/val/cat/2.png   splits: all top folders have a split's name and hold folders
photos/1.png, photos/metadata.jsonl            a metadata file lists the images and describes them
"""

import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..labels import composed
from ..messages import first_few, printable
from ..models.images import BAD_IMAGE_ERRORS, IMAGE_FORMATS
from .built_in import import_extra
from .metadata import METADATA_FILES, read_metadata

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
    "held_out": ("held_out", "held-out", "heldout", "holdout", "hold_out"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}
SYSTEM_FOLDERS = {
    *("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin"),
    *("__macosx", "system volume information", "lost+found"),
}
SYSTEM_FILES = {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
SIDECARS = {".txt", ".json", ".xml", ".csv"}  # never opened: each of a million images may have one
NOT_IMAGES = "files that are not images in a supported format"  # why they are skipped


class ImageFiles(Sequence[dict[str, Any]]):
    """Image files as rows of a dataset: `files[row]` is `{"image": {"bytes": None, "path": path}}`.

    The paths, relative to `root`, are stored in one array: a million take little memory, and the loader's workers share
    it. `notes` say how the folder was read and which files are skipped, one sentence each.
    """

    def __init__(self, root: str, paths: Iterable[str], notes: Sequence[str] = ()):
        encoded = [os.fsencode(path) for path in paths]  # names need not be valid UTF-8
        self.root, self.notes = root, list(notes)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Sizes in bytes of the files of some rows, shape (len(rows),); 0 for a deleted file."""
        sizes = np.zeros(len(rows), dtype=np.int64)
        for i, row in enumerate(rows.tolist()):
            with suppress(OSError):
                sizes[i] = os.path.getsize(self[row]["image"]["path"])
        return sizes

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} is not in 0 to {len(self) - 1}.")
        path = os.fsdecode(self._bytes[self._ends[row] : self._ends[row + 1]].tobytes())
        return {"image": {"bytes": None, "path": os.path.join(self.root, path)}}


@dataclass
class FolderScan:
    """The contents of a folder; paths are relative to it, and sorted."""

    root: str
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)  # known by their names
    folders: list[str] = field(default_factory=list)  # that were read
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # skipped paths by reason


@dataclass
class FolderSplit:
    """One split of a folder."""

    images: ImageFiles
    labels: np.ndarray | None = None  # the class of each image from 0, shape (images,)
    names: list[str] = field(default_factory=list)  # of the classes
    why_unlabelled: str = ""  # why there are no classes, as a sentence
    metadata: Any = None  # a `pyarrow.Table` of the metadata files' other columns, one row per image


def scan_folder(root: str) -> FolderScan:
    """The images in a folder and in all folders below it, links included; an `OSError` if it cannot be read itself."""
    scan = FolderScan(root)
    real_root = os.path.realpath(root)
    # Links come last: a folder below this one is read under its own name first.
    waiting: deque[tuple[str, str, set[str]]] = deque([("", real_root, set())])
    while waiting:
        folder, real, seen = waiting.pop()
        if folder and (real in seen or Path(real_root).is_relative_to(real)):
            scan.left_out["links to folders that were already read"].append(folder)
            continue
        seen.add(real)
        try:
            with os.scandir(os.path.join(root, folder)) as iterator:
                entries = sorted(iterator, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise
            scan.left_out["folders that cannot be read"].append(f"{folder} ({error.strerror})")
            continue
        if folder:
            scan.folders.append(folder)
        for entry in entries:
            name, path, is_hidden = entry.name, os.path.join(folder, entry.name), entry.name.startswith(".")
            if _holds(entry.is_dir):
                if is_hidden or name.lower() in SYSTEM_FOLDERS:
                    scan.left_out["hidden or system folders"].append(path)
                    continue
                # Loops are detected per top folder: two classes may be links to one folder.
                seen_below = seen if folder else set()
                if entry.is_symlink():
                    waiting.appendleft((path, os.path.realpath(entry.path), seen_below))
                else:
                    waiting.append((path, os.path.join(real, name), seen_below))
            elif not _holds(entry.is_file):
                reason = "pipes, sockets or devices" if os.path.exists(entry.path) else "broken links"
                scan.left_out[reason].append(path)
            elif name.startswith("._") or name.lower() in SYSTEM_FILES:
                continue  # macOS writes ._1.png beside 1.png, which is not an image
            elif name in METADATA_FILES:
                scan.metadata.append(path)
            elif _is_image(entry.path):
                (scan.left_out["hidden images"] if is_hidden else scan.images).append(path)
            elif not is_hidden:
                scan.left_out[NOT_IMAGES].append(path)
    for paths in (scan.images, scan.metadata, scan.folders, *scan.left_out.values()):
        paths.sort()
    return scan


def read_split(
    scan: FolderScan, split: str, image_column: str | None = None, known_names: list[str] | None = None
) -> FolderSplit:
    """One split of a folder. A folder without splits is the split "train".

    Args:
        scan ([`FolderScan`]): The folder.
        split (`str`): A name of `SPLIT_WORDS`, sliced as in `datasets`.
        image_column (`str`, *optional*): See [`read_metadata`].
        known_names (`list[str]`, *optional*): The classes of the training split, the only ones allowed.

    Raises:
        `ValueError`: if there is no such split, it has no image or an unknown class, a metadata file cannot be used, or
            it is unclear whether the top folders are splits or classes.
    """
    left_out = defaultdict(list, {reason: list(paths) for reason, paths in scan.left_out.items()})
    read = {path: read_metadata(scan.root, path, image_column) for path in scan.metadata}
    listings = {path: listing for path, listing in read.items() if listing is not None}
    left_out[NOT_IMAGES] += [path for path in read if path not in listings]
    parents = {os.path.dirname(path) for path in scan.images}
    splits, notes = _find_splits(scan.root, parents, listings)

    # 1. The rows: images, or what metadata files list
    rows_of: dict[str, tuple[list[str], Any]] = {}
    for name, tops in (splits or {"train": []}).items():
        listed = [listing for path, listing in listings.items() if not tops or _top(path) in tops]
        images = [path for path in scan.images if not tops or _top(path) in tops]
        rows_of[name] = _concatenate(scan.root, listed) if listed else (images, None)
        if listed:
            left_out["images that no metadata file lists"] += sorted(set(images) - set(rows_of[name][0]))
    parts = _parse_split(split, {name: len(paths) for name, (paths, _) in rows_of.items()}, scan.root, bool(splits))
    taken_rows = [(*rows_of[name], part) for name, part in parts]
    rows, metadata = _concatenate(
        scan.root, [(paths[part], None if table is None else table[part]) for paths, table, part in taken_rows]
    )

    # 2. Skipped files
    level = 1 if splits else 0  # of the class folders
    filled = {"", *(os.sep.join(parent.split(os.sep)[:depth]) for parent in parents for depth in (1, 2))}
    left_out["folders without images"] = [
        folder
        for folder in scan.folders
        if folder.count(os.sep) <= level and folder not in filled and os.path.dirname(folder) in filled
    ]
    if splits:
        taken = {folder for name, _ in parts for folder in splits[name]}
        others = {folder for tops in splits.values() for folder in tops} - taken
        for reason, paths in left_out.items():
            left_out[reason] = [path for path in paths if path.split(os.sep)[0] not in others]
        left_out["images outside the splits"] = [path for path in scan.images if not _top(path)]
        beside = f"; other splits: {first_few(sorted(others), 9)}" if others else ""
        notes.append(f"split '{split}' is the folder {first_few(sorted(taken), 9)}{beside}")
    notes += [_describe(reason, paths) for reason, paths in left_out.items() if paths]
    if not rows:
        found = "; ".join(["no image was found", *notes])
        raise ValueError(
            f"Cannot load split '{split}' of '{printable(scan.root)}' ({found}); a folder needs one sub-folder of "
            f"images per class, in a format such as PNG, JPEG or WebP."
        )

    # 3. The classes
    part = FolderSplit(ImageFiles(os.path.abspath(scan.root), rows, notes), metadata=metadata)
    if metadata is None:
        _read_classes(part, rows, level, known_names, printable(scan.root))
    return part


def _read_classes(part: FolderSplit, paths: list[str], level: int, known_names: list[str] | None, root: str) -> None:
    """Fills in the labels, or the reason why there are none."""
    parents = [os.path.dirname(path) for path in paths]
    folder_of = {parent: (*parent.split(os.sep, level + 1), "")[level] for parent in set(parents)}
    # NFC: macOS decomposes accents, and the same name must mean the same class everywhere.
    class_of = {folder: composed(printable(folder)) for folder in set(folder_of.values()) - {""}}
    names = sorted(set(class_of.values())) if known_names is None else known_names
    unknown = sorted(set(class_of.values()) - set(names))
    outside = [path for path, parent in zip(paths, parents, strict=True) if not folder_of[parent]]
    if not class_of:
        why = (
            f"Found no class folders in '{root}'; put the images of each class, two or more, in a folder of their own, "
            f"or list them in a metadata.jsonl."
        )
    elif outside:
        beside = f"{len(outside):,}: {first_few(outside)}"
        why = (
            f"'{root}' has images beside its class folders ({beside}); move them into the folder of their class, or "
            f"elsewhere."
        )
    elif unknown:
        few = first_few(unknown)
        why = f"'{root}' has class folders that the training split lacks: {few}; add them there, or remove them here."
    elif len(names) < 2:
        hint = f", or give '{os.path.join(root, names[0])}' if its folders are the classes"
        why = (
            f"'{root}' has the single class '{names[0]}', but guidance needs two or more; add a folder of images of "
            f"another class{hint if all(parent.count(os.sep) > level for parent in folder_of) else ''}, or draw "
            f"without classes: training/train_diffusion.py --no_class_conditional."
        )
    else:
        label_of = {name: label for label, name in enumerate(names)}
        label_of_parent = {parent: label_of[class_of[folder]] for parent, folder in folder_of.items()}
        part.labels = np.array([label_of_parent[parent] for parent in parents], dtype=np.int64)
        part.names = list(names)
        return
    part.why_unlabelled = why
    if class_of and (outside or unknown):
        part.images.notes.append(f"without labels: {why.rstrip('.')}")
    elif part.images.notes:
        part.why_unlabelled += f" ({'; '.join(part.images.notes)}.)"


def _find_splits(root: str, parents: set[str], listings: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The top folders by split, none if they are classes; and a note if a class could be a split."""
    if any(not _top(path) for path in listings):
        return {}, []
    holding = {_top(path) for path in (*parents, *listings)}  # folders; images with metadata need none
    tops = sorted(({parent.split(os.sep)[0] for parent in parents} | holding) - {""})
    named = [top for top in tops if top.casefold() in SPLIT_OF_WORD]
    splits = [top for top in named if top in holding]
    others = [top for top in tops if top not in splits]
    if splits and not others:
        by_name = {name: [top for top in splits if top.casefold() in words] for name, words in SPLIT_WORDS.items()}
        return {name: found for name, found in by_name.items() if found}, []
    if splits and len(named) > 1:
        raise ValueError(
            f"It is unclear whether the folders in '{printable(root)}' are splits or classes: {first_few(splits)} "
            f"would be splits, which hold folders of images, and {first_few(others)} would not; move these elsewhere, "
            f"or give the folder of one split, such as '{printable(os.path.join(root, splits[0]))}'."
        )
    if len(tops) > 1 and named == tops:
        return {}, [f"the folders {first_few(tops)} are read as classes, since they hold images and no folders"]
    return {}, [f"'{top}' is read as a class, like {first_few(others)} beside it" for top in splits]


def _parse_split(split: str, lengths: dict[str, int], root: str, has_splits: bool) -> list[tuple[str, slice]]:
    """The name and the rows of each requested split."""
    if not set(split) & set("[+("):
        name = SPLIT_OF_WORD.get(split.casefold(), split)
        if name not in lengths:
            there = f"its splits are {', '.join(lengths)}" if has_splits else "its folders are classes, not splits"
            folder = os.path.join(root, split)
            hint = f"; give '{printable(folder)}' itself" if os.path.isdir(folder) else ""
            raise ValueError(f"Cannot load split '{split}' of '{printable(root)}': {there}{hint}.")
        return [(name, slice(None))]
    try:
        parts = import_extra("datasets").ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"Cannot load split '{split}' of '{printable(root)}' ({str(error).rstrip('.')}).") from error
    return [(part.splitname, slice(part.from_, part.to)) for part in parts]


def _concatenate(root: str, parts: Sequence[tuple[list[str], Any]]) -> tuple[list[str], Any]:
    """Paths and tables one after another; no table if one part has none."""
    paths = [path for part, _ in parts for path in part]
    tables = [table for _, table in parts]
    if any(table is None for table in tables):
        return paths, None
    import pyarrow

    try:
        return paths, pyarrow.concat_tables(tables, promote_options="default")
    except (ValueError, TypeError) as error:
        raise ValueError(f"The metadata files of '{printable(root)}' have different columns ({error}).") from error


def _describe(reason: str, paths: list[str]) -> str:
    """The skipped paths of one reason, as a sentence."""
    count = f"{len(paths):,}"
    if reason == NOT_IMAGES:
        endings = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in paths)
        count += "; " + ", ".join(f"{printable(ending)} {number:,}" for ending, number in endings.most_common(3))
    return f"skipped: {reason} ({count}): {first_few(paths)}"


def _top(path: str) -> str:
    """The top folder of a path; empty for a file at the top."""
    return path.partition(os.sep)[0] if os.sep in path else ""


def _holds(question: Callable[[], bool]) -> bool:
    """The answer of a directory entry; False for a circular link."""
    with suppress(OSError):
        return question()
    return False


def _is_image(path: str) -> bool:
    """Whether a file is an image in a supported format, by its extension or, if that says nothing, by its content."""
    ending = os.path.splitext(path)[1].lower()
    if ending in SIDECARS:
        return False
    if Image.registered_extensions().get(ending) in IMAGE_FORMATS:
        return True
    # Only formats with a signature (TGA and others have none), and not TIFF, whose signature raw photographs share.
    signed = [name for name in IMAGE_FORMATS if name in Image.OPEN and Image.OPEN[name][1] is not None]
    try:
        with Image.open(path, formats=[name for name in signed if name != "TIFF" or not ending]):
            return True
    except BAD_IMAGE_ERRORS as error:
        return isinstance(error, Image.DecompressionBombError)
