"""How long a training takes on this machine, by a few images before it starts."""

import time

import torch

from .task import Task

ENOUGH = 0.3  # seconds of a measurement


def seconds_per_image(task: Task, device: torch.device) -> float:
    """Seconds of a forward and a backward pass for each image; the model keeps no gradient."""
    model, args = task.model.to(device).train(), task.args
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    count = min(4, args.train_batch_size)
    while True:
        shape = (count, task.images.image_channels, *task.images.resolution)
        batch = {"pixel_values": torch.zeros(shape), "labels": torch.zeros(count, dtype=torch.long)}
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        timesteps = task.timestep_sampler.sample(count)[0].to(device)
        for _ in range(2):  # the first pass also prepares kernels
            started = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                losses, _ = task.losses(model, batch, timesteps)
            losses.mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
        if seconds > ENOUGH or count == args.train_batch_size:
            model.zero_grad(set_to_none=True)
            return seconds / count
        count = min(4 * count, args.train_batch_size)


def in_words(seconds: float) -> str:
    """A duration, rounded: `"40 seconds"`, `"3 minutes"`, `"2.5 hours"`, `"9 days"`."""
    for unit, length, digits in (("day", 86400, 0), ("hour", 3600, 1), ("minute", 60, 0)):
        if seconds >= (1.5 if digits == 0 else 1.45) * length:
            return f"{seconds / length:.{digits}f} {unit}s"
    return f"{max(1, seconds):.0f} second{'s' if seconds >= 1.5 else ''}"


def said(expected: dict[str, float]) -> str:
    """The seconds that stages are expected to take, in a sentence."""
    parts = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in expected.items())
    return f"This takes about {in_words(sum(expected.values()))} on this machine: {parts}."
