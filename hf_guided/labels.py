"""Class names: resolving, suggesting, matching between models, making unique."""

import difflib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from .messages import first_few, spelled
from .settings import whole_number


def composed(name: str) -> str:
    """A name in Unicode's composed form, in which "é" is one letter, for comparison."""
    return unicodedata.normalize("NFC", name)


def caseless(name: str) -> str:
    """A class name without case and surrounding spaces, for comparison where no exact match exists."""
    return composed(unicodedata.normalize("NFD", name).casefold()).strip()


def spellings(name: str) -> set[str]:
    """A class name and each of its comma-separated synonyms, without case."""
    return {spelling for part in (name, *name.split(",")) if (spelling := caseless(part))}


def resolve_labels(class_labels: Any, id2label: Mapping[int, str], num_classes: int) -> list[int]:
    """Class ids from ids or names, one or several.

    A string that is a class name means that class. Other strings of digits are ids, unless numbers are the names of
    classes with other ids: then a number that is no name is refused as ambiguous.

    Args:
        class_labels (`int`, `str`, a list, array or tensor of them): Integers of any type are ids.
        id2label (`Mapping[int, str]`): Class names by id; may be empty.
        num_classes (`int`): Number of classes.

    Raises:
        `ValueError`: For other types, floats and booleans included; for an empty list; for unknown ids and names.
    """
    if hasattr(class_labels, "tolist"):  # tensors and arrays
        class_labels = class_labels.tolist()
    if isinstance(class_labels, bytes | bytearray | Mapping | AbstractSet):
        raise ValueError(
            f"class_labels is a {type(class_labels).__name__}, {spelled(class_labels)}; give ids (whole numbers) or "
            f"names, one or a list."
        )
    is_one = isinstance(class_labels, str) or not isinstance(class_labels, Iterable)
    given = [class_labels] if is_one else list(class_labels)
    words = {label for label in given if isinstance(label, str)}
    ids_of = {word: _id_of_word(word, id2label, num_classes) for word in words}
    wanted = "an id (a whole number, such as 2) or the name of a class"
    ids = [ids_of[label] if isinstance(label, str) else whole_number("class_labels", label, wanted) for label in given]
    unknown = [label for label in ids if not 0 <= label < num_classes]
    if unknown or not ids:
        raise ValueError(
            f"class_labels {spelled(unknown)} are not among the ids of the {num_classes} classes, 0 to "
            f"{num_classes - 1}."
        )
    return ids


def id_of_name(name: str, id2label: Mapping[int, str]) -> int:
    """The id of a class name: the exact match, else one without case, else one with it as a synonym.

    Raises:
        `ValueError`: For an unknown name (the message suggests the nearest), or an ambiguous one.
    """
    ids = _ids_of_name(name, id2label)
    if len(ids) > 1:
        listed = ", ".join(f"{label} ({id2label[label]})" for label in ids)
        raise ValueError(f"The class name {name!r} belongs to several ids: {listed}. Give the id.")
    if not ids:
        raise ValueError(f"There is no class named {name!r}; {_nearest(name, id2label)}.")
    return ids[0]


def unique_names(names: Sequence[str]) -> list[str]:
    """Unique class names, in order of ids; equal names, such as ImageNet's two cranes, get their id appended."""
    unique = list(names)
    while repeated := {name for name, count in Counter(map(composed, unique)).items() if count > 1}:
        unique = [f"{name} ({label})" if composed(name) in repeated else name for label, name in enumerate(unique)]
    return unique


def match_labels(pipeline: Any, classifier: Any, labels: torch.Tensor) -> torch.Tensor:
    """Class ids of the classifier, `(batch,)`, for class ids of the pipeline, by [`match_classes`]."""
    theirs = {int(label): name for label, name in classifier.config.id2label.items()}
    ours = {label: pipeline.id2label.get(label, f"LABEL_{label}") for label in range(pipeline.num_classes or 0)}
    matched = match_classes(ours, theirs, set(labels.tolist()), type(classifier).__name__)
    return torch.tensor([matched[label] for label in labels.tolist()], device=labels.device)


def match_classes(
    ours: Mapping[int, str], theirs: Mapping[int, str], wanted: set[int], classifier: str
) -> dict[int, int]:
    """The classifier's class id for each of ours: by name if both have names, by id otherwise.

    Args:
        ours (`Mapping[int, str]`): Names of the classes by id; the defaults of transformers (`LABEL_0`) do not count.
        theirs (`Mapping[int, str]`): Those of the classifier's outputs.
        wanted (`set[int]`): The ids of ours to match.
        classifier (`str`): Name of the classifier in errors.

    Raises:
        `ValueError`: For a class that the classifier does not have, or has several times.
    """
    our_names, their_names = (
        {label: composed(name) for label, name in names.items() if name != f"LABEL_{label}"} for names in (ours, theirs)
    )
    if not our_names or not their_names or our_names == their_names:
        if len(ours) != len(theirs):
            raise ValueError(
                f"The classifier has {len(theirs)} classes and the UNet {len(ours)}, without names to match them by; "
                f"give both an id2label, or take models of the same classes."
            )
        return {label: label for label in wanted}

    matched, unmatched = {}, []
    for label in sorted(wanted):
        name = our_names.get(label, "")
        found = [label] if their_names.get(label) == name else []
        found = found or [other for other in their_names if caseless(their_names[other]) == caseless(name)]
        found = found or [other for other in their_names if spellings(their_names[other]) & spellings(name)]
        if len(found) == 1:
            matched[label] = found[0]
        else:
            unmatched.append(repr(our_names.get(label, str(label))))
    if unmatched:
        raise ValueError(
            f"The classifier {classifier} has no class named {first_few(list(dict.fromkeys(unmatched)))}, or several; "
            f"rename them in its config.id2label, or take a classifier of the same classes."
        )
    return matched


def _id_of_word(word: str, id2label: Mapping[int, str], num_classes: int) -> int:
    """The id of a class by its name or a string of digits; it may be out of range."""
    if not (word.isascii() and word.isdecimal()) or _ids_of_name(word, id2label):
        return id_of_name(word, id2label)
    for label, name in id2label.items():
        for spelling in spellings(name):
            if spelling.isdecimal() and int(spelling) != label and 0 <= int(spelling) < num_classes:
                raise ValueError(
                    f"There is no class named {word!r}; {_nearest(word, id2label)}. It is not taken as an id, because "
                    f"numbers are names here ({spelling!r} is that of class {label})."
                )
    return int(word)


def _ids_of_name(name: str, id2label: Mapping[int, str]) -> list[int]:
    for spell in (composed, lambda name: composed(name).strip(), caseless):
        if ids := [label for label, other in id2label.items() if spell(other) == spell(name)]:
            return ids
    return [label for label, other in id2label.items() if caseless(name) in spellings(other)]


def _nearest(name: str, id2label: Mapping[int, str]) -> str:
    """The nearest names, as the end of a sentence."""
    label_of = {spelling: label for label, other in id2label.items() for spelling in spellings(other)}
    near = difflib.get_close_matches(caseless(name), label_of, n=3, cutoff=0.5)
    known = [repr(id2label[label_of[spelling]]) for spelling in near]
    return f"the nearest are {', '.join(known)}" if known else "pipe.id2label lists all names"
