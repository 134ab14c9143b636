"""Files and folders are whole or not there at all, whatever stops the process that writes them."""

import os
import subprocess
import sys

import pytest

from hf_guided.files import recover_folder, remove_folder, replacing, replacing_folder

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from hf_guided import files

event, number, action, target = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
seen = 0

def kill(name, arguments):
    global seen
    if name == event and (target.name in str(arguments) or name == "os.remove"):
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
if action == "file":
    with files.replacing(target) as temporary:
        temporary.write_text("new")
elif action == "folder":
    with files.replacing_folder(target) as temporary:
        (temporary / "a").write_text("new")
        (temporary / "b").write_text("new")
else:
    files.remove_folder(target)
"""


def run(event: str, number: int, action: str, target) -> bool:
    """Whether it was killed at an event in the file system."""
    command = [sys.executable, "-c", KILLED, event, str(number), action, str(target)]
    return subprocess.run(command, check=False).returncode == -9


def test_a_killed_write_leaves_the_old_file_and_the_next_one_sweeps(tmp_path):
    target = tmp_path / "report[1].json"  # a name that means something to glob
    target.write_text("old")
    others = [tmp_path / f".report[1].json.{os.getpid()}.tmp", tmp_path / ".report[1].json.mine.tmp"]
    for other in others:
        other.write_text("of a living process, or a user's")
    assert run("os.rename", 1, "file", target)
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 4
    assert not run("os.rename", 9, "file", target)
    assert target.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def whole(folder) -> str:
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert texts in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"}), texts
    return texts["a"]


@pytest.mark.parametrize(("event", "number"), [("open", 1), ("open", 2), ("os.rename", 1), ("os.rename", 2)])
def test_a_killed_replacement_is_recovered(tmp_path, event, number):
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text("old")
    assert run(event, number, "folder", folder)
    recover_folder(folder)
    assert whole(folder) == "old"
    assert list(tmp_path.iterdir()) == [folder]
    with replacing_folder(folder) as temporary:
        for name in "ab":
            (temporary / name).write_text("new")
    assert whole(folder) == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_half_removed_is_removed(tmp_path):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "a").write_text("old")
    assert run("os.remove", 1, "remove", folder)  # after the renaming
    assert not folder.exists()
    recover_folder(folder)
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_old_and_nothing_else(tmp_path):
    folder, file = tmp_path / "pipeline", tmp_path / "file"
    for target in (folder / "a", folder / "b"):
        folder.mkdir(exist_ok=True)
        target.write_text("old")
    file.write_text("old")

    def interrupted() -> None:
        with replacing_folder(folder) as temporary, replacing(file) as beside:
            (temporary / "a").write_text("new")
            beside.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert whole(folder) == file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == [file]
