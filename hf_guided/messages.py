"""Texts of messages: names that can be printed, lists and values cut short, one line of an error."""

import re
from collections.abc import Sequence
from typing import Any


def printable(text: str) -> str:
    """The text as one line of valid UTF-8; control characters and undecodable bytes become escapes."""

    def escape(match: re.Match) -> str:
        code = ord(match[0])
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else repr(match[0])[1:-1]

    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", escape, text)


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first names of a list, and the number of further ones."""
    rest = len(names) - count
    return ", ".join(map(printable, names[:count])) + (f" and {rest:,} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def spelled(value: Any) -> str:
    """A value as Python spells it, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
