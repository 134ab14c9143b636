"""Merging a user's edits of a model card into the next generated card.

A generated card ends in a comment with a digest of each of its sections and of each key of its metadata. A section
whose digest differs was edited, one that is missing was removed, one without a digest was added: these edits are kept.
All other sections are generated again.
"""

import hashlib
import json
import re
from contextlib import suppress
from itertools import pairwise
from typing import Any

import yaml
from huggingface_hub.utils import yaml_dump

from .markdown import CODE_BLOCK

_PARTS = ("metadata", "sections")
_RECORD = re.compile(r"(?m)^<!-- hf-guided: (.*) -->[ \t]*$")
_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)
_HEADING_OR_CODE = re.compile(rf"^##? .*$|{CODE_BLOCK}", re.MULTILINE)


Parts = dict[str, dict[str, Any]]  # "metadata" by key and "sections" by heading: contents, or digests of both


def sign(card: str) -> str:
    """The card with a final comment of digests of its sections and metadata."""
    parts, _ = _read(card)
    # By the digests of the names, which replacing a word throughout the card cannot change.
    record = {part: {_digest(name): _digest(entries[name]) for name in entries} for part, entries in parts.items()}
    return _write(parts, record)


def merge(edited: str, generated: str) -> str:
    """The newer, signed card with a user's edits of the older one; exactly the newer one if there are none.

    Raises a `ValueError` if the metadata of `edited` are not valid YAML.
    """
    old, record = _read(edited)
    new, new_record = _read(generated)
    merged = {part: _merge(old[part], new[part], record.get(part, {})) for part in new}
    if all(list(merged[part].items()) == list(new[part].items()) for part in new):  # in the same order, too
        return generated
    return _write(merged, new_record)


def _merge(old: dict[str, Any], new: dict[str, Any], record: dict[str, str]) -> dict[str, Any]:
    """The entries that the user edited or added, in their order, merged with the new ones that were not removed."""

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


def _read(card: str) -> tuple[Parts, Parts]:
    """The metadata and the text of each section under its heading, and the digests of what was generated."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    record: Any = {}
    if records := [*_RECORD.finditer(card)]:
        last = records[-1]  # any before it is the user's text
        card = card[: last.start()].rstrip() + card[last.end() :]
        with suppress(ValueError, RecursionError):  # an edited comment: everything counts as the user's
            record = json.loads(last[1])
        if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in _PARTS):
            record = {}
    data: Any = {}
    if match := _FRONT_MATTER.match(card):
        try:
            data = yaml.safe_load(match[1] or "") or {}
        except (yaml.YAMLError, ValueError) as error:  # the latter for an impossible date
            raise ValueError(f"README.md has metadata that are not valid YAML: {error}") from error
        if not isinstance(data, dict):
            raise ValueError("README.md has metadata that are not a mapping of names to values.")
        card = card[match.end() :]
    # A heading in code matches as code.
    starts = [(match.start(), match[0].strip()) for match in _HEADING_OR_CODE.finditer(card) if match[0][0] == "#"]
    sections: dict[str, str] = {}
    for (start, heading), (end, _) in pairwise([(0, ""), *starts, (len(card), "")]):
        while heading in sections:  # two sections with the same name
            heading += " "
        sections[heading] = card[start:end].strip()
    if not sections[""]:
        del sections[""]
    return {"metadata": data, "sections": sections}, record


def _write(parts: Parts, record: Parts) -> str:
    data, sections = parts["metadata"], parts["sections"]
    front_matter = f"---\n{yaml_dump(data, sort_keys=False)}---\n\n" if data else ""
    comment = f"\n\n<!-- hf-guided: {json.dumps(record)} -->" if record else ""
    return front_matter + "\n\n".join(text for text in sections.values() if text) + comment + "\n"
