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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor

from hf_guided import ADMUNet2DModel, ClassifierGuidedUpscalePipeline
from hf_guided.fields import NonNegativeFloat, PositiveInt, flag
from hf_guided.files import write_json
from hf_guided.generation.grids import labelled_grid, save_png
from hf_guided.models.modes import evaluating
from hf_guided.training.arguments import run_script
from hf_guided.training.budget import parse_planned
from hf_guided.training.cards import aligned
from hf_guided.training.loop import train_and_save
from hf_guided.training.saving import publish
from hf_guided.training.task import Batch, evenly, examples
from hf_guided.training.train_diffusion import DiffusionArguments, DiffusionTask, make_unet

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
        "Noise on each small image, of a standard deviation from 0 to this (arXiv 2106.15282, section 4); published "
        "models have none.",
    )


class UpscalerTask(DiffusionTask):
    """The diffusion loss of images conditioned on a downsampled version."""

    name = "upscaler"
    kind = "Upsampler"
    pipeline_class = ClassifierGuidedUpscalePipeline

    def make_model(self) -> ADMUNet2DModel:
        self.low_size = small_size(self.args.low_resolution, self.images.resolution)
        return make_unet(self.args, self.images, low_res_channels=self.images.image_channels)

    def conditions(self, batch: Batch) -> dict[str, torch.Tensor]:
        low_res = downsample(batch["pixel_values"], self.low_size)
        if self.args.low_res_noise > 0:
            strength = self.args.low_res_noise * torch.rand(len(low_res), 1, 1, 1, device=low_res.device)
            low_res = low_res + strength * torch.randn_like(low_res)
        return {**super().conditions(batch), "low_res": low_res}

    def pipeline(self, **more: Any) -> ClassifierGuidedUpscalePipeline:
        return super().pipeline(low_res_size=self.low_size[0], **more)

    def preview(self, path: Path) -> None:
        self.show(path, NUM_SHOWN)

    def show(self, path: Path, num_measured: int) -> dict[str, dict[str, float]]:
        """Errors of upsampled held-out images, and a picture of the first ones: bicubic, two samples, original."""
        images = self.held_out or self.images
        original, labels = examples(images, evenly(len(images), num_measured))
        low_res = downsample(original, self.low_size)
        pipeline = self.pipeline()
        generator = torch.Generator().manual_seed(0)

        batches = torch.arange(len(original)).split(self.args.train_batch_size)

        def sample(rows: torch.Tensor) -> torch.Tensor:
            small = ((low_res[rows] + 1) / 2).clamp(0, 1)  # negative values would be read as another range
            given = None if self.id2label is None else labels[rows]
            return pipeline(small, given, generator=generator, output_type="latent", return_dict=False)[0].cpu()

        size = tuple(original.shape[-2:])
        with evaluating(self.model):
            columns = {
                "nearest": F.interpolate(low_res, size, mode="nearest"),
                "bicubic": F.interpolate(low_res, size, mode="bicubic", antialias=False).clamp(-1, 1),
                "sample": torch.cat([sample(rows) for rows in batches]),
                "another sample": torch.cat([sample(rows) for rows in batches]),
                "original": original,
            }
        shown = evenly(len(original), NUM_SHOWN)
        names = [self.id2label[int(labels[row])] if self.id2label else "" for row in shown]
        cells = torch.stack(list(columns.values()), dim=1)[shown].flatten(0, 1)
        pictures = VaeImageProcessor(vae_scale_factor=1).postprocess(cells, output_type="pil")
        title = f"{self.low_size[0]}x{self.low_size[1]}, bicubic, two samples, original {size[0]}x{size[1]}"
        save_png(labelled_grid(pictures, names, title=title), path)
        return {name: measure(columns[name], original, low_res) for name in ("bicubic", "sample")}

    def report(self, folder: Path) -> dict[str, Any]:
        report = self.show(folder / "grid.png", NUM_MEASURED)
        write_json(report, folder / "report.json")
        lines = [["held-out images, mean squares", "error", "error after downsampling", "share of detail"]]
        for name, row in report.items():
            error, after, share = row.values()
            lines.append([name, f"{error:.4f}", f"{after:.5f}", f"{share:.2f}"])
        logger.info(f"\n{aligned(lines)}")
        return {"results": [{"held-out images": name, **row} for name, row in report.items()]}


# Trains an [`UpscalerTask`] and saves it as a pipeline.
train_upscaler = partial(train_and_save, UpscalerTask)


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


def main() -> None:
    data_args, stages, budget = parse_planned(
        {"upscaler": UpscalerArguments}, {"upscaler": UpscalerTask}, description=__doc__
    )
    budget.start("upscaler", stages["upscaler"])
    publish(train_upscaler(data_args, stages["upscaler"]), stages["upscaler"])


if __name__ == "__main__":
    run_script(main)
