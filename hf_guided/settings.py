"""Allowed settings of models and schedulers: one rule for each name, in whichever class."""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from .messages import spelled

# Upper bounds of a model's sizes; more is a damaged file, and would exhaust the memory
MOST_SIZE = 65_536  # channels, or pixels of a side
MOST_LAYERS = 1000  # of one kind
MOST_FACTOR = 1024  # of a width


def is_whole(value: Any, at_most: int = MOST_SIZE) -> bool:
    """Whether it is a whole number from 1 up to a bound; not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool) and 1 <= int(value) <= at_most


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
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_list(value: Any, fits: Callable[[Any], bool], shortest: int, longest: int) -> bool:
    """Whether it is a list or tuple of a length in the range, and every entry fits."""
    return isinstance(value, list | tuple) and shortest <= len(value) <= longest and all(map(fits, value))


COUNT = (f"a whole number from 1 to {MOST_SIZE}", is_whole)
REPEATS = (f"a whole number from 1 to {MOST_LAYERS}", lambda value: is_whole(value, MOST_LAYERS))
SWITCH = ("true or false", lambda value: isinstance(value, bool))
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "sample_size": (
        f"the side in pixels, a whole number from 1 to {MOST_SIZE}, or a pair [height, width]",
        lambda value: is_whole(value) or is_list(value, is_whole, 2, 2),
    ),
    **dict.fromkeys(("in_channels", "out_channels", "image_channels", "low_res_channels"), COUNT),
    **dict.fromkeys(("model_channels", "hidden_channels", "latent_dim", "low_res_size"), COUNT),
    **dict.fromkeys(("num_heads", "num_heads_upsample", "attention_head_dim"), COUNT),
    "channel_mult": (
        "a list of 1 to 16 positive numbers, one for each level",
        lambda value: is_list(value, lambda entry: is_number(entry) and 0 < entry <= MOST_FACTOR, 1, 16),
    ),
    "attention_resolutions": (
        "a list of sides in pixels, whole numbers from 1 up",
        lambda value: is_list(value, is_whole, 0, 1000),
    ),
    **dict.fromkeys(("num_res_blocks", "num_blocks"), REPEATS),
    "num_levels": ("a whole number from 1 to 16", lambda value: is_whole(value, 16)),
    "num_class_embeds": ("a whole number from 1 to 10,000,000", lambda value: is_whole(value, 10_000_000)),
    "num_train_timesteps": ("a whole number from 1 to 1,000,000", lambda value: is_whole(value, 1_000_000)),
    "dropout": ("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1),
    "decoder_variance": ("a finite number above 0", lambda value: is_number(value) and value > 0),
    "dequantization_width": ("a finite number from 0 up", lambda value: is_number(value) and value >= 0),
    **dict.fromkeys(("conv_resample", "resblock_updown", "use_scale_shift_norm", "null_class_label"), SWITCH),
    **dict.fromkeys(("clip_sample", "rescale_timesteps"), SWITCH),
    "trained_betas": (
        "a list of numbers between 0 and 1, one for each timestep",
        lambda value: is_list(value, lambda beta: is_number(beta) and 0 < beta < 1, 1, 1_000_000),
    ),
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
        expected, fits = RULES[name]
        if not (default is None if value is None else fits(value)):
            raise ValueError(
                f"{name}={spelled(value)} is not allowed in the config of {owner.__name__}; give {expected}"
                f"{' or null' * (default is None)}."
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
        text = str(label)
        if isinstance(label, bool) or not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) in ids:
            raise ValueError(
                f"id2label has the id {spelled(label)}, which is not a whole number or is repeated; {wanted}."
            )
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"id2label names class {label} {spelled(name)}, which is not a string; {wanted}.")
        ids.add(int(text))
    if num_classes is not None and ids and max(ids) >= num_classes:
        raise ValueError(f"id2label has the id {max(ids)}; the ids of {num_classes} classes end at {num_classes - 1}.")
    if whole and ids != set(range(len(ids))):
        raise ValueError(f"id2label must name every id from 0 to {len(ids) - 1} once; its ids are {sorted(ids)[:10]}.")
