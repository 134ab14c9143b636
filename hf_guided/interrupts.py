"""Ctrl-C and SIGTERM at any time of a command: the exit status is 128 + the signal's number, without a traceback.

Its imports are fast, so that a command can start with it.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn


def stop_at_once() -> None:
    """Makes signals end this process with one sentence until [`~processes.user_command`] takes over, and after it."""
    set_handlers(lambda signum, frame: leave(signum))


def set_handlers(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Sets the handler of Ctrl-C and SIGTERM, unless ignored as by `nohup`; returns the previous ones."""
    signums = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) is not signal.SIG_IGN]
    return {signum: signal.signal(signum, handler) for signum in signums}


def leave(signum: int) -> NoReturn:
    """Ends this process at once, without clean-up."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"Stopped.\n")  # a buffered stream may be in the middle of a write
    os._exit(128 + signum)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported; an import may swallow or change exceptions."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
