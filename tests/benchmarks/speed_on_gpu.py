"""The published sizes on a GPU: guided sampling, training, and what half precision changes.

    python tests/benchmarks/speed_on_gpu.py --guided_diffusion PATH --pixels 256 --batch_size 16

The published architecture with random weights, ours in bfloat16 beside the published code in its float16, in turn in
one process. `--parts sampling` measures guided steps: as they are, with convolutions in channels_last, compiled, and
with CUDA graphs. `--parts training` measures a step, with and without gradient checkpointing, and the largest batch
that fits. `--parts numerics` follows a guided trajectory in half precision beside float32, and counts gradients of the
classifier that are not finite. Prints Markdown and writes JSON. `--pixels 32` is the small size of the other
benchmarks, at which the script can be tried without a GPU.
"""

import argparse
import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from costs import Step, published_configs
from peers import CLASSIFIER, UNET, guided_diffusion
from peers import published_models as with_weights
from speed import device, machine, markdown, mebibytes, milliseconds, percent, ratio, save
from speed_sampling import PEAK, PUBLISHED, STEPS, measure, our_step, pipeline_of, published_step
from speed_training import our_loss, published, stepping
from torch import nn

from hf_guided.conversion.openai import make_classifier, make_unet

COLUMNS = {
    "seconds": milliseconds,
    "ratio": ratio,
    "images in an hour": lambda number: f"{number:,.0f}",
    "tensors": mebibytes,
    PEAK: percent,
}


def in_half(model: nn.Module) -> nn.Module:
    """The published model in float16, as its scripts make it with `--use_fp16 True`."""
    model = copy.deepcopy(model)
    model.dtype = torch.float16
    model.convert_to_fp16()
    return model.to(device())


def labels_of(batch: int) -> torch.Tensor:
    """Classes that every size has."""
    return torch.arange(batch, device=device()) % UNET["num_classes"]


def works(name: str, run: Callable[[], Any]) -> bool:
    """Tries a contender; one that fails is said to, and left out."""
    try:
        run()
        run()  # CUDA graphs are recorded by the second call
    except (RuntimeError, ValueError) as error:
        print(f"\n{name} is left out: {str(error).splitlines()[0]}")
        return False
    return True


def sampling(peer: Any, models: dict[str, nn.Module], pixels: int, batch: int, rounds: int, operations: float) -> dict:
    """Guided steps, with images in an hour at the published 250."""
    labels = labels_of(batch)
    half = {name: in_half(models[name]) for name in ("unet", "classifier")}
    pipelines = {
        name: pipeline_of(models, torch.bfloat16)
        for name in ("ours", "ours, channels_last", "ours, compiled", "ours, compiled, CUDA graphs")
    }
    for name in pipelines.keys() - {"ours"}:
        for model in (pipelines[name].unet, pipelines[name].classifier):
            model.to(memory_format=torch.channels_last)
    pipelines["ours, compiled"].compile()
    pipelines["ours, compiled, CUDA graphs"].compile(mode="reduce-overhead")
    contenders = {PUBLISHED: published_step(peer, half, labels, STEPS, pixels)}
    for name, pipeline in pipelines.items():
        run = our_step(pipeline, labels, STEPS)
        if works(name, run):
            contenders[name] = run
    rows = measure(contenders, rounds, batch * operations, STEPS, torch.bfloat16)
    for row in rows.values():
        row["images in an hour"] = 3600 * batch / row["seconds"] / 250
    print(f"\nA guided step, {batch} images of {pixels}x{pixels}\n\n{markdown(rows, COLUMNS)}")
    return rows


def training(peer: Any, models: dict[str, nn.Module], pixels: int, batch: int, rounds: int, operations: float) -> dict:
    """A step with and without gradient checkpointing, and the largest batch, by doubling, that fits."""

    def theirs(checkpointing: bool, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
        unet = copy.deepcopy(models["unet"]).train()
        unet.dtype = torch.float16
        for module in unet.modules():
            if hasattr(module, "use_checkpoint"):
                module.use_checkpoint = checkpointing
        return published(peer, unet.to(device()), images, labels, use_fp16=True)

    def ours(checkpointing: bool, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
        unet = copy.deepcopy(models["our_unet"]).train().to(device())
        if checkpointing:
            unet.enable_gradient_checkpointing()
        accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
        return stepping(unet, our_loss(accelerator.prepare_model(unet), images, labels), fused=True)

    rows: dict[str, Any] = {}
    for checkpointing, suffix in ((False, ""), (True, ", checkpointing")):
        data = [torch.rand(batch, 3, pixels, pixels, device=device()) * 2 - 1, labels_of(batch)]
        contenders = {PUBLISHED: theirs(checkpointing, *data), "ours": ours(checkpointing, *data)}
        found = measure(contenders, rounds, batch * operations, dtype=torch.bfloat16)
        for name, row in found.items():
            row["images in an hour"] = 3600 * batch / row["seconds"]
            rows[name + suffix] = row
        del contenders
        for name, make in ((PUBLISHED, theirs), ("ours", ours)) if torch.cuda.is_available() else ():
            rows[name + suffix]["largest batch"] = largest_batch(functools.partial(make, checkpointing), pixels)
    columns = {**COLUMNS, "largest batch": str}
    print(f"\nA training step, {batch} images of {pixels}x{pixels}\n\n{markdown(rows, columns)}")
    return rows


def largest_batch(make: Callable[..., Callable[[], Any]], pixels: int) -> int:
    """The largest power of two that a step gets through."""
    batch = 1
    while True:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            make(torch.zeros(batch, 3, pixels, pixels, device=device()), labels_of(batch))()
        except torch.OutOfMemoryError:
            return batch // 2
        batch *= 2


def numerics(models: dict[str, nn.Module], pixels: int, batch: int, gradients: int) -> dict[str, Any]:
    """How far a guided trajectory of 25 steps is from float32's, in 8-bit levels, and gradients that are not finite."""
    labels = labels_of(batch)
    options = {"respacing": "25", "guidance_scale": 1.0, "output_type": "latent", "return_dict": False}
    rows: dict[str, Any] = {}
    exact = None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipeline = pipeline_of(models, dtype)
        noise = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        images = (
            pipeline(labels, latents=noise.to(device(), dtype), generator=generators, **options)[0].double() * 127.5
        )
        exact = images if exact is None else exact
        row = {"mean difference": (images - exact).abs().mean().item(), "largest": (images - exact).abs().max().item()}
        if dtype != torch.float32:
            classifier = pipeline.classifier.requires_grad_(False)
            wrong = torch.zeros((), dtype=torch.long, device=device())
            for i in range(gradients // batch):
                x = torch.randn(batch, 3, pixels, pixels, device=device(), dtype=dtype).requires_grad_()
                log_p = classifier(x, torch.tensor(1000.0 * i * batch / gradients)).logits.float().log_softmax(-1)
                (gradient,) = torch.autograd.grad(log_p.gather(1, labels[:, None]).sum(), x)
                wrong += (~gradient.isfinite()).flatten(1).any(dim=1).sum()
            row["not finite"] = f"{wrong.item()} of {gradients // batch * batch}"
        rows[str(dtype).removeprefix("torch.")] = row
    columns = {"mean difference": "{:.2f}".format, "largest": "{:.1f}".format, "not finite": str}
    print(f"\nA guided trajectory of 25 steps beside float32's, in levels of 255\n\n{markdown(rows, columns)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guided_diffusion", required=True, metavar="PATH", help="a clone of the published code")
    parser.add_argument("--pixels", type=int, choices=(32, 64, 128, 256, 512), default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gradients", type=int, default=10_000)
    parts = ("sampling", "training", "numerics")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.json"))
    args = parser.parse_args()
    peer = guided_diffusion(args.guided_diffusion)
    configs = (UNET, CLASSIFIER) if args.pixels == UNET["image_size"] else published_configs(args.pixels)
    models = with_weights(peer, *configs)
    print(machine())
    counted = Step(make_unet(configs[0]), make_classifier(configs[1]), args.pixels, 1).count()  # on the meta device
    sizes = (args.pixels, args.batch_size, args.rounds)
    run = {
        "sampling": lambda: sampling(peer, models, *sizes, counted["guided step"]),
        "training": lambda: training(peer, models, *sizes, 3 * counted["UNet"]),  # twice the products backward
        "numerics": lambda: numerics(models, args.pixels, min(args.batch_size, 8), args.gradients),
    }
    for part in args.parts:
        save({f"gpu, {args.pixels} pixels, {part}": run[part]()}, args.output)


if __name__ == "__main__":
    main()
