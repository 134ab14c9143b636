"""A step of guided sampling, beside the published code with the same weights, and of a UNet alone, beside others.

    python tests/benchmarks/speed_sampling.py --guided_diffusion PATH [--compile] [--profile]

At the size of `peers.UNET`: 32x32 pixels, classes told and a classifier that guides, batches of 8. Everything runs in
turn in one process. Prints Markdown: seconds of a step, ratios to the published code's, peak memory, and the share of
the machine's matrix-product peak, measured in the same rounds and reckoned with the operations of our step for
everyone. `--profile` also says where a step's time goes. `--compile` adds ours compiled, a minute or two of work the
first time.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from costs import Step
from peers import CLASSIFIER, UNET, denoising_diffusion_pytorch, diffusers_unet, guided_diffusion, published_models
from speed import (
    device,
    machine,
    markdown,
    matmul,
    mebibytes,
    milliseconds,
    peak_memory,
    percent,
    ratio,
    save,
    seconds_in_turn,
    summary,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hf_guided import ADMScheduler, ClassifierGuidedPipeline

PUBLISHED = "guided-diffusion"
STEPS = 4  # of each call; a step is a quarter of it
QUALITY_STEPS = (250, 10)  # of the published DDPM, and of ours of second order, at equal FID (guidance_solvers.py)
PEAK = "of the peak"
COLUMNS = {
    "seconds": milliseconds,
    "fastest": milliseconds,
    "ratio": ratio,
    "tensors": mebibytes,
    "process": mebibytes,
    PEAK: percent,
}
KINDS = {
    "convolutions": ("convolution", "conv_transpose", "_FrozenConvolution"),
    "attention": ("attention", "bmm", "softmax", "CheckpointFunction"),
    "linear layers": ("addmm", "aten::mm", "aten::linear"),
    "norms and activations": ("group_norm", "_NormSiLU", "silu", "sigmoid", "addcmul"),
    "concatenation": ("cat",),
    "resampling": ("pool", "upsample"),
}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of README.md beside it, of what this script and `speed_training.py` have saved in one `--output`."""
    kinds = results["sampling"]["by_kind"]
    return {
        "GUIDED": markdown(results["sampling"]["guided"], COLUMNS),
        "TRAINING": markdown(results["training"], COLUMNS),
        "KINDS": markdown(kinds, dict.fromkeys(next(iter(kinds.values())), milliseconds)),
        "QUALITY": f"{results['sampling']['to_equal_quality']:.3f}",
    }


def published_step(
    peer: Any, models: dict[str, Any], labels: torch.Tensor, steps: int, pixels: int = UNET["image_size"]
) -> Callable[[], torch.Tensor]:
    """The denoising loop of the published sampler, guided as by its `classifier_sample.py`."""
    diffusion = peer.script_util.create_gaussian_diffusion(learn_sigma=True, timestep_respacing=str(steps))

    def gradient(x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_probability = F.log_softmax(models["classifier"](x, timesteps), dim=-1)
            return torch.autograd.grad(log_probability[range(len(x)), y].sum(), x)[0]

    shape = (len(labels), 3, pixels, pixels)

    def run() -> torch.Tensor:
        options = {"clip_denoised": True, "model_kwargs": {"y": labels}, "device": device()}
        return diffusion.p_sample_loop(models["unet"], shape, cond_fn=gradient, **options)

    return run


def pipeline_of(models: dict[str, Any], dtype: torch.dtype = torch.float32) -> ClassifierGuidedPipeline:
    """A pipeline of copies of our models."""
    unet, classifier = (copy.deepcopy(models[name]) for name in ("our_unet", "our_classifier"))
    pipeline = ClassifierGuidedPipeline(unet, ADMScheduler(), classifier).to(device(), dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def our_step(pipeline: ClassifierGuidedPipeline, labels: torch.Tensor, steps: int) -> Callable[[], torch.Tensor]:
    """The same loop of ours."""

    def run() -> torch.Tensor:
        options = {"guidance_scale": 1.0, "respacing": str(steps), "output_type": "latent", "return_dict": False}
        return pipeline(labels, **options)[0]

    return run


def measure(
    contenders: dict[str, Callable],
    rounds: int,
    operations: float,
    calls: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Rows of numbers, of one of `calls` steps; the peak is that of products of this type, which take turns too."""
    product, operations_of_product = matmul(dtype)
    seconds = seconds_in_turn({**contenders, PEAK: product}, rounds)
    of_product = seconds.pop(PEAK)
    rows: dict[str, Any] = summary(seconds, next(iter(contenders)))
    for name, run in contenders.items():
        products = statistics.median(a / b for a, b in zip(of_product, seconds[name], strict=True))
        rows[name]["seconds"] /= calls
        rows[name]["fastest"] /= calls
        rows[name] |= peak_memory(run)
        rows[name][PEAK] = products * calls * operations / operations_of_product
    return rows


def by_kind(run: Callable) -> dict[str, float]:
    """Seconds of a call by kinds of operations, and what is left of it, the host's share."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    seconds = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), None)
        seconds[kind or "other operations"] += event.self_cpu_time_total / 1e6
    return seconds


def by_part(run: Callable, unet: nn.Module, classifier: nn.Module) -> dict[str, float]:
    """Seconds of a call within the UNet, the classifier forward and backward, and outside of them."""
    seconds = {"UNet": 0.0, "classifier, forward": 0.0, "classifier, backward": 0.0}
    original = torch.autograd.grad

    def gradient(*args: Any, **options: Any) -> Any:
        started, torch.autograd.grad = time.perf_counter(), original  # which checkpointing calls again from within
        try:
            return original(*args, **options)
        finally:
            seconds["classifier, backward"] += time.perf_counter() - started
            torch.autograd.grad = gradient

    def tick(part: str, sign: int, *args: Any) -> None:
        seconds[part] += sign * time.perf_counter()

    hooks = []
    for part, model in (("UNet", unet), ("classifier, forward", classifier)):
        hooks.append(model.register_forward_pre_hook(partial(tick, part, -1)))
        hooks.append(model.register_forward_hook(partial(tick, part, 1)))
    started, torch.autograd.grad = time.perf_counter(), gradient
    try:
        run()
    finally:
        torch.autograd.grad = original
        for hook in hooks:
            hook.remove()
    return {**seconds, "scheduler and the rest": time.perf_counter() - started - sum(seconds.values())}


def medians(measurements: dict[str, Callable[[], dict[str, float]]], rounds: int, steps: int) -> dict[str, Any]:
    """Of so many rounds, in which the measurements take turns, each of a call of `steps` steps: seconds of a step."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measurement in measurements.items():
            found[name].append(measurement())
    return {
        name: {part: statistics.median(row[part] for row in rows) / steps for part in rows[0]}
        for name, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guided_diffusion", required=True, metavar="PATH", help="a clone of the published code")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.json"))
    args = parser.parse_args()
    peer = guided_diffusion(args.guided_diffusion)
    models = {name: model.to(device()) for name, model in published_models(peer, UNET, CLASSIFIER).items()}
    labels = torch.arange(args.batch_size, device=device()) % UNET["num_classes"]
    sample = torch.randn(args.batch_size, 3, UNET["image_size"], UNET["image_size"], device=device())
    timesteps = torch.full((args.batch_size,), 500, device=device())
    print(machine())

    # 1. Guided steps of the same weights
    pipeline = pipeline_of(models)
    contenders = {
        PUBLISHED: published_step(peer, models, labels, STEPS),
        "ours": our_step(pipeline, labels, STEPS),
    }
    if args.compile:
        compiled = pipeline_of(models)
        compiled.compile()
        contenders["ours, compiled"] = our_step(compiled, labels, STEPS)
        started, seed = time.perf_counter(), {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        images = compiled(labels, respacing=str(STEPS), **seed).images
        print(f"\nCompiled in {time.perf_counter() - started:.0f} s")
        seed["generator"].manual_seed(0)
        differences = (images - pipeline(labels, respacing=str(STEPS), **seed).images).abs()
        print(f"After {STEPS} steps images differ from those not compiled by up to {differences.max():.1e}.")
    operations = Step(models["our_unet"], models["our_classifier"], UNET["image_size"], args.batch_size).count()
    guided = measure(contenders, args.rounds, args.batch_size * operations["guided step"], STEPS)
    print(f"\nA guided step, {args.batch_size} images\n\n{markdown(guided, COLUMNS)}")
    slow, fast = QUALITY_STEPS[0] * guided[PUBLISHED]["seconds"], QUALITY_STEPS[1] * guided["ours"]["seconds"]
    print(
        f"\nTo equal quality: {QUALITY_STEPS[1]} steps of ours take {fast:.1f} s, {fast / slow:.3f} of the "
        f"{slow:.1f} s of {QUALITY_STEPS[0]} published ones."
    )
    results: dict[str, Any] = {"sampling": {"guided": guided, "to_equal_quality": fast / slow}}

    # 2. UNets alone
    alone: dict[str, Callable] = {
        PUBLISHED: lambda: models["unet"](sample, timesteps, labels),
        "ours": lambda: models["our_unet"](sample, timesteps[0], labels).sample,
    }
    their_unet = diffusers_unet(UNET).to(device()).eval()
    alone["UNet2DModel of diffusers"] = lambda: their_unet(sample, timesteps, labels).sample
    try:
        package = denoising_diffusion_pytorch()
        their_other = package.Unet(dim=64, dim_mults=(1, 2, 2), learned_variance=True).to(device()).eval()
        alone["Unet of denoising-diffusion-pytorch"] = lambda: their_other(sample, timesteps)
    except ImportError as error:
        print(f"\n{error}: left out")
    alone = {name: torch.no_grad()(run) for name, run in alone.items()}
    unguided = measure(alone, args.rounds, args.batch_size * operations["UNet"])
    print(f"\nA UNet's forward pass\n\n{markdown(unguided, COLUMNS)}")
    results["sampling"]["unet"] = unguided

    # 3. Where the time goes
    if args.profile:
        loops = {
            PUBLISHED: (contenders[PUBLISHED], models["unet"], models["classifier"]),
            "ours": (contenders["ours"], pipeline.unet, pipeline.classifier),
        }
        parts = medians({name: partial(by_part, *loop) for name, loop in loops.items()}, args.rounds, STEPS)
        kinds = medians({name: partial(by_kind, run) for name, (run, *_) in loops.items()}, args.rounds, STEPS)
        for title, table in (("By part", parts), ("By kind of operation", kinds)):
            columns = dict.fromkeys(next(iter(table.values())), milliseconds)
            print(f"\n{title}\n\n{markdown(table, columns)}")
        results["sampling"] |= {"by_part": parts, "by_kind": kinds}
    save(results, args.output)


if __name__ == "__main__":
    main()
