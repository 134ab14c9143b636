"""Which of a classifier's classes is which of the pipeline's."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .base import Pipeline


def match_labels(pipeline: Pipeline, classifier: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """The classifier's ids of the pipeline's class ids, see [`match_classes`].

    Args:
        pipeline ([`ClassifierGuidedPipeline`]): Whose `id2label` names the labels.
        classifier (`PreTrainedModel`): Whose `config.id2label` names its outputs.
        labels (`torch.Tensor` of shape `(batch,)`): Class ids of the pipeline.

    Raises:
        `ValueError`: For a class that the classifier does not know, or does not know by one name.
    """
    theirs = {int(label): name for label, name in classifier.config.id2label.items()}
    ours = {label: pipeline.id2label.get(label, f"LABEL_{label}") for label in range(pipeline.num_classes or 0)}
    matched = match_classes(ours, theirs, set(labels.tolist()), type(classifier).__name__)
    return torch.tensor([matched[label] for label in labels.tolist()], device=labels.device)


def match_classes(ours: dict[int, str], theirs: dict[int, str], wanted: set[int], classifier: str) -> dict[int, int]:
    """A classifier's id of each class id: by name if both name their classes, by id otherwise.

    Args:
        ours (`dict[int, str]`): Names of the classes by id; `LABEL_0` and the like, as transformers fills in, are none.
        theirs (`dict[int, str]`): Those of the classifier's outputs.
        wanted (`set[int]`): The ids of ours to match.
        classifier (`str`): What the classifier is called in errors.

    Raises:
        `ValueError`: For a class that the classifier does not know, or does not know by one name.
    """
    our_names, their_names = (
        {label: name for label, name in names.items() if name != f"LABEL_{label}"} for names in (ours, theirs)
    )
    if not our_names or not their_names or our_names == their_names:
        if len(ours) != len(theirs):
            raise ValueError(
                f"The classifier knows {len(theirs)} classes and the UNet {len(ours)}, and "
                f"they have no names to match them by; give both an id2label, or take models of the same classes."
            )
        return {label: label for label in wanted}

    def ids_of(name: str, spell: Callable[[str], set[str]]) -> set[int]:
        return {label for label, other in their_names.items() if spell(name) & spell(other)}

    def match(label: int) -> int | None:
        name = our_names.get(label, "")
        if their_names.get(label) == name:
            return label
        candidates = ids_of(name, lambda name: {name.strip().casefold()}) or ids_of(name, spellings)
        return candidates.pop() if len(candidates) == 1 else None

    matched = {label: match(label) for label in wanted}
    unmatched = [repr(our_names.get(label, str(label))) for label, match in sorted(matched.items()) if match is None]
    unmatched = list(dict.fromkeys(unmatched))
    if unmatched:
        more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
        raise ValueError(
            f"The classifier {classifier} has no class of the name {', '.join(unmatched[:3])}{more}, or "
            f"several; rename them in its config.id2label, or take a classifier of the same classes."
        )
    return {label: match for label, match in matched.items() if match is not None}


def spellings(name: str) -> set[str]:
    """A class name as it stands and each of its synonyms, which commas part; case does not matter."""
    return {spelling.strip().casefold() for spelling in {name, *name.split(",")}}
