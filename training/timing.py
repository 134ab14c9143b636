"""How long a training takes on this machine, by a few images before it starts; durations as text."""

import math
import re
import time

import torch
from diffusers.training_utils import EMAModel

from .task import Task, examples

ENOUGH = 0.3  # seconds of a measurement
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_per_step(task: Task, device: torch.device, enough: float = ENOUGH) -> float:
    """Seconds of an update of the weights: loading images, both passes, the optimizer and the moving average.

    As many images are taken as need `enough` seconds, up to a batch; the model's weights stay as they are.
    """
    model, args = task.model.to(device).train(), task.args
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    parameters = [parameter for group in task.parameter_groups() for parameter in group["params"]]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    ema = EMAModel(parameters, decay=args.ema_decay)
    took: dict[int, float] = {}  # by the number of images
    updating = math.inf

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    count = min(4, args.train_batch_size)
    while True:
        for _ in range(2):  # the first pass also prepares kernels
            started = now()
            pixels, labels = examples(task.images, (index % len(task.images) for index in range(count)))
            batch = {"pixel_values": pixels.to(device)} | ({} if labels is None else {"labels": labels.to(device)})
            timesteps = task.timestep_sampler.sample(count)[0].to(device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                losses, _ = task.losses(model, batch, timesteps)
            losses.mean().backward()
            computed = now()
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            ema.step(parameters)
            took[count] = min(took.get(count, math.inf), computed - started)
            updating = min(updating, now() - computed)
        is_enough = took[count] > (enough if len(took) > 1 else 10 * enough)
        if is_enough or count == args.train_batch_size:
            break
        count = min(4 * count, args.train_batch_size)
    model.zero_grad(set_to_none=True)
    (fewer, before), (count, seconds) = ([(0, 0.0), *took.items()])[-2:]
    per_image = max(0.0, seconds - before) / (count - fewer)
    return args.gradient_accumulation_steps * (seconds + per_image * (args.train_batch_size - count)) + updating


def parse_duration(text: str) -> float:
    """The seconds of a duration such as `"90s"`, `"30m"`, `"8h"` or `"2d"`.

    Raises:
        `ValueError`: For another text, nothing, or more than a year.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds <= 366 * 86400:
        raise ValueError(f"--budget {text} is not a time; give 90s, 30m, 8h or 2d.")
    return seconds


def in_words(seconds: float) -> str:
    """A duration, rounded: `"40 seconds"`, `"3 minutes"`, `"2.5 hours"`, `"9 days"`."""
    for unit, fewest, length, digits in (("day", 1.5, 86400, 0), ("hour", 1.45, 3600, 1), ("minute", 2, 60, 0)):
        if seconds >= fewest * length:
            return f"{seconds / length:.{digits}f} {unit}s"
    return f"{max(1, seconds):.0f} second{'s' if seconds >= 1.5 else ''}"


def said(expected: dict[str, float]) -> str:
    """The seconds that stages are expected to take, in a sentence."""
    parts = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in expected.items())
    total = sum(expected.values())
    hint = "; `--budget 1h` plans for less" if total > 2 * 3600 else ""
    return f"This takes about {in_words(total)} on this machine: {parts}{hint}."
