"""What is checked and said before a training: images, memory, the folder, the Hub."""

import copy
import functools
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from ..data import LabelledImages, check_images
from ..files import locked
from ..hub.push import prepare_push
from .checkpoints import recover_folders
from .task import Task

logger = logging.getLogger(__name__)

check_once = functools.lru_cache(maxsize=1)(check_images)  # stages of one script share images


@contextmanager
def preflight(task: Task, accelerator: Accelerator, output_dir: Path) -> Iterator[None]:
    """Refuses early what would fail late and sums up the training; `output_dir` is locked until the end."""
    args, images = task.args, task.images
    with ExitStack() as lock:
        if accelerator.is_main_process:
            check_batch(images, args.train_batch_size, accelerator.device)
            if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu" and is_without_bfloat16():
                logger.warning(
                    "This processor has no instructions for bfloat16, so that a step takes about ten times as long as "
                    "in float32; leave out --mixed_precision bf16."
                )
            report = check_once(images)
            memory = estimate_memory(task)
            make_writable(output_dir)
            lock.enter_context(locked(output_dir))
            recover_folders(output_dir)
            if args.push_to_hub:
                args.hub_model_id = prepare_push(args.hub_model_id, **args.hub_access())
            num_parameters = sum(parameter.numel() for parameter in task.model.parameters())
            batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
            height, width = images.resolution
            num_levels = len(getattr(getattr(task.model, "config", None), "channel_mult", [1]))
            inner = ", ".join(f"{height >> level}x{width >> level}" for level in range(1, num_levels))
            if inner and getattr(args, "pretrained_model", None) is None and num_levels < len(args.channel_mult):
                inner += f" (odd, so not all {len(args.channel_mult)} levels of --channel_mult are used)"
            logger.info(
                f"\n== {task.name} ==\n{report}\n"
                f"model     {num_parameters:,} parameters, {height}x{width} pixels{inner and f', then {inner}'}, "
                f"about {memory / 2**30:.2g} GiB a process to train"
                f"{', less with gradient checkpointing' if args.gradient_checkpointing else ''}\n"
                f"training  {args.max_train_steps} steps of {batch_size} images on {accelerator.num_processes} "
                f"{accelerator.device.type} process(es), {args.max_train_steps * batch_size / len(images):.1f} epochs\n"
                f"writes    {output_dir}: checkpoints every {args.checkpointing_steps} steps, logs, the finished model"
                f"{f', pushed to {args.hub_model_id} at each' if args.push_to_hub else ''}"
            )
        accelerator.wait_for_everyone()
        yield


def is_without_bfloat16() -> bool:
    """Whether the CPU is one that computes with bfloat16 far slower than with float32."""
    return torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2")


def check_batch(images: LabelledImages, batch_size: int, device: torch.device) -> None:
    """Refuses batches whose pixels alone exceed the memory."""
    size = 4 * batch_size * images.image_channels * math.prod(images.resolution)  # bytes, as float32
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    if size > memory:
        raise ValueError(
            f"--train_batch_size {batch_size}: the pixels of a batch take {size / 2**30:.3g} GiB, and there are "
            f"{memory / 2**30:.3g}; give a smaller one; --gradient_accumulation_steps makes up for it."
        )


def make_writable(output_dir: Path) -> None:
    """Makes the folder and writes to it, since a disk may refuse what its permissions allow."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable").touch()
        (output_dir / ".writable").unlink()
    except OSError as error:
        raise OSError(f"--output_dir {output_dir} cannot be written ({error.strerror}); give another.") from None


def estimate_memory(task: Task) -> int:
    """Bytes of weights, gradients, AdamW's moments, the moving average, and a batch's activations.

    The activations are counted on the meta device, where nothing is computed.
    """
    model = copy.deepcopy(task.model).to("meta").train()
    weights = {parameter.untyped_storage()._cdata: parameter.nbytes for parameter in model.parameters()}
    activations: dict[int, int] = {}  # by storage: tensors that several layers keep count once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            activations[storage._cdata] = storage.nbytes()
        return tensor

    size = (task.args.train_batch_size, task.images.image_channels, *task.images.resolution)
    labels = torch.zeros(size[0], dtype=torch.long, device="meta")
    batch = {"pixel_values": torch.empty(size, device="meta"), "labels": labels}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**task.inputs(batch))  # keeps every counted storage alive
    del output
    return 5 * sum(weights.values()) + sum(activations.values())
