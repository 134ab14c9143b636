"""`hf-guided sweep`: measures samples at every scale, draws fidelity against diversity, and saves the scale to keep."""

import argparse
from pathlib import Path
from typing import Any

from ..credentials import without_credentials
from ._arguments import add_measuring, count, parse_numbers

HELP = "find the guidance scale"


# Flags of a sweep that may differ between two sittings.
SWEEP_FREE = {"scales", "steps", "seeds", "output", "features", "num_workers", "no_cache", "no_save", "compile"}


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
    from ..evaluation.evaluate import judged_labels
    from ..evaluation.features.extractors import weights_digest
    from ..evaluation.features.feature_sets import CACHE_DIR, FeatureSet, collect_features
    from ..evaluation.features.image_sets import ImageSet, SampledImages
    from ..evaluation.plots import sweep_curve
    from ..evaluation.run import load_extractors, open_real, paths_of
    from ..evaluation.sweep import choose_scale, guidance_at, parse_scales, save_choice
    from ..evaluation.sweep import sweep as sweep_scales
    from ..files import check_outside, check_place, check_replaceable, differing, has_json, read_json, write_json
    from ..generation.options import labels_to_sample
    from ..generation.sampling import COMPILING
    from ..pipelines.auto_pipeline import load_pipeline
    from ..processes import from_main, join_processes, print_once, resumable

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
    pipe = load_pipeline(args.model, state)
    if not hasattr(pipe, "set_sampling_defaults"):
        raise ValueError(f"{args.model} is a {type(pipe).__name__}, which nothing guides; a sweep is of guidance.")
    guidance_at(pipe, scales[0])
    for number in (number for number in steps if number is not None):
        pipe.set_timesteps(number, None, None)  # refuses what the schedule has not
    (extractor,) = load_extractors(args.features, pipe, state)
    reference = open_real(args.reference, pipe.sample_size, state, args.labels, args.num_images)
    labels = labels_to_sample(pipe, args.labels, default="all", num_images=args.num_images)
    if isinstance(labels, int):
        raise ValueError(f"{args.model} has no classes, so nothing steers it; a sweep is of guidance by classes.")
    notes = list(reference.notes) if isinstance(reference, ImageSet) else []
    judged = judged_labels(SampledImages(pipe, labels), extractor, notes)
    flags = {**vars(args), "labels": args.labels or ["all"], "seed": 0}
    settings = without_credentials({name: value for name, value in flags.items() if name not in SWEEP_FREE})
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
    print_once(*(f"Note: {note}" for note in notes))

    def keep(rows: list[dict[str, Any]]) -> None:
        known["rows"] = rows
        write_json({"settings": settings, "rows": rows}, path)

    # 2. Measure
    output.mkdir(parents=True, exist_ok=True)
    if args.compile:
        pipe.compile()
        print_once(COMPILING)
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
    print_once(reason)
    if args.no_save:
        return
    if not args.condition_unet:
        print_once("Nothing is saved: by default this pipeline tells its UNet the class, here it was not told.")
    elif not Path(args.model).is_dir():
        print_once(f"{args.model} is not a folder, so nothing is saved; download it first to have it keep this.")
    else:
        print_once(f"{args.model} keeps by default: {save_choice(args.model, chosen)}")
