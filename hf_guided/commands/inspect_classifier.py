"""`hf-guided inspect-classifier`: measures a noisy classifier at each noise level: a picture, numbers, findings."""

import argparse
from pathlib import Path
from typing import Any

from ._arguments import add_batches, add_seed, count

HELP = "measure how good a noisy classifier is, and where to guide"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a classifier's or a pipeline's folder, or its name on the Hub")
    parser.add_argument("data", help="digits, a folder with one sub-folder of images per class, or a dataset")
    parser.add_argument("--train_split", default="train", metavar="NAME", help="as it was trained; default: train")
    parser.add_argument("--validation_split", metavar="NAME", help="the split held out; default: a part of the above")
    parser.add_argument("--held_out_fraction", type=float, metavar="F", help="that part; default: training's own")
    parser.add_argument("--image_column", metavar="NAME", help="default: found by its type or usual name")
    parser.add_argument("--label_column", metavar="NAME", help="default: found by its type or usual name")
    parser.add_argument("--num_images", type=count, default=2000, metavar="N", help="held-out ones; default: 2000")
    add_batches(parser, 64)
    add_seed(parser)
    parser.add_argument(
        "--output", default="inspection.png", metavar="PNG", help="numbers go beside it as .json; default: %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    """Measures a noisy classifier at each level of noise: a picture, numbers, and what they mean."""
    from ..data import BUILT_IN, DataArguments, load_labelled_images
    from ..evaluation.classifier_inspection import inspect_classifier, noise_schedule, with_classes_of
    from ..evaluation.plots import classifier_curves
    from ..files import check_outside, check_parent, check_replaceable, has_json, write_json
    from ..generation.samples import read_record
    from ..models.classifier_adm import image_size
    from ..processes import join_processes, print_once

    check_parent(args.output, suffix=".png")
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
    print_once(*(f"Note: {note}" for note in train.notes))
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
    print_once(
        f"{args.model} on {inspection.num_images} held-out images of {train.name} (and {inspection.num_train_images} "
        f"that it was trained on)\n\n{inspection}\n\nSaved {args.output} and its numbers as .json",
    )


def load_classifier(model: str) -> Any:
    """An image classifier of a folder or of the Hub, or that of a pipeline there, in float32."""
    import torch
    from transformers import AutoModelForImageClassification

    from .. import ADMForImageClassification  # noqa: F401, makes it known to transformers
    from ..loading import check_cover, read_config
    from ..pipelines.auto_pipeline import is_pipeline, load_saved

    of_pipeline = is_pipeline(model)
    if Path(model).is_dir() and not of_pipeline and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} is no folder of a classifier or pipeline: neither config.json nor model_index.json.")
    if of_pipeline and Path(model).is_dir():
        read_config(Path(model) / "model_index.json")  # which may be damaged
    subfolder = {"subfolder": "classifier"} if of_pipeline else {}
    try:
        classifier, info = load_saved(
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
