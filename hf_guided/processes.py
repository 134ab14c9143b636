"""Start and end of a command, in one process or in several (`accelerate launch`, `torch.distributed.run`).

Exit statuses: 0 on success, 1 after an error, 2 for wrong flags, 130 after Ctrl-C, 143 after SIGTERM.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from .credentials import without_credentials
from .files import naming_full_disk
from .interrupts import is_importing, leave, set_handlers
from .messages import first_line

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

HEARTBEAT = 10.0  # seconds between two heartbeats of a process
MISSED_HEARTBEATS = 30  # after these the others take it to be dead


class StoppedError(KeyboardInterrupt):
    """A signal has stopped a command; the message says what was saved, and how to resume."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


@contextmanager
def user_command() -> Iterator[None]:
    """Turns user errors into one sentence, and signals into their exit status; any other error is a bug to report."""
    requested: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if is_importing(frame):
            leave(signum)
        requested.append(signum)
        raise StoppedError(signum)

    previous = set_handlers(stop)
    is_done = False
    try:
        use_processor()
        with naming_full_disk():
            try:
                yield
            except Exception:
                if requested:  # a library has turned it into another exception
                    raise StoppedError(requested[0]) from None
                raise
        is_done = True
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(str(interrupt) or "Stopped.", file=sys.stderr)
        raise SystemExit(128 + getattr(interrupt, "signum", signal.SIGINT)) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise SystemExit(f"error: {without_credentials(_lost_process(error) or str(error))}") from None
    except MemoryError as error:
        raise SystemExit(f"error: Not enough memory ({error or 'no more is free'}); ask for less at once.") from None
    except Exception:
        print(without_credentials(traceback.format_exc()), file=sys.stderr)
        raise SystemExit("error: This is a bug of hf-guided. Please report it, with the above.") from None
    finally:
        leave_processes(is_done)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def resumable(message: str = "Stopped; finished parts are kept. Rerun the same command to resume.") -> Iterator[None]:
    """Adds how to resume to the message of a stopped command."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise StoppedError(getattr(stop, "signum", signal.SIGINT), str(stop) or message) from None


def print_once(*lines: str) -> None:
    """Prints lines, if any, in the main process alone and without the credentials of addresses."""
    if lines and os.environ.get("RANK", "0") == "0":
        print(without_credentials("\n".join(lines)), flush=True)


def use_processor() -> None:
    """Lets this process use its share of the CPU cores: accelerate launches one thread per process, even on a CPU."""
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if is_launched and hasattr(os, "sched_getaffinity"):
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def join_processes() -> "PartialState":
    """The state of this process among those of the run, each with its own GPU if there is one.

    [`~accelerate.PartialState`] alone takes processes on a shared CPU for independent ones.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    accelerator = torch.accelerator.current_accelerator()
    is_shared = int(os.environ.get("WORLD_SIZE", 1)) > 1 and (accelerator is None or accelerator.type == "mps")
    state = PartialState(
        cpu=is_shared or parse_flag_from_env("ACCELERATE_USE_CPU"),
        timeout=timedelta(days=7),  # one may work for hours when the others are done; heartbeats detect a dead one
    )
    if state.device.type == "cpu":
        # With "cpu:0" weights would be copied, and in memory of another alignment the last bits differ.
        state.device = torch.device("cpu")
    if state.num_processes > 1 and "MASTER_ADDR" in os.environ and Heartbeat.running is None:
        Heartbeat.running = Heartbeat(state.process_index, state.num_processes)
    return state


def from_main(function: Callable[[], T]) -> T:
    """The result of a function called in the main process, returned or raised in all processes."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return result


def leave_processes(is_done: bool = True) -> None:
    """Leaves the process group of [`join_processes`], if any; unless this process `is_done`, the others end too."""
    heartbeat, Heartbeat.running = Heartbeat.running, None
    if heartbeat is not None:
        heartbeat.stop(is_done)
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Heartbeat:
    """Ends this process if another one of the run is dead: killed, suspended, or ended by an error.

    Each process increments a counter from a thread, and reads those of the others: a collective would wait for a dead
    one for days, and no signal interrupts it.
    """

    running: "Heartbeat | None" = None

    def __init__(self, rank: int, num_processes: int):
        from torch.distributed import PrefixStore, TCPStore

        # Its own connection: that of the process group is locked while something waits on it.
        timeout = timedelta(seconds=HEARTBEAT * MISSED_HEARTBEATS)
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)
        self.store = PrefixStore(f"hf-guided/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.rank, self.peers = rank, [peer for peer in range(num_processes) if peer != rank]
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        """Runs until this process ends, or ends it after another one has."""
        why = ""
        last, missed = dict.fromkeys(self.peers, -1), dict.fromkeys(self.peers, 0)
        while not self.ended.wait(HEARTBEAT):
            try:
                self.store.add(f"beats/{self.rank}", 1)
                beats = {peer: self.store.add(f"beats/{peer}", 0) for peer in self.peers}
                done = {peer for peer in self.peers if self.store.add(f"done/{peer}", 0)}
            except RuntimeError:  # the store belongs to the main process or its launcher
                why = "The main process of this run, or its launcher, has ended"
                break
            # Counted in own heartbeats, not seconds, which also pass while all processes are suspended.
            for peer in self.peers:
                missed[peer] = 0 if beats[peer] != last[peer] or peer in done else missed[peer] + 1
            last = beats
            if dead := [peer for peer in self.peers if missed[peer] >= MISSED_HEARTBEATS]:
                seconds = HEARTBEAT * MISSED_HEARTBEATS
                why = f"Process {dead[0]} of this run has sent no heartbeat for {seconds:g} seconds"
                break
        if not self.ended.wait(HEARTBEAT):  # a main thread that notices it itself ends cleanly
            print(f"error: {why}. Rerun the same command to resume.", file=sys.stderr, flush=True)
            os._exit(1)

    def stop(self, is_done: bool) -> None:
        """Stops watching; unless this process is done, the others now take it to be dead."""
        self.ended.set()
        self.thread.join(HEARTBEAT)
        if is_done:
            with suppress(RuntimeError):
                self.store.add(f"done/{self.rank}", 1)


def _lost_process(error: Exception) -> str | None:
    """The message for a collective that failed because another process has ended; `None` for other errors."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    is_network = distributed is not None and distributed.is_available() and isinstance(error, distributed.DistError)
    if not is_network and "/gloo/" not in str(error):
        return None
    return f"Another process of this run has ended, see above. Rerun the same command to resume. ({first_line(error)})"
