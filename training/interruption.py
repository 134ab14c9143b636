"""Ctrl-C and SIGTERM during a training: all processes end after the same step, and save it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from ..processes import StoppedError

LAUNCHER = os.getppid()


@contextmanager
def stop_requests(accelerator: Accelerator) -> Iterator[Callable[[], int]]:
    """A function for the loop to call after each step: the signal received (Ctrl-C, SIGTERM), 0 for none.

    A second Ctrl-C ends the process at once.
    """
    requested: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        # SIGTERM may come several times: from a launcher, and from a cluster's scheduler
        if signum == signal.SIGINT and signum in requested:
            raise StoppedError(signum)
        requested.append(signum)

    # `accelerate launch` of one process does not forward SIGTERM: watch for its end instead
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ

    def stop_requested() -> int:
        if launched and os.getppid() != LAUNCHER:
            requested.append(signal.SIGTERM)
        signum = requested[0] if requested else 0
        if accelerator.num_processes == 1:
            return signum  # without accelerate's `check_trigger`, which waits for the accelerator at each step
        signums = accelerator.gather(torch.tensor([signum], device=accelerator.device))
        return int(signums.max())

    previous = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requested
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def ignore_signals(worker_id: int) -> None:
    """Lets the loader's workers ignore signals: they must live until the step is done."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
