"""Trains an ADM UNet, class-conditional with label dropout or unconditional.

    accelerate launch training/train_diffusion.py                                    # the built-in digits
    accelerate launch training/train_diffusion.py --train_data_dir photos --resolution 64 --mixed_precision bf16
    accelerate launch --multi_gpu training/train_diffusion.py --recipe imagenet128 --train_data_dir imagenet
    accelerate launch -m hf_guided.training.train_diffusion                          # from an installed wheel

arXiv 2105.05233, sections 2 and 3: the hybrid objective with a learned variance. The finished pipeline, UNet and
scheduler without a classifier, is `<output_dir>/diffusion/pipeline`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline
from hf_guided.data import DataArguments, LabelledImages, load_labelled_images
from hf_guided.evaluation.pictures import labelled_grid, save_png
from hf_guided.evaluation.sampling import sample_batches
from hf_guided.losses import diffusion_loss
from hf_guided.schedulers.schedules import space_timesteps
from hf_guided.schedulers.scheduling_adm import model_timesteps
from hf_guided.training.arguments import (
    ArchitectureArguments,
    LoopArguments,
    ScheduleArguments,
    flag,
    parse_arguments,
    run_script,
)
from hf_guided.training.loop import Batch, Task, finish, train
from hf_guided.training.timestep_sampling import LossSecondMomentSampler, TimestepSampler


@dataclass
class DiffusionArguments(LoopArguments, ScheduleArguments, ArchitectureArguments):
    """A diffusion model's flags."""

    num_heads_upsample: int | None = flag(None, "Another number of heads in the decoder.")
    variance_type: str = flag(
        "learned_range", "Variance of the reverse process.", choices=("learned_range", "fixed_small", "fixed_large")
    )
    prediction_type: str = flag("epsilon", "What the UNet predicts.", choices=("epsilon", "sample", "v_prediction"))
    loss_type: str = flag("hybrid", "Objective.", choices=("simple", "hybrid", "vlb"))
    timestep_sampler: str = flag(
        "uniform", "How timesteps are drawn (Improved DDPM, section 3.3).", choices=("uniform", "loss_second_moment")
    )
    class_conditional: bool = flag(True, "Tell the UNet the class.")
    label_dropout: float = flag(0.1, "Share of images whose class is withheld, so that one UNet does both.")
    preview_respacing: str = flag("25", "Timesteps of previews, in OpenAI's notation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        space_timesteps(self.num_train_timesteps, self.preview_respacing)
        if self.loss_type == "hybrid" and self.variance_type != "learned_range":
            raise ValueError(
                f"--loss_type hybrid trains a learned variance, and --variance_type {self.variance_type} has none; add "
                f"--loss_type simple."
            )


class DiffusionTask(Task):
    """The diffusion loss, some labels withheld."""

    name = "diffusion"

    def __init__(
        self, model: ADMUNet2DModel, scheduler: ADMScheduler, args: DiffusionArguments, id2label: dict[int, str]
    ):
        self.model = model
        self.scheduler = scheduler
        self.args = args
        self.id2label = id2label
        samplers = {"uniform": TimestepSampler, "loss_second_moment": LossSecondMomentSampler}
        self.timestep_sampler = samplers[args.timestep_sampler](args.num_train_timesteps)

    def losses(self, model: nn.Module, batch: Batch, timesteps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        clean = batch["pixel_values"]
        noise = torch.randn_like(clean)
        sample = self.scheduler.add_noise(clean, noise, timesteps)
        output = model(sample, model_timesteps(self.scheduler, timesteps), **self.labels(batch)).sample
        loss = diffusion_loss(self.scheduler, output, clean, noise, timesteps, self.args.loss_type)
        return loss.loss, {"mse": loss.mse.detach(), "vb": loss.vb.detach()}

    def labels(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The labels that the UNet is told: none, or the batch's, a share of them replaced by the null label."""
        if not self.args.class_conditional:
            return {}
        withheld = torch.rand(len(batch["labels"]), device=batch["labels"].device) < self.args.label_dropout
        return {"class_labels": batch["labels"].masked_fill(withheld, len(self.id2label))}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        timesteps = torch.zeros(len(batch["pixel_values"]), device=batch["pixel_values"].device)
        labels = {"class_labels": batch["labels"]} if self.args.class_conditional else {}
        return {"sample": batch["pixel_values"], "timestep": timesteps, **labels}

    def preview(self, model: nn.Module, path: Path) -> None:
        was_training = model.training
        pipeline = ClassifierGuidedPipeline(model.eval(), ADMScheduler.from_config(self.scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        names = list(self.id2label.values())[:10] if self.args.class_conditional else ["samples"]
        labels = torch.arange(len(names)).repeat_interleave(8) if self.args.class_conditional else 8
        batches = sample_batches(pipeline, labels, self.args.train_batch_size, respacing=self.args.preview_respacing)
        pictures = [picture for batch in batches for picture in batch]
        save_png(labelled_grid(pictures, names), path)
        model.train(was_training)


def train_diffusion(
    data_args: DataArguments,
    args: DiffusionArguments,
    images: tuple[LabelledImages, LabelledImages | None] | None = None,
) -> Path | None:
    """Trains a UNet and saves it as a pipeline.

    Args:
        data_args ([`DataArguments`]), args ([`DiffusionArguments`]): The flags.
        images (a pair of [`LabelledImages`], *optional*): To train on and to watch the loss on, if loaded already.

    Returns:
        `Path`: The finished folder; `None` if a signal stopped the training.
    """
    train_images, held_out_images = images or load_labelled_images(
        data_args, seed=args.seed, require_labels=args.class_conditional
    )
    torch.manual_seed(args.seed)
    model = make_unet(args, train_images)
    scheduler = ADMScheduler(variance_type=args.variance_type, prediction_type=args.prediction_type, **args.schedule())
    task = DiffusionTask(model, scheduler, args, train_images.id2label)
    if not train(task, train_images, held_out_images, args, data_args):
        return None
    id2label = train_images.id2label if args.class_conditional else None
    pipeline = ClassifierGuidedPipeline(model, scheduler, id2label=id2label)
    return finish(pipeline.save_pretrained, Path(args.output_dir) / task.name / "pipeline", args)


def make_unet(args: DiffusionArguments, images: LabelledImages) -> ADMUNet2DModel:
    """A fresh UNet of the images' size, channels and classes."""
    channels = images.image_channels
    return ADMUNet2DModel(
        sample_size=images.resolution,
        in_channels=channels,
        out_channels=2 * channels if args.variance_type == "learned_range" else channels,
        num_heads_upsample=args.num_heads_upsample,
        num_class_embeds=images.num_classes if args.class_conditional else None,
        null_class_label=args.class_conditional and args.label_dropout > 0,
        **args.architecture(),
    )


def main() -> None:
    data_args, stages = parse_arguments({"diffusion": DiffusionArguments}, description=__doc__)
    train_diffusion(data_args, stages["diffusion"])


if __name__ == "__main__":
    run_script(main)
