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

import dataclasses
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
from hf_guided.data import DataArguments, LabelledImages
from hf_guided.evaluation.classifier_inspection import inspect_classifier
from hf_guided.evaluation.plots import classifier_curves
from hf_guided.fields import PositiveInt, flag
from hf_guided.files import write_json
from hf_guided.schedulers.scheduling_adm import model_timesteps
from hf_guided.training.arguments import LoopArguments, ModelArguments, run_script
from hf_guided.training.budget import parse_planned
from hf_guided.training.loop import train_and_save
from hf_guided.training.saving import publish
from hf_guided.training.task import Batch, Images, Task, fitted
from hf_guided.training.timestep_sampling import TimestepSampler

logger = logging.getLogger(__name__)


@dataclass
class ClassifierArguments(LoopArguments, ModelArguments):
    """A classifier's flags."""

    pool: str = flag("attention", "Pooling head.", choices=("adaptive", "attention", "spatial", "spatial_v2"))
    noisy: bool = flag(True, "Train on noised images, to guide; otherwise on clean ones, to evaluate.")
    augment: bool = flag(False, "Crop images at random scales and places, as --random_crop does for every stage.")
    inspected_images: PositiveInt = flag(2000, "Most held-out images that a noisy-image classifier is measured on.")


class ClassifierTask(Task):
    """Cross entropy of the class of an image, noised or clean.

    Args:
        args, images: As for [`Task`].
        name (`str`, defaults to `"classifier"`): Name in logs and in `output_dir`.
    """

    folder = "model"

    def __init__(self, args: ClassifierArguments, images: Images, name: str = "classifier"):
        if args.augment:
            images = (dataclasses.replace(images[0], random_crop=True), images[1])
        super().__init__(args, images)
        kind = "noisy" if args.noisy else "clean"
        self.name, self.title, self.summary = name, f"Classifier of {kind}", f"A classifier of {kind} images"
        self.scheduler = ADMScheduler(**args.schedule())
        self.timestep_sampler = TimestepSampler(args.num_train_timesteps)

    def make_model(self) -> ADMForImageClassification:
        return make_classifier(self.args, self.images)

    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        images, model_timestep = batch["pixel_values"], None
        if self.args.noisy:
            images = self.scheduler.add_noise(images, torch.randn_like(images), timesteps)
            model_timestep = model_timesteps(self.scheduler, timesteps)
        logits = model(images, model_timestep).logits.float()
        accuracy = (logits.argmax(dim=-1) == batch["labels"]).float()
        return F.cross_entropy(logits, batch["labels"], reduction="none"), {"accuracy": accuracy}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"pixel_values": batch["pixel_values"]}

    def pipeline(self) -> ADMForImageClassification:
        return self.model

    def preview(self, path: Path) -> None:
        """A classifier has none."""

    def facts(self) -> dict[str, Any]:
        return {"noise schedule": self.args.beta_schedule} if self.args.noisy else {}

    def report(self, folder: Path) -> dict[str, Any]:
        """Measures a noisy classifier at each noise level, into `inspection.png` and `inspection.json`."""
        if not self.args.noisy:
            return {}
        try:
            if self.held_out is None:
                raise ValueError("no images are held out.")
            classifier = ADMForImageClassification.from_pretrained(folder).to(PartialState().device)
            found = inspect_classifier(
                classifier,
                self.held_out,
                self.images,
                batch_size=self.args.train_batch_size,
                max_images=self.args.inspected_images,
            )
        except ValueError as error:  # the images do not allow it: too late to refuse the training
            logger.warning(f"The classifier is not inspected: {error}")
            return {}
        logger.info(f"\n{found}")
        classifier_curves(found, folder / "inspection.png")
        write_json(found.to_dict(), folder / "inspection.json")
        return {"inspection": found.to_dict()}


def train_classifier(
    data_args: DataArguments, args: ClassifierArguments, images: Images | None = None, name: str = "classifier"
) -> Path:
    """Trains a [`ClassifierTask`] of a name and saves it, see [`train_and_save`]."""
    return train_and_save(partial(ClassifierTask, name=name), data_args, args, images)


def make_classifier(args: ClassifierArguments, images: LabelledImages) -> ADMForImageClassification:
    """A new classifier for the images' size, channels and classes."""
    return ADMForImageClassification(
        ADMClassifierConfig(
            sample_size=list(images.resolution),
            in_channels=images.image_channels,
            pool=args.pool,
            id2label=images.id2label,
            label2id={label: id for id, label in images.id2label.items()},
            **args.schedule(),
            **args.architecture() | fitted(args, images.resolution),
        )
    )


def main() -> None:
    data_args, stages, budget = parse_planned(
        {"classifier": ClassifierArguments}, {"classifier": ClassifierTask}, description=__doc__
    )
    budget.start("classifier", stages["classifier"])
    publish(train_classifier(data_args, stages["classifier"]), stages["classifier"])


if __name__ == "__main__":
    run_script(main)
