"""What the training tests share: flags for a tiny model, and ways to run a script."""

import os
import sys
from pathlib import Path
from subprocess import CompletedProcess

import forked

TINY_MODEL = [
    *("--model_channels", "32"),
    *("--channel_mult", "1", "1"),
    *("--num_res_blocks", "1"),
    *("--attention_resolutions", "4"),
    *("--num_heads", "2"),
    *("--dropout", "0.1"),
]
TINY_RUN = [*TINY_MODEL, *("--train_batch_size", "4"), *("--report_to", "none"), *("--validation_steps", "0")]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}


def script(name: str, *arguments: str) -> list[str]:
    """The command that runs a training script of the installed package."""
    return [sys.executable, "-m", f"hf_guided.training.{name}", *arguments]


def run(name: str, *arguments: str, processes: int = 1, cwd: Path | None = None) -> CompletedProcess:
    return forked.run(script(name, *arguments), processes=processes, env=environment(), cwd=cwd, timeout=300)
