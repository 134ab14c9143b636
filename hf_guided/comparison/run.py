"""Comparison of families of generative models: trained with the same budget and measured in the same features.

    hf-guided compare --data digits --families vae,gan,flow,diffusion,guided --budget 5m

The numbers of each run are saved when it is finished. Rerun the same command to resume.
"""

import dataclasses
import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoModelForImageClassification

from hf_guided import ADMScheduler
from hf_guided.comparison.report import write_comparison
from hf_guided.credentials import without_credentials
from hf_guided.data import DataArguments, LabelledImages, load_labelled_images, source_argument
from hf_guided.evaluation.evaluate import FEWEST_IMAGES, check_independent, judged_labels, measure
from hf_guided.evaluation.features.extractors import FeatureExtractor, ModelFeatures, load_features
from hf_guided.evaluation.features.feature_sets import FeatureSet, collect_features
from hf_guided.evaluation.features.image_sets import ImageSet, LoadedImages, SampledImages
from hf_guided.evaluation.likelihood import likelihood, likelihood_labels
from hf_guided.evaluation.memorisation import memorisation
from hf_guided.families import BASELINES, DIFFUSION, family_of
from hf_guided.files import check_replaceable, differing, has_json, read_json, write_json
from hf_guided.generation.sampling import sample_batches
from hf_guided.guidance.classifier import ClassifierGuidance
from hf_guided.labels import match_classes
from hf_guided.pipelines.auto_pipeline import pipeline_class
from hf_guided.processes import StoppedError
from hf_guided.training.arguments import LoopArguments, parse_arguments
from hf_guided.training.cards import describe_run
from hf_guided.training.checkpoints import read_history, save_folder
from hf_guided.training.loop import DivergedError, Task, estimate_memory
from hf_guided.training.train_baseline import COLLAPSED, TRAINERS, train_baseline
from hf_guided.training.train_classifier import ClassifierArguments, ClassifierTask, make_classifier, train_classifier
from hf_guided.training.train_diffusion import DiffusionArguments, DiffusionTask, make_unet, train_diffusion

logger = logging.getLogger(__name__)

Images = tuple[LabelledImages, LabelledImages | None]

TITLES = {name: family.title for name, family in [*BASELINES.items(), ("diffusion", DIFFUSION)]}
TITLES["guided"] = "Guided diffusion"
CLASSIFIER_SHARE = 1 / 3  # of the budget of guided diffusion

_STAGES = {
    "judge": ClassifierArguments,
    "classifier": ClassifierArguments,
    "diffusion": DiffusionArguments,
    **{family: arguments for family, (arguments, _) in TRAINERS.items()},
}
_CALIBRATION = (10, 30)  # steps between which the speed is measured
_UNITS = {"s": ("seconds", 1), "m": ("seconds", 60), "h": ("seconds", 3600),
          "steps": ("steps", 1), "parameters": ("parameters", 1)}  # fmt: skip
_MOST = {"seconds": 366 * 86400, "steps": 1e11, "parameters": 1e11}
_LIKELIHOOD_IMAGES = 128
_PICTURED = 5  # images of each class in the report
_MAX_REAL_IMAGES = 10_000
_PLAN = {"settings": dict, "steps": {str: {str: int}}, "widths": {str: {str: dict}}, "seconds_per_step": dict}
_RUN = {"family": str, "seed": int, "parameters": int, "metrics": dict, "losses": dict, "notes": list}
_GROWING = {"families", "seeds", "hardware"}  # settings that may change when a comparison is resumed
_GUIDANCE_HAS_NO_BITS = "the density of the guided samples is not known"


@dataclass(frozen=True)
class Budget:
    """The training budget of every family.

    Attributes:
        amount (`float`): The amount, in its unit.
        unit (`str`): `"seconds"` of training, `"steps"` of training, or `"parameters"`, trained for the recipe's steps.
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """The budget of a text such as `"5m"`, `"300s"`, `"1h"`, `"2000steps"` or `"500kparameters"`.

        Raises:
            `ValueError`: For anything else.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kM]?)\s*(s|m|h|steps|parameters)", text)
        if match is not None:
            unit, factor = _UNITS[match[3]]
            amount = float(match[1]) * factor * {"": 1, "k": 1e3, "M": 1e6}[match[2]]
            if 0 < amount <= _MOST[unit]:
                return cls(amount, unit)
        raise ValueError(f"--budget {text} is not a budget; give 5m, 300s, 1h, 2000steps or 500kparameters.")

    def __str__(self) -> str:
        if self.unit != "seconds":
            return f"{self.amount:,.0f} {self.unit}"
        return f"{self.amount / 60:g} minutes" if self.amount >= 60 else f"{self.amount:g} seconds"


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
    """The report that compares families, each trained with each seed and the same budget, or compares trained models.

    Args:
        data (`str`): A built-in dataset, a folder with one sub-folder of images per class, or a dataset on the Hub.
        output (`str` or `Path`): Folder for the models, the numbers and the report.
        families (`Sequence[str]`): Some of `"vae"`, `"gan"`, `"flow"`, `"diffusion"` (class-conditional) and
            `"guided"` (class-conditional, with a classifier that takes a third of the budget).
        models (`dict[str, str]`, *optional*): Trained pipelines to compare instead, folders or ids on the Hub, by the
            name that the report gives them.
        budget (`str`, defaults to `"5m"`): See [`Budget.parse`]. For a time, the speed is measured first.
        seeds (`Sequence[int]`, defaults to `(0, 1, 2)`): One model of each family is trained per seed.
        features (`str`, *optional*): The evaluation classifier or other features, see [`load_features`]. By default
            the recipe trains an evaluation classifier.
        num_images (`int`, defaults to 2000): Samples of each model, balanced over the classes.
        guidance_scale (`float`, defaults to 0.5): Guidance scale of guided diffusion in the table.
        guidance_scales (`Sequence[float]`): Guidance scales of its curve.
        resolution (`Sequence[int]`, *optional*), recipe (`str`, *optional*): As the training scripts take them.
        batch_size (`int`, defaults to 250): Images at once, in sampling and measuring.

    Returns:
        `Path`: The report, `comparison.html`.

    Raises:
        `ValueError`: For an unknown family or budget, unsuitable images, or an output of another comparison.
    """
    # 1. Checks, before hours are spent
    output = Path(output)
    plan_file, sheet = output / "plan.json", output / "comparison.json"
    is_comparison = has_json(plan_file, "settings") or has_json(sheet, "settings", "real", "runs")
    pictures = [output / name for name in ("comparison.md", "comparison.html", "grids.png", "curves.png")]
    check_replaceable([plan_file, sheet, *pictures], lambda path: is_comparison, [data, recipe, features])
    unknown = [family for family in families if family not in TITLES]
    if unknown or not families or not seeds:
        raise ValueError(
            f"--families {','.join(families)}: give one or more of {', '.join(TITLES)}, and one seed or more."
        )
    for name, given_values in (("families", families), ("seeds", seeds)):
        if len(set(given_values)) < len(given_values):
            raise ValueError(f"--{name} {','.join(map(str, given_values))}: give each value once.")
    given = Budget.parse(budget)
    argv = [f"--{flag}={source}" for flag, source in source_argument(data).items()]
    argv += [] if resolution is None else ["--resolution", *map(str, resolution)]
    argv += [] if recipe is None else ["--recipe", recipe]
    argv += ["--output_dir", str(output)]
    data_args, stages = parse_arguments(_STAGES, argv)
    for seed in seeds:
        with_flags(stages["judge"], seed=seed)  # checks the seed
    for scale in (guidance_scale, *guidance_scales):
        ClassifierGuidance(scale)
    images = load_labelled_images(data_args, seed=0)
    train, held_out = images
    if train.notes and PartialState().is_main_process:
        logger.info("\n".join(f"{train.name}: {note}" for note in train.notes))
    if held_out is None or min(len(train), len(held_out), num_images) < FEWEST_IMAGES:
        raise ValueError(
            f"{data_args.source}: a comparison needs at least {FEWEST_IMAGES} training, held-out and sampled images."
        )
    for args in stages.values():
        args.report_to, args.preview_steps, args.push_to_hub = "none", 0, False
    stages["diffusion"].label_dropout = 0.0  # always class-conditional here
    settings: dict[str, Any] = {
        "data": data_args.title,
        "images": [train.digest, held_out.digest],
        "recipe": stages["judge"].recipe,
        "resolution": list(train.resolution),
        "families": list(models or families),
        "budget": None if models else str(given),
        "seeds": [0] if models else list(seeds),
        "num_images": num_images,
        "features": without_credentials(features) or "judge",
        "guidance_scale": guidance_scale,
        "guidance_scales": list(guidance_scales),
        "hardware": describe_run(stages["judge"])["hardware"],
        "class_names": list(train.id2label.values())[:10],
    }
    given_judge = None if features is None else load_features(features, PartialState().device)
    if given_judge is not None:
        settings["judge"] = given_judge.fingerprint
    output.mkdir(parents=True, exist_ok=True)
    plan = {"settings": settings}
    if plan_file.is_file():
        fix = f"give another --output, or remove {output} to compare from scratch"
        plan = without_credentials(read_json(plan_file, _PLAN, fix))
    changed = set(differing(plan["settings"], settings, {"data": "images", "features": "judge"})) - _GROWING
    if changed:
        raise ValueError(
            f"{output} holds a comparison with other settings ({', '.join(sorted(changed))}); give the same flags, or "
            f"another --output."
        )

    # 2. The evaluation classifier, and the features of the real images
    if given_judge is None:
        judge_folder = train_classifier(data_args, with_flags(stages["judge"], output_dir=str(output)), images, "judge")
        judge = AutoModelForImageClassification.from_pretrained(judge_folder).to(PartialState().device)
        extractor: FeatureExtractor = ModelFeatures(judge, "judge")
    else:
        extractor = given_judge
    measuring = Measuring(extractor, images, num_images, batch_size, guidance_scale, tuple(guidance_scales))

    # 3. Train, sample, measure
    runs = []
    if models:
        for name, folder in models.items():
            pipeline = load(folder)
            trained = pipeline.components[pipeline.main_component]
            run: Any = {"family": name, "title": name, "seed": 0, "losses": {}}
            run["parameters"] = sum(parameter.numel() for parameter in trained.parameters())
            runs.append({**run, **measuring.model(pipeline)})
    else:
        plan = {"steps": {}, "widths": {}, "seconds_per_step": {}, **plan, "settings": settings}
        for family in families:
            fit(family, given, stages, data_args, images, plan)
            write_json(plan, plan_file)
        log_plan(plan, families, seeds, given, output)
        for seed in seeds:
            for family in families:
                runs.append(trained_run(family, seed, stages, data_args, images, plan, measuring, output))

    # 4. The report, with samples of the first seed
    folders = models or {family: str(output / f"seed-{seeds[0]}" / family / "pipeline") for family in families}
    drawn = {name: folder for name, folder in folders.items() if models or Path(folder).is_dir()}
    grids = {"real": measuring.real_pictures(), **{name: measuring.pictures(load(drawn[name])) for name in drawn}}
    titles = {"real": "Held-out images", **{name: TITLES.get(name, name) for name in drawn}}
    settings["features"] = extractor.name
    write_comparison(output, {"settings": settings, "real": measuring.real, "runs": runs}, grids, titles)
    return output / "comparison.html"


# The stages of each family, and their shares of the budget.
PARTS = {
    **{family: {family: 1.0} for family in (*TRAINERS, "diffusion")},
    "guided": {"diffusion": 1 - CLASSIFIER_SHARE, "classifier": CLASSIFIER_SHARE},
}
_WIDTHS = {
    **{family: task.widths for family, (_, task) in TRAINERS.items()},
    "diffusion": ("model_channels",),
    "classifier": ("model_channels",),
}


def with_flags(args: Any, **flags: Any) -> Any:
    """A stage's flags with some of them replaced."""
    changed = dataclasses.replace(args, **flags)
    changed.recipe = args.recipe
    return changed


def make_task(stage: str, args: Any, images: LabelledImages) -> Task:
    """The training task of a stage, with a newly initialised model."""
    if stage in TRAINERS:
        return TRAINERS[stage][1](args, images)
    if stage == "classifier":
        return ClassifierTask(stage, make_classifier(args, images), ADMScheduler(**args.schedule()), args.noisy)
    return DiffusionTask(make_unet(args, images), ADMScheduler(**args.reverse_process()), args, images.id2label)


def train_stage(stage: str, data_args: DataArguments, args: Any, images: Images) -> Path:
    """Trains a stage and returns the finished folder."""
    if stage in TRAINERS:
        return train_baseline(stage, data_args, args, images)
    train = train_classifier if stage == "classifier" else train_diffusion
    return train(data_args, args, images)


def fit(
    family: str, budget: Budget, stages: dict[str, Any], data_args: DataArguments, images: Images, plan: dict[str, Any]
) -> None:
    """Adds the steps and widths of a family's stages within the budget to the plan."""
    if family in plan["steps"]:
        return
    plan["steps"][family], plan["widths"][family] = {}, {}
    for stage, share in PARTS[family].items():
        steps, widths = stages[stage].max_train_steps, {}
        if budget.unit == "steps":
            steps = max(1, round(budget.amount * share))
        elif budget.unit == "seconds":
            if stage not in plan["seconds_per_step"]:
                plan["seconds_per_step"][stage] = seconds_per_step(stage, stages[stage], data_args, images)
            steps = max(1, int(budget.amount * share / plan["seconds_per_step"][stage]))
        else:
            widths = widths_of(stage, stages[stage], images[0], budget.amount * share)
        plan["steps"][family][stage], plan["widths"][family][stage] = steps, widths


def seconds_per_step(stage: str, args: LoopArguments, data_args: DataArguments, images: Images) -> float:
    """The measured duration of a training step on this machine, in seconds."""
    first, last = _CALIBRATION
    with TemporaryDirectory() as folder:
        flags = {"max_train_steps": last, "logging_steps": first, "validation_steps": 0, "checkpointing_steps": last}
        try:
            train_stage(stage, data_args, with_flags(args, output_dir=folder, **flags), images)
        except StoppedError as stop:
            raise StoppedError(stop.signum) from None  # its checkpoint only served this measurement
        rows = {row["step"]: row["seconds"] for row in read_history(Path(folder) / stage)}
    return (rows[last] - rows[first]) / (last - first)


def widths_of(stage: str, args: LoopArguments, images: LabelledImages, parameters: float) -> dict[str, int]:
    """The widths, multiples of 32, that bring a stage's number of parameters closest to a budget."""
    best: tuple[float, dict[str, int]] = (math.inf, {})
    for width in range(32, 4096, 32):
        widths = dict.fromkeys(_WIDTHS[stage], width)
        count = num_parameters(make_task(stage, with_flags(args, **widths), images))
        best = min(best, (abs(math.log(count / parameters)), widths), key=lambda found: found[0])
        if count > parameters:
            break
    if best[0] > math.log(10):  # the smallest has more than ten times as many
        raise ValueError(
            f"--budget: {stage} of this recipe cannot have as few as {parameters:,.0f} parameters; give more."
        )
    return best[1]


def num_parameters(task: Task) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in task.model.parameters())


def log_plan(plan: dict[str, Any], families: Sequence[str], seeds: Sequence[int], budget: Budget, output: Path) -> None:
    """Logs the steps of each family, the output folder and the estimated time."""
    lines = [f"\n== compare ==\nEach family gets {budget}, with {len(seeds)} seed(s)."]
    for family in families:
        parts = [f"{stage} {steps:,} steps" for stage, steps in plan["steps"][family].items()]
        widths = [f"{name} {width}" for part in plan["widths"][family].values() for name, width in part.items()]
        lines.append(f"  {TITLES[family]}: {', '.join(parts + widths)}")
    if budget.unit == "seconds":
        minutes = len(families) * len(seeds) * budget.amount / 60
        lines.append(f"Training takes about {minutes:.0f} minutes in total, plus the time for sampling and evaluation.")
    logger.info("\n".join([*lines, f"Writes {output}; rerun the same command to resume."]))


def trained_run(
    family: str,
    seed: int,
    stages: dict[str, Any],
    data_args: DataArguments,
    images: Images,
    plan: dict[str, Any],
    measuring: "Measuring",
    output: Path,
) -> dict[str, Any]:
    """The results of a family with a seed: trained and measured, or read if it is finished."""
    folder = output / f"seed-{seed}" / family
    if (folder / "run.json").is_file():
        try:
            return read_json(folder / "run.json", _RUN)
        except ValueError as error:
            logger.warning(f"{error} The run is repeated.")
    args = {
        stage: with_flags(
            stages[stage], seed=seed, output_dir=str(folder), max_train_steps=steps, **plan["widths"][family][stage]
        )
        for stage, steps in plan["steps"][family].items()
    }
    tasks = {stage: make_task(stage, args[stage], images[0]) for stage in args}
    run: dict[str, Any] = {
        "family": family,
        "title": TITLES[family],
        "seed": seed,
        "parameters": sum(num_parameters(task) for task in tasks.values()),
        "memory_bytes": max(
            estimate_memory(task, images[0], args[stage].train_batch_size) for stage, task in tasks.items()
        ),
        "steps": sum(part.max_train_steps for part in args.values()),
    }
    try:
        folders: dict[str, Path] = {}
        for stage in args:
            folders[stage] = train_stage(stage, data_args, args[stage], images)
    except DivergedError as error:
        run |= {"metrics": {}, "curve": None, "losses": {}, "notes": [f"diverged: {error}"]}
    else:
        histories = {stage: read_history(folder / stage) for stage in args}
        run["train_seconds"] = sum(history[-1]["seconds"] for history in histories.values())
        main = next(iter(histories.values()))
        run["losses"] = {
            name: [[row["seconds"], row[name]] for row in main if name in row] for name in ("loss", "held_out/loss")
        }
        pipeline = assemble(folders, measuring.guidance_scale, folder / "pipeline")
        run |= measuring.model(pipeline)
        run["notes"] += collapse(main)
    write_json(run, folder / "run.json")
    return run


def assemble(folders: dict[str, Path], guidance_scale: float, destination: Path) -> Any:
    """The pipeline of a family's trained parts, saved in `destination`."""
    pipeline = load(str(next(iter(folders.values()))))
    if "classifier" in folders:
        classifier = AutoModelForImageClassification.from_pretrained(folders["classifier"])
        pipeline.register_modules(classifier=classifier.to(pipeline.device))
        defaults = pipeline.config.sampling_defaults or {}
        pipeline.set_sampling_defaults(**{**defaults, "guidance_scale": guidance_scale})
    save_folder(pipeline.save_pretrained, destination)
    return pipeline


def load(model: str) -> Any:
    """A pipeline of any family, on this process's device."""
    pipeline = pipeline_class(model).from_pretrained(model).to(PartialState().device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def collapse(history: Sequence[dict[str, float]]) -> list[str]:
    """A note on mode collapse of a GAN, if it ended in it."""
    watched = [row["lowest_spread"] for row in history if "lowest_spread" in row]
    if not watched or watched[-1] >= COLLAPSED:
        return []
    return [f"mode collapse: the spread of samples of a class was only {watched[-1]:.0%} of its real images'"]


class Measuring:
    """Measures models in the same way: class-balanced samples against the training images, in the same features.

    Args:
        extractor ([`FeatureExtractor`]): Computes the features, such as an evaluation classifier.
        images (a pair of [`LabelledImages`]): The training images and the held-out ones.
        num_images (`int`), batch_size (`int`): Number of samples per model, and images at once.
        guidance_scale (`float`), guidance_scales (`Sequence[float]`): For guided models: in the table, and of the
            curve.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        images: Images,
        num_images: int,
        batch_size: int,
        guidance_scale: float,
        guidance_scales: Sequence[float],
    ):
        self.extractor, self.batch_size = extractor, batch_size
        self.guidance_scale, self.guidance_scales = guidance_scale, guidance_scales
        train, held_out = images
        assert held_out is not None  # checked before
        self.held_out_images = LoadedImages(held_out.plain(_MAX_REAL_IMAGES))
        self.id2label = train.id2label
        self.labels = torch.arange(num_images) % train.num_classes
        self.train = self.features(LoadedImages(train.plain(_MAX_REAL_IMAGES)))
        self.held_out = self.features(self.held_out_images)
        judged = judged_labels(self.held_out_images, extractor, [])
        self.real = {"metrics": self.metrics(self.held_out, judged)}

    def features(self, images: ImageSet) -> FeatureSet:
        collected = collect_features(images, self.extractor, batch_size=self.batch_size)
        assert collected is not None  # a comparison runs in one process
        return collected

    def metrics(self, features: FeatureSet, judged: Any) -> dict[str, float]:
        """Metrics by their plain names, since all are in the same features."""
        return {name.partition("/")[0]: value for name, value in measure(features, self.train, judged).items()}

    def model(self, pipeline: Any) -> dict[str, Any]:
        """All results of a model."""
        check_independent(pipeline, self.extractor)
        size = self.held_out_images.size
        if pipeline.sample_size != size:
            raise ValueError(
                f"A model makes images of {pipeline.sample_size} pixels, but the data's images have {size}; give the "
                f"models' --resolution."
            )
        notes: list[str] = []
        labels = self.labels_of(pipeline, self.labels)
        judged = judged_labels(SampledImages(pipeline, labels), self.extractor, notes)

        def sampled(**arguments: Any) -> tuple[FeatureSet, dict[str, float]]:
            features = self.features(SampledImages(pipeline, labels, **arguments))
            return features, self.metrics(features, judged)

        features, metrics = sampled()
        curve = None
        if (trade_off := self.trade_off(pipeline)) is not None:
            name, argument, values = trade_off
            points = [{"value": value, "metrics": sampled(**{argument: value})[1]} for value in values]
            curve = {"name": name, "points": points}
        if (width := pipeline.main_config.get("dequantization_width", 1)) > 1:
            notes.append(
                f"its values are dequantised over {width:g} steps of the 8-bit scale, which adds "
                f"{math.log2(width):.2f} to its bits/dim"
            )
        return {
            "metrics": metrics,
            "copied_share": memorisation(features, self.train, self.held_out).copied_share,
            "seconds_per_image": self.seconds_per_image(pipeline),
            "curve": curve,
            "notes": notes,
            **self.bits(pipeline),
        }

    def labels_of(self, pipeline: Any, labels: torch.Tensor) -> torch.Tensor:
        """The model's class ids for the data's class ids, matched by name."""
        if not pipeline.id2label:
            return labels
        matched = match_classes(self.id2label, pipeline.id2label, set(labels.tolist()), "of the pipeline")
        return torch.tensor([matched[label] for label in labels.tolist()])

    def trade_off(self, pipeline: Any) -> tuple[str, str, Sequence[float]] | None:
        """What trades variety for fidelity: its name, the argument of the pipeline's call, and values."""
        if getattr(pipeline, "classifier", None) is not None:
            return "guidance scale", "guidance_scale", self.guidance_scales
        family = family_of(type(pipeline).__name__)
        return (family.trade_off, family.trade_off, family.curve) if family.curve else None

    def bits(self, pipeline: Any) -> dict[str, Any]:
        """Bits per dimension of held-out images, or the reason why there are none."""
        if getattr(pipeline, "classifier", None) is not None:
            return {"bits_per_dim": None, "bits_kind": None, "no_bits": _GUIDANCE_HAS_NO_BITS}
        images = LoadedImages(self.held_out_images.images.plain(_LIKELIHOOD_IMAGES))
        try:
            found = likelihood(pipeline, images, likelihood_labels(pipeline, images), batch_size=self.batch_size)
        except ValueError as error:
            reason = getattr(pipeline, "no_likelihood", None) or str(error)
            return {"bits_per_dim": None, "bits_kind": None, "no_bits": reason}
        assert found is not None
        return {"bits_per_dim": found.total_bpd, "bits_kind": found.kind, "no_bits": None}

    def seconds_per_image(self, pipeline: Any) -> float:
        """Sampling time in seconds per image, of the fastest of three batches."""
        labels = self.labels_of(pipeline, self.labels[: self.batch_size])
        seconds = []
        for seed in range(3):
            started = time.perf_counter()
            list(sample_batches(pipeline, labels, self.batch_size, seed))
            seconds.append(time.perf_counter() - started)
        return min(seconds) / len(labels)

    def pictures(self, pipeline: Any) -> list[Any]:
        """Samples of the first ten classes, side by side for each."""
        labels = torch.arange(min(10, len(self.id2label))).repeat_interleave(_PICTURED)
        return SampledImages(pipeline, self.labels_of(pipeline, labels)).pictures(self.batch_size)

    def real_pictures(self) -> list[Any]:
        """Held-out images of the first ten classes."""
        rows = [np.flatnonzero(self.held_out_images.labels == label) for label in range(min(10, len(self.id2label)))]
        return [self.held_out_images.picture(int(row)) for of_class in rows for row in np.resize(of_class, _PICTURED)]
