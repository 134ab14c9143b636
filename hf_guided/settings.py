"""Allowed settings of models and schedulers: one rule for each name, in whichever class."""

import inspect
import re
from collections.abc import Mapping
from typing import Annotated, Any

from .fields import MOST_SIZE, Depth, Factor, Kind, Length, NonNegativeFloat, PositiveFloat, Range, Share, Width
from .messages import spelled


def is_whole(value: Any, at_most: int = MOST_SIZE) -> bool:
    """Whether it is a whole number from 1 up to a bound; not a boolean."""
    return Kind(int, (Range(at_least=1, at_most=at_most),)).fits(value)


def whole_number(name: str, value: Any, wanted: str = "a whole number") -> int:
    """A whole number, of Python's, numpy's or torch's types, as Python's `int`.

    Anything else is a `ValueError` that says `name` and what is `wanted`, booleans and floats such as 2.0 included.
    """
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{name}: {spelled(number)} ({type(number).__name__}) is not {wanted}.")
    return number


def is_number(value: Any) -> bool:
    """Whether it is a finite number; not a boolean."""
    return Kind(float).fits(value)


# The type and range of a setting; a tuple allows any of several
RULES: dict[str, Any] = {
    "sample_size": (Width, Annotated[list[Width], Length(2, 2)]),  # side, or height and width, in pixels
    **dict.fromkeys(("in_channels", "out_channels", "image_channels", "low_res_channels"), Width),
    **dict.fromkeys(("model_channels", "hidden_channels", "latent_dim", "low_res_size"), Width),
    **dict.fromkeys(("num_heads", "num_heads_upsample", "attention_head_dim"), Width),
    "channel_mult": Annotated[list[Factor], Length(1, 16)],  # of each level
    "attention_resolutions": Annotated[list[Width], Length(0, 1000)],  # sides in pixels
    **dict.fromkeys(("num_res_blocks", "num_blocks"), Depth),
    "num_levels": Annotated[int, Range(at_least=1, at_most=16)],
    "num_class_embeds": Annotated[int, Range(at_least=1, at_most=10**7)],
    "num_train_timesteps": Annotated[int, Range(at_least=1, at_most=10**6)],
    "dropout": Share,
    "decoder_variance": PositiveFloat,
    "dequantization_width": NonNegativeFloat,
    **dict.fromkeys(("conv_resample", "resblock_updown", "use_scale_shift_norm", "null_class_label"), bool),
    **dict.fromkeys(("clip_sample", "rescale_timesteps"), bool),
    "trained_betas": Annotated[list[Annotated[float, Range(above=0, below=1)]], Length(1, 10**6)],
}
MEANINGS = {
    "sample_size": " (the side, or height and width, in pixels)",
    "channel_mult": ", one for each level",
    "attention_resolutions": ", sides in pixels",
    "trained_betas": ", one for each timestep",
}


def check_settings(owner: type, values: Mapping[str, Any]) -> None:
    """Refuses, by a `ValueError`, the first setting of a class that [`RULES`] do not allow; those without are ignored.

    `None` is allowed where it is the default.
    """
    parameters = inspect.signature(owner).parameters
    for name, value in values.items():
        if name not in RULES or not (name in parameters or hasattr(owner, name)):
            continue
        default = parameters[name].default if name in parameters else getattr(owner, name)
        rule = RULES[name]
        kinds = [Kind.of(hint) for hint in (rule if isinstance(rule, tuple) else [rule])]
        if not (default is None if value is None else any(kind.fits(value) for kind in kinds)):
            raise ValueError(
                f"{name}={spelled(value)} is not allowed in the config of {owner.__name__}; give "
                f"{', or '.join(f'{kind}{kind.hint(value)}' for kind in kinds)}{MEANINGS.get(name, '')}"
                f"{', or null' * (default is None)}."
            )


def check_names(id2label: Any, num_classes: int | None, whole: bool = False) -> None:
    """Refuses, by a `ValueError`, class names that are not a mapping from ids to texts.

    Args:
        id2label: Class names by id, whole numbers, or strings of them as in JSON.
        num_classes (`int`, *optional*): Ids lie below it.
        whole (`bool`, defaults to `False`): Every id from 0 up must have a name.
    """
    wanted = 'give the names of the classes by id, such as {"0": "cat", "1": "dog"}'
    if not isinstance(id2label, Mapping):
        raise ValueError(f"id2label={spelled(id2label)} is not a mapping; {wanted}.")
    ids = set()
    for label, name in id2label.items():
        if not re.fullmatch("[0-9]{1,9}", str(label)) or int(label) in ids:
            raise ValueError(f"id2label has the id {spelled(label)}, no whole number or a repeated one; {wanted}.")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"id2label names class {label} {spelled(name)}, which is not a string; {wanted}.")
        ids.add(int(label))
    if num_classes is not None and ids and max(ids) >= num_classes:
        raise ValueError(f"id2label has the id {max(ids)}; the ids of {num_classes} classes end at {num_classes - 1}.")
    if whole and ids != set(range(len(ids))):
        raise ValueError(f"id2label must name every id from 0 to {len(ids) - 1} once; its ids are {sorted(ids)[:10]}.")
