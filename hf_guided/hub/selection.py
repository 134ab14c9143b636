"""Selecting the files of a folder to push: those of a model repository, and those that the user adds."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import _MODULE_OF
from ..files import read_json
from ..messages import first_few
from .markdown import single_line

logger = logging.getLogger(__name__)

# Code of a standalone repository, see `write_standalone`.
CODE_FILES = {f"{module.rpartition('.')[2]}.py" for module in _MODULE_OF.values()}
_NAMES = {
    ".gitattributes", "CITATION.cff", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt",
    "README.md", "grid.png", "inspection.json", "inspection.png", "model_index.json", "openai_flags.json",
    "trade_off.png",
}  # fmt: skip
# Files of models, schedulers, processors and tokenizers, as diffusers and transformers name them.
_SAVED = {
    "adapter_config.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
    "feature_extractor_config.json", "generation_config.json", "image_processor_config.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "scheduler_config.json", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "video_preprocessor_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_PICTURES = (".avif", ".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
_SPACE = {".gitattributes", "README.md", "app.py", "packages.txt", "requirements.txt"}
COPIED = (".py", ".jinja", ".css")  # of this package, in a Space
_NAMED = 5  # names of files that are not pushed, in the log


def select_files(
    folder: str | os.PathLike, include: Sequence[str] | None = None, repo_type: str = "model"
) -> list[str]:
    """The paths of the files to push, relative to the folder. A line of the log names the others.

    Pushed are configs, safetensors and the files of processors and tokenizers, in the folder and in its components'
    folders; the model card, the pictures that it shows, licences; and the code that this package writes. A link is
    pushed if its target would be: within the folder, or in the Hub's cache that the folder is part of.

    `include` names further paths of files or folders in the folder, or patterns such as `"assets/*.csv"`, whose star
    also matches slashes. Links are followed; hidden files must be named with their dot.

    Returns:
        `list[str]`: Paths with slashes, sorted.

    Raises:
        `ValueError`: If a pattern matches no file, or `model_index.json` is damaged.
    """
    folder = Path(folder)
    is_part = _is_part_of_space if repo_type == "space" else _parts_of_model(folder)
    unmatched, chosen, left = list(include or ()), [], []
    for path in _walk(folder):
        matching = [pattern for pattern in include or () if _matches(path, pattern)]
        if matching and (folder / path).is_file():
            unmatched = [pattern for pattern in unmatched if pattern not in matching]
            chosen.append(path)
        elif is_part(path) and _is_held(folder, path, is_part):
            chosen.append(path)
        else:
            left.append(path)
    if unmatched:
        raise ValueError(
            f"--include {' '.join(unmatched)} matches no file of {folder}; give paths in it, or patterns such as "
            f"'assets/*' (hidden files with their dot)."
        )
    if left:
        names = list(dict.fromkeys(single_line(_shortest_name(path, chosen), length=100) for path in left))
        files = f"{len(left)} {'file that is' if len(left) == 1 else 'files that are'} no part of the model"
        logger.warning(f"Not pushed, {files}: {first_few(names, _NAMED)}. To push some: --include PATTERN.")
    return sorted(chosen)


def _walk(folder: Path) -> Iterator[str]:
    """All files, and links to folders, which are not followed."""
    for parent, folders, files in os.walk(folder):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in sorted([*files, *links]):
            yield Path(parent, name).relative_to(folder).as_posix()


def _matches(path: str, pattern: str) -> bool:
    if re.search(r"(\A|/)\.", path) and not re.search(r"(\A|/)\.[^/]", pattern):
        return False
    pattern = pattern.removeprefix("./").rstrip("/")
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")


def _parts_of_model(folder: Path) -> Callable[[str], bool]:
    places = {""}  # the folder, and its components' folders
    for name, value in read_saved(folder / "model_index.json").items():
        match value:
            case [str(), str()] if name[:1] != "_":
                places.add(name)
    card_file = folder / "README.md"
    card = card_file.read_text(encoding="utf-8", errors="replace") if card_file.is_file() else ""

    def is_part(path: str) -> bool:
        place, _, name = path.rpartition("/")
        if path in _NAMES:
            return True
        if re.search(r"(\A|/)\.", path):
            return False
        if name.lower().endswith(_PICTURES):  # those that the card shows
            spelled = "|".join(re.escape(spelling) for spelling in (path, quote(path)))
            return re.search(rf"(?<![\w./-])(?:\./)?(?:{spelled})(?![\w-])", card) is not None
        return place in places and (name in _SAVED or name in CODE_FILES or name.endswith(_WEIGHTS))

    return is_part


def read_saved(path: Path) -> dict[str, Any]:
    """A config that `save_pretrained` wrote; empty if there is none, a `ValueError` if it is damaged."""
    return read_json(path, fix="save the pipeline again") if path.is_file() else {}


def _is_part_of_space(path: str) -> bool:
    return path in _SPACE or (path.startswith("hf_guided/") and path.endswith(COPIED))


def _is_held(folder: Path, path: str, is_part: Callable[[str], bool]) -> bool:
    """Whether a path is a file of the folder, and not a link to a file elsewhere."""
    if not (folder / path).is_file():  # a socket, a pipe, a broken link
        return False
    root, real = folder.resolve(), (folder / path).resolve()
    if real.is_relative_to(root):
        return real == root / path or is_part(real.relative_to(root).as_posix())
    caches = [parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"]
    return any(real.is_relative_to(cache / "blobs") for cache in caches)  # as `snapshot_download` stores a repository


def _shortest_name(path: str, chosen: list[str]) -> str:
    """The topmost folder of a path without chosen files, with a slash; otherwise the path itself."""
    for slash in re.finditer("/", path):
        if not any(other.startswith(path[: slash.end()]) for other in chosen):
            return path[: slash.end()]
    return path
