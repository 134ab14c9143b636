"""`hf-guided sweep`: measures samples at every scale, draws fidelity against diversity, and saves the scale to keep."""

import argparse

from ._arguments import MEASURING, PIPELINE, add_flags, parse_numbers

HELP = "find the guidance scale"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=PIPELINE)
    parser.add_argument("reference", help="real images, as for evaluate")
    parser.add_argument("--scales", default="0:10", help='"0,1,2.5", or "0:10" for a range; default: 0:10')
    parser.add_argument("--steps", help='numbers of steps, "25,50"; default: the pipeline\'s own')
    parser.add_argument("--seeds", default="0,1,2", help="each makes samples of its own; default: 0,1,2")
    add_flags(parser, "num_images", default=1000, help="at each setting; default: 1000")
    parser.add_argument("--no_save", action="store_true", help="do not write the choice into the pipeline's defaults")
    add_flags(parser, *MEASURING)
    add_flags(parser, "output", default="sweep")


def run(args: argparse.Namespace) -> None:
    """Measures samples at every scale, draws fidelity against diversity, and saves the scale to keep."""
    from ..evaluation.sweep import SweepSettings, parse_scales, run_sweep
    from ..processes import print_once

    args.scales = parse_scales(args.scales)
    args.steps = [None] if args.steps is None else parse_numbers("--steps", args.steps)
    args.seeds = parse_numbers("--seeds", args.seeds)
    if (result := run_sweep(SweepSettings(**vars(args)))) is not None:
        print_once(str(result))
