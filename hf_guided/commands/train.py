"""`hf-guided train`: trains a guided generator on pictures, as `training/train.py` does, in this process."""

import argparse

HELP = "train a guided generator on your pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "hf-guided train [PICTURES] [FLAGS]"
    parser.description = (
        "PICTURES is a folder with one subfolder of pictures for each class, a dataset on the Hub, digits (default) or "
        "mnist. FLAGS are those of training/train.py: --budget 30m is the time it may take, for which everything else "
        "is planned (--dry_run shows the plan), --output_dir outputs/photos where it writes; `hf-guided train PICTURES "
        "--help` lists them all. Rerun the same command to resume."
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Trains the stages of the main job in this process, and reports on guided samples."""
    from ..data import source_argument
    from ..training import train
    from ..training.arguments import run_script

    words = args.words
    if words and not words[0].startswith("-"):
        ((flag, source),) = source_argument(words[0]).items()
        words = [f"--{flag}", source, *words[1:]]
    run_script(lambda: train.main(words))
