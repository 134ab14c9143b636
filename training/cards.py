"""What cards and logs say of a training: data, steps and time, hardware, tables."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hf_guided.data import DataArguments, LabelledImages
from hf_guided.files import is_hub_id
from hf_guided.training.arguments import LoopArguments, RunArguments
from hf_guided.training.checkpoints import list_checkpoints, read_state
from hf_guided.training.timing import in_words


def describe_data(data_args: DataArguments) -> dict[str, Any]:
    """Entries about the data."""
    return {"dataset": data_args.title, "dataset_id": on_hub(data_args.dataset_name)}


def on_hub(name: str | None) -> str | None:
    """The name, if it is a Hub id; else `None`."""
    return name if name and "/" in name and is_hub_id(name) else None


def describe_images(images: tuple[LabelledImages, LabelledImages | None]) -> str:
    """The numbers of images to train on and held out, as text."""
    return f"{len(images[0])} to train on, {len(images[1] or ())} held out"


def describe_steps(args: LoopArguments, stage: str) -> str:
    """The length of a training as text: steps, and the time from its newest checkpoint."""
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
    text = f"{args.max_train_steps} steps of {batch_size} images"
    checkpoints = list_checkpoints(Path(args.output_dir) / stage)
    if not checkpoints:
        return text
    state = read_state(checkpoints[-1])
    if state["step"] < args.max_train_steps:
        text = f"{state['step']} of {text} so far"
    return f"{text}, in {in_words(state['seconds'])}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a text of aligned columns, the first one to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in rows)


def describe_run(args: RunArguments) -> dict[str, Any]:
    """Entries about precision, hardware and software."""
    is_gpu = PartialState().device.type == "cuda"
    hardware = torch.cuda.get_device_name() if is_gpu else f"{torch.get_num_threads()} CPU threads"
    packages = ("hf-guided", "torch", "diffusers", "transformers", "accelerate")
    return {
        "recipe": args.recipe,
        "seed": args.seed,
        "hardware": f"{hardware}, {platform.system()}, {PartialState().num_processes} process(es)",
        "versions": {name: version(name) for name in packages},
    }
