"""Images a second that the data pipeline delivers, beside what a training step eats of them.

    OMP_NUM_THREADS=1 python tests/benchmarks/speed_loading.py --guided_diffusion ../guided-diffusion

The built-in digits, a folder of made-up PNGs of 32x32, and one of made-up JPEGs of 256x256 that are brought to 64x64;
each in the main process and in two workers. Beside ours stand the published `image_datasets.load_data` and the loader
of diffusers' example of unconditional training. All mirror half of the images, crop the centre and give the class. A
chunk is an epoch of the folder, contenders take turns, and workers live on between chunks, idle: none fills its queues
on another's time. Files are in the system's cache. The published loader has one worker, which it restarts each epoch;
the row "1 worker as published" leaves it so, the others set the number from outside.

"eaten" is the training step of the benchmark's UNet, made for the data's size, with nothing loaded meanwhile, and
"factor" is delivered / eaten: below 1 the training waits for images, and without workers loading makes each step
1 + 1 / factor times as long. On a processor workers take their cores from the training. "relative" is the speed beside
the first row's of the same data, round by round. Prints Markdown and writes "loading" to the benchmarks' JSON.
"""

import argparse
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import peers
import speed
import torch
from PIL import Image
from speed_training import our_loss
from torch.utils.data import DataLoader

from hf_guided import ADMUNet2DModel
from hf_guided.conversion.openai import make_unet
from hf_guided.data import DataArguments, StepBatchSampler, load_labelled_images

CLASSES = peers.UNET["num_classes"]


class Data(NamedTuple):
    """A set of images: files of `side` pixels in a format, and what they are brought to; without a format, digits."""

    name: str
    side: int
    resolution: int
    channels: int = 3
    suffix: str | None = None


DATA = (
    Data("digits", 8, 8, channels=1),
    Data("PNG 32x32", 32, 32, suffix="png"),
    Data("JPEG 256x256 to 64x64", 256, 64, suffix="jpg"),
)


def draw_images(folder: Path, data: Data, count: int) -> Path:
    """Writes `count` images of blurred noise, which take as many bytes as photographs, a folder for each class.

    The files' names begin with the class, too, where the published code looks for it.
    """
    generator = np.random.default_rng(0)
    for number in range(count):
        noise = generator.integers(0, 256, (data.side // 4, data.side // 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((data.side, data.side), Image.Resampling.BICUBIC)
        name = f"c{number % CLASSES}"
        (folder / name).mkdir(exist_ok=True)
        image.save(folder / name / f"{name}_{number:06d}.{data.suffix}")
    return folder


def our_chunk(data: Data, folder: Path | None, batch_size: int, batches: int, workers: int) -> Callable[[], Any]:
    """As the training loop loads them, but in epochs: the loop's stream has no end."""
    place = {} if folder is None else {"train_data_dir": str(folder), "cache_dir": str(folder.parent / "cache")}
    arguments = DataArguments(
        **place, resolution=[data.resolution], random_flip=True, held_out_fraction=None if folder is None else 0
    )
    images, _ = load_labelled_images(arguments, seed=0)
    sampler = StepBatchSampler(len(images), batch_size, seed=0, num_steps=batches)
    loader = DataLoader(images, batch_sampler=sampler, **loader_options(workers))
    return lambda: consume(iter(loader), batches)


def diffusers_chunk(data: Data, folder: Path, batch_size: int, batches: int, workers: int) -> Callable[[], Any]:
    """As in diffusers' examples/unconditional_image_generation, its transforms written without torchvision."""
    images = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(folder.parent / "cache")
    )

    def augmentations(image: Image.Image) -> torch.Tensor:
        scale = data.resolution / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - data.resolution) // 2, (image.height - data.resolution) // 2
        image = image.crop((left, top, left + data.resolution, top + data.resolution))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)  # ToTensor
        return values.sub_(0.5).div_(0.5)  # Normalize

    def transform(examples: dict[str, list]) -> dict[str, list]:
        return {
            "input": [augmentations(image.convert("RGB")) for image in examples["image"]],
            "label": examples["label"],
        }

    images.set_transform(transform)
    loader = DataLoader(images, batch_size=batch_size, shuffle=True, drop_last=True, **loader_options(workers))
    return lambda: consume(iter(loader), batches)


def published_chunk(
    module: Any, data: Data, folder: Path, batch_size: int, batches: int, workers: int | None
) -> Callable[[], Any]:
    """The published loader with so many workers; `None` leaves it as it is."""
    stream = module.load_data(
        data_dir=str(folder), batch_size=batch_size, image_size=data.resolution, class_cond=True, random_flip=True
    )

    def run() -> None:
        # The stream makes its one loader when it is first asked for a batch.
        module.DataLoader = DataLoader if workers is None else partial(with_workers, workers)
        consume(stream, batches)

    return run


def with_workers(workers: int, *args: Any, **options: Any) -> DataLoader:
    return DataLoader(*args, **{**options, **loader_options(workers)})


def loader_options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


def consume(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


def published_loader(folder: Path) -> Any:
    """Their module of data sets. It asks MPI for the process's number and blobfile for files; either may be missing."""
    peers.guided_diffusion(folder)
    if importlib.util.find_spec("mpi4py") is None:
        # Stands in for MPI: one process.
        world = types.SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1)
        package = types.ModuleType("mpi4py")
        package.MPI = types.SimpleNamespace(COMM_WORLD=world)
        sys.modules["mpi4py"] = package
    if importlib.util.find_spec("blobfile") is None:
        # Stands in for blobfile: local files only, without its detour through URLs, which makes the peer faster.
        package = types.ModuleType("blobfile")
        package.listdir, package.join, package.isdir = os.listdir, os.path.join, os.path.isdir
        package.basename, package.BlobFile = os.path.basename, open
        sys.modules["blobfile"] = package
    return importlib.import_module("guided_diffusion.image_datasets")


def training_step(data: Data, batch_size: int) -> Callable[[], Any]:
    """The step of training/loop.py on one batch that is there already, in float32 and without its moving average."""
    side, place = data.resolution, speed.device()
    torch.manual_seed(0)
    size = {"image_size": side, "in_channels": data.channels, "out_channels": 2 * data.channels}
    unet = ADMUNet2DModel.from_config(make_unet({**peers.UNET, **size}).config).to(place)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    clean = torch.rand(batch_size, data.channels, side, side, device=place) * 2 - 1
    loss = our_loss(unet, clean, torch.randint(CLASSES, (batch_size,), device=place))

    def run() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def measured(data: Data, args: argparse.Namespace, module: Any) -> dict[str, dict[str, Any]]:
    """The rows of one set of images."""
    with tempfile.TemporaryDirectory() as temporary:
        size = (args.batch_size, args.batches)
        contenders: dict[str, Callable[[], Any]] = {}
        if data.suffix is None:
            folder = None
        else:
            (folder := Path(temporary) / "images").mkdir()
            draw_images(folder, data, args.batch_size * args.batches)
        for workers in args.workers:
            contenders[f"ours, {workers} workers"] = our_chunk(data, folder, *size, workers)
            if folder is not None:
                contenders[f"diffusers' example, {workers} workers"] = diffusers_chunk(data, folder, *size, workers)
            if folder is not None and module is not None:
                contenders[f"guided-diffusion, {workers} workers"] = published_chunk(
                    module, data, folder, *size, workers
                )
        if folder is not None and module is not None:
            contenders["guided-diffusion, 1 worker as published"] = published_chunk(module, data, folder, *size, None)
        reference = next(iter(contenders))
        seconds = speed.seconds_in_turn(contenders, args.rounds, warmup=1)
        # On a processor fewer images do: enough of them that the optimizer's share is small.
        few = args.batch_size if torch.cuda.is_available() else max(8, 4096 // data.resolution**2)
        step_batch_size = args.step_batch_size or min(args.batch_size, few)
        step = speed.seconds_in_turn({"step": training_step(data, step_batch_size)}, args.step_rounds, warmup=1)
    eaten = step_batch_size / statistics.median(step["step"])
    rows = {}
    for name, times in seconds.items():
        delivered = args.batch_size * args.batches / statistics.median(times)
        rows[f"{data.name}: {name}"] = {
            "seconds": statistics.median(times),
            "images/s": delivered,
            "relative": statistics.median(a / b for a, b in zip(seconds[reference], times, strict=True)),
            "eaten/s": eaten,
            "factor": delivered / eaten,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guided_diffusion", type=Path, metavar="PATH", help="folder of the published code")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="images in a batch (default: 64)")
    parser.add_argument("--batches", type=int, default=16, metavar="N", help="batches in a chunk (default: 16)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="chunks of each contender (default: 10)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="default: 0 2")
    parser.add_argument(
        "--step_batch_size",
        type=int,
        metavar="N",
        help="of the step (default: like --batch_size; on the CPU 8, 64 digits)",
    )
    parser.add_argument("--step_rounds", type=int, default=5, metavar="N", help="steps measured (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.json"), metavar="JSON")
    args = parser.parse_args()

    datasets.disable_progress_bars()
    module = published_loader(args.guided_diffusion) if args.guided_diffusion else None
    rows: dict[str, dict[str, Any]] = {}
    for data in DATA:
        rows |= measured(data, args, module)
    columns = {"images/s": whole, "relative": speed.ratio, "eaten/s": speed.ratio, "factor": speed.ratio}
    print(speed.markdown(rows, columns))
    speed.save({"loading": rows}, args.output)


def whole(value: float) -> str:
    return f"{value:,.0f}"


if __name__ == "__main__":
    main()
