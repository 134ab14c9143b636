"""`hf-guided evaluate`: measures samples against real images, and writes a report with pictures."""

import argparse
import time
from pathlib import Path
from typing import Any

from ..credentials import without_credentials
from ._arguments import LATENTS, STEPS, add_latents, add_measuring, add_seed, add_steps, count

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
    parser.add_argument("--num_images", type=count, default=10_000, metavar="N", help="of a pipeline; default: 10000")
    add_steps(parser)
    add_latents(parser)
    add_seed(parser)
    add_measuring(parser)
    parser.add_argument("--output", default="evaluation", metavar="FOLDER", help="default: evaluation")


def run(args: argparse.Namespace) -> None:
    """Measures samples against real images, and writes a report with pictures."""
    from ..evaluation.evaluate import evaluate as evaluate_images
    from ..evaluation.evaluate import what_to_know
    from ..evaluation.features.feature_sets import CACHE_DIR, FeatureSet, collect_features, is_saved
    from ..evaluation.features.image_sets import ImageSet, SampledImages, open_images
    from ..evaluation.likelihood import likelihood, likelihood_labels
    from ..evaluation.memorisation import closest_pairs
    from ..evaluation.plots import likelihood_curve
    from ..evaluation.run import load_extractors, open_real, paths_of
    from ..files import check_outside, check_parent, check_place, check_replaceable, has_json, write_json
    from ..generation.grids import save_png
    from ..generation.options import check_compile, labels_to_sample, pipeline_arguments
    from ..generation.sampling import check_destination, sample_to_file
    from ..pipelines.auto_pipeline import is_pipeline, load_pipeline
    from ..processes import join_processes, print_once, resumable

    # 1. What there is, looked at before hours are spent on it
    started = time.monotonic()
    output, sources = Path(args.output), paths_of(args.generated, args.reference, args.held_out, *args.features)
    check_outside(output, sources)
    is_report = has_json(output / "report.json", "generated", "reference", "metrics", "settings")
    pictures = output.glob("closest-pairs-*.png") if args.held_out else ()
    curve = [output / "likelihood.png"] if args.likelihood else []
    check_replaceable([output / "report.json", *curve, *pictures], lambda path: is_report, sources)
    if args.save_statistics:
        check_parent(args.save_statistics, "--save_statistics", ".npz")
        if len(args.features) > 1:
            raise ValueError("--save_statistics keeps one kind of features; give one to --features.")
        sampled = output / "samples.npz"  # which another check is of
        check_replaceable([sampled, args.save_statistics], lambda path: path == sampled or is_saved(path), sources)
    check_place(args.output)
    samples_pipeline = is_pipeline(args.generated)
    if samples_pipeline and output.is_dir():
        check_destination(output / "samples.npz")
    state = join_processes()
    pipe = load_pipeline(args.generated, state) if samples_pipeline else None
    extractors = load_extractors(args.features, pipe, state)
    if pipe is not None:
        labels = labels_to_sample(pipe, args.labels, default="all", num_images=args.num_images, seed=args.seed)
        sampling = pipeline_arguments(
            pipe, **{name: getattr(args, name) for name in (*STEPS, *LATENTS, "condition_unet")}
        )
        generated: Any = SampledImages(pipe, labels, args.seed, **sampling)
        check_compile(pipe, args.compile)
    elif args.likelihood or args.compile:
        flag = "--likelihood" if args.likelihood else "--compile"
        raise ValueError(f"{flag} is of a pipeline, and {args.generated} is none.")
    else:
        generated = open_images(args.generated)
    reference = open_real(args.reference, generated.size, state, args.labels, args.num_images, args.seed)
    held_out = (
        open_real(args.held_out, generated.size, state, args.labels, args.num_images, args.seed)
        if args.held_out
        else None
    )
    needs_images = {
        "--held_out": args.held_out,
        "--likelihood": args.likelihood,
        "--save_statistics": args.save_statistics,
    }
    for flag in (flag for flag, given in needs_images.items() if given):
        if not isinstance(reference, ImageSet) or (held_out is not None and not isinstance(held_out, ImageSet)):
            raise ValueError(f"{flag} needs images, and statistics alone were given.")
    bits_labels = likelihood_labels(pipe, reference) if args.likelihood else None
    print_once(*(f"Note: {note}" for note in what_to_know(generated, reference, held_out)))

    # 2. Sample, where it is a pipeline's turn; measure
    output.mkdir(parents=True, exist_ok=True)
    with resumable():
        if pipe is not None:
            options = {"batch_size": args.batch_size, "seed": args.seed, "compile": args.compile}
            options |= sampling
            sample_to_file(pipe, labels, output / "samples.npz", **options)
            state.wait_for_everyone()
            samples = open_images(str(output / "samples.npz"))
            samples.id2label, samples.name = generated.id2label, without_credentials(args.generated)
            generated = samples
        seconds = {"sampling": time.monotonic() - started}
        options = {"batch_size": args.batch_size, "num_workers": args.num_workers}
        options["cache_dir"] = None if args.no_cache else CACHE_DIR
        result = evaluate_images(
            generated,
            reference,
            extractors,
            held_out=held_out,
            interval=args.interval,
            distance_dtype=args.distance_dtype,
            **options,
        )
        seconds["measuring"] = time.monotonic() - started - sum(seconds.values())
        bits = None
        if pipe is not None and args.likelihood:
            bits = likelihood(pipe, reference, bits_labels, args.respacing, args.batch_size, args.seed)
            seconds["likelihood"] = time.monotonic() - started - sum(seconds.values())
        if args.save_statistics:
            features = collect_features(reference, extractors[0], **options)
            if isinstance(features, FeatureSet):
                features.save(args.save_statistics)
    if result is None:
        return  # another process reports

    # 3. Report
    settings = {**vars(args), "labels": args.labels or ["all"]}
    report = {**result.to_dict(), "seconds": {name: round(value, 1) for name, value in seconds.items()}}
    write_json({**report, "likelihood": bits and bits.to_dict(), "settings": settings}, output / "report.json")
    for name, found in result.memorisation.items():
        save_png(closest_pairs(found, generated, reference), output / f"closest-pairs-{name}.png")
    if bits is not None and bits.timesteps:
        likelihood_curve(bits.timesteps, bits.vb, output / "likelihood.png")
    print_once(
        "",
        str(result),
        *([] if bits is None else [str(bits)]),
        "",
        f"The report and its pictures are in {output}.",
    )
