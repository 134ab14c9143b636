"""`hf-guided sample`: draws samples, on as many processes as were launched together."""

import argparse

from ._arguments import LATENTS, PIPELINE, STEPS, add_flags, count, saved_message

HELP = "draw samples: a picture, or a file of many"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=PIPELINE)
    add_flags(
        parser,
        "labels",
        help="classes by id or name, in turn, a number being the id unless it is a class's name; or all, in turn; or "
        "uniform, drawn at random; default: of a picture the first ten, of a file uniform",
    )
    add_flags(parser, "num_images", help="images in all")
    parser.add_argument("--num_images_per_label", type=count, metavar="N", help="instead; default: 8")
    add_flags(parser, *STEPS, "condition_unet", *LATENTS, "batch_size", "compile", "seed")
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
        settings = {name: getattr(args, name) for name in ("batch_size", "seed", "compile")}
        options = {name: getattr(args, name) for name in (*STEPS, *LATENTS, "condition_unet")}
        is_new = sample_to_file(pipe, labels, args.output, **settings, **pipeline_arguments(pipe, **options))
    print_once(saved_message(f"{len(labels)} samples", args.output, is_new))
