"""Trains a class-conditional baseline to compare with diffusion: a VAE, a GAN or a normalizing flow.

    accelerate launch training/train_baseline.py --family vae                        # the built-in digits
    accelerate launch training/train_baseline.py --family gan --train_data_dir photos --resolution 64
    accelerate launch -m hf_guided.training.train_baseline --family flow             # from an installed wheel

The data, the loop and their flags are those of diffusion; `--family vae --help` lists the family's own. The finished
pipeline is `<output_dir>/<family>/pipeline`, for `VAEPipeline`, `GANPipeline` or `FlowPipeline`.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from hf_guided.interrupts import stop_at_once

    stop_at_once()

import argparse
import logging
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from hf_guided import FlowPipeline, GANPipeline, VAEPipeline
from hf_guided.baselines import (
    AdversarialPair,
    BigGANDiscriminator,
    BigGANGenerator,
    ClassConditionalGlow,
    ClassConditionalVAE,
)
from hf_guided.baselines.gan import hinge_losses
from hf_guided.data import DataArguments, LabelledImages, load_labelled_images
from hf_guided.evaluation.features.image_sets import SampledImages
from hf_guided.families import BASELINES
from hf_guided.fields import Depth, Length, NonNegativeFloat, NonNegativeInt, PositiveFloat, Range, Share, Width, flag
from hf_guided.generation.grids import labelled_grid, save_png
from hf_guided.hub import write_model_card
from hf_guided.models.modes import evaluating
from hf_guided.training.arguments import LoopArguments, parse_arguments, run_script
from hf_guided.training.cards import describe_data, describe_images, describe_run, describe_steps
from hf_guided.training.loop import Batch, Task, finish, publish, train

logger = logging.getLogger(__name__)

_WATCHED = 64  # images per class to measure the spread on
COLLAPSED = 0.5  # share of the real images' spread: below it a class has collapsed


@dataclass
class VAEArguments(LoopArguments):
    """A VAE's flags."""

    latent_dim: Width = flag(128, "Length of the latent vector.")
    model_channels: Width = flag(64, "Base width.")
    channel_mult: Annotated[list[Depth], Length(1)] = flag([1, 2, 4], "Width of each level, as a multiple of the base.")
    num_res_blocks: Depth = flag(2, "Residual blocks per level.")
    kl_weight: NonNegativeFloat = flag(
        1.0, "Weight of the rate, KL(q(z|x) || p(z)), in the loss; 1 is the negative ELBO."
    )
    decoder_variance: PositiveFloat | None = flag(
        None, "Variance of the decoder, for images in [-1, 1]. Default: learned."
    )


@dataclass
class GANArguments(LoopArguments):
    """A GAN's flags; `--learning_rate` is the generator's."""

    discriminator_learning_rate: PositiveFloat = flag(4e-4, "The discriminator's learning rate (arXiv 1706.08500).")
    adam_beta1: Share = flag(0.0, "AdamW's first decay rate.")
    latent_dim: Width = flag(120, "Length of the latent vector.")
    model_channels: Width = flag(64, "Base width of the generator.")
    discriminator_channels: Width = flag(64, "Base width of the discriminator.")
    channel_mult: Annotated[list[Depth], Length(1)] = flag([1, 2, 4], "Width of each level, as a multiple of the base.")
    translation: NonNegativeInt = flag(
        0, "Largest random shift in pixels of the discriminator's images; helps with few images."
    )


@dataclass
class FlowArguments(LoopArguments):
    """A flow's flags."""

    num_levels: Depth = flag(3, "Levels, each of half the side length.")
    num_blocks: Depth = flag(8, "Steps of flow per level.")
    hidden_channels: Width = flag(128, "Width of the networks in the couplings.")
    dequantization_width: Annotated[float, Range(at_least=1, at_most=255)] = flag(
        1.0, "Steps of the 8-bit scale between two levels of the images."
    )


class BaselineTask(Task):
    """A model of another family than diffusion.

    Args:
        args ([`LoopArguments`]): The family's flags.
        images ([`LabelledImages`]): Images to train on.
    """

    widths: tuple[str, ...]  # flags that make the model larger
    summary: str

    def __init__(self, args: Any, images: LabelledImages):
        self.args, self.images = args, images
        self.of_images = {
            "sample_size": images.resolution,
            "image_channels": images.image_channels,
            "num_class_embeds": images.num_classes,
        }
        self.model = self.make_model()

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A new model for the images' size, channels and classes."""

    @abstractmethod
    def pipeline(self) -> Any:
        """The current model as a pipeline, to sample from and to save."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"sample": batch["pixel_values"], "class_labels": batch["labels"]}

    def preview(self, model: nn.Module, path: Path) -> None:
        names = list(self.images.id2label.values())[:10]
        samples = SampledImages(self.pipeline(), torch.arange(len(names)).repeat_interleave(8))
        with evaluating(model):
            save_png(labelled_grid(samples.pictures(self.args.train_batch_size), names), path)

    def findings(self, held_out: LabelledImages | None) -> dict[str, Any]:
        """Entries about the finished model for its card."""
        return {}


class VAETask(BaselineTask):
    """The negative ELBO: distortion and rate."""

    name, widths = "vae", ("model_channels",)
    summary = "A class-conditional variational autoencoder"

    def make_model(self) -> ClassConditionalVAE:
        names = ("latent_dim", "model_channels", "channel_mult", "num_res_blocks", "decoder_variance")
        return ClassConditionalVAE(**self.of_images, **{name: getattr(self.args, name) for name in names})

    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        output = model(**self.inputs(batch))
        distortion, rate = self.model.bound(batch["pixel_values"], output)
        logs = {"bits_per_dim": distortion + rate, "rate": rate}
        return distortion + self.args.kl_weight * rate, {name: value.detach() for name, value in logs.items()}

    def pipeline(self) -> VAEPipeline:
        return VAEPipeline(self.model, id2label=self.images.id2label)


class FlowTask(BaselineTask):
    """The exact negative log-likelihood of dequantised images."""

    name, widths = "flow", ("hidden_channels",)
    summary = "A class-conditional normalizing flow"

    def __init__(self, args: FlowArguments, images: LabelledImages):
        super().__init__(args, images)
        indices = torch.linspace(0, len(images) - 1, min(len(images), 256)).long().tolist()
        first = [images[index] for index in indices]
        labels = torch.tensor([item["labels"] for item in first])
        self.model.initialize(torch.stack([item["pixel_values"] for item in first]), labels)

    def make_model(self) -> ClassConditionalGlow:
        names = ("num_levels", "num_blocks", "hidden_channels", "dequantization_width")
        return ClassConditionalGlow(**self.of_images, **{name: getattr(self.args, name) for name in names})

    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        bits = model(**self.inputs(batch))
        return bits, {}

    def pipeline(self) -> FlowPipeline:
        return FlowPipeline(self.model, id2label=self.images.id2label)

    def findings(self, held_out: LabelledImages | None) -> dict[str, Any]:
        return {"largest error of an image taken to latents and back": self.inversion_error(held_out or self.images)}

    @torch.no_grad()
    def inversion_error(self, images: LabelledImages) -> float:
        """Largest absolute error of images encoded and decoded again, for values in [0, 1]."""
        batch = [images[index] for index in range(min(len(images), 64))]
        labels = torch.tensor([item["labels"] for item in batch], device=self.model.device)
        values = self.model.dequantize(torch.stack([item["pixel_values"] for item in batch]).to(self.model.device))
        latents, _ = self.model.encode(values, labels)
        back = self.model.dequantize(self.model.decode(latents, labels).sample, torch.full_like(values, -0.5))
        error = (back - values).abs().max().item()
        if error > 1e-3:
            logger.warning(f"The flow has become hard to invert: images come back with an error of {error:.2g}.")
        return error


class GANTask(BaselineTask):
    """Adversarial training of generator and discriminator, each with its own learning rate; detects mode collapse."""

    name, widths = "gan", ("model_channels", "discriminator_channels")
    summary = "A class-conditional GAN, a small BigGAN"

    @cached_property
    def real_spread(self) -> list[float]:
        """The spread of the real images of each class; computed on first use."""
        assert self.images.labels is not None  # required by the loader
        spreads = []
        for label in range(self.images.num_classes):
            rows = np.flatnonzero(self.images.labels == label)[:_WATCHED]
            spreads.append(spread(torch.stack([self.images[row]["pixel_values"] for row in rows.tolist()])))
        return spreads

    def make_model(self) -> AdversarialPair:
        shared = {**self.of_images, "channel_mult": self.args.channel_mult}
        side = min(self.images.resolution)
        if self.args.translation >= side:
            raise ValueError(
                f"--translation {self.args.translation} shifts images of {side} pixels out of view; give less."
            )
        generator = BigGANGenerator(**shared, latent_dim=self.args.latent_dim, model_channels=self.args.model_channels)
        discriminator = BigGANDiscriminator(**shared, model_channels=self.args.discriminator_channels)
        return AdversarialPair(generator, discriminator, self.args.translation)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.model.generator.parameters()), "lr": self.args.learning_rate},
            {"params": list(self.model.discriminator.parameters()), "lr": self.args.discriminator_learning_rate},
        ]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        images = batch["pixel_values"]
        latents = torch.randn(len(images), self.args.latent_dim, device=images.device)
        return {**super().inputs(batch), "latents": latents}

    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        output = model(**self.inputs(batch))
        discriminator_loss, generator_loss = hinge_losses(output)
        logs = {"discriminator_loss": discriminator_loss, "real_score": output.real, "fake_score": output.fake}
        return discriminator_loss + generator_loss, {name: value.detach() for name, value in logs.items()}

    def pipeline(self) -> GANPipeline:
        generator = BigGANGenerator.from_config(self.model.generator.config).to(self.model.generator.device)
        generator.load_state_dict(self.model.generator.state_dict())
        generator.set_standing_statistics()
        return GANPipeline(generator, id2label=self.images.id2label)

    def watch(self) -> dict[str, float]:
        spreads = self.spreads()
        collapsed = self.collapsed(spreads)
        if collapsed:
            logger.warning(f"The GAN's {collapsed}.")
        return {"spread": sum(spreads) / len(spreads), "lowest_spread": min(spreads)}

    def findings(self, held_out: LabelledImages | None) -> dict[str, Any]:
        return {"collapse": self.collapsed(self.spreads()) or "none was seen"}

    def spreads(self) -> list[float]:
        """The spread of the samples of each class, as a share of that of its real images."""
        pipeline = self.pipeline()
        generator = torch.Generator().manual_seed(0)
        return [
            spread(pipeline([label], _WATCHED, generator=generator, output_type="latent", return_dict=False)[0])
            / max(real, 1e-6)
            for label, real in enumerate(self.real_spread)
        ]

    def collapsed(self, spreads: Sequence[float]) -> str:
        """A sentence naming the classes that have collapsed; empty if there are none."""
        names = [f"{self.images.id2label[i]} ({share:.0%})" for i, share in enumerate(spreads) if share < COLLAPSED]
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        return f"samples of a class differ far less than its real images do: {listed}" if names else ""


def spread(images: torch.Tensor) -> float:
    """The mean distance between two of the images `(n, channels, height, width)`; 0 for a single one."""
    distances = torch.pdist(images.flatten(1).float())
    return distances.mean().item() if len(distances) else 0.0


TRAINERS: dict[str, tuple[type[LoopArguments], type[BaselineTask]]] = {
    "vae": (VAEArguments, VAETask),
    "gan": (GANArguments, GANTask),
    "flow": (FlowArguments, FlowTask),
}


def train_baseline(
    family: str,
    data_args: DataArguments,
    args: LoopArguments,
    images: tuple[LabelledImages, LabelledImages | None] | None = None,
) -> Path:
    """Trains a model of a family and saves it as a pipeline with a card.

    Args:
        family (`str`): `"vae"`, `"gan"` or `"flow"`.
        data_args ([`DataArguments`]), args ([`LoopArguments`]): The flags; the latter of the family's own class.
        images (a pair of [`LabelledImages`], *optional*): Images to train and to validate on, if already loaded.

    Returns:
        `Path`: The finished folder.
    """
    images = images or load_labelled_images(data_args, seed=args.seed)
    torch.manual_seed(args.seed)
    task = TRAINERS[family][1](args, images[0])

    def save(folder: str, is_finished: bool = False) -> None:
        pipeline = task.pipeline()
        pipeline.save_pretrained(folder)
        if is_finished:
            task.preview(task.model, Path(folder) / "grid.png")
        write_model_card(
            folder,
            title=f"{BASELINES[family].title} of {data_args.title}",
            class_names=list(images[0].id2label.values()),
            training={
                "images": describe_images(images),
                "steps": describe_steps(args, task.name),
                **(task.findings(images[1]) if is_finished else {}),
                **describe_run(args),
            },
            model_class=type(pipeline).__name__,
            summary=task.summary,
            guided=False,
            repo_id=args.hub_model_id,
            license=args.hub_license,
            **describe_data(data_args),
        )

    train(task, *images, args, data_args, save)
    return finish(lambda folder: save(folder, is_finished=True), Path(args.output_dir) / family / "pipeline")


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--family", choices=TRAINERS, required=not {"-h", "--help"} & set(sys.argv[1:]))
    given, others = parser.parse_known_args()
    family = given.family or "vae"
    data_args, stages = parse_arguments({family: TRAINERS[family][0]}, others, description=__doc__)
    publish(train_baseline(family, data_args, stages[family]), stages[family])


if __name__ == "__main__":
    run_script(main)
