"""What tests of wrong inputs share: a command is refused in one sentence, within seconds, and leaves nothing behind."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LIMIT = 10  # seconds


def contents(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def ending(start: Callable[[], Any], capsys) -> tuple[int, str]:
    """Runs a command here; its exit status, and what was said of the mistake."""
    try:
        start()
    except SystemExit as end:
        said = capsys.readouterr().err
        if isinstance(end.code, str):
            return 1, end.code
        return end.code or 0, said.strip().splitlines()[-1] if said.strip() else ""
    return 0, ""


def assert_refused(start: Callable[[], Any], place: Path, capsys) -> str:
    """Returns the sentence."""
    before, started = contents(place), time.monotonic()
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("It does not end."))
    signal.alarm(2 * LIMIT)
    try:
        status, said = ending(start, capsys)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    seconds = time.monotonic() - started
    after = contents(place)
    print(f"[{seconds:.1f} s] {status} {said}")
    assert status in (1, 2), said
    assert "error: " in said
    assert "\n" not in said.strip()
    assert "bug of hf-guided" not in said
    left = sorted(path for path in {*before, *after} if before.get(path, 0) != after.get(path, 0))
    assert not left
    assert seconds < LIMIT
    return said
