"""Flags that several commands share, and types of arguments for argparse."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def number_between(low: int, high: int) -> Callable[[str], int]:
    """A whole number in a range, for argparse."""

    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} does not lie between {low:,} and {high:,}")
        return int(text)

    return number


count = number_between(1, 10**9)
PIPELINE = "a pipeline's folder, or its name on the Hub"
FLAGS: dict[str, dict[str, Any]] = {
    "guidance_scale": {"type": float, "metavar": "S", "help": "default: the pipeline's own"},
    "num_inference_steps": {"type": count, "metavar": "N", "help": "default: the pipeline's own"},
    "respacing": {"metavar": "R", "help": 'instead: published timesteps, such as "250" or "ddim25"'},
    "truncation": {"type": float, "metavar": "T", "help": "of a GAN: latents between -T and T"},
    "temperature": {"type": float, "metavar": "T", "help": "of a VAE or flow: the latents' spread"},
    "condition_unet": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "condition the UNet on the class, or leave the class to the guidance; default: condition it",
    },
    "features": {
        "nargs": "+",
        "default": ["inception"],
        "metavar": "MODEL",
        "help": "what images are measured in: inception, or a model's folder or name on the Hub; NAME=MODEL names it; "
        "default: inception",
    },
    "labels": {"nargs": "+", "metavar": "LABEL", "help": "of samples, as for sample; default: all"},
    "num_images": {"type": count, "metavar": "N"},
    "batch_size": {"type": count, "default": 64, "metavar": "N", "help": "images at once; default: %(default)s"},
    "compile": {"action": "store_true", "help": "compile the models first: worth it for many batches"},
    "num_workers": {
        "type": number_between(0, 1024),
        "default": 0,
        "metavar": "N",
        "help": "processes that decode images",
    },
    "no_cache": {"action": "store_true", "help": "compute the features of real images again"},
    "seed": {"type": number_between(0, 2**63 - 1), "default": 0, "help": "of the noise; default: 0"},
    "output": {"metavar": "FOLDER", "help": "default: %(default)s"},
    "hub_private": {"action": "store_true", "help": "make a new repository private"},
    "hub_token": {
        "metavar": "TOKEN",
        "help": "default: that of `hf auth login`, or HF_TOKEN; prefer those, for the machine's list of processes "
        "shows a flag to everybody on it",
    },
}
# Flags that go to the pipeline by the same name.
STEPS = ("guidance_scale", "num_inference_steps", "respacing")
LATENTS = ("truncation", "temperature")
# What the commands that measure samples share.
MEASURING = ("features", "labels", "condition_unet", "batch_size", "compile", "num_workers", "no_cache")


def add_flags(parser: argparse.ArgumentParser, *names: str, **settings: Any) -> None:
    """Adds shared flags; `settings`, such as another default or help, are those of argparse for each of them."""
    for name in names:
        parser.add_argument(f"--{name}", **{**FLAGS[name], **settings})


def parse_numbers(flag: str, text: str) -> list[Any]:
    """Whole numbers from 0 up, of a list such as `"25,50"`."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"{flag} {text} are no whole numbers; give some as 25,50.")
    numbers = [int(part) for part in text.split(",")]
    if max(numbers) >= 2**63:
        raise ValueError(f"{flag} {text}: the numbers must lie below 2**63; give smaller ones.")
    return numbers


def shown_name(model: str) -> str:
    """What a model is called: its name on the Hub, or the part of its folder's path that says something."""
    if not Path(model).exists():
        return model
    return next(part for part in reversed(Path(model).absolute().parts) if part not in ("pipeline", "model"))


def saved_message(what: str, output: str, is_new: bool) -> str:
    """What a command says that has made a file, or found the one of an earlier run."""
    return f"Saved {what} as {output}" if is_new else f"{output} is there already, made by the same command"
