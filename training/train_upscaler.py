"""Trains an upsampler: an ADM UNet conditioned on a small image that samples the large one.

    accelerate launch training/train_upscaler.py                                     # the built-in digits, 8x8 to 16x16
    accelerate launch training/train_upscaler.py --recipe photographs                # crops of two photographs, 8 to 32
    accelerate launch training/train_upscaler.py --train_data_dir photos --resolution 256 --low_resolution 64
    accelerate launch --multi_gpu training/train_upscaler.py --recipe imagenet256 --train_data_dir imagenet
    accelerate launch -m hf_guided.training.train_upscaler                           # from an installed wheel

arXiv 2105.05233, section 5.2: trained like the diffusion model, on images that are downsampled on the fly. The finished
pipeline is `<output_dir>/upscaler/pipeline`; in it, `grid.png` and `report.json` show held-out images upsampled.
"""

if __name__ == "__main__":  # before what takes seconds to import
    from hf_guided.interrupts import stop_at_once

    stop_at_once()

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedUpscalePipeline
from hf_guided.data import DataArguments, LabelledImages, load_labelled_images
from hf_guided.fields import NonNegativeFloat, PositiveInt, flag
from hf_guided.files import write_json
from hf_guided.generation.grids import labelled_grid, save_png
from hf_guided.models.modes import evaluating
from hf_guided.training.arguments import parse_arguments, run_script
from hf_guided.training.loop import Batch, publish
from hf_guided.training.train_diffusion import DiffusionArguments, DiffusionTask, make_unet, train_and_save

logger = logging.getLogger(__name__)

NUM_SHOWN, NUM_MEASURED = 8, 64


@dataclass
class UpscalerArguments(DiffusionArguments):
    """An upsampler's flags."""

    low_resolution: PositiveInt | None = flag(
        None, "Side of the small images in pixels, of their height if they are not square. Default: a quarter."
    )
    low_res_noise: NonNegativeFloat = flag(
        0.0,
        "Gaussian conditioning augmentation (arXiv 2106.15282, section 4): noise with a standard deviation drawn "
        "from 0 to this is added to each small image. Published upsamplers have none.",
    )


class UpscalerTask(DiffusionTask):
    """The diffusion loss of images conditioned on a downsampled version.

    Args:
        model, scheduler, args: As for [`DiffusionTask`].
        low_size (`tuple[int, int]`): Height and width of the small images.
        examples ([`LabelledImages`]): Images for previews.
    """

    name = "upscaler"
    kind = "Upsampler"
    args: UpscalerArguments

    def __init__(
        self,
        model: ADMUNet2DModel,
        scheduler: ADMScheduler,
        args: UpscalerArguments,
        low_size: tuple[int, int],
        examples: LabelledImages,
    ):
        super().__init__(model, scheduler, args, examples.id2label)
        self.low_size = low_size
        self.examples = examples

    def conditions(self, batch: Batch) -> dict[str, torch.Tensor]:
        low_res = downsample(batch["pixel_values"], self.low_size)
        if self.args.low_res_noise > 0:
            strength = self.args.low_res_noise * torch.rand(len(low_res), 1, 1, 1, device=low_res.device)
            low_res = low_res + strength * torch.randn_like(low_res)
        return {**super().conditions(batch), "low_res": low_res}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {**super().inputs(batch), "low_res": downsample(batch["pixel_values"], self.low_size)}

    def pipeline(self) -> ClassifierGuidedUpscalePipeline:
        return ClassifierGuidedUpscalePipeline(
            self.model,
            ADMScheduler.from_config(self.scheduler.config, solver_order=2),
            id2label=self.id2label if self.args.class_conditional else None,
            sampling_defaults=self.args.steps(),
            low_res_size=self.low_size[0],
        )

    def preview(self, model: nn.Module, path: Path) -> None:
        with evaluating(model):
            self.show(path, NUM_SHOWN)

    def show(self, path: Path, num_measured: int) -> dict[str, dict[str, float]]:
        """Errors of the upsampled examples, and a picture of the first ones: bicubic, two samples, original."""
        self.model.eval()
        spread = torch.linspace(0, len(self.examples) - 1, min(num_measured, len(self.examples))).long()
        items = [self.examples[index] for index in spread.tolist()]
        original = torch.stack([item["pixel_values"] for item in items])
        labels = torch.tensor([item["labels"] for item in items]) if self.args.class_conditional else None
        low_res = downsample(original, self.low_size)

        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)

        def samples() -> torch.Tensor:
            batches = [
                pipeline(
                    ((low_res[batch] + 1) / 2).clamp(0, 1),  # negative values would be read as another range
                    None if labels is None else labels[batch],
                    generator=generator,
                    output_type="latent",
                    return_dict=False,
                )[0].cpu()
                for batch in torch.arange(len(items)).split(self.args.train_batch_size)
            ]
            return torch.cat(batches)

        size = tuple(original.shape[-2:])
        columns = {
            "nearest": F.interpolate(low_res, size, mode="nearest"),
            "bicubic": F.interpolate(low_res, size, mode="bicubic", antialias=False).clamp(-1, 1),
            "sample": samples(),
            "another sample": samples(),
            "original": original,
        }
        shown = torch.linspace(0, len(items) - 1, min(NUM_SHOWN, len(items))).long()
        names = ["" if labels is None else self.id2label[int(labels[row])] for row in shown]
        cells = torch.stack(list(columns.values()), dim=1)[shown].flatten(0, 1)
        pictures = VaeImageProcessor(vae_scale_factor=1).postprocess(cells, output_type="pil")
        title = f"{self.low_size[0]}x{self.low_size[1]}, bicubic, two samples, original {size[0]}x{size[1]}"
        save_png(labelled_grid(pictures, names, title=title), path)
        return {name: measure(columns[name], original, low_res) for name in ("bicubic", "sample")}

    def report(self, folder: Path) -> list[dict[str, Any]]:
        report = self.show(folder / "grid.png", NUM_MEASURED)
        write_json(report, folder / "report.json")
        print_table(report)
        return [{"held-out images": name, **row} for name, row in report.items()]


def train_upscaler(
    data_args: DataArguments,
    args: UpscalerArguments,
    images: tuple[LabelledImages, LabelledImages | None] | None = None,
) -> Path:
    """Trains an upsampler and saves it as a pipeline with upsampled held-out images; returns its folder.

    Args:
        data_args ([`DataArguments`]), args ([`UpscalerArguments`]): The flags.
        images (a pair of [`LabelledImages`], *optional*): Images to train and to validate on, if already loaded.

    Returns:
        `Path`: The finished folder.

    Raises:
        `ValueError`: If the images cannot be downsampled to the low resolution evenly.
    """
    images = images or load_labelled_images(data_args, seed=args.seed, require_labels=args.class_conditional)
    train_images, held_out_images = images
    low_size = small_size(args.low_resolution, train_images.resolution)
    torch.manual_seed(args.seed)
    model = make_unet(args, train_images, low_res_channels=train_images.image_channels)
    scheduler = ADMScheduler(**args.reverse_process())
    task = UpscalerTask(model, scheduler, args, low_size, examples=held_out_images or train_images)
    return train_and_save(task, images, args, data_args)


def small_size(low_resolution: int | None, resolution: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the small images, in pixels.

    Args:
        low_resolution (`int`, *optional*): Their height. Default: a quarter, as published (64 to 256, 128 to 512).
        resolution (`tuple[int, int]`): Height and width of the large images.

    Raises:
        `ValueError`: Unless the large sides are an integer multiple, two or more, of the small ones.
    """
    height, width = resolution
    low_height = height // 4 if low_resolution is None else low_resolution
    factor = height // max(1, low_height)
    if factor < 2 or low_height * factor != height or width % factor:
        raise ValueError(
            f"Images of {height} x {width} pixels (height x width) cannot be downsampled evenly to a height of "
            f"{low_height}; give a --low_resolution that is a half, a third, a quarter ... of the --resolution."
        )
    return low_height, width // factor


def downsample(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images downsampled by averaging blocks of pixels."""
    return F.interpolate(images, size, mode="area")


def measure(upsampled: torch.Tensor, original: torch.Tensor, low_res: torch.Tensor) -> dict[str, float]:
    """Errors of upsampled images (mean squares), and their share of detail.

    A pixel error alone favours blur over detail that is slightly displaced. So there is also the error after
    downsampling (is the large image consistent with the small one?) and the share of the original's detail, the energy
    that downsampling removes (is the large image sharp?).
    """
    size, low_size = original.shape[-2:], (low_res.shape[-2], low_res.shape[-1])

    def detail(images: torch.Tensor) -> float:
        blocks = F.interpolate(downsample(images, low_size), size, mode="nearest")
        return (images - blocks).square().mean().item()

    return {
        "error": (upsampled - original).square().mean().item(),
        "error_after_downsampling": (downsample(upsampled, low_size) - low_res).square().mean().item(),
        "share_of_detail": detail(upsampled) / max(detail(original), 1e-12),
    }


def print_table(report: dict[str, dict[str, float]]) -> None:
    """Prints the report."""
    lines = [f"\nheld-out images, mean squares{'error':>9}{'error after downsampling':>26}{'share of detail':>17}"]
    for name, row in report.items():
        error, after, share = row.values()
        lines.append(f"{name:29}{error:9.4f}{after:26.5f}{share:17.2f}")
    logger.info("\n".join(lines))


def main() -> None:
    data_args, stages = parse_arguments({"upscaler": UpscalerArguments}, description=__doc__)
    publish(train_upscaler(data_args, stages["upscaler"]), stages["upscaler"])


if __name__ == "__main__":
    run_script(main)
