"""`hf-guided upscale`: makes large images of small ones, on as many processes as were launched together."""

import argparse

from ._arguments import STEPS, add_flags, saved_message

HELP = "make large images of small ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="an upscaling pipeline's folder, or its name on the Hub")
    parser.add_argument("images", nargs="+", help="a .npz file of samples as OpenAI's scripts write it, or image files")
    add_flags(parser, "labels", help="one class for all or one for each, as for sample")
    add_flags(parser, *STEPS)
    add_flags(parser, "batch_size", default=16)
    add_flags(parser, "seed")
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
        classes = labels if args.labels is None else class_ids(pipe, args.labels)
        settings = {name: getattr(args, name) for name in ("batch_size", "seed", *STEPS)}
        is_new = upscale_to_file(pipe, images, classes, args.output, **settings)
    height, width = pipe.sample_size
    print_once(saved_message(f"{len(images)} images of {height}x{width}", args.output, is_new))
