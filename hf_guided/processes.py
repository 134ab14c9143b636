"""The processes that `accelerate launch` or `torch.distributed.run` start together; one, without them."""

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


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
