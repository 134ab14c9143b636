"""What is in the way in --output_dir is named before the training, and two trainings never write to one folder."""

import importlib
import os
import signal
import subprocess
import sys
import time

import forked
import pytest
from launching import TINY_RUN, environment, script
from refusals import assert_refused, contents

from hf_guided import files
from hf_guided.files import locked
from hf_guided.training import train_diffusion
from hf_guided.training.arguments import run_script

TINY = [*TINY_RUN, "--resolution", "8", "--max_train_steps", "1"]


def start(name, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    run_script(importlib.import_module(f"hf_guided.training.{name}").main)


OCCUPIED = [
    ("train_diffusion", "diffusion", "pipeline"),
    ("train_upscaler", "upscaler", "pipeline"),
    ("train_classifier", "classifier", "model"),
    ("train_baseline", "vae", "pipeline"),
    ("train_baseline", "flow", "pipeline"),
    ("train", "judge", "model"),
    ("train", "diffusion", "pipeline"),
    ("train", ".", "pipeline"),
]


@pytest.mark.parametrize(("name", "stage", "folder"), OCCUPIED)
@pytest.mark.parametrize("is_own", [False, True])
def test_a_file_where_a_folder_of_results_goes(name, stage, folder, is_own, photos, tmp_path, capsys, monkeypatch):
    """Also beside what looks like a training of ours."""
    place = tmp_path / "out" / stage
    place.mkdir(parents=True)
    (place / folder).write_text("mine")
    if is_own:
        (place / "history.json").write_text("[]")
        (tmp_path / "out" / "diffusion").mkdir(exist_ok=True)
    argv = ["--family", stage] if name == "train_baseline" else []
    argv += ["--train_data_dir", str(photos), "--resolution", "8", "--output_dir", str(tmp_path / "out")]
    said = assert_refused(lambda: start(name, monkeypatch, *argv), tmp_path, capsys)
    assert f"{place / folder} is " in said


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("path", ["diffusion", "diffusion/logs", "diffusion/snapshot"])
def test_other_files_in_the_way(path, is_finished, photos, tmp_path, capsys, monkeypatch):
    wrong = tmp_path / "out" / path
    wrong.parent.mkdir(parents=True)
    wrong.write_text("mine")
    argv = [*TINY, "--train_data_dir", str(photos), "--output_dir", str(tmp_path / "out")]
    name = "train" if is_finished else "train_diffusion"
    assert path in assert_refused(lambda: start(name, monkeypatch, *argv), tmp_path, capsys)


@pytest.mark.parametrize(
    "path",
    [
        "diffusion/history.json",
        "diffusion/.run.json",
        "diffusion/preview-000002.png",
        "report.json",
        "grid-scale-1-conditional.png",
        "scales.png",
        "judge/history.json",
    ],
)
def test_folders_where_files_of_results_go(path, photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "out" / path).mkdir(parents=True)
    argv = ["--train_data_dir", str(photos), "--resolution", "8", "--output_dir", str(tmp_path / "out")]
    assert path in assert_refused(lambda: start("train", monkeypatch, *argv), tmp_path, capsys)


@pytest.mark.parametrize("name", ["train", "train_diffusion", "train_classifier"])
@pytest.mark.parametrize("folder", ["", "new", "diffusion"])
def test_a_read_only_disk(name, folder, small_disk, photos, capsys, monkeypatch):
    (small_disk / "diffusion").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    argv = [*TINY, "--train_data_dir", str(photos), "--output_dir", str(small_disk / folder)]
    assert str(small_disk) in assert_refused(lambda: start(name, monkeypatch, *argv), small_disk, capsys)


HOLDER = """
import multiprocessing, sys, time
from hf_guided.files import locked
with locked(sys.argv[1]):
    if len(sys.argv) > 2:  # as a loader's worker
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), daemon=True).start()
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of a folder."""
    held = []

    def hold(folder, *more):
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *more], stdout=subprocess.PIPE, text=True)
        held.append(holder)
        assert holder.stdout.readline() == "held\n"
        return holder

    yield hold
    for process in held:
        process.kill()


@pytest.mark.parametrize("more", [[], ["with a worker"]])
def test_a_locked_folder_is_refused_until_its_process_has_died(more, holder, photos, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out" / "diffusion"
    folder.mkdir(parents=True)
    process = holder(folder, *more)
    argv = [*TINY, "--train_data_dir", str(photos), "--output_dir", str(tmp_path / "out")]
    said = assert_refused(lambda: start("train_diffusion", monkeypatch, *argv), tmp_path, capsys)
    assert f"Another process is writing to {folder}" in said
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(folder):
        pass
    assert not any(folder.iterdir())


def test_without_locks_everything_works(holder, tmp_path, monkeypatch):
    holder(tmp_path)
    monkeypatch.setattr(files, "fcntl", None)
    with locked(tmp_path):
        (tmp_path / "file").write_text("")
    assert list(contents(tmp_path)) == ["file"]


def test_two_trainings_at_once(photos, tmp_path):
    """The second is refused, and the first ends well; other stages may share the folder."""
    argv = [*TINY, "--train_data_dir", str(photos), "--output_dir", str(tmp_path / "out")]
    steps = ["--max_train_steps", "100000"]
    first = forked.Popen(script("train_diffusion", *argv, *steps), env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "diffusion" / ".run.json").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = forked.run(script("train_diffusion", *argv, *steps), env=environment())
        assert second.returncode == 1
        assert second.stderr.splitlines()[-1].startswith("error: Another process is writing to")
        assert os.path.exists(tmp_path / "out" / "diffusion" / ".run.json")
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 143
    assert "Stopped after" in errors
    assert not list((tmp_path / "out" / "diffusion").glob("*lock*"))


def test_one_process_may_train_twice(photos, tmp_path, monkeypatch):
    argv = [*TINY, "--train_data_dir", str(photos), "--output_dir", str(tmp_path / "out"), "--num_inference_steps", "2"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["train_diffusion.py", *argv])
        train_diffusion.main()
