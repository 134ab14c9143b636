"""Escaping of names and values for Markdown pages, so that they are shown as they are."""

import re
import unicodedata
from urllib.parse import quote

CODE_BLOCK = r"^```[^`\n]*\n(?s:.*?)(?:^```|\Z)"  # a fenced one, with `re.MULTILINE`
_SPECIAL = re.compile(
    r"[\\`*\[\]<~$]"
    r"|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])"  # not markup within a word
    r"|&(?=#?\w+;)"
    r"|(?<!\S)#"
    r"|\A>|\A[-+=](?=[\s=-])"
)
_NUMBERED = re.compile(r"\A(\d{1,9})([.)])(?=\s|\Z)")
_JOINERS = "\u200c\u200d"  # of emoji, and of Persian and Indic letters


def single_line(text: str, length: int = 1000) -> str:
    """One line of at most `length` characters; longer text ends in `"…"`.

    White space becomes a space. Control characters, among them those that change the direction of text, and invalid
    characters become U+FFFD.
    """

    def is_shown(char: str) -> bool:
        return char in _JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs")

    line = "".join(char if is_shown(char) else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return line if len(line) <= length else line[: length - 1] + "…"


def escape(text: str) -> str:
    """Escaped text of a paragraph, heading or list item, on one line; in a table, escape its bars too."""
    return _NUMBERED.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", single_line(text)))


def code_span(text: str) -> str:
    """Text as inline code, of at most 100 characters."""
    text = single_line(text, length=100) or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def link_to_hub(repo_id: str) -> str:
    """A link to a model on the Hub."""
    return f"[{escape(repo_id)}](https://huggingface.co/{quote(single_line(repo_id))})"
