"""What a script trains: a model on images, its loss, and what is shown and saved of it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import LabelledImages
from ..evaluation.features.image_sets import SampledImages
from ..generation.grids import labelled_grid, save_png
from ..generation.samples import NO_CLASS
from ..models.modes import evaluating
from .timestep_sampling import TimestepSampler

Batch = dict[str, torch.Tensor]
Images = tuple[LabelledImages, LabelledImages | None]


class Task(ABC):
    """A model to train on images.

    Args:
        args ([`LoopArguments`]): The flags of its kind.
        images (a pair of [`LabelledImages`]): Images to train on, and to validate on, if any.
    """

    name: str  # the stage, for logs and folders
    title: str  # of the card, before the name of the data: "Diffusion model of"
    summary: str  # of the card: the kind of model in a few words
    folder = "pipeline"  # name of the finished folder
    timestep_sampler = TimestepSampler(1)  # of the timesteps that batches are noised to; one for a model without noise

    def __init__(self, args: Any, images: Images):
        self.args = args
        self.images, self.held_out = images
        self.id2label: dict[int, str] | None = self.images.id2label  # None for an unconditional model
        self.model = self.make_model()

    @abstractmethod
    def make_model(self) -> Any:
        """A new model for the images' size, channels and classes."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of each image at its timestep, `(batch,)`, and tensors `(batch,)` to log, by name."""

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's arguments for a batch, to estimate memory."""

    @abstractmethod
    def pipeline(self) -> Any:
        """The current model as it is saved: a pipeline to sample from, or the model alone."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer, each with an optional learning rate."""
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}]

    def validation_metrics(self) -> dict[str, float]:
        """Further values of the current model to log with the losses on held-out images, by name."""
        return {}

    def preview(self, path: Path) -> None:
        """Writes a grid of samples of the current model: eight of each of the first ten classes."""
        names = ["samples"] if self.id2label is None else list(self.id2label.values())[:10]
        classes = torch.tensor([NO_CLASS]) if self.id2label is None else torch.arange(len(names))
        with evaluating(self.model):
            samples = SampledImages(self.pipeline(), classes.repeat_interleave(8))
            save_png(labelled_grid(samples.pictures(self.args.train_batch_size), names), path)

    def facts(self) -> dict[str, Any]:
        """Entries about the training for the card."""
        return {}

    def findings(self) -> dict[str, Any]:
        """Entries about the finished model for the card."""
        return {}

    def report(self, folder: Path) -> dict[str, Any]:
        """Writes the finished model's pictures and numbers into its folder; returns what [`write_model_card`] takes."""
        self.preview(folder / "grid.png")
        return {}


def fitted(args: Any, resolution: tuple[int, int]) -> dict[str, Any]:
    """The flags of a model's levels, as far as the sides of the images can be halved.

    `channel_mult` or `num_levels` ends where a side is odd; `attention_resolutions` are those of the levels that are
    nearest to the flag's, so that attention at 16 pixels is at 14 for images of 28.
    """
    common = math.gcd(*resolution)
    halvings = (common & -common).bit_length() - 1
    if hasattr(args, "num_levels"):  # halves at each of them
        return {"num_levels": min(args.num_levels, max(1, halvings))}
    levels = {"channel_mult": args.channel_mult[: halvings + 1]}
    if hasattr(args, "attention_resolutions"):
        sides = [resolution[0] >> level for level in range(len(levels["channel_mult"]))]
        wanted = args.attention_resolutions
        nearest = [side for side in sides if any(side / 2**0.5 < other < side * 2**0.5 for other in wanted)]
        levels["attention_resolutions"] = wanted if set(nearest) == set(sides) & set(wanted) else nearest
    return levels


def evenly(size: int, at_most: int) -> list[int]:
    """Indices spread over a set of images, whose rows may be sorted by class."""
    return torch.linspace(0, size - 1, min(size, at_most)).long().tolist()


def examples(images: LabelledImages, indices: Iterable[int]) -> tuple[torch.Tensor, Any]:
    """Images `(n, channels, height, width)` and their labels, if they have any."""
    items = [images[index] for index in indices]
    labels = torch.tensor([item["labels"] for item in items]) if "labels" in items[0] else None
    return torch.stack([item["pixel_values"] for item in items]), labels
