"""Files that are whole or not there at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Lends a temporary name beside a file, which takes the file's place at the end and is removed after an error.

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
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Any, path: str | os.PathLike) -> None:
    """Writes JSON that people can read."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
