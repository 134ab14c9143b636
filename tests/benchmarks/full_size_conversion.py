"""Converts random weights in the format of published checkpoints, at full size, and measures memory and time.

For each name it writes a `.pt` file of random float32 weights with the published names and shapes, runs `hf-guided
convert` on it in a process of its own, and prints a Markdown table: the file's size, the peak of the process's memory
(imports included) and the seconds. For the 64x64 UNet the converted model then runs one forward.

    python tests/benchmarks/full_size_conversion.py 64x64_diffusion 256x256_diffusion [--dtype fp16] [--back]
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "conversion"))
from conversion_helpers import write_random_checkpoint

CHECKPOINTS = Path(__file__).parents[1] / "reference" / "published_checkpoints.json"


def apart(function: Callable, *arguments: Any) -> Any:
    """Calls a function in a process of its own: Linux counts what a parent ever held for its children's peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def run(*arguments: str) -> tuple[float, int]:
    """Runs `hf-guided` and returns its seconds and its peak of memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "hf_guided.cli", *arguments], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"hf-guided {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def forward_seconds(folder: Path) -> float:
    """One forward of the converted 64x64 UNet, whose output must be finite and neither zero nor huge."""
    from hf_guided import ADMUNet2DModel

    unet = ADMUNet2DModel.from_pretrained(folder / "unet")
    start = time.perf_counter()
    with torch.no_grad():
        output = unet(torch.randn(1, 3, 64, 64), torch.tensor([500]), torch.tensor([207])).sample
    seconds = time.perf_counter() - start
    assert output.shape == (1, 6, 64, 64)
    assert 1e-3 < output.std() < 1e3, output.std()
    return seconds


def check_equal(ours: Path, theirs: Path) -> None:
    """Compares two state dicts bit by bit."""
    a, b = (torch.load(path, mmap=True, weights_only=True) for path in (ours, theirs))
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["64x64_diffusion", "256x256_diffusion"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--back", action="store_true", help="also convert back, and compare bit by bit")
    args = parser.parse_args()
    print("| checkpoint | parameters | float32 size | peak memory | times the size | seconds |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for name in args.names:
        with tempfile.TemporaryDirectory() as temporary:
            checkpoint, folder = Path(temporary) / f"{name}.pt", Path(temporary) / "converted"
            shapes = json.loads(CHECKPOINTS.read_text())[name]["tensors"]
            parameters = apart(write_random_checkpoint, shapes, checkpoint)
            size = 4 * parameters

            def report(label: str, seconds: float, peak: int, size: int = size, parameters: int = parameters) -> None:
                print(
                    f"| {label} | {parameters / 1e6:.1f}M | {size / 1e9:.2f} GB | {peak / 1e9:.2f} GB | "
                    f"{peak / size:.2f} | {seconds:.1f} |",
                    flush=True,
                )

            files = ["--checkpoint", str(checkpoint), "--output", str(folder), "--dtype", args.dtype]
            report(f"{name}, {args.dtype}", *run("convert", name, *files))
            if name == "64x64_diffusion":
                print(f"one forward of the converted {name}: {apart(forward_seconds, folder):.1f} s", file=sys.stderr)
            if args.back:
                back = Path(temporary) / "back.pt"
                report(f"{name}, back", *run("convert", str(folder), "--to", "openai", "--output", str(back)))
                apart(check_equal, back, checkpoint)
                print(f"{name} came back bit by bit", file=sys.stderr)


if __name__ == "__main__":
    main()
