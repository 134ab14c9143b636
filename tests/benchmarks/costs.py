"""How the cost of guided sampling grows: counted operations, the seconds of a few sizes, and what 50,000 samples cost.

    OMP_NUM_THREADS=1 python tests/benchmarks/costs.py --output outputs/speed.json

A guided step is the UNet's forward pass and the classifier's gradient with respect to the image. Operations (FLOPs)
are those of convolutions and matrix products, a product and a sum being two; they are counted on the meta device, so
that the published models need no weights. Prints three Markdown tables (small models measured here; the published
models counted; 50,000 samples of them computed) and writes the numbers under "costs" to the JSON of the benchmarks.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import speed
import torch
from peers import CLASSIFIER, UNET, randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_guided import ADMForImageClassification, ADMUNet2DModel
from hf_guided.conversion.architecture import infer_architecture
from hf_guided.conversion.flags import classifier_config, parse_flags, unet_config
from hf_guided.conversion.openai import make_classifier, make_unet
from hf_guided.conversion.published import PUBLISHED
from hf_guided.models.ops import UpsampleConv2d
from hf_guided.schedulers.scheduling_adm import FEW_STEPS

Models = tuple[ADMUNet2DModel, ADMForImageClassification]

SHAPES = Path(__file__).parents[1] / "reference" / "published_checkpoints.json"
SAMPLES = 50_000
RESOLUTIONS = (64, 128, 256, 512)

# Operations a second of dense bfloat16 products with sums in float32, from the vendor's data sheets.
GPU_PEAKS = {"H100 SXM": 989e12, "A100": 312e12, "RTX 4090": 165e12}


class Size(NamedTuple):
    """What Table 1 varies; the widths are (1, 2, 2) times the channels, and attention sits on the lower two levels."""

    pixels: int = 32
    channels: int = 64
    batch: int = 8

    def __str__(self) -> str:
        return f"{self.pixels} pixels, {self.channels} channels, batch {self.batch}"


MIDDLE = Size()
SIZES = (
    MIDDLE,
    Size(pixels=16),
    Size(pixels=64),
    Size(channels=32),
    Size(channels=128),
    Size(batch=1),
    Size(batch=32),
)
WIDEST = Size(channels=128)  # nearest to the published models' 192 and 256


def count(model_call: Callable[[], Any]) -> int:
    """FLOPs of the convolutions and matrix products in a call, which may be one on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model_call()
    return counter.get_total_flops()


def check_counter() -> None:
    """The upsampling convolution of stride two must count 16 products for each pixel and pair of channels.

    Raises:
        `RuntimeError`: If this version of torch counts otherwise.
    """
    batch, channels, width, side = 2, 32, 48, 8
    with torch.device("meta"), torch.no_grad():
        layer, images = UpsampleConv2d(channels, width), torch.empty(batch, channels, side, side)
        counted = count(lambda: layer(images))
    transposed = 2 * batch * side**2 * 4**2 * channels * width
    kernel = 2 * channels * width * 3**2 * 4**2
    if counted != transposed + kernel:
        raise RuntimeError(f"torch counts {counted} operations in an upsampling convolution of {transposed + kernel}.")


class Step:
    """A guided step of two models on random images, on the models' device."""

    def __init__(self, unet: nn.Module, classifier: nn.Module, pixels: int, batch: int):
        self.unet, self.classifier = unet.requires_grad_(False), classifier.requires_grad_(False)
        device = next(unet.parameters()).device
        self.images = torch.randn(batch, 3, pixels, pixels, device=device)
        self.timestep = torch.tensor(500.0, device=device)
        self.labels = torch.zeros(batch, dtype=torch.long, device=device)

    def predict(self) -> torch.Tensor:
        with torch.no_grad():
            return self.unet(self.images, self.timestep, self.labels).sample

    def log_probability(self, images: torch.Tensor) -> torch.Tensor:
        log_p = self.classifier(images, self.timestep).logits.log_softmax(dim=-1)
        return log_p.gather(1, self.labels[:, None]).sum()

    def gradient(self) -> torch.Tensor | None:
        images = self.images.detach().requires_grad_()
        self.log_probability(images).backward()  # not autograd.grad, which the counter refuses
        return images.grad

    def __call__(self) -> None:
        self.predict()
        self.gradient()

    def count(self) -> dict[str, float]:
        """Parameters, and FLOPs for each image, of each part."""
        batch = len(self.images)
        with torch.no_grad():
            forward = count(lambda: self.log_probability(self.images)) / batch
        unet, gradient = count(self.predict) / batch, count(self.gradient) / batch
        return {
            "UNet's parameters": sum(parameter.numel() for parameter in self.unet.parameters()),
            "classifier's parameters": sum(parameter.numel() for parameter in self.classifier.parameters()),
            "UNet": unet,
            "classifier, forward": forward,
            "classifier, backward": gradient - forward,
            "guided step": unet + gradient,
        }


@cache
def small_models(pixels: int, channels: int) -> Models:
    """UNet and classifier as the project states its numbers, of another size, on the meta device."""
    size = {"image_size": pixels, "model_channels": channels}
    return make_unet({**UNET, **size}), make_classifier({**CLASSIFIER, **size})


@cache
def real_models(pixels: int, channels: int) -> Models:
    """The same with random weights, where the benchmarks run."""
    unet, classifier = small_models(pixels, channels)
    unet, classifier = ADMUNet2DModel.from_config(unet.config), ADMForImageClassification(classifier.config)
    for model in (unet, classifier):
        randomise(model).eval().to(speed.device())
    return unet, classifier


def published_configs(pixels: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the published UNet of this size and the classifier that guides it are made of, as their constructors ask."""
    checkpoints = json.loads(SHAPES.read_text())

    def config(kind: str, describe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        name = f"{pixels}x{pixels}_{kind}"
        flags = parse_flags(PUBLISHED[name].flags)
        shapes = checkpoints[name]["tensors"]
        return describe(flags, infer_architecture(shapes, flags["image_size"], flags.get("classifier_depth")))

    return config("diffusion", unet_config), config("classifier", classifier_config)


def published_models(pixels: int) -> Models:
    """Ours of them, on the meta device."""
    unet, classifier = published_configs(pixels)
    return make_unet(unet), make_classifier(classifier)


def measured(sizes: Sequence[Size], rounds: int, seconds_of_peak: float = 2.0) -> tuple[dict[str, dict], float]:
    """Table 1, and the peak of matrix products here; the first size is what the others are compared to."""

    def steps(models: Callable[[int, int], Models]) -> dict[str, Step]:
        return {str(size): Step(*models(size.pixels, size.channels), size.pixels, size.batch) for size in sizes}

    rows = {name: step.count() for name, step in steps(small_models).items()}
    contenders = steps(real_models)
    peak = speed.matmul_peak(seconds=seconds_of_peak)
    summary = speed.summary(speed.seconds_in_turn(contenders, rounds), reference=str(sizes[0]))
    peak = max(peak, speed.matmul_peak(seconds=seconds_of_peak))  # others may have slowed the first
    first = rows[str(sizes[0])]
    for size in sizes:
        row = rows[str(size)]
        row["parameters"] = row["UNet's parameters"] + row["classifier's parameters"]
        row["seconds"] = summary[str(size)]["seconds"] / size.batch
        row["share of the peak"] = row["guided step"] / row["seconds"] / peak
        row["FLOPs, relative"] = row["guided step"] / first["guided step"]
        row["seconds, relative"] = row["seconds"] / first["seconds"]
    return rows, peak


def samples(counted: dict[str, dict[str, float]], rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """Table 3: of each published model and number of steps, the FLOPs of all samples and the seconds at each rate."""
    rows = {}
    for pixels in RESOLUTIONS:
        name = f"{pixels}x{pixels}"
        published = int(parse_flags(PUBLISHED[f"{name}_diffusion"].flags)["timestep_respacing"])
        for steps in (published, FEW_STEPS):
            flops = SAMPLES * steps * counted[name]["guided step"]
            seconds = {hardware: flops / rate for hardware, rate in rates.items()}
            rows[f"{name}, {steps} steps"] = {"FLOPs": flops, **seconds}
    return rows


def scaled(value: float, unit: float, digits: int = 1) -> str:
    return f"{value / unit:,.{digits}f}"


def hours(seconds: float) -> str:
    value = seconds / 3600
    return f"{value:,.0f} h" if value >= 100 else f"{value:.1f} h" if value >= 10 else f"{value:.2f} h"


def small_table(rows: dict[str, dict]) -> str:
    """Table 1, of the small models measured here."""
    columns: dict[str, Callable[[Any], str]] = {
        "parameters": partial(scaled, unit=1e6),
        "guided step": partial(scaled, unit=1e9, digits=2),
        "FLOPs, relative": speed.ratio,
        "seconds": speed.milliseconds,
        "seconds, relative": speed.ratio,
        "share of the peak": speed.percent,
    }
    return speed.markdown(rows, columns)


def samples_table(table: dict[str, dict]) -> str:
    """Table 3, of what many samples of the published models cost."""
    columns = {"FLOPs": partial(scaled, unit=1e18, digits=2), **dict.fromkeys(("here", *GPU_PEAKS), hours)}
    return speed.markdown(table, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.json"))
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each size (default: 5)")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.45,
        help="share of a GPU's peak that Table 3 assumes (default: 0.45, an aim that is not measured yet)",
    )
    args = parser.parse_args()

    check_counter()
    rows, peak = measured(SIZES, args.rounds)
    counted = {
        f"{pixels}x{pixels}": Step(*published_models(pixels), pixels, batch=16).count() for pixels in RESOLUTIONS
    }
    share = rows[str(WIDEST)]["share of the peak"]
    rates = {"here": peak * share, **{name: theirs * args.efficiency for name, theirs in GPU_PEAKS.items()}}
    table = samples(counted, rates)
    report(rows, peak, counted, table, args.efficiency)
    results = {
        "matmul_peak": peak,
        "small": rows,
        "published": counted,
        "samples": table,
        "assumed": {"gpu_efficiency": args.efficiency, "gpu_peaks": GPU_PEAKS, "efficiency_here": share},
    }
    speed.save({"costs": results}, args.output)


def report(
    rows: dict[str, dict], peak: float, counted: dict[str, dict], table: dict[str, dict], efficiency: float
) -> None:
    """Prints the three tables, each with which of its numbers are measured, counted or computed."""
    machine = speed.machine()
    here = machine["gpu"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    mega, giga = partial(scaled, unit=1e6), partial(scaled, unit=1e9)

    print(
        f"\nTable 1. A guided step for each image: the UNet's forward pass and the classifier's gradient. Parameters "
        f"(millions, both models) and FLOPs (10⁹) are counted, seconds are measured (medians) on {here}, in float32. "
        f"The peak is that of matrix products measured there, {scaled(peak, 1e9)} GFLOP/s. Relative is to the first "
        f"row. Steps are alike: N of them cost N times as much.\n"
    )
    print(small_table(rows))

    print(
        "\nTable 2. The published models, for each image: parameters (millions) and FLOPs (10⁹), all of them counted, "
        "none measured. Halve them for the multiply-adds that papers often call FLOPs; ours upsample in 4/9 of the "
        "published code's products.\n"
    )
    columns: dict[str, Callable[[Any], str]] = {
        name: mega if name.endswith("parameters") else giga for name in next(iter(counted.values()))
    }
    print(speed.markdown(counted, columns))

    share = rows[str(WIDEST)]["share of the peak"]
    peaks = ", ".join(f"{name} {scaled(value, 1e12, digits=0)}" for name, value in GPU_PEAKS.items())
    print(
        f"\nTable 3. {SAMPLES:,} guided samples of the published models, in the published number of steps and in "
        f"{FEW_STEPS} of our second-order solver, which calls both models once a step, too: FLOPs (10¹⁸) counted, "
        f"hours computed, none measured. Here ({here}, float32) the hours suppose the share of the peak that the "
        f"{WIDEST.channels} channels of Table 1 reached, {speed.percent(share)}; these models themselves were not run. "
        f"On GPUs they suppose {speed.percent(efficiency)} of the data sheets' dense bfloat16 peaks ({peaks} "
        f"TFLOP/s): an aim, not measured yet. The published samples at 512x512 were drawn in float32.\n"
    )
    print(samples_table(table))


if __name__ == "__main__":
    main()
