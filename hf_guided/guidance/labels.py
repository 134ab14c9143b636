"""Which of a classifier's classes is which of the pipeline's."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .base import Pipeline


def match_labels(pipeline: Pipeline, classifier: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """The classifier's ids of the pipeline's class ids: by name if both name their classes, by id otherwise.

    Args:
        pipeline ([`ClassifierGuidedPipeline`]): Whose `id2label` names the labels.
        classifier (`PreTrainedModel`): Whose `config.id2label` names its outputs.
        labels (`torch.Tensor` of shape `(batch,)`): Class ids of the pipeline.

    Raises:
        `ValueError`: For a class that the classifier does not know, or does not know by one name.
    """
    ours = {label: name for label, name in pipeline.id2label.items() if name != f"LABEL_{label}"}
    theirs = {int(label): name for label, name in classifier.config.id2label.items() if name != f"LABEL_{int(label)}"}
    if not ours or not theirs or ours == theirs:
        if pipeline.num_classes != classifier.config.num_labels:
            raise ValueError(
                f"The classifier knows {classifier.config.num_labels} classes and the UNet {pipeline.num_classes}, and "
                f"they have no names to match them by; give both an id2label, or take models of the same classes."
            )
        return labels

    def ids_of(name: str, spell: Callable[[str], set[str]]) -> set[int]:
        return {label for label, other in theirs.items() if spell(name) & spell(other)}

    def match(label: int) -> int | None:
        name = ours.get(label, "")
        if theirs.get(label) == name:
            return label
        candidates = ids_of(name, lambda name: {name.strip().casefold()}) or ids_of(name, spellings)
        return candidates.pop() if len(candidates) == 1 else None

    matched = {label: match(label) for label in set(labels.tolist())}
    unmatched = [repr(ours.get(label, str(label))) for label, match in sorted(matched.items()) if match is None]
    unmatched = list(dict.fromkeys(unmatched))
    if unmatched:
        more = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
        raise ValueError(
            f"The classifier {type(classifier).__name__} has no class of the name {', '.join(unmatched[:3])}{more}, or "
            f"several; rename them in its config.id2label, or guide by a classifier of the same classes."
        )
    return torch.tensor([matched[label] for label in labels.tolist()], device=labels.device)


def spellings(name: str) -> set[str]:
    """A class name as it stands and each of its synonyms, which commas part; case does not matter."""
    return {spelling.strip().casefold() for spelling in {name, *name.split(",")}}
