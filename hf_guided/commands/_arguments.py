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
seed = number_between(0, 2**63 - 1)
port = number_between(1, 65535)
workers = number_between(0, 1024)


# Flags that go to the pipeline by the same name.
STEPS = ("guidance_scale", "num_inference_steps", "respacing")
LATENTS = ("truncation", "temperature")


def parse_numbers(flag: str, text: str) -> list[Any]:
    """Whole numbers from 0 up, of a list such as `"25,50"`."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"{flag} {text} are no whole numbers; give some as 25,50.")
    numbers = [int(part) for part in text.split(",")]
    if max(numbers) >= 2**63:
        raise ValueError(f"{flag} {text}: the numbers must lie below 2**63; give smaller ones.")
    return numbers


def add_steps(parser: argparse.ArgumentParser) -> None:
    """The flags of guided denoising; a pipeline's saved defaults stand where they are left out."""
    parser.add_argument("--guidance_scale", type=float, metavar="S", help="default: the pipeline's own")
    parser.add_argument("--num_inference_steps", type=count, metavar="N", help="default: the pipeline's own")
    parser.add_argument("--respacing", metavar="R", help='instead: published timesteps, such as "250" or "ddim25"')


def add_latents(parser: argparse.ArgumentParser) -> None:
    """The flags of the families that make an image from a latent in one pass."""
    parser.add_argument("--truncation", type=float, metavar="T", help="of a GAN: latents between -T and T")
    parser.add_argument("--temperature", type=float, metavar="T", help="of a VAE or flow: the latents' spread")


def add_condition_unet(parser: argparse.ArgumentParser) -> None:
    """Whether the UNet is class-conditional."""
    parser.add_argument(
        "--condition_unet",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="condition the UNet on the class, or leave the class to the guidance; default: condition it",
    )


def add_compile(parser: argparse.ArgumentParser) -> None:
    """The switch that sampling and measuring commands share."""
    parser.add_argument("--compile", action="store_true", help="compile the models first: worth it for many batches")


def add_batch_size(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The batch size; its default is the command's own."""
    parser.add_argument(
        "--batch_size", type=count, default=batch_size, metavar="N", help="images at once; default: %(default)s"
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """The seed of all images together."""
    parser.add_argument("--seed", type=seed, default=0, help="of the noise; default: 0")


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """The flags that measuring commands share."""
    parser.add_argument(
        "--features",
        nargs="+",
        default=["inception"],
        metavar="MODEL",
        help="what images are measured in: inception, or a model's folder or name on the Hub; NAME=MODEL names it; "
        "default: inception",
    )
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="of samples, as for sample; default: all")
    add_condition_unet(parser)
    add_batch_size(parser, 64)
    add_compile(parser)
    parser.add_argument("--num_workers", type=workers, default=0, metavar="N", help="processes that decode images")
    parser.add_argument("--no_cache", action="store_true", help="compute the features of real images again")


def add_token(parser: argparse.ArgumentParser) -> None:
    """The token of the commands that push."""
    parser.add_argument(
        "--hub_token",
        metavar="TOKEN",
        help="default: that of `hf auth login`, or HF_TOKEN; prefer those, for the machine's list of processes shows a "
        "flag to everybody on it",
    )


def shown_name(model: str) -> str:
    """What a model is called: its name on the Hub, or the part of its folder's path that says something."""
    if not Path(model).exists():
        return model
    return next(part for part in reversed(Path(model).absolute().parts) if part not in ("pipeline", "model"))
