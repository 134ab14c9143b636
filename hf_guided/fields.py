"""Dataclasses whose fields are flags: a field declares its type and range, and one function checks them all."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from . import settings


@dataclass(frozen=True)
class Range:
    """Allowed numbers of a field: `Annotated[float, Range(at_least=0, below=1)]`."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        words = {"at_least": "of at least", "above": "above", "at_most": "at most", "below": "below"}
        return " and ".join(f"{words[name]} {bound}" for name, bound in vars(self).items() if math.isfinite(bound))


@dataclass(frozen=True)
class Length:
    """Allowed number of entries of a list: `Annotated[list[int], Length(1, 2)]`."""

    at_least: int
    at_most: float = math.inf

    def __contains__(self, value: Sequence[Any]) -> bool:
        return self.at_least <= len(value) <= self.at_most

    def __str__(self) -> str:
        return f"{self.at_least} or {self.at_most if math.isfinite(self.at_most) else 'more'}"


MOST = 10**9  # upper bound of all counts: more has no use, and overflows

PositiveInt = Annotated[int, Range(at_least=1, at_most=MOST)]
NonNegativeInt = Annotated[int, Range(at_least=0, at_most=MOST)]
Width = Annotated[int, Range(at_least=1, at_most=settings.MOST)]  # channels, or pixels of a side
Depth = Annotated[int, Range(at_least=1, at_most=settings.MOST_LAYERS)]  # layers of one kind
Factor = Annotated[float, Range(above=0, at_most=settings.MOST_FACTOR)]  # of a width
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, below=1)]

_NOUNS = {bool: "true or false", int: "whole number", float: "finite number", str: "non-empty text"}


def flag(default: Any, help: str, choices: Sequence[Any] | None = None, repr: bool = True) -> Any:
    """A dataclass field for a flag; `repr=False` keeps its value out of messages."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata, repr=repr)
    return field(default=default, metadata=metadata, repr=repr)


@dataclass
class CheckedFields:
    """Refuses a field's value that is not of its annotated type, in its range or among its choices.

    A `Path` counts as its text.
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, PathLike):
                setattr(self, name, fspath(value))
        check_values(type(self), vars(self))


def as_flag(name: str, value: str, prefix: str = "") -> str:
    """A flag and its value as a message shows them."""
    return f"--{prefix}{name} {value}"


def check_values(owner: type, values: Mapping[str, Any], spell: Callable[[str, str], str] = as_flag) -> None:
    """Refuses the first of some fields' values that a dataclass does not allow, by a `ValueError` with what it allows.

    `spell` makes the message's text of a field and its value.
    """
    hints = get_type_hints(owner, include_extras=True)  # `field.type` loses its `None` to `HfArgumentParser`
    for f in fields(owner):
        if f.name not in values:
            continue
        value, choices = values[f.name], f.metadata.get("choices")
        if _fits(hints[f.name], value, choices):
            continue
        expected = f"one of {', '.join(map(str, choices))}" if choices else _expected(hints[f.name])
        shown = _shown(value, hints[f.name]) if f.repr else "..."
        raise ValueError(f"{spell(f.name, shown)} is not allowed; give {expected}{_hint(hints[f.name], value)}.")


def _fits(hint: Any, value: Any, choices: Sequence[Any] | None = None) -> bool:
    base, rules, is_optional = _parts(hint)
    if value is None:
        return is_optional
    if get_origin(base) is list:
        (of_entries,) = get_args(base)
        fits = isinstance(value, list | tuple) and all(_fits(of_entries, entry) for entry in value)
    elif base is str:
        fits = isinstance(value, str) and value.strip() != ""
    elif base is bool:
        fits = isinstance(value, bool)
    else:
        fits = isinstance(value, int if base is int else int | float) and not isinstance(value, bool)
        fits = fits and (base is int or abs(value) <= sys.float_info.max)  # neither nan nor infinite
    return fits and all(value in rule for rule in rules) and (choices is None or value in choices)


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """A type without `Annotated` and `| None`, the rules of the former, and whether it has the latter."""
    if get_origin(hint) is Annotated:
        base, *rules = get_args(hint)
        return base, tuple(rules), False
    if NoneType in get_args(hint):
        (inner,) = (part for part in get_args(hint) if part is not NoneType)
        return *_parts(inner)[:2], True
    return hint, (), False


def _expected(hint: Any) -> str:
    base, rules, _ = _parts(hint)
    if get_origin(base) is list:
        noun, of_entries, _ = _parts(get_args(base)[0])
        return "".join(
            [*(f"{rule} " for rule in rules), f"{_NOUNS[noun]}s", *(f", each {rule}" for rule in of_entries)]
        )
    return "".join([*([] if base is bool else ["a "]), _NOUNS[base], *(f" {rule}" for rule in rules)])


def _hint(hint: Any, value: Any) -> str:
    """A hint for a value that YAML reads as another type."""
    base, _, _ = _parts(hint)
    if get_origin(base) is list:
        if not isinstance(value, list | tuple):
            return ", as a list in square brackets"
        return "".join({_hint(get_args(base)[0], entry) for entry in value})
    if base is str:
        return "" if isinstance(value, str) else ", in quotes"
    return ", without quotes" if isinstance(value, str) else ""


def _shown(value: Any, hint: Any) -> str:
    base, _, _ = _parts(hint)
    if isinstance(value, list | tuple) and value:
        of_entries = get_args(base)[0] if get_origin(base) is list else hint
        text = " ".join(_shown(entry, of_entries) for entry in value)
    elif isinstance(value, str) and (base is not str or not value.strip()):
        text = repr(value)
    else:
        text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
