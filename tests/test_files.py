"""Files and folders are whole or not there at all, whatever stops the process that writes them."""

import errno
import os
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_guided.files import (
    FullDiskError,
    naming_full_disk,
    read_json,
    recover_folder,
    remove_folder,
    replacing,
    replacing_folder,
    write_json,
)

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
    others = [tmp_path / ".report[1].json.mine.tmp", tmp_path / ".notes.2024.tmp", tmp_path / "mine.tmp"]
    for other in others:
        other.write_text("a user's")
    for _ in range(2):
        assert run("os.rename", 1, "file", target)
        assert target.read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 5  # that of the other killed process is gone
    # what lies beside is swept too: a picture of a step that is never drawn again, a folder of samples begun
    (left,) = set(tmp_path.iterdir()) - {target, *others}
    left.rename(tmp_path / left.name.replace("report[1].json", "preview-000500.png"))
    (tmp_path / left.name / "000").mkdir(parents=True)
    with replacing(tmp_path / "samples") as living:
        living.mkdir()
        assert not run("os.rename", 9, "file", target)
        assert living.is_dir()
    assert target.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == sorted([target, tmp_path / "samples", *others])


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


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive, archive.open("array", "w") as member:
        member.write(bytes(2**21))


def write_numpy(path):
    with open(path, "wb") as file:
        np.savez(file, array=np.zeros(2**18))


def write_torch(path):
    torch.save(torch.zeros(2**19), path)


WRITERS = {
    "bytes": lambda path: path.write_bytes(bytes(2**21)),
    "torch": write_torch,
    "safetensors": lambda path: save_file({"weight": torch.zeros(2**19)}, path),
    "zip": write_zip,
    "numpy": write_numpy,
    "picture": lambda path: Image.effect_noise((1500, 1500), 100).save(path, format="PNG"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_is_one_sentence_that_names_the_file(small_disk, writer, kind):
    target = small_disk / "out.put"

    def write():
        if kind == "file":
            with replacing(target) as temporary:
                WRITERS[writer](temporary)
        else:
            with replacing_folder(target) as folder:
                WRITERS[writer](folder / "part")

    with pytest.raises(FullDiskError) as raised:
        write()
    assert str(raised.value).startswith(f"The disk is full: {target} cannot be written. Free some space and rerun")
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_so_is_a_file_that_may_grow_no_further(tmp_path, writer):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with (
            pytest.raises(FullDiskError, match=r"^The disk is full: .*out cannot be written"),
            naming_full_disk(),
            replacing(tmp_path / "out") as temporary,
        ):
            WRITERS[writer](temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_other_errors_are_left_as_they_are():
    for error in (OSError(errno.EACCES, "no"), RuntimeError("no"), ValueError("no"), KeyError("no")):
        with pytest.raises(type(error)) as raised, naming_full_disk():
            raise error
        assert raised.value is error
    for number, words in ((errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EROFS, "read-only")):
        with pytest.raises(FullDiskError, match=f"^The disk is {words}: name cannot be written"), naming_full_disk():
            raise OSError(number, os.strerror(number), "name")


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b"", b'{"rows": [{"seed', b"\xff\x00", b'{"rows": [{}]}',
                                     b'{"rows": [1]}', b'{"rows": [{"seed": "0"}]}', b'{"rows": {}}', b"[" * 10**5,
                                     b'{"rows": [{"seed": 1}], "steps": {"a": []}}'])  # fmt: skip
def test_json_that_is_not_as_it_was_written_is_named(tmp_path, content):
    path, shape = tmp_path / "sweep.json", {"rows": [{"seed": int | None}], "steps": {str: {str: int}}}
    write_json({"rows": [{"seed": 1}, {"seed": None}], "steps": {"a": {"b": 1}}, "more": 0}, path)
    assert len(read_json(path, shape)["rows"]) == 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sweep\.json is damaged: .*; give another\.$"):
        read_json(path, shape, "give another")
