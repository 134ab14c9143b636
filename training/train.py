"""The whole walk: a judge, a noisy classifier, an ADM UNet, a guided pipeline, and what guidance does to its samples.

    accelerate launch training/train.py                                              # the built-in digits, minutes
    accelerate launch training/train.py --train_data_dir photos --resolution 64 --mixed_precision bf16
    accelerate launch training/train.py --recipe digits --diffusion_max_train_steps 300 --output_dir outputs/short
    accelerate launch -m hf_guided.training.train                                    # from an installed wheel

A flag such as `--max_train_steps` holds for every stage, `--classifier_max_train_steps` for one. `--output_dir` ends up
with `pipeline/` (for `ClassifierGuidedPipeline.from_pretrained`), grids, curves and `report.json`. Stopped or killed,
the same command goes on where it was.
"""

import logging
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification

from hf_guided import ClassifierGuidedPipeline
from hf_guided.data import LabelledImages, load_labelled_images
from hf_guided.evaluation import classifier_features, judge_samples, labelled_grid, save_png, trade_off_curve
from hf_guided.hub import write_model_card
from hf_guided.schedulers.schedules import space_timesteps
from hf_guided.training.arguments import RunArguments, flag, parse_arguments, run_script
from hf_guided.training.loop import finish, write_json
from hf_guided.training.train_classifier import ClassifierArguments, train_classifier
from hf_guided.training.train_diffusion import DiffusionArguments, train_diffusion

logger = logging.getLogger(__name__)


@dataclass
class ReportArguments(RunArguments):
    """What is sampled and judged at the end."""

    num_images: int = flag(500, "Samples judged at each setting.")
    sampling_batch_size: int = flag(250, "Samples made at once.")
    respacing: str = flag("25", "Timesteps, in OpenAI's notation; also the pipeline's saved default.")
    guidance_scales: list[float] = flag([0.0, 1.0, 3.0, 10.0], "Scales at which the classifier alone steers.")
    conditional_scales: list[float] = flag([0.0, 1.0], "Scales beside a UNet that is told the class.")
    default_scale: float = flag(3.0, "Scale that the pipeline saves as its default.")


def main() -> None:
    stage_types = {
        "judge": ClassifierArguments,
        "classifier": ClassifierArguments,
        "diffusion": DiffusionArguments,
        "report": ReportArguments,
    }
    data_args, stages = parse_arguments(stage_types, description=__doc__)
    args: ReportArguments = stages["report"]
    output_dir = Path(args.output_dir)
    for name in ("judge", "classifier", "diffusion"):  # the finished folder alone is pushed
        stages[name].output_dir, stages[name].push_to_hub = str(output_dir / name), False
    check_stages(stages)
    started = time.monotonic()

    # 1. Train: what judges, what guides, what makes images
    images = load_labelled_images(data_args, seed=args.seed)
    judge_folder = train_classifier(data_args, stages["judge"], images, name="judge")
    classifier_folder = judge_folder and train_classifier(data_args, stages["classifier"], images)
    diffusion_folder = classifier_folder and train_diffusion(data_args, stages["diffusion"], images)
    if diffusion_folder is None:
        return

    # 2. Assemble
    device = PartialState().device
    judge = AutoModelForImageClassification.from_pretrained(judge_folder).to(device)
    pipeline = ClassifierGuidedPipeline.from_pretrained(
        diffusion_folder,
        classifier=AutoModelForImageClassification.from_pretrained(classifier_folder),
        sampling_defaults={"respacing": args.respacing, "guidance_scale": args.default_scale},
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)

    # 3. Sample, judge, publish
    if PartialState().is_main_process:
        trained = time.monotonic()
        logger.info("\n== report ==")
        report = make_report(pipeline, judge, images, args, output_dir)
        minutes = {"training": (trained - started) / 60, "report": (time.monotonic() - trained) / 60}
        write_json({"seed": args.seed, "rows": report, "minutes": minutes}, output_dir / "report.json")

        def save(folder: str) -> None:
            pipeline.save_pretrained(folder)
            names = list(pipeline.id2label)[:10]
            draw_grid(pipeline, names, args.default_scale, Path(folder) / "grid.png")
            generated = [row for row in report if row["guidance_scale"] is not None]
            trade_off_curve(generated, Path(folder) / "trade_off.png")
            write_model_card(
                folder,
                title=f"Guided diffusion on {images[0].name}",
                dataset=images[0].name,
                class_names=list(pipeline.id2label.values()),
                training=describe(stages, images, minutes["training"]),
                results=report,
                dataset_id=data_args.dataset_name if "/" in (data_args.dataset_name or "") else None,
                repo_id=args.hub_model_id,
            )
    else:
        save = pipeline.save_pretrained
    finish(save, output_dir / "pipeline", args)
    if PartialState().is_main_process:
        print_table(report)
        logger.info(f"\nPictures, numbers and the pipeline are in {output_dir}. Try:\n")
        logger.info(
            f"  from hf_guided import ClassifierGuidedPipeline\n"
            f'  pipe = ClassifierGuidedPipeline.from_pretrained("{output_dir / "pipeline"}")\n'
            f"  pipe({[pipeline.id2label[0]]}).images[0].save('sample.png')"
        )


def check_stages(stages: dict[str, Any]) -> None:
    """Refuses at once what would only fail when all is trained."""
    classifier, diffusion, report = stages["classifier"], stages["diffusion"], stages["report"]
    for name in ("beta_schedule", "num_train_timesteps", "rescale_timesteps"):
        if getattr(classifier, name) != getattr(diffusion, name):
            raise ValueError(
                f"The classifier's {name} is {getattr(classifier, name)!r} and the UNet's "
                f"{getattr(diffusion, name)!r}; both must see the same noise, so give --{name} once, for all stages."
            )
    space_timesteps(diffusion.num_train_timesteps, report.respacing)
    if diffusion.class_conditional and diffusion.label_dropout == 0 and report.guidance_scales:
        raise ValueError(
            "The report's guidance_scales are for a classifier that steers alone, beside a UNet that is not told the "
            "class; with label_dropout 0 this UNet must always be told. Give --label_dropout 0.1, or a recipe whose "
            "report has guidance_scales: []."
        )


def make_report(
    pipeline: ClassifierGuidedPipeline,
    judge: torch.nn.Module,
    images: tuple[LabelledImages, LabelledImages | None],
    args: ReportArguments,
    output_dir: Path,
) -> list[dict[str, Any]]:
    """Samples at every setting, judged by a network that never guides; the held-out images are the floor."""
    train_features = classifier_features(judge, all_images(images[0])[0])[0]
    rows: list[dict[str, Any]] = []
    if images[1] is not None and len(images[1]) > 3:
        pixel_values, labels = all_images(images[1])
        verdict = judge_samples(judge, pixel_values, labels, train_features)
        rows.append({"samples": "held-out images", "guidance_scale": None, "condition_unet": None, **verdict})

    settings = [(scale, False) for scale in args.guidance_scales]
    if pipeline.unet.config.num_class_embeds is not None:
        settings += [(scale, True) for scale in args.conditional_scales]
    for scale, condition_unet in tqdm(settings, desc="sampling"):
        labels = torch.arange(args.num_images) % len(pipeline.id2label)
        generator = torch.Generator().manual_seed(args.seed)
        batches = [
            pipeline(
                batch,
                guidance_scale=scale,
                condition_unet=condition_unet,
                generator=generator,
                output_type="pt",
                return_dict=False,
            )[0].cpu()
            for batch in labels.split(args.sampling_batch_size)
        ]
        samples = (torch.cat(batches) * 255).round() / 127.5 - 1  # as the 8-bit images that a user gets
        verdict = judge_samples(judge, samples, labels, train_features)
        rows.append({"samples": "generated", "guidance_scale": scale, "condition_unet": condition_unet, **verdict})
        who = "told" if condition_unet else "not-told"
        path = output_dir / f"grid-scale-{scale:g}-unet-{who}.png"
        draw_grid(pipeline, list(pipeline.id2label)[:10], scale, path, condition_unet)
    return rows


def draw_grid(
    pipeline: ClassifierGuidedPipeline, labels: list[int], scale: float, path: Path, condition_unet: bool = True
) -> None:
    """Ten samples of each class, a row each."""
    images = pipeline(
        labels,
        num_images_per_label=10,
        guidance_scale=scale,
        condition_unet=condition_unet,
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
    )[0]
    names = [pipeline.id2label[label] for label in labels]
    told = "the UNet is told the class" if condition_unet else "the classifier alone steers"
    save_png(labelled_grid(images, names, title=f"scale {scale:g}: {told}"), path)


def all_images(images: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to 10,000 images without augmentation, `(n, channels, height, width)` in [-1, 1], and their labels."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:10_000].tolist()
    examples = [images[index] for index in order]
    return torch.stack([e["pixel_values"] for e in examples]), torch.tensor([e["labels"] for e in examples])


def describe(
    stages: dict[str, Any], images: tuple[LabelledImages, LabelledImages | None], minutes: float
) -> dict[str, Any]:
    """How it was trained, for the model card."""
    device = PartialState().device
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    packages = ("hf-guided", "torch", "diffusers", "transformers", "accelerate")
    return {
        "images": f"{len(images[0])} to train on, {len(images[1] or ())} held out",
        "classifier": f"{stages['classifier'].max_train_steps} steps of {stages['classifier'].train_batch_size}",
        "UNet": f"{stages['diffusion'].max_train_steps} steps of {stages['diffusion'].train_batch_size}",
        "noise schedule": stages["diffusion"].beta_schedule,
        "seed": stages["diffusion"].seed,
        "minutes": round(minutes, 1),
        "hardware": f"{hardware}, {platform.system()}",
        "versions": {name: version(name) for name in packages},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The report on the screen."""
    lines = [f"\n{'':30}{'accuracy':>10}{'FID':>9}{'precision':>11}{'recall':>8}   (in the judge's features)"]
    for row in rows:
        name = row["samples"]
        if row["guidance_scale"] is not None:
            name = f"scale {row['guidance_scale']:g}, UNet {'told' if row['condition_unet'] else 'not told'} the class"
        lines.append(f"{name:34}{row['accuracy']:6.3f}{row['fid']:9.3g}{row['precision']:11.3f}{row['recall']:8.3f}")
    logger.info("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
