"""`hf-guided compare`: trains the families alike, or takes trained models, and draws them side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..credentials import log_to_screen
from ..families import BASELINES
from ._arguments import add_flags, parse_numbers, shown_name

PASSED_ON = ("budget", "features", "num_images", "guidance_scale", "resolution", "recipe", "batch_size")
HELP = "train a VAE, a GAN, a flow and diffusion alike, and measure them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", metavar="NAME=PIPELINE", help="instead of training: folders or names on the Hub, named"
    )
    parser.add_argument("--data", default="digits", help="as for inspect-classifier; default: digits")
    parser.add_argument("--resolution", type=int, nargs="+", metavar="N", help="pixels, as in training")
    parser.add_argument("--recipe", metavar="NAME|YAML", help="as in training; default: the data's own")
    parser.add_argument(
        "--families", default=",".join([*BASELINES, "diffusion", "guided"]), help="default: %(default)s"
    )
    parser.add_argument("--budget", default="5m", help="of each: 5m, 300s, 1h, 2000steps, 500kparameters; default: 5m")
    parser.add_argument("--seeds", default="0,1,2", help="each trains models of its own; default: 0,1,2")
    parser.add_argument(
        "--features", metavar="MODEL", help="the evaluation classifier; default: one is trained by the recipe"
    )
    add_flags(parser, "num_images", default=2000, help="of each model; default: 2000")
    add_flags(parser, "guidance_scale", default=0.5, help="in the table; default: 0.5")
    parser.add_argument("--scales", default="0,0.25,0.5,1,3,10", help="of guidance's curve; default: %(default)s")
    add_flags(parser, "batch_size", default=250)
    add_flags(parser, "output", default="comparison")


def run(args: argparse.Namespace) -> None:
    """Trains the families alike, or takes trained models, and draws them side by side."""
    from ..comparison.run import compare as compare_families
    from ..evaluation.sweep import parse_scales
    from ..files import check_outside, check_place
    from ..processes import join_processes, resumable
    from ..training.arguments import quiet_libraries

    models = named_models(args.models)
    log_to_screen()
    quiet_libraries()
    if join_processes().num_processes > 1:
        raise ValueError("compare runs in one process, so that each family has the whole machine.")
    check_outside(args.output, [args.data, *models.values()])  # before it is made
    with resumable():
        sheet = compare_families(
            args.data,
            check_place(args.output),
            families=args.families.split(","),
            models=models,
            seeds=parse_numbers("--seeds", args.seeds),
            guidance_scales=parse_scales(args.scales),
            **{name: getattr(args, name) for name in PASSED_ON},
        )
    print(f"\n{sheet.with_suffix('.md').read_text()}\nThe sheet is {sheet}.")


def named_models(specs: Sequence[str]) -> dict[str, str]:
    """Models by name, of `NAME=PIPELINE` or a folder or name on the Hub that names itself."""
    models: dict[str, str] = {}
    for model in specs:
        name, found, path = model.partition("=")
        if not found or "/" in name or Path(model).exists():
            name, path = shown_name(model), model
        elif not name or not path:
            raise ValueError(f"{model!r} names no pipeline; give NAME=PIPELINE, or a folder.")
        if name in models:
            raise ValueError(f"Two models are called {name}; name them apart, as NAME=PIPELINE.")
        models[name] = path
    return models
