"""Noise schedules, and the timesteps that sampling uses."""

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ..settings import whole_number


def make_betas(beta_schedule: str, num_train_timesteps: int) -> np.ndarray:
    """The variances (beta) of the noise that the steps of the forward process add, float64 of that length.

    Args:
        beta_schedule (`str`): `"linear"`, from 1e-4 to 0.02 at 1,000 steps (DDPM, arXiv 2006.11239, section 4) and
            scaled by `1000 / num_train_timesteps` for other numbers of steps; or `"squaredcos_cap_v2"`, the cosine
            schedule of Improved DDPM (arXiv 2102.09672, equation 17).
        num_train_timesteps (`int`): Number of steps.

    Raises:
        `ValueError`: For another schedule, or so few steps that a linear beta reaches 1.
    """
    if not isinstance(beta_schedule, str) or beta_schedule not in SCHEDULES:
        raise ValueError(f"beta_schedule={beta_schedule!r} is not one of {', '.join(map(repr, SCHEDULES))}.")
    return SCHEDULES[beta_schedule](num_train_timesteps)


def _linear(num_train_timesteps: int) -> np.ndarray:
    scale = 1000 / num_train_timesteps
    if scale * 0.02 >= 1:
        raise ValueError(
            f"The linear schedule has no {num_train_timesteps} steps: its last beta would be {scale * 0.02:g}, and "
            f"betas stay below 1. Use 21 steps or more, or beta_schedule='squaredcos_cap_v2'."
        )
    return np.linspace(scale * 0.0001, scale * 0.02, num_train_timesteps, dtype=np.float64)


def _cosine(num_train_timesteps: int) -> np.ndarray:
    times = np.arange(num_train_timesteps + 1) / num_train_timesteps
    alpha_bar = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


# The betas of each schedule, by its name.
SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"linear": _linear, "squaredcos_cap_v2": _cosine}


def space_timesteps(num_train_timesteps: int, respacing: str) -> list[int]:
    """The timesteps that a respacing keeps, ascending (Improved DDPM, section 4; ADM, appendix on sampling).

    Args:
        num_train_timesteps (`int`): Number of timesteps of the training schedule.
        respacing (`str`): OpenAI's notation. `"250"`: that many, evenly spaced from first to last. `"90,60,60,20,20"`:
            the schedule in sections of equal length (the least noisy first), that many evenly spaced in each.
            `"ddim25"`: that many at a constant integer stride from 0 (DDIM).

    Raises:
        `ValueError`: If the notation is not one of these, or asks for more timesteps than there are.
    """
    counts = respacing_counts(respacing)
    if respacing.startswith("ddim"):
        (wanted,) = counts
        for stride in range(1, num_train_timesteps + 1):
            kept = range(0, num_train_timesteps, stride)
            if len(kept) == wanted:
                return list(kept)
        raise ValueError(
            f"respacing={respacing!r}: no integer stride over {num_train_timesteps} timesteps keeps exactly {wanted} "
            f"of them; try another number, or '{wanted}' without 'ddim'."
        )

    timesteps: list[int] = []
    for section, count in zip(np.array_split(np.arange(num_train_timesteps), len(counts)), counts, strict=True):
        if count > len(section):
            raise ValueError(
                f"respacing={respacing!r} asks for {count} timesteps of a section that has {len(section)}; "
                f"all {len(counts)} sections together have {num_train_timesteps}."
            )
        spacing = (len(section) - 1) / (count - 1) if count > 1 else 1.0
        positions = accumulate([spacing] * (count - 1), initial=0.0)  # summed, as the published code rounds
        timesteps += [int(section[round(position)]) for position in positions]
    return sorted(set(timesteps))


def respacing_counts(respacing: Any) -> list[int]:
    """Numbers of steps in OpenAI's notation; anything else is a `ValueError`."""
    if not isinstance(respacing, str):
        raise ValueError(f"respacing={respacing!r} is not a string; write respacing='25', or num_inference_steps=25.")
    counts = respacing.removeprefix("ddim").split(",", maxsplit=0 if respacing.startswith("ddim") else -1)
    if not all(count.strip().isdecimal() and len(count) < 20 and int(count) > 0 for count in counts):
        raise ValueError(
            f"respacing={respacing!r} is not understood; write a number of steps ('250'), one for each section "
            f"('90,60,60,20,20'), or 'ddim' and a number ('ddim25')."
        )
    return [int(count) for count in counts]


def check_timesteps(timesteps: Any, num_train_timesteps: int) -> list[int]:
    """Timesteps in a list, array or tensor, descending as sampling uses them; anything else is a `ValueError`."""
    values = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"timesteps: {values!r} ({type(values).__name__}) is not a list of whole numbers.")
    timesteps = [whole_number("timesteps", value) for value in values]
    if not timesteps or any(a <= b for a, b in pairwise(timesteps)):
        raise ValueError(f"timesteps must be given in descending order without repeats; got {timesteps}.")
    if timesteps[0] >= num_train_timesteps or timesteps[-1] < 0:
        raise ValueError(
            f"timesteps must lie between 0 and {num_train_timesteps - 1}; got {timesteps[0]} to {timesteps[-1]}."
        )
    return timesteps
