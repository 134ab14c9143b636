"""A training step, beside the published code, diffusers' UNet and denoising-diffusion-pytorch, of equal size.

    python tests/benchmarks/speed_training.py --guided_diffusion PATH [--compile]

At the size of `peers.UNET`: 32x32 pixels, batches of 8, float32. A step is the loss, its gradient, AdamW and the moving
average, as each project's own trainer has them. Everything runs in turn in one process; prints Markdown. `--compile`
adds ours as `accelerate launch --dynamo_backend inductor` has it, on the processor with
`TORCHINDUCTOR_LAYOUT_OPTIMIZATION=0`; minutes of work the first time.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from costs import count
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from peers import (
    CLASSIFIER,
    UNET,
    denoising_diffusion_pytorch,
    diffusers_unet,
    guided_diffusion,
    published_models,
    randomise,
)
from speed import device, machine, markdown, save
from speed_sampling import COLUMNS, PUBLISHED, measure
from torch import nn

from hf_guided import ADMScheduler
from hf_guided.losses import diffusion_loss
from hf_guided.schedulers.scheduling_adm import model_timesteps


def published(
    peer: Any, unet: nn.Module, images: torch.Tensor, labels: torch.Tensor, use_fp16: bool = False
) -> Callable[[], None]:
    """As its `train_util.py` has it: a hybrid loss, AdamW, one moving average."""
    diffusion = peer.script_util.create_gaussian_diffusion(learn_sigma=True)
    sampler = peer.resample.UniformSampler(diffusion)
    trainer = peer.fp16_util.MixedPrecisionTrainer(model=unet, use_fp16=use_fp16)
    optimizer = torch.optim.AdamW(trainer.master_params, lr=1e-5)
    average = [parameter.detach().clone() for parameter in trainer.master_params]

    def run() -> None:
        trainer.zero_grad()
        timesteps, weights = sampler.sample(len(images), device())
        losses = diffusion.training_losses(unet, images, timesteps, model_kwargs={"y": labels})
        trainer.backward((losses["loss"] * weights).mean())
        trainer.optimize(optimizer)
        peer.nn.update_ema(average, trainer.master_params, rate=0.9999)

    return run


def stepping(model: nn.Module, loss: Callable[[], torch.Tensor], fused: bool = False) -> Callable[[], None]:
    """The rest of a step as our loop and diffusers' examples have it: clipping, AdamW, the moving average."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused)
    average = EMAModel(parameters, decay=0.9999)

    def run() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)

    return run


def our_loss(unet: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """As `training/train_diffusion.py` has it: hybrid."""
    scheduler = ADMScheduler()

    def loss() -> torch.Tensor:
        timesteps, noise = torch.randint(1000, labels.shape, device=device()), torch.randn_like(images)
        sample = scheduler.add_noise(images, noise, timesteps)
        output = unet(sample, model_timesteps(scheduler, timesteps), labels).sample
        return diffusion_loss(scheduler, output, images, noise, timesteps, "hybrid").loss.mean()

    return loss


def of_diffusers(unet: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """As diffusers' example of unconditional generation has it: the error of the noise alone."""
    scheduler = DDPMScheduler()

    def loss() -> torch.Tensor:
        timesteps, noise = torch.randint(1000, labels.shape, device=device()), torch.randn_like(images)
        output = unet(scheduler.add_noise(images, noise, timesteps), timesteps, labels).sample
        return F.mse_loss(output[:, :3], noise) + 0 * output.sum()

    return stepping(unet, loss)


def other(package: Any, images: torch.Tensor) -> Callable[[], None]:
    """As the trainer of denoising-diffusion-pytorch has it, with a learned variance."""
    unet = package.Unet(dim=64, dim_mults=(1, 2, 2), learned_variance=True).to(device())
    diffusion = package.LearnedGaussianDiffusion(unet, image_size=UNET["image_size"]).to(device())
    return stepping(diffusion, functools.partial(diffusion, (images + 1) / 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guided_diffusion", required=True, metavar="PATH", help="a clone of the published code")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.json"))
    args = parser.parse_args()
    peer = guided_diffusion(args.guided_diffusion)
    models = {name: model.to(device()).train() for name, model in published_models(peer, UNET, CLASSIFIER).items()}
    labels = torch.arange(args.batch_size, device=device()) % UNET["num_classes"]
    images = torch.rand(args.batch_size, 3, UNET["image_size"], UNET["image_size"], device=device()) * 2 - 1
    print(machine())

    their_unet = randomise(diffusers_unet(UNET)).to(device()).train()
    compiled_unet = copy.deepcopy(models["our_unet"])
    contenders = {
        PUBLISHED: published(peer, models["unet"], images, labels),
        "ours": stepping(models["our_unet"], our_loss(models["our_unet"], images, labels), fused=True),
    }
    if args.compile:
        options = {"layout_optimization": False} if device().type == "cpu" else None
        loss = our_loss(torch.compile(compiled_unet, options=options), images, labels)
        contenders["ours, compiled"] = stepping(compiled_unet, loss, fused=True)
        started = time.perf_counter()
        contenders["ours, compiled"]()
        print(f"\nCompiled in {time.perf_counter() - started:.0f} s")
    contenders["UNet2DModel of diffusers"] = of_diffusers(their_unet, images, labels)
    try:
        contenders["denoising-diffusion-pytorch"] = other(denoising_diffusion_pytorch(), images)
    except ImportError as error:
        print(f"\n{error}: left out")
    timesteps = torch.zeros(len(images), device=device())
    operations = count(lambda: models["our_unet"](images, timesteps, labels).sample.sum().backward())
    rows = measure(contenders, args.rounds, operations)
    print(f"\nA training step, {args.batch_size} images\n\n{markdown(rows, COLUMNS)}")
    save({"training": rows}, args.output)


if __name__ == "__main__":
    main()
