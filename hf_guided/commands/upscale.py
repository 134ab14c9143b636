"""`hf-guided upscale`: makes large images of small ones, on as many processes as were launched together."""

import argparse

from ._arguments import STEPS, add_batch_size, add_seed, add_steps

HELP = "make large images of small ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="an upscaling pipeline's folder, or its name on the Hub")
    parser.add_argument("images", nargs="+", help="a .npz file of samples as OpenAI's scripts write it, or image files")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="one class for all or one for each, as for sample")
    add_steps(parser)
    add_batch_size(parser, 16)
    add_seed(parser)
    parser.add_argument(
        "--output",
        default="upscaled.npz",
        help="a file (.npz, .parquet), a folder of PNGs, or a picture of small and large images (.png); default: "
        "upscaled.npz",
    )


def run(args: argparse.Namespace) -> None:
    """Makes large images of small ones, on as many processes as were launched together."""
    from ..generation.options import class_ids
    from ..generation.runs import check_destination
    from ..generation.upscaling import COMMAND, read_small_images, upscale_to_file
    from ..pipelines.auto_pipeline import load_pipeline
    from ..pipelines.pipeline_classifier_guided_upscale import ClassifierGuidedUpscalePipeline
    from ..processes import join_processes, print_once, resumable

    check_destination(args.output, command=COMMAND, inputs=args.images)
    images, labels = read_small_images(args.images)
    with resumable():
        pipe = load_pipeline(args.model, join_processes(), ClassifierGuidedUpscalePipeline)
        made = upscale_to_file(
            pipe,
            images,
            labels if args.labels is None else class_ids(pipe, args.labels),
            args.output,
            batch_size=args.batch_size,
            seed=args.seed,
            **{name: getattr(args, name) for name in STEPS},
        )
    height, width = pipe.sample_size
    there = "is there already, made by the same command"
    saved = f"Saved {len(images)} images of {height}x{width} as {args.output}"
    print_once(saved if made else f"{args.output} {there}")
