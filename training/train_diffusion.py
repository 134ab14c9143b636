"""Trains an ADM UNet, class-conditional with label dropout or unconditional.

    accelerate launch training/train_diffusion.py                                    # the built-in digits
    accelerate launch training/train_diffusion.py --train_data_dir photos --resolution 64 --mixed_precision bf16
    accelerate launch --multi_gpu training/train_diffusion.py --recipe imagenet128 --train_data_dir imagenet
    accelerate launch -m hf_guided.training.train_diffusion                          # from an installed wheel

arXiv 2105.05233, sections 2 and 3: the hybrid objective with a learned variance. The finished pipeline, UNet and
scheduler without a classifier, is `<output_dir>/diffusion/pipeline`. `--pretrained_model` fine-tunes an existing one.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from hf_guided.interrupts import stop_at_once

    stop_at_once()

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline
from hf_guided.data import LabelledImages
from hf_guided.fields import PositiveFloat, PositiveInt, Share, flag
from hf_guided.losses import LOSS_TYPES, diffusion_loss
from hf_guided.schedulers.scheduling_adm import CHOICES, model_timesteps
from hf_guided.training.arguments import LoopArguments, ModelArguments, SamplingArguments, run_script
from hf_guided.training.budget import parse_planned
from hf_guided.training.fine_tuning import Pretrained
from hf_guided.training.loop import train_and_save
from hf_guided.training.saving import publish
from hf_guided.training.task import Batch, Images, Task, fitted
from hf_guided.training.timestep_sampling import LossSecondMomentSampler, TimestepSampler


@dataclass
class DiffusionArguments(LoopArguments, SamplingArguments, ModelArguments):
    """A diffusion model's flags."""

    num_heads_upsample: PositiveInt | None = flag(None, "Number of heads in the decoder, if it differs.")
    variance_type: str = flag("learned_range", "Variance of the reverse process.", choices=CHOICES["variance_type"])
    prediction_type: str = flag("epsilon", "What the UNet predicts.", choices=CHOICES["prediction_type"])
    loss_type: str = flag("hybrid", "Objective.", choices=LOSS_TYPES)
    snr_gamma: PositiveFloat | None = flag(
        None, "Weight timesteps by Min-SNR (arXiv 2303.09556); 5 is the paper's. Default: all alike."
    )
    timestep_sampler: str = flag("uniform", "How timesteps are drawn.", choices=("uniform", "loss_second_moment"))
    class_conditional: bool = flag(True, "Train a class-conditional UNet.")
    label_dropout: Share = flag(0.1, "Share of images that get the null label, for classifier-free guidance.")
    pretrained_model: str | None = flag(
        None,
        "Pipeline or UNet to start from, a folder or a Hub id. Its architecture replaces the flags from "
        "--model_channels to --use_scale_shift_norm except --dropout; size, channels and classes are the data's.",
    )

    def reverse_process(self) -> dict[str, Any]:
        """The arguments of the scheduler."""
        return {**self.schedule(), "variance_type": self.variance_type, "prediction_type": self.prediction_type}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.count_steps(self.num_train_timesteps)
        if self.loss_type == "hybrid" and self.variance_type != "learned_range":
            raise ValueError(
                f"--loss_type hybrid trains a learned variance, and --variance_type {self.variance_type} has none; add "
                f"--loss_type simple."
            )
        if self.snr_gamma is not None and self.loss_type == "vlb":
            raise ValueError("--snr_gamma weights the mse, which --loss_type vlb has not; leave one of them out.")
        if self.num_heads_upsample is not None and self.num_heads is None:
            raise ValueError(f"--num_heads_upsample {self.num_heads_upsample} needs --num_heads, for the encoder.")


class DiffusionTask(Task):
    """The diffusion loss, with label dropout."""

    name = "diffusion"
    kind = "Diffusion model"
    pipeline_class: Any = ClassifierGuidedPipeline

    def __init__(self, args: DiffusionArguments, images: Images):
        super().__init__(args, images)
        if not args.class_conditional:
            self.id2label = None
        self.title = f"{self.kind} of"
        self.summary = f"{'A class-conditional' if args.class_conditional else 'An unconditional'} {self.kind.lower()}"
        self.scheduler = ADMScheduler(**args.reverse_process())
        samplers = {"uniform": TimestepSampler, "loss_second_moment": LossSecondMomentSampler}
        self.timestep_sampler = samplers[args.timestep_sampler](args.num_train_timesteps)

    def make_model(self) -> ADMUNet2DModel:
        return make_unet(self.args, self.images)

    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        clean = batch["pixel_values"]
        noise = torch.randn_like(clean)
        sample = self.scheduler.add_noise(clean, noise, timesteps)
        output = model(sample, model_timesteps(self.scheduler, timesteps), **self.conditions(batch)).sample
        loss = diffusion_loss(self.scheduler, output, clean, noise, timesteps, self.args.loss_type, self.args.snr_gamma)
        return loss.loss, {"mse": loss.mse.detach(), "vb": loss.vb.detach()}

    def conditions(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The UNet's labels: none, or the batch's with label dropout."""
        if self.id2label is None:
            return {}
        withheld = torch.rand(len(batch["labels"]), device=batch["labels"].device) < self.args.label_dropout
        return {"class_labels": batch["labels"].masked_fill(withheld, len(self.id2label))}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        timesteps = torch.zeros(len(batch["pixel_values"]), device=batch["pixel_values"].device)
        return {"sample": batch["pixel_values"], "timestep": timesteps, **self.conditions(batch)}

    def pipeline(self, **more: Any) -> Any:
        more |= {"id2label": self.id2label, "sampling_defaults": self.args.steps()}
        scheduler = ADMScheduler.from_config(self.scheduler.config, solver_order=2)
        pipeline = self.pipeline_class(self.model, scheduler, **more)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def facts(self) -> dict[str, Any]:
        pretrained = {"fine-tuned from": self.args.pretrained_model} if self.args.pretrained_model else {}
        return {**pretrained, "noise schedule": self.args.beta_schedule}


# Trains a [`DiffusionTask`] and saves it as a pipeline.
train_diffusion = partial(train_and_save, DiffusionTask)


def unet_config(
    args: DiffusionArguments, images: LabelledImages, low_res_channels: int | None = None
) -> dict[str, Any]:
    """The UNet's arguments: the images' size, channels and classes, the flags' or the pretrained model's architecture.

    Raises:
        `ValueError`: If the pretrained model cannot be fine-tuned with these flags.
    """
    channels = images.image_channels
    of_images = {
        "sample_size": images.resolution,
        "in_channels": channels,
        "out_channels": 2 * channels if args.variance_type == "learned_range" else channels,
        "num_class_embeds": images.num_classes if args.class_conditional else None,
        "null_class_label": args.class_conditional and args.label_dropout > 0,
        "low_res_channels": low_res_channels,
    }
    architecture = {**args.architecture(), "num_heads_upsample": args.num_heads_upsample}
    architecture |= fitted(args, images.resolution)
    if args.pretrained_model is not None:
        pretrained = Pretrained(args.pretrained_model)
        pretrained.check(args.reverse_process(), is_upsampler=low_res_channels is not None)
        architecture = {**pretrained.architecture(images.resolution), "dropout": args.dropout}
    return {**architecture, **of_images}


def make_unet(args: DiffusionArguments, images: LabelledImages, low_res_channels: int | None = None) -> ADMUNet2DModel:
    """A UNet for the images' size, channels and classes: new, or with the pretrained weights that fit."""
    config = unet_config(args, images, low_res_channels)
    if args.pretrained_model is None:
        return ADMUNet2DModel(**config)
    return Pretrained(args.pretrained_model).unet(config, images.id2label)


def main() -> None:
    data_args, stages, budget = parse_planned(
        {"diffusion": DiffusionArguments}, {"diffusion": DiffusionTask}, description=__doc__
    )
    budget.start("diffusion", stages["diffusion"])
    publish(train_diffusion(data_args, stages["diffusion"]), stages["diffusion"])


if __name__ == "__main__":
    run_script(main)
