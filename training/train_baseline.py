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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from hf_guided import FlowPipeline, GANPipeline, VAEPipeline
from hf_guided.baselines import BigGANDiscriminator, BigGANGenerator, ClassConditionalGlow, ClassConditionalVAE
from hf_guided.baselines.gan import AdversarialPair, hinge_losses
from hf_guided.data import DataArguments
from hf_guided.families import BASELINES
from hf_guided.fields import Depth, Length, NonNegativeFloat, NonNegativeInt, PositiveFloat, Range, Share, Width, flag
from hf_guided.messages import first_few
from hf_guided.training.arguments import LoopArguments, run_script
from hf_guided.training.budget import parse_planned
from hf_guided.training.loop import train_and_save
from hf_guided.training.saving import publish
from hf_guided.training.task import Batch, Images, Task, evenly, examples, fitted

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
    kl_weight: NonNegativeFloat = flag(1.0, "Weight of the rate, KL(q(z|x) || p(z)); 1 is the negative ELBO.")
    decoder_variance: PositiveFloat | None = flag(None, "Decoder's variance, for images in [-1, 1]. Default: learned.")


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
        0, "Largest random shift in pixels of what the discriminator sees; helps with few images."
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
    """A model of another family than diffusion."""

    model_class: Any
    pipeline_class: Any
    widths: tuple[str, ...] = ("model_channels",)  # flags that make the model larger

    def __init__(self, args: Any, images: Images):
        super().__init__(args, images)
        self.title = f"{BASELINES[self.name].title} of"

    def make_model(self) -> Any:
        return self.build(self.model_class)

    def build(self, model_class: Any, **others: Any) -> Any:
        """A model whose arguments are the images' size, channels and classes, and the flags of the same names."""
        known = {
            **vars(self.args),
            **fitted(self.args, self.images.resolution),
            "sample_size": self.images.resolution,
            "image_channels": self.images.image_channels,
            "num_class_embeds": self.images.num_classes,
            **others,
        }
        return model_class(**{name: known[name] for name in signature(model_class).parameters})

    def pipeline(self) -> Any:
        return self.pipeline_class(self.model, id2label=self.id2label)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"sample": batch["pixel_values"], "class_labels": batch["labels"]}


class VAETask(BaselineTask):
    """The negative ELBO: distortion and rate."""

    name, model_class, pipeline_class = "vae", ClassConditionalVAE, VAEPipeline
    summary = "A class-conditional variational autoencoder"

    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        output = model(**self.inputs(batch))
        distortion, rate = self.model.bound(batch["pixel_values"], output)
        logs = {"bits_per_dim": distortion + rate, "rate": rate}
        return distortion + self.args.kl_weight * rate, {name: value.detach() for name, value in logs.items()}


class FlowTask(BaselineTask):
    """The exact negative log-likelihood of dequantised images."""

    name, model_class, pipeline_class = "flow", ClassConditionalGlow, FlowPipeline
    widths = ("hidden_channels",)
    summary = "A class-conditional normalizing flow"

    def __init__(self, args: FlowArguments, images: Images):
        super().__init__(args, images)
        self.model.initialize(*examples(self.images, evenly(len(self.images), 256)))

    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return model(**self.inputs(batch)), {}

    @torch.no_grad()
    def findings(self) -> dict[str, Any]:
        """The largest absolute error of held-out images encoded and decoded again, for values in [0, 1]."""
        images = self.held_out or self.images
        pixel_values, labels = examples(images, range(min(len(images), 64)))
        labels = labels.to(self.model.device)
        values = self.model.dequantize(pixel_values.to(self.model.device))
        latents, _ = self.model.encode(values, labels)
        back = self.model.dequantize(self.model.decode(latents, labels).sample, torch.full_like(values, -0.5))
        error = (back - values).abs().max().item()
        if error > 1e-3:
            logger.warning(f"The flow has become hard to invert: images come back with an error of {error:.2g}.")
        return {"largest error of an image taken to latents and back": error}


class GANTask(BaselineTask):
    """Adversarial training of generator and discriminator, each with its own learning rate; detects mode collapse."""

    name, pipeline_class = "gan", GANPipeline
    widths = ("model_channels", "discriminator_channels")
    summary = "A class-conditional GAN, a small BigGAN"

    @cached_property
    def real_spread(self) -> list[float]:
        """The spread of the real images of each class; computed on first use."""
        assert self.images.labels is not None  # required by the loader
        rows = [np.flatnonzero(self.images.labels == label)[:_WATCHED] for label in range(self.images.num_classes)]
        return [spread(examples(self.images, of_class.tolist())[0]) for of_class in rows]

    def make_model(self) -> AdversarialPair:
        side, shift = min(self.images.resolution), self.args.translation
        if shift >= side:
            raise ValueError(f"--translation {shift} shifts images of {side} pixels out of view; give less.")
        generator = self.build(BigGANGenerator)
        discriminator = self.build(BigGANDiscriminator, model_channels=self.args.discriminator_channels)
        return AdversarialPair(generator, discriminator, shift)

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
        return GANPipeline(generator, id2label=self.id2label)

    def validation_metrics(self) -> dict[str, float]:
        spreads = self.spreads()
        if collapsed := self.collapsed(spreads):
            logger.warning(f"The GAN's {collapsed}.")
        return {"spread": sum(spreads) / len(spreads), "lowest_spread": min(spreads)}

    def findings(self) -> dict[str, Any]:
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
        return f"samples of a class differ far less than its real images do: {first_few(names, 10)}" if names else ""


def spread(images: torch.Tensor) -> float:
    """The mean distance between two of the images `(n, channels, height, width)`; 0 for a single one."""
    distances = torch.pdist(images.flatten(1).float())
    return distances.mean().item() if len(distances) else 0.0


TRAINERS: dict[str, tuple[type[LoopArguments], type[BaselineTask]]] = {
    "vae": (VAEArguments, VAETask),
    "gan": (GANArguments, GANTask),
    "flow": (FlowArguments, FlowTask),
}


def train_baseline(family: str, data_args: DataArguments, args: LoopArguments, images: Images | None = None) -> Path:
    """Trains a model of a family, `"vae"`, `"gan"` or `"flow"`, and saves it, see [`train_and_save`]."""
    return train_and_save(TRAINERS[family][1], data_args, args, images)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--family", choices=TRAINERS, required=not {"-h", "--help"} & set(sys.argv[1:]))
    given, others = parser.parse_known_args()
    family = given.family or "vae"
    arguments, task = TRAINERS[family]
    data_args, stages, budget = parse_planned({family: arguments}, {family: task}, others, description=__doc__)
    budget.start(family, stages[family])
    publish(train_baseline(family, data_args, stages[family]), stages[family])


if __name__ == "__main__":
    run_script(main)
