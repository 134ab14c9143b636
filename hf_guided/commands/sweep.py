"""`hf-guided sweep`: measures samples at every scale, draws fidelity against diversity, and saves the scale to keep."""

import argparse

from ._arguments import add_measuring, count, parse_numbers

HELP = "find the guidance scale"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a pipeline's folder, or its name on the Hub")
    parser.add_argument("reference", help="real images, as for evaluate")
    parser.add_argument("--scales", default="0:10", help='"0,1,2.5", or "0:10" for a range; default: 0:10')
    parser.add_argument("--steps", help='numbers of steps, "25,50"; default: the pipeline\'s own')
    parser.add_argument("--seeds", default="0,1,2", help="each makes samples of its own; default: 0,1,2")
    parser.add_argument("--num_images", type=count, default=1000, metavar="N", help="at each setting; default: 1000")
    parser.add_argument("--no_save", action="store_true", help="do not write the choice into the pipeline's defaults")
    add_measuring(parser)
    parser.add_argument("--output", default="sweep", metavar="FOLDER", help="default: sweep")


def run(args: argparse.Namespace) -> None:
    """Measures samples at every scale, draws fidelity against diversity, and saves the scale to keep."""
    from ..evaluation.sweep import SweepSettings, parse_scales, run_sweep
    from ..processes import print_once

    args.scales = parse_scales(args.scales)
    args.steps = [None] if args.steps is None else parse_numbers("--steps", args.steps)
    args.seeds = parse_numbers("--seeds", args.seeds)
    if (result := run_sweep(SweepSettings(**vars(args)))) is not None:
        print_once(str(result))
