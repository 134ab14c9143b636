"""`hf-guided evaluate`: measures samples against real images, and writes a report with pictures."""

import argparse

from ._arguments import LATENTS, MEASURING, STEPS, add_flags

HELP = "measure samples against real images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("generated", help="a .npz or .parquet file of samples, a folder of images, or a pipeline")
    parser.add_argument(
        "reference", help="real images: the same, a dataset (digits:train, user/name:test), or saved statistics"
    )
    parser.add_argument("--held_out", metavar="IMAGES", help="images never trained on: looks for copies of REFERENCE")
    parser.add_argument("--likelihood", action="store_true", help="bits per dimension of REFERENCE under the pipeline")
    parser.add_argument("--interval", action="store_true", help="a 95 %% confidence interval of each FID")
    parser.add_argument(
        "--distance_dtype",
        choices=["float32", "float16"],
        default="float32",
        help="float16 has the published evaluator's noise in precision and recall; default: float32",
    )
    parser.add_argument("--save_statistics", metavar="NPZ", help="save the reference's, to be given in its place")
    add_flags(parser, "num_images", default=10_000, help="of a pipeline; default: 10000")
    add_flags(parser, *STEPS, *LATENTS, "seed", *MEASURING)
    add_flags(parser, "output", default="evaluation")


def run(args: argparse.Namespace) -> None:
    """Measures samples against real images, and writes a report with pictures."""
    from ..evaluation.run import EvaluationSettings, run_evaluation
    from ..processes import print_once

    if (result := run_evaluation(EvaluationSettings(**vars(args)))) is not None:
        print_once("", str(result), "", f"The report and its pictures are in {args.output}.")
