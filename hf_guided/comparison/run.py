"""Comparison of families of generative models: trained with the same budget and measured in the same features.

    hf-guided compare --data digits --families vae,gan,flow,diffusion,guided --budget 5m

The numbers of each run are saved when it is finished. Rerun the same command to resume.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForImageClassification

from hf_guided.comparison.measuring import Measuring
from hf_guided.comparison.report import write_comparison
from hf_guided.comparison.trainer import STAGES, TITLES, Budget, Trainer, load, num_parameters, with_flags
from hf_guided.credentials import without_credentials
from hf_guided.data import load_labelled_images, source_argument
from hf_guided.evaluation.evaluate import FEWEST_IMAGES
from hf_guided.evaluation.features.extractors import ModelFeatures, load_features
from hf_guided.files import check_replaceable, differing, has_json, read_json, write_json
from hf_guided.guidance.classifier import ClassifierGuidance
from hf_guided.training.arguments import parse_arguments
from hf_guided.training.cards import describe_run

logger = logging.getLogger(__name__)

_PLAN = {"settings": dict, "steps": {str: {str: int}}, "widths": {str: {str: dict}}, "seconds_per_step": dict}
_GROWING = {"families", "seeds", "hardware"}  # settings that may change when a comparison is resumed


def compare(
    data: str,
    output: str | Path,
    *,
    families: Sequence[str] = tuple(TITLES),
    models: dict[str, str] | None = None,
    budget: str = "5m",
    seeds: Sequence[int] = (0, 1, 2),
    features: str | None = None,
    num_images: int = 2000,
    guidance_scale: float = 0.5,
    guidance_scales: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 3.0, 10.0),
    resolution: Sequence[int] | None = None,
    recipe: str | None = None,
    batch_size: int = 250,
) -> Path:
    """Compares families, each trained with each seed and the same budget, or trained models; returns the report's path.

    Args:
        data (`str`): A built-in dataset, a folder with one sub-folder of images per class, or a dataset on the Hub.
        output (`str` or `Path`): Folder for the models, the numbers and the report, `comparison.html`.
        families (`Sequence[str]`): Some of `"vae"`, `"gan"`, `"flow"`, `"diffusion"` (class-conditional) and
            `"guided"` (with a classifier that takes a third of the budget).
        models (`dict[str, str]`, *optional*): Trained pipelines to compare instead, folders or ids on the Hub, by the
            name that the report gives them.
        budget (`str`, defaults to `"5m"`): See [`Budget.parse`]. For a time, the speed is measured first.
        seeds (`Sequence[int]`, defaults to `(0, 1, 2)`): Of the models of each family, one per seed.
        features (`str`, *optional*): Features, see [`load_features`]; default: an evaluation classifier is trained.
        num_images (`int`, defaults to 2000): Samples of each model, balanced over the classes.
        guidance_scale (`float`, defaults to 0.5), guidance_scales (`Sequence[float]`): Those of guided diffusion, in
            the table and of its curve.
        resolution (`Sequence[int]`, *optional*), recipe (`str`, *optional*): As the training scripts take them.
        batch_size (`int`, defaults to 250): Images at once, in sampling and measuring.

    Raises:
        `ValueError`: For an unknown family or budget, unsuitable images, or an output of another comparison.
    """
    output = Path(output)
    check_outputs(output, [data, recipe, features])
    check_choice(families, seeds, (guidance_scale, *guidance_scales))
    trainer = open_trainer(data, output, resolution, recipe, Budget.parse(budget), seeds, num_images)
    extractor = None if features is None else load_features(features, PartialState().device)
    settings: dict[str, Any] = {
        "data": trainer.data_args.title,
        "images": [images.digest for images in trainer.images],
        "recipe": trainer.flags["judge"].recipe,
        "resolution": list(trainer.images[0].resolution),
        "families": list(models or families),
        "budget": None if models else str(trainer.budget),
        "seeds": [0] if models else list(seeds),
        "num_images": num_images,
        "features": without_credentials(features) or "judge",
        "guidance_scale": guidance_scale,
        "guidance_scales": list(guidance_scales),
        "hardware": describe_run(trainer.flags["judge"])["hardware"],
        "class_names": list(trainer.images[0].id2label.values())[:10],
        **({} if extractor is None else {"judge": extractor.fingerprint}),
    }
    output.mkdir(parents=True, exist_ok=True)
    trainer.plan |= read_plan(output, settings)
    if extractor is None:
        folder = trainer.train("judge", output_dir=str(output))
        judge = AutoModelForImageClassification.from_pretrained(folder).to(PartialState().device)
        extractor = ModelFeatures(judge, "judge")
    measuring = Measuring(extractor, trainer.images, num_images, batch_size, guidance_scale, tuple(guidance_scales))
    if models:
        runs, drawn = [measured_run(name, load(folder), measuring) for name, folder in models.items()], models
    else:
        for family in families:
            trainer.fit(family)
            write_json(trainer.plan, output / "plan.json")
        trainer.log_plan(families, seeds, output)
        runs = [trainer.run(family, seed, measuring, output) for seed in seeds for family in families]
        folders = {family: output / f"seed-{seeds[0]}" / family / "pipeline" for family in families}
        drawn = {family: str(folder) for family, folder in folders.items() if folder.is_dir()}  # others diverged
    grids = {"real": measuring.real_pictures(), **{name: measuring.pictures(load(drawn[name])) for name in drawn}}
    titles = {"real": "Held-out images", **{name: TITLES.get(name, name) for name in drawn}}
    settings["features"] = extractor.name
    write_comparison(output, {"settings": settings, "real": measuring.real, "runs": runs}, grids, titles)
    return output / "comparison.html"


def check_outputs(output: Path, inputs: Sequence[str | None]) -> None:
    """Refuses to replace files of others."""
    plan, sheet = output / "plan.json", output / "comparison.json"
    is_comparison = has_json(plan, "settings") or has_json(sheet, "settings", "real", "runs")
    pictures = [output / name for name in ("comparison.md", "comparison.html", "grids.png", "curves.png")]
    check_replaceable([plan, sheet, *pictures], lambda path: is_comparison, inputs)


def check_choice(families: Sequence[str], seeds: Sequence[int], guidance_scales: Sequence[float]) -> None:
    """Refuses unknown or repeated families, repeated seeds, and guidance scales that are not allowed."""
    if not families or not seeds or not set(families) <= TITLES.keys():
        raise ValueError(
            f"--families {','.join(families)}: give one or more of {', '.join(TITLES)}, and one seed or more."
        )
    for name, given in (("families", families), ("seeds", seeds)):
        if len(set(given)) < len(given):
            raise ValueError(f"--{name} {','.join(map(str, given))}: give each value once.")
    for scale in guidance_scales:
        ClassifierGuidance(scale)


def open_trainer(
    data: str,
    output: Path,
    resolution: Sequence[int] | None,
    recipe: str | None,
    budget: Budget,
    seeds: Sequence[int],
    num_images: int,
) -> Trainer:
    """What trains the families, with its data loaded and all flags checked."""
    argv = [*(f"--{flag}={source}" for flag, source in source_argument(data).items()), "--output_dir", str(output)]
    argv += [] if resolution is None else ["--resolution", *map(str, resolution)]
    argv += [] if recipe is None else ["--recipe", recipe]
    data_args, flags = parse_arguments({name: stage.arguments for name, stage in STAGES.items()}, argv)
    for seed in seeds:
        with_flags(flags["judge"], seed=seed)  # checks the seed
    for args in flags.values():
        args.report_to, args.preview_steps, args.push_to_hub = "none", 0, False
    flags["diffusion"].label_dropout = 0.0  # always class-conditional here
    train, held_out = load_labelled_images(data_args, seed=0)
    if train.notes and PartialState().is_main_process:
        logger.info("\n".join(f"{train.name}: {note}" for note in train.notes))
    if held_out is None or min(len(train), len(held_out), num_images) < FEWEST_IMAGES:
        raise ValueError(
            f"{data_args.source}: a comparison needs at least {FEWEST_IMAGES} training, held-out and sampled images."
        )
    return Trainer(data_args, (train, held_out), flags, budget)


def read_plan(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The plan with these settings, of a comparison to resume or a new one; a damaged or other one is refused."""
    plan: dict[str, Any] = {"settings": settings}
    if (output / "plan.json").is_file():
        fix = f"give another --output, or remove {output} to compare from scratch"
        plan = without_credentials(read_json(output / "plan.json", _PLAN, fix))
    changed = set(differing(plan["settings"], settings, {"data": "images", "features": "judge"})) - _GROWING
    if changed:
        raise ValueError(
            f"{output} holds a comparison with other settings ({', '.join(sorted(changed))}); give the same flags, or "
            f"another --output."
        )
    return {**plan, "settings": settings}


def measured_run(name: str, pipeline: Any, measuring: Measuring) -> dict[str, Any]:
    """The results of a trained model."""
    parameters = num_parameters(pipeline.components[pipeline.main_component])
    run = {"family": name, "title": name, "seed": 0, "losses": {}, "parameters": parameters}
    return {**run, **measuring.model(pipeline)}
