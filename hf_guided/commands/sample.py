"""`hf-guided sample`: draws samples, on as many processes as were launched together."""

import argparse

from ._arguments import (
    LATENTS,
    STEPS,
    add_batch_size,
    add_compile,
    add_condition_unet,
    add_latents,
    add_seed,
    add_steps,
    count,
)

HELP = "draw samples: a picture, or a file of many"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a pipeline's folder, or its name on the Hub")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="classes by id or name, in turn, a number being the id unless it is a class's name; or all, in turn; or "
        "uniform, drawn at random; default: of a picture the first ten, of a file uniform",
    )
    parser.add_argument("--num_images", type=count, metavar="N", help="images in all")
    parser.add_argument("--num_images_per_label", type=count, metavar="N", help="instead; default: 8")
    add_steps(parser)
    add_condition_unet(parser)
    add_latents(parser)
    add_batch_size(parser, 64)
    add_compile(parser)
    add_seed(parser)
    parser.add_argument(
        "--output",
        default="samples.png",
        help="a picture (.png), a file (.npz, .parquet) or a folder of PNGs; default: samples.png",
    )


def run(args: argparse.Namespace) -> None:
    """Draws samples, on as many processes as were launched together."""
    from ..generation.options import check_compile, labels_to_sample, pipeline_arguments
    from ..generation.runs import check_destination
    from ..generation.sampling import sample_to_file
    from ..pipelines.auto_pipeline import load_pipeline
    from ..processes import join_processes, print_once, resumable

    check_destination(args.output)
    if args.num_images is not None and args.num_images_per_label is not None:
        raise ValueError("Give --num_images or --num_images_per_label, not both.")
    with resumable():
        pipe = load_pipeline(args.model, join_processes())
        labels = labels_to_sample(
            pipe,
            args.labels,
            default=range(min(10, pipe.num_classes or 0)) if args.output.endswith(".png") else "uniform",
            num_images=args.num_images,
            num_images_per_label=args.num_images_per_label,
            seed=args.seed,
        )
        check_compile(pipe, args.compile)
        options = {name: getattr(args, name) for name in (*STEPS, *LATENTS, "condition_unet")}
        made = sample_to_file(
            pipe,
            labels,
            args.output,
            batch_size=args.batch_size,
            seed=args.seed,
            compile=args.compile,
            **pipeline_arguments(pipe, **options),
        )
    num_images = labels if isinstance(labels, int) else len(labels)
    there = "is there already, made by the same command"
    print_once(f"Saved {num_images} samples as {args.output}" if made else f"{args.output} {there}")
