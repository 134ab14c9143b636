"""Trains a classifier of noisy images, to guide, or of clean ones, to evaluate.

    accelerate launch training/train_classifier.py                                   # the built-in digits
    accelerate launch training/train_classifier.py --train_data_dir photos --resolution 64
    accelerate launch --multi_gpu training/train_classifier.py --recipe imagenet128 --train_data_dir imagenet
    accelerate launch -m hf_guided.training.train_classifier                         # from an installed wheel

arXiv 2105.05233, section 4.3: the encoder of the UNet with an attention pool, trained on images noised to uniformly
drawn timesteps. The finished classifier is `<output_dir>/classifier/model`, with a card that reports its
accuracy at each noise level, and the timesteps to guide at.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from hf_guided.interrupts import stop_at_once

    stop_at_once()

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn

from hf_guided import ADMClassifierConfig, ADMForImageClassification, ADMScheduler
from hf_guided.data import DataArguments, LabelledImages, load_labelled_images
from hf_guided.evaluation.classifier_inspection import inspect_classifier
from hf_guided.evaluation.plots import classifier_curves
from hf_guided.fields import flag
from hf_guided.files import write_json
from hf_guided.hub import write_model_card
from hf_guided.schedulers.scheduling_adm import model_timesteps
from hf_guided.training.arguments import (
    ArchitectureArguments,
    LoopArguments,
    ScheduleArguments,
    parse_arguments,
    run_script,
)
from hf_guided.training.cards import describe_data, describe_images, describe_run, describe_steps
from hf_guided.training.loop import Batch, Task, finish, publish, train
from hf_guided.training.timestep_sampling import TimestepSampler

logger = logging.getLogger(__name__)


@dataclass
class ClassifierArguments(LoopArguments, ScheduleArguments, ArchitectureArguments):
    """A classifier's flags."""

    pool: str = flag("attention", "Pooling head.", choices=("adaptive", "attention", "spatial", "spatial_v2"))
    noisy: bool = flag(True, "Train on noised images, to guide; otherwise on clean ones, to evaluate.")


class ClassifierTask(Task):
    """Cross entropy of the class of an image, noised or clean."""

    def __init__(self, name: str, model: ADMForImageClassification, scheduler: ADMScheduler, noisy: bool):
        self.name = name
        self.model = model
        self.scheduler = scheduler
        self.noisy = noisy
        self.timestep_sampler = TimestepSampler(scheduler.config.num_train_timesteps)

    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        images, model_timestep = batch["pixel_values"], None
        if self.noisy:
            images = self.scheduler.add_noise(images, torch.randn_like(images), timesteps)
            model_timestep = model_timesteps(self.scheduler, timesteps)
        logits = model(images, model_timestep).logits.float()
        accuracy = (logits.argmax(dim=-1) == batch["labels"]).float()
        return F.cross_entropy(logits, batch["labels"], reduction="none"), {"accuracy": accuracy}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"pixel_values": batch["pixel_values"]}


def train_classifier(
    data_args: DataArguments,
    args: ClassifierArguments,
    images: tuple[LabelledImages, LabelledImages | None] | None = None,
    name: str = "classifier",
) -> Path:
    """Trains and saves a classifier; returns its folder.

    Args:
        data_args ([`DataArguments`]), args ([`ClassifierArguments`]): The flags.
        images (a pair of [`LabelledImages`], *optional*): Images to train and to validate on, if already loaded.
        name (`str`, defaults to `"classifier"`): Name in logs and in `output_dir`.

    Returns:
        `Path`: The finished folder.
    """
    train_images, held_out_images = images or load_labelled_images(data_args, seed=args.seed)
    torch.manual_seed(args.seed)
    task = ClassifierTask(name, make_classifier(args, train_images), ADMScheduler(**args.schedule()), args.noisy)
    kind = "noisy" if args.noisy else "clean"

    def save(folder: str, is_finished: bool = False) -> None:
        task.model.save_pretrained(folder)
        inspection = None
        if args.noisy and is_finished:
            inspection = inspect(folder, train_images, held_out_images, args)
        write_model_card(
            folder,
            title=f"Classifier of {kind} {data_args.title}",
            summary=f"A classifier of {kind} images",
            class_names=list(train_images.id2label.values()),
            training={
                "images": describe_images((train_images, held_out_images)),
                "steps": describe_steps(args, name),
                **({"noise schedule": args.beta_schedule} if args.noisy else {}),
                **describe_run(args),
            },
            inspection=inspection,
            model_class="ADMForImageClassification",
            repo_id=args.hub_model_id,
            license=args.hub_license,
            **describe_data(data_args),
        )

    train(task, train_images, held_out_images, args, data_args, save)
    return finish(partial(save, is_finished=True), Path(args.output_dir) / name / "model")


def inspect(
    folder: str, train_images: LabelledImages, held_out_images: LabelledImages | None, args: ClassifierArguments
) -> dict[str, Any] | None:
    """Measures a saved classifier at each noise level, into `inspection.png` and `inspection.json` in its folder."""
    try:
        if held_out_images is None:
            raise ValueError("no images are held out.")
        classifier = ADMForImageClassification.from_pretrained(folder).to(PartialState().device)
        inspection = inspect_classifier(classifier, held_out_images, train_images, batch_size=args.train_batch_size)
    except ValueError as error:  # the images do not allow it: too late to refuse the training
        logger.warning(f"The classifier is not inspected: {error}")
        return None
    logger.info(f"\n{inspection}")
    classifier_curves(inspection, Path(folder) / "inspection.png")
    write_json(inspection.to_dict(), Path(folder) / "inspection.json")
    return inspection.to_dict()


def make_classifier(args: ClassifierArguments, images: LabelledImages) -> ADMForImageClassification:
    """A new classifier for the images' size, channels and classes."""
    return ADMForImageClassification(
        ADMClassifierConfig(
            sample_size=list(images.resolution),
            in_channels=images.image_channels,
            pool=args.pool,
            id2label=images.id2label,
            label2id={label: id for id, label in images.id2label.items()},
            **args.architecture(),
            **args.schedule(),
        )
    )


def main() -> None:
    data_args, stages = parse_arguments({"classifier": ClassifierArguments}, description=__doc__)
    publish(train_classifier(data_args, stages["classifier"]), stages["classifier"])


if __name__ == "__main__":
    run_script(main)
