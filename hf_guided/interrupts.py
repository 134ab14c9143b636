"""Ctrl-C and SIGTERM at every moment of a command: the exit status is 128 and the signal's number, never a traceback.

It imports nothing that takes time, so that a command can begin with it.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn


def stop_at_once() -> None:
    """Lets this process end in one sentence until [`~processes.user_command`] takes over, and after it."""
    set_handlers(lambda signum, frame: leave(signum))


def set_handlers(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Sets the handler of Ctrl-C and SIGTERM, but for one that is ignored, as by `nohup`; returns the earlier ones."""
    signums = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) is not signal.SIG_IGN]
    return {signum: signal.signal(signum, handler) for signum in signums}


def leave(signum: int) -> NoReturn:
    """Ends this process, with nothing of it to be tidied up."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"Stopped.\n")  # a buffered stream may be in the midst of writing
    os._exit(128 + signum)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported, out of which an exception may come as another one, or not at all."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
