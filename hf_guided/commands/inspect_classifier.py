"""`hf-guided inspect-classifier`: measures a noisy classifier at each noise level: a picture, numbers, findings."""

import argparse

from ._arguments import add_flags

HELP = "measure how good a noisy classifier is, and where to guide"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a classifier's or a pipeline's folder, or its name on the Hub")
    parser.add_argument("data", help="digits, a folder with one sub-folder of images per class, or a dataset")
    parser.add_argument("--train_split", default="train", metavar="NAME", help="as it was trained; default: train")
    parser.add_argument("--validation_split", metavar="NAME", help="the split held out; default: a part of the above")
    parser.add_argument("--held_out_fraction", type=float, metavar="F", help="that part; default: training's own")
    for column in ("--image_column", "--label_column"):
        parser.add_argument(column, metavar="NAME", help="default: found by its type or usual name")
    add_flags(parser, "num_images", default=2000, help="held-out ones; default: 2000")
    add_flags(parser, "batch_size", "seed")
    parser.add_argument(
        "--output", default="inspection.png", metavar="PNG", help="numbers go beside it as .json; default: %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    """Measures a noisy classifier at each noise level: a picture, numbers, and what they mean."""
    from ..evaluation.run import run_inspection
    from ..processes import print_once

    if (found := run_inspection(**vars(args))) is not None:
        print_once(found, "", f"Saved {args.output} and its numbers as .json")
