"""A disk that is full in the midst of a training costs what was not saved yet, and one sentence."""

import subprocess

import pytest
from launching import TINY_RUN, run

from hf_guided.training.checkpoints import HISTORY, find_checkpoint, list_checkpoints, read_history


def resize(disk, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_at_a_checkpoint(small_disk, photos, processes):
    output = small_disk / "out" / "diffusion"
    flags = [
        *(*TINY_RUN, "--report_to", "tensorboard", "--resolution", "8", "--train_data_dir", str(photos)),
        *("--max_train_steps", "2", "--checkpointing_steps", "1", "--output_dir", str(small_disk / "out")),
    ]
    resize(small_disk, "8m")  # enough for one checkpoint
    result = run("train_diffusion", *flags, processes=processes)
    assert result.returncode == 1
    said = f"error: The disk is full: {output}/checkpoint-2 cannot be written. Free some space and rerun"
    assert said in result.stderr
    assert processes > 1 or "Traceback" not in result.stderr  # torch's launcher has its own words for it
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-1"]
    assert not list(output.glob(".*.partial"))
    assert not list(output.glob(".*.tmp"))
    assert find_checkpoint(output, "latest") == output / "checkpoint-1"
    if processes == 1:
        resize(small_disk, "40m")
        result = run("train_diffusion", *flags)
        assert result.returncode == 0, result.stderr
        assert f"Resuming from {output}/checkpoint-1, after 1 of 2 steps." in result.stderr
        assert [row["step"] for row in read_history(output)] == [2]
        assert (output / "checkpoint-2" / HISTORY).read_bytes() == (output / HISTORY).read_bytes()
