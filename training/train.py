"""The main job: trains an evaluation classifier, a noisy classifier and an ADM UNet, and reports on guided samples.

    accelerate launch training/train.py                                              # the built-in digits, minutes
    accelerate launch training/train.py --train_data_dir photos --budget 30m         # planned for this machine
    accelerate launch training/train.py --train_data_dir photos --resolution 64 --mixed_precision bf16
    accelerate launch training/train.py --recipe digits --diffusion_max_train_steps 300 --output_dir outputs/short
    accelerate launch -m hf_guided.training.train                                    # from an installed wheel

A flag such as `--max_train_steps` holds for every stage, `--classifier_max_train_steps` for one. `--output_dir` then
has `pipeline/` (for `ClassifierGuidedPipeline.from_pretrained`), `scales.png`, grids, curves and `report.json`. After a
stop or a kill, rerun the same command to resume. Exit statuses: see `hf_guided/processes.py`.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from hf_guided.interrupts import stop_at_once

    stop_at_once()

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification

from hf_guided import ADMUNet2DModel, ClassifierGuidedPipeline
from hf_guided.data import DataArguments, LabelledImages, load_labelled_images
from hf_guided.evaluation import trade_off_curve
from hf_guided.evaluation.evaluate import FEWEST_IMAGES, measure
from hf_guided.evaluation.features.extractors import ModelFeatures
from hf_guided.evaluation.features.feature_sets import FeatureSet, collect_features
from hf_guided.evaluation.features.image_sets import ArrayImages, ImageSet, LoadedImages, SampledImages
from hf_guided.evaluation.memorisation import memorisation
from hf_guided.evaluation.metrics.table import METRICS
from hf_guided.evaluation.sweep import guidance_at
from hf_guided.fields import MOST_COUNT, NonNegativeFloat, PositiveInt, Range, flag
from hf_guided.files import check_kind, check_replaceable, has_json, read_json, write_json
from hf_guided.generation.grids import labelled_grid, save_png
from hf_guided.guidance import ClassifierFreeGuidance
from hf_guided.hub import write_model_card
from hf_guided.hub.model_card import weak_accuracy
from hf_guided.hub.push import prepare_push
from hf_guided.processes import join_processes
from hf_guided.training.arguments import RunArguments, SamplingArguments, run_script
from hf_guided.training.budget import parse_planned
from hf_guided.training.cards import aligned, describe_data, describe_images, describe_run, describe_steps, on_hub
from hf_guided.training.checkpoints import list_checkpoints, step_of
from hf_guided.training.saving import finish, publish, save_folder
from hf_guided.training.task import Images
from hf_guided.training.timing import in_words, said, seconds_per_step
from hf_guided.training.train_classifier import ClassifierArguments, ClassifierTask, make_classifier, train_classifier
from hf_guided.training.train_diffusion import DiffusionArguments, DiffusionTask, train_diffusion, unet_config

logger = logging.getLogger(__name__)

MAX_REAL_IMAGES = 10_000  # to measure samples against
SHOWN = 12  # samples of each setting, side by side


@dataclass
class ReportArguments(RunArguments, SamplingArguments):
    """Flags of the samples and their evaluation at the end."""

    num_images: Annotated[int, Range(at_least=FEWEST_IMAGES, at_most=MOST_COUNT)] = flag(
        500, "Samples evaluated at each setting."
    )
    sampling_batch_size: PositiveInt = flag(250, "Samples made at once.")
    guidance_scales: list[NonNegativeFloat] = flag([0.0, 1.0, 3.0, 10.0], "Scales of the classifier guiding alone.")
    conditional_scales: list[NonNegativeFloat] = flag([0.0, 1.0], "Scales with a class-conditional UNet.")
    default_scale: NonNegativeFloat | None = flag(
        3.0,
        "Scale that the pipeline saves as its default. None, as with --budget: of the class-conditional ones whose "
        "samples are recognised, that of best FID, in half of the steps if they are as good.",
    )
    classifier_free: bool = flag(
        False, "Train no classifier to guide: the conditional scales are those of classifier-free guidance."
    )


STAGES = {
    "judge": ClassifierArguments,
    "classifier": ClassifierArguments,
    "diffusion": DiffusionArguments,
    "report": ReportArguments,
}
TASKS = {"judge": ClassifierTask, "classifier": ClassifierTask, "diffusion": DiffusionTask}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains all stages, and reports, by the flags of a command line; by default that of the process."""
    data_args, stages, budget = parse_planned(STAGES, TASKS, argv, description=__doc__)
    args: ReportArguments = stages["report"]
    output_dir = Path(args.output_dir)
    for name in ("judge", "classifier"):  # only the UNet's checkpoints and the finished pipeline are pushed
        stages[name].push_to_hub = False

    # 1. Check what would fail late
    check_outputs(output_dir, stages)
    check_stages(stages)
    images = load_labelled_images(data_args, seed=args.seed)
    check_models(stages, images[0])
    if args.push_to_hub and args.hub_model_id and os.environ.get("RANK", "0") == "0":
        args.hub_model_id = prepare_push(args.hub_model_id, **args.hub_access())

    state = join_processes()
    if state.is_main_process and budget.plan is None:
        logger.info(said(expected_seconds(stages, images, state.device)))

    # 2. Train the evaluation classifier, the guiding classifier and the UNet
    budget.start("judge", stages["judge"])
    judge_folder = train_classifier(data_args, stages["judge"], images, name="judge")
    classifier_folder = None
    if not args.classifier_free:
        budget.start("classifier", stages["classifier"])
        classifier_folder = train_classifier(data_args, stages["classifier"], images)
    budget.start("diffusion", stages["diffusion"])
    diffusion_folder = train_diffusion(data_args, stages["diffusion"], images)
    budget.start("report", args)
    if not PartialState().is_main_process:
        return

    # 3. Assemble and save the pipeline
    device = PartialState().device
    judge = AutoModelForImageClassification.from_pretrained(judge_folder).to(device)
    pipeline = ClassifierGuidedPipeline.from_pretrained(diffusion_folder)
    if classifier_folder is not None:
        pipeline.register_modules(classifier=AutoModelForImageClassification.from_pretrained(classifier_folder))
    save_scale(pipeline.to(device), args)
    pipeline.set_progress_bar_config(disable=True)
    save_folder(pipeline.save_pretrained, output_dir / "pipeline")

    # 4. Sample, evaluate, publish
    logger.info("\n== report ==")
    report = make_report(pipeline, judge, images, args, output_dir)
    save_scale(pipeline, args)
    write_json({"seed": args.seed, "rows": report}, output_dir / "report.json")
    finish(lambda folder: save_pipeline(pipeline, report, data_args, stages, images, folder), output_dir / "pipeline")
    logger.info(
        f"\n{table(report)}\n\nPictures, numbers and the pipeline are in {output_dir}. Try:\n\n"
        f"  from hf_guided import ClassifierGuidedPipeline\n"
        f'  pipe = ClassifierGuidedPipeline.from_pretrained("{output_dir / "pipeline"}")\n'
        f"  pipe({[pipeline.id2label[0]]}).images[0].save('sample.png')"
    )
    if budget.plan is not None:
        logger.info(f"This took {in_words(budget.elapsed())} of {in_words(budget.plan.budget)}.")
    publish(output_dir / "pipeline", args)


def check_outputs(output_dir: Path, stages: dict[str, Any]) -> None:
    """Refuses what is in the way of the results, before any image is loaded."""
    report, pipeline = output_dir / "report.json", output_dir / "pipeline"
    check_kind([pipeline], is_folder=True)
    check_kind([report, output_dir / "scales.png", *output_dir.glob("grid-scale-*.png")], is_folder=False)
    check_replaceable([report], lambda path: has_json(path, "seed", "rows"))
    check_replaceable(
        [pipeline], lambda path: (output_dir / "diffusion").is_dir(), [stages["diffusion"].pretrained_model]
    )


def check_stages(stages: dict[str, Any]) -> None:
    """Refuses stages whose flags contradict each other, before any image is loaded."""
    classifier, diffusion, report = stages["classifier"], stages["diffusion"], stages["report"]
    for name in () if report.classifier_free else classifier.schedule():
        if getattr(classifier, name) != getattr(diffusion, name):
            raise ValueError(
                f"The classifier's {name} is {getattr(classifier, name)!r} and the UNet's "
                f"{getattr(diffusion, name)!r}; both need one noise schedule, so give --{name} once, for all stages."
            )
    if stages["judge"].noisy or not classifier.noisy:
        raise ValueError(
            "The classifier guides and must be trained on noised images (--classifier_noisy true); the evaluation "
            "classifier on clean ones (--judge_noisy false)."
        )
    report.count_steps(diffusion.num_train_timesteps)
    if report.classifier_free and not diffusion.class_conditional:
        raise ValueError(
            "With --classifier_free nothing guides a UNet of --no_class_conditional; leave out one of them."
        )
    scales = report.conditional_scales if diffusion.class_conditional else []
    if report.default_scale is None and not (scales or (report.guidance_scales and not report.classifier_free)):
        raise ValueError("The report has no scale to choose the pipeline's from; give --default_scale.")
    has_null_label = diffusion.class_conditional and diffusion.label_dropout > 0
    if report.classifier_free and not has_null_label and any(report.conditional_scales):
        raise ValueError(
            "With --label_dropout 0 the UNet has no null label, which classifier-free guidance needs; give "
            "--label_dropout 0.1, or --conditional_scales 0."
        )
    if diffusion.class_conditional and not has_null_label and report.guidance_scales and not report.classifier_free:
        raise ValueError(
            "With --label_dropout 0 the UNet has no null label, with which the report's guidance_scales sample; give "
            "--label_dropout 0.1, or a recipe whose report has guidance_scales: []."
        )


def check_models(stages: dict[str, Any], images: LabelledImages) -> None:
    """Refuses too few images, and images of a size that a later stage's model does not take."""
    if len(images) < FEWEST_IMAGES:
        raise ValueError(f"{len(images)} images are too few to train and to evaluate; give {FEWEST_IMAGES} or more.")
    diffusion = stages["diffusion"]
    with torch.device("meta"):  # a forward pass costs nothing there
        noisy = torch.empty(1, images.image_channels, *images.resolution)
        for name in ("judge", "classifier")[: 1 if stages["report"].classifier_free else 2]:
            make_classifier(stages[name], images)(noisy)
        labels = torch.zeros(1, dtype=torch.long) if diffusion.class_conditional else None
        ADMUNet2DModel(**unet_config(diffusion, images))(noisy, torch.zeros(1), labels)


def expected_seconds(stages: dict[str, Any], images: Images, device: torch.device) -> dict[str, float]:
    """Seconds that the steps left of each stage, and the report, take at the speed of a few images."""
    args: ReportArguments = stages["report"]
    seconds, per_image = {}, {"classifier": 0.0}
    for name, make_task in TASKS.items():
        if name == "classifier" and args.classifier_free:
            continue
        stage = stages[name]
        step = seconds_per_step(make_task(stage, images), device)
        per_image[name] = step / stage.train_batch_size / stage.gradient_accumulation_steps
        done = max(map(step_of, list_checkpoints(Path(args.output_dir) / name)), default=0)
        seconds[name] = max(0, stage.max_train_steps - done) * step
    scales = args.guidance_scales + (args.conditional_scales if stages["diffusion"].class_conditional else [])
    # A third of a training step is its forward pass, and two thirds are the gradient of the images
    of_a_step = sum(per_image["diffusion"] / 3 + (scale > 0) * per_image["classifier"] * 2 / 3 for scale in scales)
    num_steps = args.count_steps(stages["diffusion"].num_train_timesteps)
    return {**seconds, "report": of_a_step * args.num_images * num_steps}


def save_scale(pipeline: ClassifierGuidedPipeline, args: ReportArguments) -> None:
    """Makes the guidance scale, of the classifier or of classifier-free guidance, and the steps the pipeline's default.

    The scale is 1 until the report has chosen one.
    """
    scale = 1.0 if args.default_scale is None else args.default_scale
    if args.classifier_free and pipeline.unet.config.null_class_label:
        pipeline.set_sampling_defaults(**args.steps(), guidance=[ClassifierFreeGuidance(scale).to_dict()])
    else:
        pipeline.set_sampling_defaults(**args.steps(), guidance_scale=0.0 if args.classifier_free else scale)


def best_row(report: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of best FID among those whose accuracy is at most 0.01 below that of held-out images.

    Where it is lower at every scale, it may be at most 0.01 below the best.
    """
    generated = [row for row in report if row["guidance_scale"] is not None]
    rated = [row for row in generated if row["condition_unet"]] or generated
    possible = [row["accuracy/judge"] for row in report if row["guidance_scale"] is None]
    needed = min(max(row["accuracy/judge"] for row in rated), *possible, 1.0) - 0.01
    recognised = [row for row in rated if row["accuracy/judge"] >= needed]
    return min(recognised, key=lambda row: row["fid/judge"])


def make_report(
    pipeline: ClassifierGuidedPipeline, judge: Any, images: Images, args: ReportArguments, output_dir: Path
) -> list[dict[str, Any]]:
    """Metrics of samples at every setting, by the evaluation classifier; held-out images show the best possible.

    Chooses scale and steps of the pipeline, if `args` leave them open.
    """
    extractor = ModelFeatures(judge, "judge")

    def features(images: ImageSet) -> FeatureSet:
        collected = collect_features(images, extractor, batch_size=args.sampling_batch_size)
        assert collected is not None  # this is the main process
        return collected

    train = features(LoadedImages(images[0].plain(MAX_REAL_IMAGES)))
    held_out, possible, rows = None, None, []
    if images[1] is not None and len(images[1]) >= FEWEST_IMAGES:
        # As many as samples, since the distance of fewer images is larger
        real = LoadedImages(images[1].plain(min(args.num_images, MAX_REAL_IMAGES)))
        held_out = features(real)
        metrics = measure(held_out, train, real.labels)
        possible = metrics["fid/judge"] if len(real) == args.num_images else None
        rows.append({"samples": "held-out images", "guidance_scale": None, "condition_unet": None, **metrics})

    shown: dict[str, list[Image.Image]] = {}  # the same noises at every setting
    settings = [] if args.classifier_free else [(scale, False) for scale in args.guidance_scales]
    if pipeline.unet.config.num_class_embeds is not None:
        settings += [(scale, True) for scale in args.conditional_scales]
    labels = torch.arange(args.num_images) % len(pipeline.id2label)

    def measured(setting: dict[str, Any], **steps: Any) -> tuple[ArrayImages, dict[str, Any]]:
        samples = sample(pipeline, labels, args, setting["guidance_scale"], setting["condition_unet"], **steps)
        generated = features(samples)
        metrics = measure(generated, train, labels.numpy())
        if held_out is not None:
            metrics["copied_share/judge"] = memorisation(generated, train, held_out).copied_share
        if possible:
            metrics["fd_ratio/judge"] = metrics["fid/judge"] / possible
        return samples, {"samples": "generated", **setting, **metrics}

    for scale, condition_unet in tqdm(settings, desc="sampling"):
        samples, row = measured({"guidance_scale": scale, "condition_unet": condition_unet})
        rows.append(row)
        path = output_dir / f"grid-scale-{scale:g}-{'conditional' if condition_unet else 'unconditional'}.png"
        draw_grid(samples, pipeline, scale, path, condition_unet)
        name = f"scale {scale:g}{'' if condition_unet else ', unconditional'}"
        shown[name] = [samples.picture(index) for index in range(min(SHOWN, len(samples)))]
    if shown:
        pictures = [picture for of_setting in shown.values() for picture in of_setting]
        title = "The same noises at every guidance scale"
        save_png(labelled_grid(pictures, list(shown), title=title), output_dir / "scales.png")
    if args.default_scale is None:
        best = best_row(rows)
        args.default_scale, half = best["guidance_scale"], args.num_inference_steps // 2
        if args.respacing is None and half:
            setting = {name: best[name] for name in ("guidance_scale", "condition_unet")}
            _, row = measured(setting, num_inference_steps=half)
            logger.info(
                f"At scale {args.default_scale:g}, {half} steps: {summed_up(row)}; "
                f"{args.num_inference_steps} steps: {summed_up(best)}."
            )
            if row["fid/judge"] <= 1.05 * best["fid/judge"] and row["accuracy/judge"] >= best["accuracy/judge"] - 0.01:
                args.num_inference_steps = half
    return rows


def summed_up(row: dict[str, Any]) -> str:
    """Accuracy and FID of a row, as text."""
    named = ((METRICS[name], row[f"{name}/judge"]) for name in ("accuracy", "fid"))
    return ", ".join(f"{metric.title} {metric.format(value)}" for metric, value in named)


def sample(
    pipeline: ClassifierGuidedPipeline,
    labels: torch.Tensor,
    args: ReportArguments,
    scale: float,
    condition_unet: bool,
    **steps: Any,
) -> ArrayImages:
    """Samples of classes `(n,)` at a guidance scale, in the pipeline's steps or others."""
    arguments = {"condition_unet": condition_unet, **guidance_at(pipeline, scale), **steps}
    samples = SampledImages(pipeline, labels, args.seed, **arguments)
    batches = samples.split(args.sampling_batch_size)
    made = tqdm(samples.batches(batches), f"samples at scale {scale:g}", len(batches), unit="batch", leave=False)
    return ArrayImages(torch.cat(list(made)).permute(0, 2, 3, 1).numpy(), labels.numpy())


def draw_grid(
    samples: ArrayImages, pipeline: ClassifierGuidedPipeline, scale: float, path: Path, condition_unet: bool
) -> None:
    """Writes a grid of samples that are balanced over the classes: up to ten of the first ten, one class per row."""
    first = [np.flatnonzero(samples.labels == label)[:10] for label in range(min(10, len(pipeline.id2label)))]
    of_class = {label: indices for label, indices in enumerate(first) if len(indices)}
    columns, names = min(map(len, of_class.values())), [pipeline.id2label[label] for label in of_class]
    pictures = [samples.picture(index) for indices in of_class.values() for index in indices[:columns]]
    conditional = condition_unet and pipeline.unet.config.num_class_embeds is not None
    title = f"guidance scale {scale:g}, {'class-conditional' if conditional else 'unconditional'} UNet"
    save_png(labelled_grid(pictures, names, title=title), path)


def save_pipeline(
    pipeline: ClassifierGuidedPipeline,
    report: list[dict[str, Any]],
    data_args: DataArguments,
    stages: dict[str, Any],
    images: Images,
    folder: str,
) -> None:
    """Saves the pipeline with its grid, its trade-off curve, the classifier's inspection and a card."""
    args, diffusion = stages["report"], stages["diffusion"]
    scale = args.default_scale
    pipeline.save_pretrained(folder)
    shown = min(10, len(pipeline.id2label))
    samples = sample(pipeline, torch.arange(10 * shown) % shown, args, scale, condition_unet=True)
    draw_grid(samples, pipeline, scale, Path(folder) / "grid.png", condition_unet=True)
    generated = [row for row in report if row["guidance_scale"] is not None]
    trade_off_curve(generated, "judge", Path(folder) / "trade_off.png")
    inspection, inspected = None, Path(args.output_dir) / "classifier" / "model"
    if (inspected / "inspection.json").is_file():
        for name in ("inspection.json", "inspection.png"):
            shutil.copy(inspected / name, folder)
        inspection = read_json(inspected / "inspection.json")
    write_model_card(
        folder,
        title=f"Guided diffusion on {data_args.title}",
        class_names=list(pipeline.id2label.values()),
        training={
            "images": describe_images(images),
            **({} if args.classifier_free else {"classifier": describe_steps(stages["classifier"], "classifier")}),
            "UNet": describe_steps(diffusion, "diffusion"),
            **({"UNet fine-tuned from": diffusion.pretrained_model} if diffusion.pretrained_model else {}),
            "noise schedule": diffusion.beta_schedule,
            **describe_run(diffusion),
        },
        results=report,
        inspection=inspection,
        repo_id=args.hub_model_id,
        license=args.hub_license,
        base_model=on_hub(diffusion.pretrained_model),
        **describe_data(data_args),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The report as text; a weak evaluation classifier is named first."""
    shown = [metric for metric in METRICS.values() if any(f"{metric.name}/judge" in row for row in rows)]
    lines = [["", *(metric.title for metric in shown)]]
    for row in rows:
        name, scale = row["samples"], row["guidance_scale"]
        if scale is not None:
            name = f"scale {scale:g}, {'conditional' if row['condition_unet'] else 'unconditional'} UNet"
        values = [(metric, row.get(f"{metric.name}/judge")) for metric in shown]
        lines.append([name, *("" if value is None else metric.format(value) for metric, value in values)])
    accuracy = weak_accuracy(rows)
    if accuracy is None:
        return aligned(lines)
    return (
        f"The evaluation classifier is right in only {accuracy:.0%} of held-out images, so these numbers say little; "
        f"train it longer (--judge_max_train_steps).\n\n{aligned(lines)}"
    )


if __name__ == "__main__":
    run_script(main)
