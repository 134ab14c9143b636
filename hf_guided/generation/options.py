"""What a command asks of a pipeline: the classes to sample, and the arguments that the pipeline supports."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ..families import family_of
from ..processes import print_once
from .samples import NO_CLASS
from .sampling import sample_labels


def labels_to_sample(
    pipeline: Any,
    labels: Sequence[str] | None,
    *,
    default: str | Sequence[int],
    num_images: int | None = None,
    num_images_per_label: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """The class of each image to sample, `(n,)`; [`NO_CLASS`] for each of an unconditional pipeline.

    Args:
        pipeline ([`ClassConditionalPipeline`]): Makes the images.
        labels (`Sequence[str]`, *optional*): Ids and names, or one word: `"all"` or `"uniform"`.
        default (`str` or `Sequence[int]`): What to take if there are none, as for [`sample_labels`].
        num_images, num_images_per_label (`int`, *optional*): Images in all, or of each class; 8 of each by default.
        seed (`int`, defaults to 0): Seed of all images together.

    Raises:
        `ValueError`: For labels that the pipeline does not have, or if it is not said how many uniform ones to draw.
    """
    per_label = num_images_per_label or 8
    if pipeline.num_classes is None:
        if labels is not None:
            raise ValueError("--labels were given, but this pipeline has no classes; leave them out.")
        return torch.tensor(NO_CLASS).expand(num_images or per_label)
    which: Any = default
    if labels is not None:
        is_word = list(labels) in (["uniform"], ["all"])
        which = labels[0] if is_word else class_ids(pipeline, labels)
        if is_word and which in pipeline.id2label.values():
            raise ValueError(f"--labels {which} might mean the class of that name too; give the ids of classes.")
    if which == "uniform" and num_images is None:
        raise ValueError("Say how many samples to draw of all classes together: --num_images 50000.")
    count = num_images or per_label * (pipeline.num_classes if which == "all" else len(which))
    return sample_labels(which, count, pipeline.num_classes, seed)


def class_ids(pipeline: Any, labels: Sequence[str]) -> list[int]:
    """Class ids of labels; prints where a number is a name and not the id."""
    ids = pipeline.resolve_labels(labels).tolist()
    named = {label: i for label, i in zip(labels, ids, strict=True) if label.isdecimal() and int(label) != i}
    if named:
        listed = ", ".join(f"{name} has id {i}" for name, i in named.items())
        print_once(f"Note: numbers are taken for class names: {listed}")
    return ids


def pipeline_arguments(pipeline: Any, **given: Any) -> dict[str, Any]:
    """Those of some arguments that this pipeline takes; one that is given (not `None` or `True`) and that it does not
    support is a `ValueError`."""
    kind = type(pipeline)
    known = {*inspect.signature(kind.__call__).parameters, family_of(kind.__name__).trade_off}
    for name, value in given.items():
        if name not in known and value is not None and value is not True:
            raise ValueError(f"A {kind.__name__} does not support --{name}; leave it out.")
    return {name: value for name, value in given.items() if name in known}


def check_compile(pipeline: Any, compile: bool) -> None:
    """Refuses to compile a pipeline that has nothing to compile."""
    if compile and not hasattr(pipeline, "compile"):
        raise ValueError(f"A {type(pipeline).__name__} makes its images in one pass; leave --compile out.")
