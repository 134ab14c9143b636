"""How a command begins and ends, in one process or in those that `accelerate launch` or `torch.distributed.run` start.

Exit statuses: 0 if all is done, 1 after an error, 2 for wrong flags, 130 after Ctrl-C, 143 after SIGTERM.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .credentials import without_credentials

if TYPE_CHECKING:
    from accelerate import PartialState


class StoppedError(KeyboardInterrupt):
    """A signal has stopped a command.

    Args:
        signum (`int`): The signal, of which the exit status tells: 128 and its number.
        message (`str`): What was saved, and how to resume.
    """

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


@contextmanager
def user_command() -> Iterator[None]:
    """Ends what a user has started as the user expects: a mistake in one sentence, a signal in its exit status.

    Raises:
        `SystemExit`: With the exit status of the module's docstring.
    """
    previous = signal.signal(signal.SIGTERM, _stop)
    use_processor()
    try:
        yield
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            print(str(stop) or "Stopped.", file=sys.stderr)
        raise SystemExit(128 + getattr(stop, "signum", signal.SIGINT)) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise SystemExit(f"error: {without_credentials(str(error))}") from None
    finally:
        signal.signal(signal.SIGTERM, previous)
        leave_processes()


def _stop(signum: int, frame: Any) -> None:
    raise StoppedError(signum)


@contextmanager
def resumable(message: str = "Stopped; what is made is kept. Rerun the same command to resume.") -> Iterator[None]:
    """Says of a part of a command that is stopped how to resume it."""
    try:
        yield
    except StoppedError as stop:
        raise StoppedError(stop.signum, str(stop) or message) from None
    except KeyboardInterrupt:
        raise StoppedError(signal.SIGINT, message) from None


def use_processor() -> None:
    """Lets this process use its share of the processor's cores.

    accelerate launches with one thread a process, also where the processor is all there is to compute on.
    """
    if (
        "ACCELERATE_MIXED_PRECISION" in os.environ
        and os.environ.get("OMP_NUM_THREADS") == "1"
        and hasattr(os, "sched_getaffinity")
    ):
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def join_processes() -> "PartialState":
    """This process's place among them, with a GPU of its own where there is one.

    [`~accelerate.PartialState`] alone takes processes that share a processor for single ones.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    accelerator = torch.accelerator.current_accelerator()
    is_shared = int(os.environ.get("WORLD_SIZE", 1)) > 1 and (accelerator is None or accelerator.type == "mps")
    # One may have work for hours when the others have done theirs; their launcher ends all of them if one fails.
    patience = timedelta(days=7)
    state = PartialState(cpu=is_shared or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=patience)
    if state.device.type == "cpu":
        # By the name "cpu:0" weights would be copied, and in memory of another alignment the last bits are others.
        state.device = torch.device("cpu")
    return state


def leave_processes() -> None:
    """Ends what [`join_processes`] began, if anything."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
