"""How commands end: exit statuses that `&&`, schedulers and scripts can rely on."""

import os
import signal
import subprocess
import sys

import pytest

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
