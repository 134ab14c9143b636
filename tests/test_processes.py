"""How commands end: exit statuses that `&&`, schedulers and scripts can rely on."""

import os
import signal
import subprocess
import sys
import time

import forked
import pytest

from hf_guided.processes import user_command

ENDS = """
import os, signal, sys
from hf_guided.processes import StoppedError, resumable, user_command

def work():
    how = sys.argv[1]
    if how == "error":
        raise ValueError("--flag 3 is wrong; give 4.")
    if how.isdecimal():
        os.kill(os.getpid(), int(how))
        signal.pause()
    if how == "saved":
        raise StoppedError(signal.SIGTERM, "Saved after 3 steps.")

with user_command(), resumable("Stopped. Rerun the same command to resume."):
    work()
"""


@pytest.mark.parametrize(
    ("how", "status", "says"),
    [
        ("well", 0, ""),
        ("error", 1, "error: --flag 3 is wrong; give 4.\n"),
        (str(int(signal.SIGINT)), 130, "Stopped. Rerun the same command to resume.\n"),
        (str(int(signal.SIGTERM)), 143, "Stopped. Rerun the same command to resume.\n"),
        ("saved", 143, "Saved after 3 steps.\n"),
    ],
)
def test_exit_status(how, status, says):
    result = subprocess.run([sys.executable, "-c", ENDS, how], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (status, says)


def test_a_process_beside_the_main_one_says_nothing():
    environment = {**os.environ, "RANK": "1"}
    command = [sys.executable, "-c", ENDS, str(int(signal.SIGINT))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "")


PEER = """
import os, signal, sys, time
import torch
from hf_guided import processes
from hf_guided.processes import join_processes, user_command

processes.HEARTBEAT, processes.MISSED_HEARTBEATS = 0.2, 15
how = sys.argv[1]
with user_command():
    state = join_processes()
    print("joined", flush=True)
    if state.is_main_process:
        time.sleep({"busy": 12, "finishes alone": 8}.get(how, 0))  # as if it measured, saved or pushed
    elif how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "computes":
        time.sleep(100)
    elif how != "finishes alone":
        torch.distributed.barrier()
    print("done", flush=True)
"""


def start_peers(how: str) -> list[subprocess.Popen]:
    """Two processes, each started by hand: no launcher ends them."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return forked.launch([sys.executable, "-c", PEER, how], 2, env, **pipes)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("stops", "error: Process 1 of this run has sent no heartbeat for 3 seconds. Rerun the same command to"),
        ("is killed", "error: Another process of this run has ended, see above. Rerun the same command to resume."),
    ],
)
def test_one_process_of_two_that_dies_ends_the_other(how, says):
    main, other = start_peers(how)
    try:
        _, errors = main.communicate(timeout=60)
    finally:
        for peer in (main, other):
            peer.kill()
    assert main.returncode == 1
    assert says in errors
    assert "Traceback" not in errors


def test_the_end_of_the_main_process_ends_the_others_whatever_they_do():
    main, other = start_peers("computes")
    assert main.stdout.readline() == other.stdout.readline() == "joined\n"
    main.kill()
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 1
    assert "error: The main process of this run, or its launcher, has ended. Rerun" in errors


def test_what_the_main_process_does_alone_is_waited_for():
    """For longer than any process may be silent."""
    ends = [(*peer.communicate(timeout=60), peer.returncode) for peer in start_peers("finishes alone")]
    assert ends == [("joined\ndone\n", "", 0)] * 2


def test_a_run_that_is_suspended_resumes():
    """Ctrl-Z and fg: the time between does not count."""
    peers = start_peers("busy")
    for peer in peers:
        assert peer.stdout.readline() == "joined\n"
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for peer in peers:
            peer.send_signal(signum)
        time.sleep(5 if signum == signal.SIGSTOP else 0)
    ends = [(*peer.communicate(timeout=60), peer.returncode) for peer in peers]
    assert ends == [("done\n", "", 0)] * 2


@pytest.mark.parametrize("mistake", [KeyError("unet"), TypeError("no"), AssertionError()])
def test_our_own_mistakes_keep_their_traceback_and_ask_to_be_reported(mistake, capsys):
    with pytest.raises(SystemExit, match=r"error: This is a bug of hf-guided\. Please report it"), user_command():
        raise mistake
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: a sentence"), user_command():
        raise ValueError("a sentence")
    assert not capsys.readouterr().err
