"""Lets what a user changed in a model card survive the next card that is generated.

A generated card ends in a comment that holds a digest of each of its sections and of each key of its metadata. What no
longer has its digest was edited, what is missing was removed, what never had one was added; all of it is the user's,
and stays as it is. Everything else makes way for what is generated anew.
"""

import hashlib
import json
import re
from contextlib import suppress
from itertools import pairwise
from typing import Any

import yaml
from huggingface_hub.utils import yaml_dump

_RECORD = re.compile(r"(?m)^<!-- hf-guided: (.*) -->[ \t]*$")
_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)
_HEADING = re.compile(r"(?m)^##? .*$")
CODE = re.compile(r"(?ms)^```[^`\n]*\n.*?(?:^```|\Z)")


def sign(card: str) -> str:
    """Ends a card in the digests of what it holds now."""
    data, sections, _ = _read(card)
    return _write(data, sections, {"metadata": _digests(data), "sections": _digests(sections)})


def merge(edited: str, generated: str) -> str:
    """Brings a user's edits of an older card into a newer one.

    Args:
        edited (`str`): The older card, as it is now.
        generated (`str`): The newer one, signed by [`sign`].

    Returns:
        `str`: The newer card with the edits, or, where there are none, `generated` to the byte.

    Raises:
        `ValueError`: If the metadata of `edited` is not valid YAML.
    """
    old_data, old_sections, record = _read(edited)
    new_data, new_sections, new_record = _read(generated)
    data = _merge(old_data, new_data, record.get("metadata", {}))
    sections = _merge(old_sections, new_sections, record.get("sections", {}))
    if (list(data.items()), list(sections.items())) == (list(new_data.items()), list(new_sections.items())):
        return generated
    return _write(data, sections, new_record)


def _merge(old: dict[str, Any], new: dict[str, Any], record: dict[str, str]) -> dict[str, Any]:
    """The old entries, where edited or added, in their order; between them the new ones, where not removed."""

    def is_edited(name: str) -> bool:
        return name in old and record.get(_digest(name)) != _digest(old[name])

    kept = [name for name in old if name in new or is_edited(name)]
    previous = None
    for name in new:
        if name not in old and _digest(name) not in record:
            kept.insert(0 if previous is None else kept.index(previous) + 1, name)
        if name in kept:
            previous = name
    return {name: old[name] if is_edited(name) else new[name] for name in kept}


def _digest(content: Any) -> str:
    text = content.strip() if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _digests(entries: dict[str, Any]) -> dict[str, str]:
    """By digests, too: replacing words everywhere in a card must not reach them."""
    return {_digest(name): _digest(content) for name, content in entries.items()}


def _read(card: str) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """The metadata, the text of each section under its heading, and the digests of what was generated."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    record: dict[str, Any] = {}
    if records := [*_RECORD.finditer(card)]:
        last = records[-1]  # any before it is somebody's text
        card = card[: last.start()].rstrip() + card[last.end() :]
        with suppress(ValueError, RecursionError):  # of a comment that was edited: then everything counts as the user's
            record = _parse(last[1])
    data: Any = {}
    if match := _FRONT_MATTER.match(card):
        try:
            data = yaml.safe_load(match[1] or "") or {}
        except (yaml.YAMLError, ValueError) as error:  # the latter of an impossible date
            raise ValueError(f"README.md has metadata that are not valid YAML: {error}") from error
        if not isinstance(data, dict):
            raise ValueError("README.md has metadata that are no mapping of names to values.")
        card = card[match.end() :]
    code = [match.span() for match in CODE.finditer(card)]
    starts = [
        (match.start(), match[0].strip())
        for match in _HEADING.finditer(card)
        if not any(start <= match.start() < end for start, end in code)
    ]
    sections: dict[str, str] = {}
    bounds = [(0, ""), *starts, (len(card), "")]
    for (start, heading), (end, _) in pairwise(bounds):
        while heading in sections:  # two sections of one name
            heading += " "
        sections[heading] = card[start:end].strip()
    if not sections.get(""):
        sections.pop("", None)
    return data, sections, record


def _parse(text: str) -> dict[str, dict[str, str]]:
    """The digests in a comment; a `ValueError` if it holds anything else."""
    record = json.loads(text)
    is_dict = isinstance(record, dict) and record.keys() == {"metadata", "sections"}
    if not is_dict or not all(isinstance(part, dict) for part in record.values()):
        raise ValueError("no two dicts")
    if not all(isinstance(digest, str) for part in record.values() for digest in part.values()):
        raise ValueError("no digests")
    return record


def _write(data: dict[str, Any], sections: dict[str, str], record: dict[str, Any]) -> str:
    front_matter = f"---\n{yaml_dump(data, sort_keys=False)}---\n\n" if data else ""
    comment = f"\n\n<!-- hf-guided: {json.dumps(record)} -->" if record else ""
    return front_matter + "\n\n".join(text for text in sections.values() if text) + comment + "\n"
