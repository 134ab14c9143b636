"""What the benchmarks of speed share: contenders in turn, in one process; medians, ratios, peaks, and the machine."""

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_guided.files import write_json

Contender = Callable[[], Any]


def device() -> torch.device:
    """Where the benchmarks run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Waits until the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_in_turn(contenders: Mapping[str, Contender], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, A B C A B C …: what else the machine does meanwhile slows all of them alike.

    Args:
        contenders (`Mapping[str, Callable]`): What to measure, by name.
        rounds (`int`): Measured calls of each.
        warmup (`int`, defaults to 2): Calls of each before that.
    """
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, run in contenders.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, float]]:
    """Of each contender: the median and the fastest of its seconds, and the median of its ratios to the reference's,
    round by round."""
    return {
        name: {
            "seconds": statistics.median(times),
            "fastest": min(times),
            "ratio": statistics.median(a / b for a, b in zip(times, seconds[reference], strict=True)),
        }
        for name, times in seconds.items()
    }


def peak_memory(run: Contender) -> dict[str, float]:
    """Bytes that a call needs beyond what is there before it.

    Returns:
        `"tensors"`: the most that tensors took at once, as torch allocates them. `"process"`, on the CPU: the growth
        of the process's resident memory at its highest, scratch space of the libraries included.
    """
    run()
    if torch.cuda.is_available():
        wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        wait()
        return {"tensors": torch.cuda.max_memory_allocated() - before}

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)

    ctypes.CDLL(None).malloc_trim(0)  # hands freed memory back, which would hide what the call takes again
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    run()
    return {"tensors": most, "process": _status("VmHWM") - before}


def _status(name: str) -> int:
    """Bytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def matmul(dtype: torch.dtype = torch.float32) -> tuple[Contender, float]:
    """A product of large matrices, and its operations (a product and a sum are two)."""
    side = 8192 if torch.cuda.is_available() else 2048
    a, b = (torch.randn(side, side, device=device(), dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3


def matmul_peak(seconds: float = 2.0) -> float:
    """The most operations a second that products of large matrices reach here."""
    product, operations = matmul()
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        wait()
        started = time.perf_counter()
        product()
        wait()
        best = max(best, operations / (time.perf_counter() - started))
    return best


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markdown(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Callable[[Any], str]]) -> str:
    """A table: a line for each row, a column for each that is named, with how its values are written."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{' ---: |' * len(columns)}"]
    for name, row in rows.items():
        cells = [write(row[column]) if row.get(column) is not None else "" for column, write in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def ratio(value: float) -> str:
    return f"{value:.2f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def save(results: Mapping[str, Any], path: Path) -> None:
    """Writes the results with the machine's description, whole or not at all; what other runs wrote there is kept."""
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({**earlier, **results, "machine": machine()}, path)
