"""Types and ranges of settings, declared by annotations; dataclasses whose fields are flags, which they check."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from os import PathLike, fspath
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Allowed numbers: `Annotated[float, Range(at_least=0, below=1)]`."""

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
        if self.at_least == self.at_most:
            return str(self.at_least)
        if self.at_most == math.inf:
            return f"{self.at_least} or more"
        return f"{self.at_least} {'or' if self.at_most == self.at_least + 1 else 'to'} {self.at_most}"


# More than these is of no use, or a damaged file, and would exhaust the memory
MOST_COUNT = 10**9
MOST_SIZE = 65_536

PositiveInt = Annotated[int, Range(at_least=1, at_most=MOST_COUNT)]
NonNegativeInt = Annotated[int, Range(at_least=0, at_most=MOST_COUNT)]
Width = Annotated[int, Range(at_least=1, at_most=MOST_SIZE)]  # channels, or pixels of a side
Depth = Annotated[int, Range(at_least=1, at_most=1000)]  # layers of one kind
Factor = Annotated[float, Range(above=0, at_most=1024)]  # of a width
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, below=1)]


@dataclass(frozen=True)
class Kind:
    """An annotation, taken apart: of a truth value, a number, a text, or a list of these."""

    base: Any  # without `Annotated` and `| None`
    rules: tuple[Any, ...] = ()
    is_optional: bool = False
    entries: "Kind | None" = None  # of a list

    @classmethod
    def of(cls, hint: Any) -> "Kind":
        """The kind of an annotation."""
        if NoneType in get_args(hint):
            (inner,) = (part for part in get_args(hint) if part is not NoneType)
            return replace(cls.of(inner), is_optional=True)
        base, *rules = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        return cls(base, tuple(rules), entries=cls.of(*get_args(base)) if get_origin(base) is list else None)

    def fits(self, value: Any) -> bool:
        """Whether it is a value of this kind; numbers may be numpy's."""
        if value is None:
            return self.is_optional
        if self.entries is not None:
            fits = isinstance(value, list | tuple) and all(map(self.entries.fits, value))
        elif self.base is str:
            fits = isinstance(value, str) and value.strip() != ""
        elif self.base is bool:
            fits = isinstance(value, bool)
        else:
            fits = isinstance(value, Integral if self.base is int else Real) and not isinstance(value, bool)
            if fits and self.base is float:  # neither nan nor infinite, nor an integer that overflows
                fits = abs(value if isinstance(value, int) else float(value)) <= sys.float_info.max
        return fits and all(value in rule for rule in self.rules)

    def __str__(self) -> str:
        """What is allowed, in words."""
        nouns = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a non-empty text"}
        if self.entries is None:
            return " ".join([nouns[self.base], *map(str, self.rules)])
        plural = f"{nouns[self.entries.base].removeprefix('a ')}s"
        return ", each ".join([" ".join([*map(str, self.rules), plural]), *map(str, self.entries.rules)])

    def hint(self, value: Any) -> str:
        """A hint for a value that YAML reads as another type."""
        if self.entries is not None:
            if not isinstance(value, list | tuple):
                return ", as a list in square brackets"
            return "".join({self.entries.hint(entry) for entry in value})
        if isinstance(value, str) == (self.base is str):
            return ""
        return ", in quotes" if self.base is str else ", without quotes"

    def shown(self, value: Any) -> str:
        """A value as a message shows it, of at most 80 characters."""
        if isinstance(value, list | tuple) and value:
            text = " ".join(map((self.entries or self).shown, value))
        else:
            text = repr(value) if isinstance(value, str) and (self.base is not str or not value.strip()) else str(value)
        return text if len(text) <= 80 else f"{text[:77]}..."


def flag(default: Any, help: str, choices: Sequence[Any] | None = None, repr: bool = True) -> Any:
    """A dataclass field for a flag; `repr=False` keeps its value out of messages."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    given: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata=metadata, repr=repr)


@dataclass
class CheckedFields:
    """Refuses a field's value that is not of its annotated type, in its range or among its choices.

    A `Path` counts as its text.
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, PathLike):
                setattr(self, name, fspath(value))
            elif hasattr(value, "item"):  # a number of numpy, which JSON does not take
                setattr(self, name, value.item())
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
        value, choices, kind = values[f.name], f.metadata.get("choices"), Kind.of(hints[f.name])
        if kind.fits(value) and (choices is None or value is None or value in choices):
            continue
        expected = f"one of {', '.join(map(str, choices))}" if choices else kind
        shown = kind.shown(value) if f.repr else "..."
        raise ValueError(f"{spell(f.name, shown)} is not allowed; give {expected}{kind.hint(value)}.")
