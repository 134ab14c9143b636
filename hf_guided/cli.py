"""`hf-guided …`: parses, calls, prints. What is heavy is imported by the command that needs it."""

if __name__ == "__main__":  # before what takes seconds to import
    from hf_guided.interrupts import stop_at_once

    stop_at_once()

import argparse
import inspect
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .credentials import FormatterWithoutCredentials, log_to_screen, without_credentials
from .processes import resumable, user_command


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `hf-guided`, also `python -m hf_guided.cli`."""
    parser = argparse.ArgumentParser(prog="hf-guided", description="Classifier-guided diffusion (ADM).")
    parser.add_argument("--version", action="version", version=f"hf-guided {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    command = commands.add_parser("sample", help="draw samples: a picture, or a file of many")
    command.add_argument("model", help="a pipeline's folder, or its name on the Hub")
    command.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="classes by id or name, in turn, a number being the id unless it is a class's name; or all, in turn; or "
        "uniform, drawn at random; default: of a picture the first ten, of a file uniform",
    )
    command.add_argument("--num_images", type=count, metavar="N", help="images in all")
    command.add_argument("--num_images_per_label", type=count, metavar="N", help="instead; default: 8")
    command.add_argument("--guidance_scale", type=float, metavar="S", help="default: the pipeline's own")
    command.add_argument(
        "--condition_unet",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tell the UNet the class, or let the classifier alone steer; default: tell it",
    )
    command.add_argument("--num_inference_steps", type=count, metavar="N", help="default: the pipeline's own")
    command.add_argument("--respacing", metavar="R", help='instead: published timesteps, such as "250" or "ddim25"')
    add_latents(command)
    command.add_argument("--batch_size", type=count, default=64, metavar="N", help="images at once; default: 64")
    add_compile(command)
    command.add_argument("--seed", type=seed, default=0, help="default: 0")
    command.add_argument(
        "--output",
        default="samples.png",
        help="a picture (.png), a file (.npz, .parquet) or a folder of PNGs; default: samples.png",
    )
    command.set_defaults(run=sample)

    command = commands.add_parser("upscale", help="make large images of small ones")
    command.add_argument("model", help="an upscaling pipeline's folder, or its name on the Hub")
    command.add_argument(
        "images", nargs="+", help="a .npz file of samples as OpenAI's scripts write it, or image files"
    )
    command.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="one class for all or one for each, as for sample"
    )
    command.add_argument("--guidance_scale", type=float, metavar="S", help="default: the pipeline's own")
    command.add_argument("--num_inference_steps", type=count, metavar="N", help="default: the pipeline's own")
    command.add_argument("--respacing", metavar="R", help='instead: published timesteps, such as "250" or "ddim25"')
    command.add_argument("--batch_size", type=count, default=16, metavar="N", help="images at once; default: 16")
    command.add_argument("--seed", type=seed, default=0, help="default: 0")
    command.add_argument("--output", default="upscaled.npz", metavar="NPZ|PNG", help="default: upscaled.npz")
    command.set_defaults(run=upscale)

    command = commands.add_parser("evaluate", help="measure samples against real images")
    command.add_argument("generated", help="a .npz or .parquet file of samples, a folder of images, or a pipeline")
    command.add_argument(
        "reference", help="real images: the same, a dataset (digits:train, user/name:test), or saved statistics"
    )
    command.add_argument("--held_out", metavar="IMAGES", help="images never trained on: looks for copies of REFERENCE")
    command.add_argument("--likelihood", action="store_true", help="bits per dimension of REFERENCE under the pipeline")
    command.add_argument("--interval", action="store_true", help="a 95 %% confidence interval of each FID")
    command.add_argument(
        "--distance_dtype",
        choices=["float32", "float16"],
        default="float32",
        help="float16 has the published evaluator's noise in precision and recall; default: float32",
    )
    command.add_argument("--save_statistics", metavar="NPZ", help="save the reference's, to be given in its place")
    command.add_argument("--num_images", type=count, default=10_000, metavar="N", help="of a pipeline; default: 10000")
    command.add_argument("--guidance_scale", type=float, metavar="S", help="default: the pipeline's own")
    command.add_argument("--num_inference_steps", type=count, metavar="N", help="default: the pipeline's own")
    command.add_argument("--respacing", metavar="R", help='instead: published timesteps, such as "250" or "ddim25"')
    add_latents(command)
    command.add_argument("--seed", type=seed, default=0, help="default: 0")
    add_measuring(command)
    command.add_argument("--output", default="evaluation", metavar="FOLDER", help="default: evaluation")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("sweep", help="find the guidance scale")
    command.add_argument("model", help="a pipeline's folder, or its name on the Hub")
    command.add_argument("reference", help="real images, as for evaluate")
    command.add_argument("--scales", default="0:10", help='"0,1,2.5", or "0:10" for a range; default: 0:10')
    command.add_argument("--steps", help='numbers of steps, "25,50"; default: the pipeline\'s own')
    command.add_argument("--seeds", default="0,1,2", help="each makes samples of its own; default: 0,1,2")
    command.add_argument("--num_images", type=count, default=1000, metavar="N", help="at each setting; default: 1000")
    command.add_argument("--no_save", action="store_true", help="do not write the choice into the pipeline's defaults")
    add_measuring(command)
    command.add_argument("--output", default="sweep", metavar="FOLDER", help="default: sweep")
    command.set_defaults(run=sweep, seed=0)

    command = commands.add_parser("compare", help="train a VAE, a GAN, a flow and diffusion alike, and measure them")
    command.add_argument(
        "models", nargs="*", metavar="NAME=PIPELINE", help="instead of training: folders or names on the Hub, named"
    )
    command.add_argument("--data", default="digits", help="as for inspect-classifier; default: digits")
    command.add_argument("--resolution", type=int, nargs="+", metavar="N", help="pixels, as in training")
    command.add_argument("--recipe", metavar="NAME|YAML", help="as in training; default: the data's own")
    command.add_argument("--families", default="vae,gan,flow,diffusion,guided", help="default: %(default)s")
    command.add_argument("--budget", default="5m", help="of each: 5m, 300s, 1h, 2000steps, 500kparameters; default: 5m")
    command.add_argument("--seeds", default="0,1,2", help="each trains models of its own; default: 0,1,2")
    command.add_argument("--features", metavar="MODEL", help="the judge; default: one is trained by the recipe")
    command.add_argument("--num_images", type=count, default=2000, metavar="N", help="of each model; default: 2000")
    command.add_argument("--guidance_scale", type=float, default=0.5, metavar="S", help="in the table; default: 0.5")
    command.add_argument("--scales", default="0,0.25,0.5,1,3,10", help="of guidance's curve; default: %(default)s")
    command.add_argument("--batch_size", type=count, default=250, metavar="N", help="images at once; default: 250")
    command.add_argument("--output", default="comparison", metavar="FOLDER", help="default: comparison")
    command.set_defaults(run=compare)

    command = commands.add_parser("inspect-classifier", help="tell how good a noisy classifier is, and where to guide")
    command.add_argument("model", help="a classifier's or a pipeline's folder, or its name on the Hub")
    command.add_argument("data", help="digits, a folder with one sub-folder of images per class, or a dataset")
    command.add_argument("--train_split", default="train", metavar="NAME", help="as it was trained; default: train")
    command.add_argument("--validation_split", metavar="NAME", help="the split held out; default: a part of the above")
    command.add_argument("--held_out_fraction", type=float, metavar="F", help="that part; default: training's own")
    command.add_argument("--image_column", metavar="NAME", help="default: found by its type or usual name")
    command.add_argument("--label_column", metavar="NAME", help="default: found by its type or usual name")
    command.add_argument("--num_images", type=count, default=2000, metavar="N", help="held-out ones; default: 2000")
    command.add_argument("--batch_size", type=count, default=64, metavar="N", help="images at once; default: 64")
    command.add_argument("--seed", type=seed, default=0, help="of the noise; default: 0")
    command.add_argument(
        "--output", default="inspection.png", metavar="PNG", help="numbers go beside it as .json; default: %(default)s"
    )
    command.set_defaults(run=inspect_classifier)

    command = commands.add_parser("convert", help="OpenAI's checkpoints to a pipeline, and back")
    command.add_argument(
        "model", nargs="?", help="name of a published checkpoint; with --to openai, a folder or a name on the Hub"
    )
    command.add_argument("--checkpoint", metavar="PT", help="the UNet's, the upsampler's or a classifier's .pt file")
    command.add_argument("--classifier", metavar="PT", help="the .pt file of the classifier that guides")
    command.add_argument("--flags", help='instead of a name: "$MODEL_FLAGS $DIFFUSION_FLAGS" of the published scripts')
    command.add_argument("--labels", metavar="TXT", help="class names, one a line; default: ImageNet's for 1,000")
    command.add_argument("--output", required=True, help="the folder to write; with --to openai, the .pt file")
    command.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="default: fp32")
    command.add_argument("--to", choices=["openai"], help="write .pt files that the published code loads")
    command.add_argument("--push_to_hub", action="store_true", help="push the folder to --hub_model_id")
    command.add_argument("--hub_model_id", metavar="user/name", help="the repository, made if there is none")
    command.add_argument("--hub_private", action="store_true", help="make a new repository private")
    add_token(command)
    command.set_defaults(run=convert)

    command = commands.add_parser("push", help="push a finished pipeline or model to the Hub, in one commit")
    command.add_argument("folder", help="what save_pretrained or training wrote; with --space alone, a name on the Hub")
    command.add_argument("repo_id", nargs="?", metavar="user/name", help="the repository, made if there is none")
    command.add_argument("--revision", metavar="BRANCH", help="the branch, made if there is none; default: main")
    command.add_argument("--create_pr", action="store_true", help="propose the commit as a pull request")
    command.add_argument("--commit_message", default="Upload with hf-guided", help="default: %(default)s")
    command.add_argument(
        "--standalone",
        action="store_true",
        help="let the repository carry its code, so that it loads with trust_remote_code=True and without this package",
    )
    command.add_argument(
        "--include",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="push these too: paths in the folder, or patterns such as 'assets/*'; what is no part of the model stays "
        "behind otherwise, and is named",
    )
    command.add_argument(
        "--hub_license",
        metavar="NAME",
        help="of the model card that is added where there is none, as the Hub spells it: apache-2.0, mit ...",
    )
    command.add_argument("--space", metavar="user/space", help="also push the page of `hf-guided demo`, as a Space")
    command.add_argument("--judge", metavar="MODEL", help="of that page: the classifier on the Hub that judges")
    command.add_argument("--hub_private", action="store_true", help="make a new repository private")
    add_token(command)
    command.set_defaults(run=push)

    command = commands.add_parser("demo", help="a page to play with a pipeline in the browser")
    command.add_argument("model", help="a pipeline's folder, or its name on the Hub")
    command.add_argument("--judge", metavar="MODEL", help="a classifier that does not guide, to judge the samples")
    command.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone; 0.0.0.0 lets others in"
    )
    command.add_argument("--port", type=port, default=7860, help="default: 7860")
    command.set_defaults(run=demo)

    args = parser.parse_args(join_flags(sys.argv[1:] if argv is None else argv))
    if logging.lastResort is not None:  # what shows the warnings of commands without a log
        logging.lastResort.setFormatter(FormatterWithoutCredentials())
    with user_command():
        args.run(args)


def sample(args: argparse.Namespace) -> None:
    """Draws samples, on as many processes as were launched together."""
    from .generation.sampling import check_destination, sample_to_file
    from .processes import join_processes

    check_destination(args.output)
    if args.num_images is not None and args.num_images_per_label is not None:
        raise ValueError("Give --num_images or --num_images_per_label, not both.")
    with resumable():
        state = join_processes()
        pipe = load_guided(args.model, state)
        labels = labels_to_sample(pipe, args)
        check_compile(pipe, args)
        options = {"batch_size": args.batch_size, "seed": args.seed, "compile": args.compile}
        options |= sampling_options(pipe, args)
        made = sample_to_file(pipe, labels, args.output, **options)
    if state.is_main_process:
        num_images = labels if isinstance(labels, int) else len(labels)
        there = "is there already, made by the same command"
        print(f"Saved {num_images} samples as {args.output}" if made else f"{args.output} {there}")


def load_guided(model: str, state: Any) -> Any:
    """A pipeline where this process computes; the bar of its steps is the main process's, below that of the images."""
    from .pipelines.auto_pipeline import pipeline_class
    from .pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline

    kind = pipeline_class(model) if is_pipeline(model) else ClassifierGuidedPipeline  # which says what is missing
    pipe = load_pipeline(kind, model).to(state.device)
    bar = {"desc": "batch", "position": 1, "leave": False}
    pipe.set_progress_bar_config(**bar, disable=None if state.is_main_process else True)
    return pipe


def sampling_options(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say to the pipeline.

    Raises:
        `ValueError`: For a flag that this kind of pipeline does not know.
    """
    names = ("guidance_scale", "condition_unet", "num_inference_steps", "respacing", "temperature", "truncation")
    given = {name: getattr(args, name, None) for name in names}
    known = inspect.signature(type(pipe).__call__).parameters
    for name, value in given.items():
        if name not in known and value is not None and value is not True:
            raise ValueError(f"A {type(pipe).__name__} knows no --{name}; leave it out.")
    return {name: value for name, value in given.items() if name in known}


EVERY_CLASS = ["all"]  # where --labels are not given


def labels_to_sample(pipe: Any, args: argparse.Namespace) -> Any:
    """The class of each image to sample, or the number of images without classes."""
    from .generation.sampling import sample_labels

    per_label = args.num_images_per_label or 8
    given = args.labels is not None and args.labels is not EVERY_CLASS
    if pipe.num_classes is None and given:
        raise ValueError("--labels were given, but this pipeline has no classes; leave them out.")
    if pipe.num_classes is None:
        return args.num_images or per_label
    which: Any = "uniform"
    if args.labels in (["uniform"], ["all"]):
        which = args.labels[0]
        if given and which in pipe.id2label.values():
            raise ValueError(f"--labels {which} might mean the class of that name too; give the ids of classes.")
    elif args.labels is not None:
        which = class_ids(pipe, args.labels)
    elif args.output.endswith(".png"):
        which = list(range(min(10, pipe.num_classes)))
    if which == "uniform" and args.num_images is None:
        raise ValueError("Say how many samples to draw of all classes together: --num_images 50000.")
    num_images = args.num_images or per_label * (pipe.num_classes if which == "all" else len(which))
    return sample_labels(which, num_images, pipe.num_classes, args.seed)


def add_latents(command: argparse.ArgumentParser) -> None:
    """The flags of the families whose images come of latents at once."""
    command.add_argument("--truncation", type=float, metavar="T", help="of a GAN: latents between -T and T")
    command.add_argument("--temperature", type=float, metavar="T", help="of a VAE or flow: the latents' spread")


def add_token(command: argparse.ArgumentParser) -> None:
    """The token of the commands that push."""
    command.add_argument(
        "--hub_token",
        metavar="TOKEN",
        help="default: that of `hf auth login`, or HF_TOKEN; prefer those, for the machine's list of processes shows a "
        "flag to everybody on it",
    )


def add_compile(command: argparse.ArgumentParser) -> None:
    """The switch that sampling and measuring commands share."""
    command.add_argument("--compile", action="store_true", help="compile the models first: worth it for many batches")


def check_compile(pipe: Any, args: argparse.Namespace) -> None:
    """Refuses `--compile` for a pipeline that has nothing to compile."""
    if args.compile and not hasattr(pipe, "compile"):
        raise ValueError(f"A {type(pipe).__name__} makes its images in one pass; leave --compile out.")


def add_measuring(command: argparse.ArgumentParser) -> None:
    """The flags that measuring commands share."""
    command.add_argument(
        "--features",
        nargs="+",
        default=["inception"],
        metavar="MODEL",
        help="what images are measured in: inception, or a model's folder or name on the Hub; NAME=MODEL names it; "
        "default: inception",
    )
    command.add_argument(
        "--labels", nargs="+", default=EVERY_CLASS, metavar="LABEL", help="of samples, as for sample; default: all"
    )
    command.add_argument(
        "--condition_unet",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tell the UNet the class, or let the classifier alone steer; default: tell it",
    )
    command.add_argument("--batch_size", type=count, default=64, metavar="N", help="images at once; default: 64")
    add_compile(command)
    command.add_argument("--num_workers", type=workers, default=0, metavar="N", help="processes that decode images")
    command.add_argument("--no_cache", action="store_true", help="compute the features of real images anew")
    command.set_defaults(num_images_per_label=None)


def evaluate(args: argparse.Namespace) -> None:
    """Measures samples against real images, and writes a report with pictures."""
    from .evaluation.evaluate import evaluate as evaluate_images
    from .evaluation.evaluate import find_warnings
    from .evaluation.features.feature_sets import CACHE_DIR, FeatureSet, collect_features, is_saved
    from .evaluation.features.image_sets import ImageSet, SampledImages, open_images
    from .evaluation.likelihood import likelihood, likelihood_labels
    from .evaluation.memorisation import closest_pairs
    from .evaluation.plots import likelihood_curve
    from .files import check_outside, check_place, check_replaceable, has_json, write_json
    from .generation.grids import save_png
    from .generation.sampling import check_destination, sample_to_file
    from .processes import join_processes

    # 1. What there is, looked at before hours are spent on it
    started = time.monotonic()
    output, sources = Path(args.output), paths_of(args.generated, args.reference, args.held_out, *args.features)
    check_outside(output, sources)
    is_report = has_json(output / "report.json", "generated", "reference", "metrics", "settings")
    pictures = output.glob("closest-pairs-*.png") if args.held_out else ()
    curve = [output / "likelihood.png"] if args.likelihood else []
    check_replaceable([output / "report.json", *curve, *pictures], lambda path: is_report, sources)
    if args.save_statistics:
        check_output(args.save_statistics, ".npz", flag="--save_statistics")
        if len(args.features) > 1:
            raise ValueError("--save_statistics keeps one kind of features; give one to --features.")
        sampled = output / "samples.npz"  # which another check is of
        check_replaceable([sampled, args.save_statistics], lambda path: path == sampled or is_saved(path), sources)
    check_place(args.output)
    samples_pipeline = is_pipeline(args.generated)
    if samples_pipeline and output.is_dir():
        check_destination(output / "samples.npz")
    state = join_processes()
    pipe = load_guided(args.generated, state) if samples_pipeline else None
    extractors = load_extractors(args.features, pipe, state)
    if pipe is not None:
        labels = labels_to_sample(pipe, args)
        generated: Any = SampledImages(pipe, labels, args.seed, **sampling_options(pipe, args))
        check_compile(pipe, args)
    elif args.likelihood or args.compile:
        flag = "--likelihood" if args.likelihood else "--compile"
        raise ValueError(f"{flag} is of a pipeline, and {args.generated} is none.")
    else:
        generated = open_images(args.generated)
    reference = open_real(args.reference, generated.size, args, state)
    held_out = open_real(args.held_out, generated.size, args, state) if args.held_out else None
    needs_images = {
        "--held_out": args.held_out,
        "--likelihood": args.likelihood,
        "--save_statistics": args.save_statistics,
    }
    for flag in (flag for flag, given in needs_images.items() if given):
        if not isinstance(reference, ImageSet) or (held_out is not None and not isinstance(held_out, ImageSet)):
            raise ValueError(f"{flag} needs images, and statistics alone were given.")
    bits_labels = likelihood_labels(pipe, reference) if args.likelihood else None
    tell(state, *(f"Note: {note}" for note in find_warnings(generated, reference, held_out)))

    # 2. Sample, where it is a pipeline's turn; measure
    output.mkdir(parents=True, exist_ok=True)
    with resumable():
        if pipe is not None:
            options = {"batch_size": args.batch_size, "seed": args.seed, "compile": args.compile}
            options |= sampling_options(pipe, args)
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
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    report = {**result.to_dict(), "seconds": {name: round(value, 1) for name, value in seconds.items()}}
    write_json({**report, "likelihood": bits and bits.to_dict(), "settings": settings}, output / "report.json")
    for name, found in result.memorisation.items():
        save_png(closest_pairs(found, generated, reference), output / f"closest-pairs-{name}.png")
    if bits is not None and bits.timesteps:
        likelihood_curve(bits.timesteps, bits.vb, output / "likelihood.png")
    tell(
        state,
        "",
        str(result),
        *([] if bits is None else [str(bits)]),
        "",
        f"The report and its pictures are in {output}.",
    )


def sweep(args: argparse.Namespace) -> None:
    """Measures samples at every scale, draws fidelity against diversity, and saves the scale to keep."""
    from .evaluation.evaluate import judged_labels
    from .evaluation.features.extractors import weights_digest
    from .evaluation.features.feature_sets import CACHE_DIR, FeatureSet, collect_features
    from .evaluation.features.image_sets import ImageSet, SampledImages
    from .evaluation.plots import sweep_curve
    from .evaluation.sweep import choose_scale, guidance_at, parse_scales, save_choice
    from .evaluation.sweep import sweep as sweep_scales
    from .files import check_outside, check_place, check_replaceable, differing, has_json, read_json, write_json
    from .generation.sampling import COMPILING
    from .processes import from_main, join_processes

    # 1. What there is, looked at before hours are spent on it
    scales = parse_scales(args.scales)
    steps: list[int | None] = [None] if args.steps is None else parse_numbers("--steps", args.steps)
    seeds = parse_numbers("--seeds", args.seeds)
    if len(args.features) > 1:
        raise ValueError("One kind of features chooses the scale; give one to --features.")
    output, sources = Path(args.output), paths_of(args.reference, *args.features)
    check_outside(output, sources)
    results = [output / "sweep.json", output / "sweep.png"]
    is_sweep = has_json(results[0], "settings", "rows")
    check_replaceable(results, lambda path: is_sweep, [args.model, *sources])
    check_place(args.output)
    state = join_processes()
    pipe = load_guided(args.model, state)
    if not hasattr(pipe, "set_sampling_defaults"):
        raise ValueError(f"{args.model} is a {type(pipe).__name__}, which nothing guides; a sweep is of guidance.")
    guidance_at(pipe, scales[0])
    for number in (number for number in steps if number is not None):
        pipe.set_timesteps(number, None, None)  # refuses what the schedule has not
    (extractor,) = load_extractors(args.features, pipe, state)
    reference = open_real(args.reference, pipe.sample_size, args, state)
    labels = labels_to_sample(pipe, args)
    if isinstance(labels, int):
        raise ValueError(f"{args.model} has no classes, so nothing steers it; a sweep is of guidance by classes.")
    notes = list(reference.notes) if isinstance(reference, ImageSet) else []
    judged = judged_labels(SampledImages(pipe, labels), extractor, notes)
    settings = without_credentials({name: value for name, value in vars(args).items() if name not in SWEEP_FREE})
    settings["features"] = f"{extractor.name} {extractor.fingerprint}"
    path = output / "sweep.json"
    settings["weights"] = [weights_digest(model) for model in (pipe.unet, pipe.classifier) if model is not None]
    settings["images"] = from_main(reference.digest)
    known: dict[str, Any] = {"settings": settings, "rows": []}
    if path.is_file():
        rows = [{"num_inference_steps": int | None, "guidance_scale": int | float, "seed": int}]
        shape = {"settings": dict, "rows": rows}
        fix = "give another --output, or remove it to measure from scratch"
        known = without_credentials(read_json(path, shape, fix))
    if changed := differing(known["settings"], settings, {"model": "weights", "reference": "images"}):
        raise ValueError(
            f"{path} was measured otherwise ({', '.join(changed)}); give the same flags, or another --output."
        )
    tell(state, *(f"Note: {note}" for note in notes))

    def keep(rows: list[dict[str, Any]]) -> None:
        known["rows"] = rows
        write_json({"settings": settings, "rows": rows}, path)

    # 2. Measure
    output.mkdir(parents=True, exist_ok=True)
    if args.compile:
        pipe.compile()
        tell(state, COMPILING)
    with resumable():
        cache_dir = None if args.no_cache else CACHE_DIR
        real: Any = reference
        if not isinstance(reference, FeatureSet):
            options = {"batch_size": args.batch_size, "num_workers": args.num_workers, "cache_dir": cache_dir}
            real = collect_features(reference, extractor, **options)
        rows = sweep_scales(
            pipe,
            real,
            extractor,
            labels,
            scales=scales,
            steps=steps,
            seeds=seeds,
            judged=judged,
            batch_size=args.batch_size,
            done=known["rows"],
            on_row=keep,
            condition_unet=args.condition_unet,
        )
    if not state.is_main_process:
        return

    # 3. Choose, draw, save
    chosen, reason = choose_scale(rows, f"fid/{extractor.name}")
    write_json({"settings": settings, "rows": known["rows"], "chosen": chosen, "reason": reason}, path)
    sweep_curve(rows, extractor.name, output / "sweep.png", chosen)
    tell(state, reason)
    if args.no_save:
        return
    if not args.condition_unet:
        tell(state, "Nothing is saved: by default this pipeline tells its UNet the class, here it was not told.")
    elif not Path(args.model).is_dir():
        tell(state, f"{args.model} is not a folder, so nothing is saved; download it first to have it keep this.")
    else:
        tell(state, f"{args.model} keeps by default: {save_choice(args.model, chosen)}")


def compare(args: argparse.Namespace) -> None:
    """Trains the families alike, or takes trained models, and draws them side by side."""
    from .comparison.run import compare as compare_families
    from .evaluation.sweep import parse_scales
    from .files import check_outside, check_place
    from .processes import join_processes
    from .training.arguments import quiet_libraries

    models = {}
    for model in args.models:
        name, found, path = model.partition("=")
        if not found or "/" in name or Path(model).exists():
            name, path = shown_name(model), model
        elif not name or not path:
            raise ValueError(f"{model!r} names no pipeline; give NAME=PIPELINE, or a folder.")
        if name in models:
            raise ValueError(f"Two models are called {name}; name them apart, as NAME=PIPELINE.")
        models[name] = path
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
            budget=args.budget,
            seeds=parse_numbers("--seeds", args.seeds),
            features=args.features,
            num_images=args.num_images,
            guidance_scale=args.guidance_scale,
            guidance_scales=parse_scales(args.scales),
            resolution=args.resolution,
            recipe=args.recipe,
            batch_size=args.batch_size,
        )
    print(f"\n{sheet.with_suffix('.md').read_text()}\nThe sheet is {sheet}.")


# Flags of a sweep that may differ between two sittings.
SWEEP_FREE = {"run", "scales", "steps", "seeds", "output", "features", "num_workers", "no_cache", "no_save", "compile"}


def tell(state: Any, *lines: str) -> None:
    """Prints, in the main process alone, and without the credentials of addresses."""
    if state.is_main_process and lines:
        print(without_credentials("\n".join(lines)))


def parse_numbers(flag: str, text: str) -> list[Any]:
    """Whole numbers from 0 up, of a list such as `"25,50"`."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"{flag} {text} are no whole numbers; give some as 25,50.")
    numbers = [int(part) for part in text.split(",")]
    if max(numbers) >= 2**63:
        raise ValueError(f"{flag} {text}: the numbers must lie below 2**63; give smaller ones.")
    return numbers


def is_pipeline(name: str) -> bool:
    """Whether a folder, or a repository of the Hub, holds a pipeline."""
    if Path(name).exists() or name.count("/") != 1 or ":" in name:
        return (Path(name) / "model_index.json").is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        hf_hub_download(name, "model_index.json")
    except (OSError, ValueError, HTTPError):
        return False
    return True


def load_extractors(specs: Sequence[str], pipe: Any, state: Any) -> list[Any]:
    """What images are measured in, none of which guides the pipeline."""
    from .evaluation.evaluate import check_independent
    from .evaluation.features.extractors import load_features

    extractors = [load_features(spec, state.device) for spec in specs]
    names = [extractor.name for extractor in extractors]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two of --features are called {name}; name them apart, as NAME=MODEL.")
    if pipe is not None:
        for extractor in extractors:
            check_independent(pipe, extractor)
    return extractors


def open_real(spec: str, size: tuple[int, int], args: argparse.Namespace, state: Any) -> Any:
    """Images to measure against, brought to a size; a pipeline's samples; or statistics, of a file without images."""
    from .evaluation.features.feature_sets import FeatureSet
    from .evaluation.features.image_sets import SampledImages, has_images, open_images

    if is_pipeline(spec):
        pipe = load_guided(spec, state)
        if pipe.sample_size != size:
            raise ValueError(f"{spec} makes images of {pipe.sample_size} pixels, and those to measure have {size}.")
        return SampledImages(pipe, labels_to_sample(pipe, args), args.seed)
    if spec.endswith(".npz") and Path(spec).is_file() and not has_images(spec):
        return FeatureSet.load(spec)
    return open_images(spec, size)


def inspect_classifier(args: argparse.Namespace) -> None:
    """Measures a noisy classifier at each level of noise: a picture, numbers, and what they mean."""
    from .data import BUILT_IN, DataArguments, load_labelled_images
    from .evaluation.classifier_inspection import inspect_classifier, noise_schedule, with_classes_of
    from .evaluation.plots import classifier_curves
    from .files import check_outside, check_replaceable, has_json, write_json
    from .generation.samples import read_record
    from .models.classifier_adm import image_size
    from .processes import join_processes

    check_output(args.output, ".png")
    numbers = Path(args.output).with_suffix(".json")
    check_outside(args.output, [args.data])
    record = {"command": "inspect-classifier"}  # training's have none
    is_marked = read_record(args.output) == record
    check_replaceable([args.output], lambda path: is_marked, [args.model, args.data])
    check_replaceable([numbers], lambda path: is_marked and has_json(path, "findings", "rows"))
    classifier = load_classifier(args.model)
    noise_schedule(classifier)  # refuses one of clean images before any are loaded
    is_folder = args.data not in BUILT_IN and Path(args.data).is_dir()
    train, held_out = load_labelled_images(
        DataArguments(
            train_data_dir=args.data if is_folder else None,
            dataset_name=None if is_folder else args.data,
            train_split=args.train_split,
            validation_split=args.validation_split,
            held_out_fraction=args.held_out_fraction,
            image_column=args.image_column,
            label_column=args.label_column,
            resolution=list(image_size(classifier.config)),
            image_channels=classifier.config.in_channels,
        ),
        seed=args.seed,
    )
    if held_out is None:
        raise ValueError(f"Nothing of {args.data} is held out; give a larger --held_out_fraction, or none.")
    train, held_out = (with_classes_of(classifier, images) for images in (train, held_out))
    state = join_processes()
    tell(state, *(f"Note: {note}" for note in train.notes))
    if not state.is_main_process:
        return
    inspection = inspect_classifier(
        classifier.to(state.device),
        held_out,
        train,
        seed=args.seed,
        batch_size=args.batch_size,
        max_images=args.num_images,
    )
    classifier_curves(inspection, args.output, record)
    write_json(inspection.to_dict(), numbers)
    tell(
        state,
        f"{args.model} on {inspection.num_images} held-out images of {train.name} (and {inspection.num_train_images} "
        f"that it was trained on)\n\n{inspection}\n\nSaved {args.output} and its numbers as .json",
    )


def load_classifier(model: str) -> Any:
    """An image classifier of a folder or of the Hub, or that of a pipeline there, in float32."""
    import torch
    from transformers import AutoModelForImageClassification

    from . import ADMForImageClassification  # noqa: F401, makes it known to transformers
    from .loading import check_cover, read_config

    of_pipeline = is_pipeline(model)
    if Path(model).is_dir() and not of_pipeline and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} is no folder of a classifier or pipeline: neither config.json nor model_index.json.")
    if of_pipeline and Path(model).is_dir():
        read_config(Path(model) / "model_index.json")  # which may be damaged
    subfolder = {"subfolder": "classifier"} if of_pipeline else {}
    try:
        classifier, info = load_pipeline(
            AutoModelForImageClassification, model, dtype=torch.float32, output_loading_info=True, **subfolder
        )
    except (OSError, ValueError) as error:
        if of_pipeline and (isinstance(error, OSError) or not (Path(model) / "classifier").exists()):
            raise ValueError(f"The pipeline {model} has no classifier to inspect.") from error
        if "Unrecognized" in str(error):
            raise ValueError(f"{model} is no image classifier.") from error
        raise
    check_cover(model, info["missing_keys"])
    return classifier


def upscale(args: argparse.Namespace) -> None:
    """Makes large images of small ones, as an `.npz` file or as a picture of both."""
    import numpy as np
    import torch

    from .data.npz import read_samples
    from .files import check_replaceable
    from .generation.grids import labelled_grid, save_png
    from .generation.samples import read_record, to_picture, write_samples
    from .generation.sampling import to_8_bit
    from .pipelines.pipeline_classifier_guided_upscale import ClassifierGuidedUpscalePipeline

    # 1. What there is, looked at before hours are spent on it
    check_output(args.output, ".npz", ".png")
    record = {"command": "upscale"}
    check_replaceable([args.output], lambda path: read_record(path) == record, args.images)
    images: Any
    labels: Any = None
    if len(args.images) == 1 and args.images[0].endswith(".npz"):
        images, labels = read_samples(args.images[0])
    else:
        images = [open_picture(path) for path in args.images]
    pipe = load_pipeline(ClassifierGuidedUpscalePipeline, args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.prepare_low_res(images if isinstance(images, list) else images[:1])
    if args.labels is not None:
        labels = class_ids(pipe, args.labels)
    elif pipe.num_classes is None:
        labels = None
    if labels is not None:
        labels = pipe.resolve_labels(labels).cpu()
        if len(labels) not in (1, len(images)):
            raise ValueError(f"--labels names {len(labels)} classes for {len(images)} images; give one, or one each.")
        labels = labels.expand(len(images))
    elif pipe.unet.config.num_class_embeds is not None and not pipe.unet.config.null_class_label:
        raise ValueError("This upsampler is told the class: add --labels, one for all images or one for each.")

    # 2. Upsample; as the published script does, 8 bits cut off what lies between them
    generator = torch.Generator().manual_seed(args.seed)
    batches = []
    for start in range(0, len(images), args.batch_size):
        part = slice(start, start + args.batch_size)
        sample = pipe(
            images[part],
            None if labels is None else labels[part],
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            respacing=args.respacing,
            generator=generator,
            output_type="latent",
        ).images
        batches.append(to_8_bit(sample).permute(0, 2, 3, 1).cpu().numpy())
    large = np.concatenate(batches)

    # 3. Save
    if args.output.endswith(".npz"):
        write_samples(args.output, [large], large.shape, None if labels is None else labels.numpy(), record=record)
    else:
        shown = ((pipe.prepare_low_res(images) + 1) * 127.5).round().to(torch.uint8)  # bytes come back to the bit
        small = shown.permute(0, 2, 3, 1).cpu().numpy()
        pairs = zip(map(to_picture, small), map(to_picture, large), strict=True)
        names = [""] * len(large) if labels is None else [pipe.id2label.get(i, str(i)) for i in labels.tolist()]
        grid = labelled_grid([picture for pair in pairs for picture in pair], names, cell_size=max(large.shape[1:3]))
        save_png(grid, args.output, record=record)
    print(f"Saved {len(large)} images of {large.shape[1]}x{large.shape[2]} as {args.output}")


def number_between(low: int, high: int) -> Callable[[str], int]:
    """A whole number in a range, for argparse."""

    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} does not lie between {low:,} and {high:,}")
        return int(text)

    return number


count = number_between(1, 10**9)
seed = number_between(0, 2**63 - 1)
port = number_between(1, 65535)
workers = number_between(0, 1024)


def open_picture(path: str) -> Any:
    """A picture's file, upright."""
    from .data.images import BAD_IMAGE_ERRORS, open_image

    try:
        return open_image({"path": path, "bytes": None})
    except BAD_IMAGE_ERRORS as error:
        raise ValueError(
            f"{path} is no picture that can be read ({error}); give .png files and the like, or one .npz."
        ) from error


def load_pipeline(kind: Any, model: str, **arguments: Any) -> Any:
    """A pipeline or model of a folder or of the Hub, without the bars of its parts."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from .loading import naming_damage

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if not Path(model).exists() and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise ValueError(f"There is no folder {model}.")
    try:
        with naming_damage(model):
            return kind.from_pretrained(model, **arguments)
    except OSError as error:
        if Path(model).exists():
            raise
        raise ValueError(f"There is no folder {model}, and it could not be downloaded from the Hub.") from error


def check_output(path: str, *suffixes: str, flag: str = "--output") -> None:
    """Refuses, before the work, a file of another kind, or in a folder that is not there or takes none."""
    from .files import check_parent

    if not path.endswith(suffixes):
        raise ValueError(f"{flag} {path} must end in {' or '.join(suffixes)}.")
    check_parent(path, flag)


def paths_of(*specs: str | None) -> list[str]:
    """What images and features, given as `name:part` and `NAME=MODEL` too, may be as paths."""
    return [path for spec in specs if spec for path in (spec, spec.rpartition(":")[0], spec.partition("=")[2])]


def class_ids(pipe: Any, labels: Sequence[str]) -> list[int]:
    """Class ids of the labels of the command line; says so where a number is a name and not the id."""
    ids = pipe.resolve_labels(labels).tolist()
    named = {label: i for label, i in zip(labels, ids, strict=True) if label.isdecimal() and int(label) != i}
    if named and os.environ.get("RANK", "0") == "0":
        print("Note: numbers are taken for class names:", ", ".join(f"{name} has id {i}" for name, i in named.items()))
    return ids


def join_flags(argv: Sequence[str]) -> list[str]:
    """Makes `--flags VALUE` one word, for argparse takes a value that begins with dashes for an option."""
    joined: list[str] = []
    words = iter(argv)
    for word in words:
        value = next(words, None) if word == "--flags" else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def convert(args: argparse.Namespace) -> None:
    """Converts published checkpoints to a folder, or a folder back."""
    if args.to == "openai":
        from .conversion.export import export_checkpoint

        others = ("checkpoint", "flags", "labels", "dtype", "push_to_hub", "hub_model_id", "hub_private")
        superfluous = [name for name in others if getattr(args, name)]
        if args.model is None or superfluous:
            raise ValueError(
                "--to openai takes the folder of a pipeline or model, --output and, for the pipeline's classifier, "
                "--classifier" + "".join(f"; leave --{name} out" for name in superfluous) + "."
            )
        export_checkpoint(args.model, args.output, classifier=args.classifier, token=args.hub_token)
        return

    if args.checkpoint is None:
        raise ValueError("--checkpoint is missing: the .pt file to convert.")
    if args.push_to_hub:
        if not args.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id user/name to know where.")
        from .hub.push import prepare_push

        args.hub_model_id = prepare_push(args.hub_model_id, private=args.hub_private or None, token=args.hub_token)

    from .conversion.convert import convert_checkpoint

    convert_checkpoint(
        args.checkpoint,
        args.output,
        name=args.model,
        flags=args.flags,
        classifier=args.classifier,
        labels=args.labels,
        dtype=args.dtype or "fp32",
        repo_id=args.hub_model_id,
    )
    if args.push_to_hub:
        from .hub import push_folder

        url = push_folder(args.output, args.hub_model_id, private=args.hub_private or None, token=args.hub_token)
        print(without_credentials(url))


def push(args: argparse.Namespace) -> None:
    """Pushes a folder to the Hub, and the page that shows it."""
    from .hub import push_folder
    from .hub.push import prepare_push

    access = {"private": args.hub_private or None, "token": args.hub_token}
    if args.repo_id is None and args.space is None:
        raise ValueError("Name the repository to push to, user/name; or, for a page of a model there, --space.")
    if args.include and args.repo_id is None:
        raise ValueError("--include is for files of a folder that is pushed; name its repository, or leave it out.")
    if args.hub_license and args.repo_id is None:
        raise ValueError("--hub_license is for a folder that is pushed; name its repository, or leave it out.")
    if args.judge and not args.space:
        raise ValueError("--judge is for the page of --space; add that, or leave it out.")
    if args.repo_id is not None:
        url = push_folder(
            args.folder,
            args.repo_id,
            commit_message=args.commit_message,
            revision=args.revision,
            create_pr=args.create_pr,
            standalone=args.standalone,
            include=args.include,
            license=args.hub_license,
            **access,
        )
        print(without_credentials(url))
    elif Path(args.folder).exists():
        raise ValueError(f"A page shows a model of the Hub: say where {args.folder} goes, as user/name before --space.")
    if args.space is not None:
        from tempfile import TemporaryDirectory

        from .hub.space import write_space
        from .pipelines.auto_pipeline import pipeline_class

        with TemporaryDirectory() as folder:
            model_id = args.folder if args.repo_id is None else prepare_push(args.repo_id, **access)
            kind = pipeline_class(args.folder, args.hub_token).__name__
            write_space(folder, model_id=model_id, judge_id=args.judge, model_class=kind)
            print(without_credentials(push_folder(folder, args.space, repo_type="space", **access)))


def demo(args: argparse.Namespace) -> None:
    """Serves a page to play with a pipeline until it is stopped."""
    from .demo.page import build_demo, launch_demo
    from .processes import join_processes

    stopped: list[int] = []
    try:
        state = join_processes()
        pipe = load_guided(args.model, state)
        judge = load_extractors([args.judge], pipe, state)[0] if args.judge else None
        url = launch_demo(build_demo(pipe, judge, shown_name(args.model)), args.host, args.port)
        for signum in (signal.SIGINT, signal.SIGTERM):  # no exception, which whatever runs just then could swallow
            signal.signal(signum, lambda signum, frame: stopped.append(signum))
        print(f"The demo of {args.model} is at {url} until Ctrl-C.", flush=True)
        while not stopped:
            time.sleep(0.1)
    except KeyboardInterrupt as stop:
        stopped.append(getattr(stop, "signum", signal.SIGINT))
    print("Stopped.", file=sys.stderr, flush=True)
    os._exit(128 + stopped[0])  # an orderly end is aborted by the threads of a walk under way


def shown_name(model: str) -> str:
    """What a page calls a model: its name on the Hub, or the part of its folder's path that says something."""
    if not Path(model).exists():
        return model
    return next(part for part in reversed(Path(model).absolute().parts) if part not in ("pipeline", "model"))


if __name__ == "__main__":
    main()
