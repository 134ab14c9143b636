"""Conversions that are killed at any of their file events: a rerun finishes with the same bytes."""

import os
import resource
import signal
import sys

import pytest
import torch
from conversion_helpers import contents, needed_flags

from hf_guided import ADMScheduler, ClassifierGuidedPipeline
from hf_guided.cli import main

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")


def run_killed(command, folder, at):
    """Runs a command in a child process, which dies just before its `at`-th change below a folder; the exit status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    count = 0

    def watch(event, arguments):
        nonlocal count
        if event in EVENTS and str(arguments[0]).startswith(str(folder)):
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(watch)
        main(command)
    finally:
        os._exit(0)


def check_every_kill(command, folder):
    """Kills at one file event after another, each in a fresh folder, until the command ends by itself."""
    (folder / "whole").mkdir(exist_ok=True)
    main([word.format(out=folder / "whole") for word in command])
    expected = contents(folder / "whole")
    at = 1
    while True:
        work = folder / f"killed {at}"
        work.mkdir()
        words = [word.format(out=work) for word in command]
        status = run_killed(words, work, at)
        main(words)
        assert contents(work) == expected, at
        if status == 0:  # so the rerun has found its own finished output
            return at
        assert os.WTERMSIG(status) == signal.SIGKILL
        at += 1


def test_a_conversion(checkpoint, reference, tmp_path):
    flags = needed_flags(reference("classifier_spatial").config)
    path = checkpoint("classifier_spatial")
    words = ["convert", "--checkpoint", str(path), "--flags", flags, "--dtype", "bf16", "--output", "{out}/new/out"]
    assert check_every_kill(words, tmp_path) > 5


def test_a_conversion_into_an_empty_folder(checkpoint, reference, tmp_path):
    flags = needed_flags(reference("classifier_spatial").config)
    path, output = checkpoint("classifier_spatial"), tmp_path / "work" / "out"
    command = ["convert", "--checkpoint", str(path), "--flags", flags, "--output", str(output)]
    main(command)
    expected = contents(output.parent)
    for at in range(1, 40):
        for file in sorted(output.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        status = run_killed(command, output.parent, at)
        main(command)
        assert contents(output.parent) == expected, at
        if status == 0:
            break
    assert at > 5


@pytest.fixture
def pipeline(tiny_unet, tiny_classifier, tmp_path):
    pipe = ClassifierGuidedPipeline(tiny_unet(), ADMScheduler(), tiny_classifier(num_labels=5))
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_an_export(pipeline, tmp_path):
    """Of two files, the last of which may lack when the process dies."""
    files = ["--output", "{out}/unet.pt", "--classifier", "{out}/classifier.pt"]
    assert check_every_kill(["convert", str(pipeline), "--to", "openai", *files], tmp_path) > 4


def test_an_exports_bytes_depend_on_nothing_else(pipeline, tmp_path, convert):
    for name in ("a.pt", "b.pt"):
        convert(pipeline, "--to", "openai", "--output", tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_what_another_command_has_written_stays(pipeline, tiny_unet, checkpoint, reference, refused, convert, tmp_path):
    convert(pipeline, "--to", "openai", "--output", tmp_path / "unet.pt")
    before = (tmp_path / "unet.pt").read_bytes()
    other = tiny_unet()
    torch.nn.init.zeros_(other.conv_in.bias)
    other.save_pretrained(tmp_path / "other")
    message = refused(tmp_path / "other", "--to", "openai", "--output", tmp_path / "unet.pt")
    assert "unet.pt exists already" in message
    both = ["--output", tmp_path / "unet.pt", "--classifier", tmp_path / "classifier.pt"]
    (tmp_path / "classifier").mkdir()
    changed = ClassifierGuidedPipeline.from_pretrained(pipeline, unet=other)
    changed.save_pretrained(tmp_path / "changed")
    assert "unet.pt exists already" in refused(tmp_path / "changed", "--to", "openai", *both)
    assert not (tmp_path / "classifier.pt").exists()
    assert (tmp_path / "unet.pt").read_bytes() == before

    flags = ["--flags", needed_flags(reference("classifier_spatial").config)]
    path = checkpoint("classifier_spatial")
    convert("--checkpoint", path, *flags, "--output", tmp_path / "out")
    expected = contents(tmp_path / "out")
    assert "exists already" in refused("--checkpoint", path, *flags, "--dtype", "fp16", "--output", tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists already" in refused("--checkpoint", path, *flags, "--output", tmp_path / "out")
    assert contents(tmp_path / "out") == {**expected, "mine.txt": b"mine"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("room", [5_000, 40_000, 200_000])
def test_a_full_disk_leaves_nothing(pipeline, checkpoint, reference, tmp_path, room):
    """As a limit to the size of a file shows it, for which nothing has to be mounted."""
    files = ["--output", tmp_path / "unet.pt", "--classifier", tmp_path / "classifier.pt"]
    flags = ["--flags", needed_flags(reference("unet_class_cond").config)]
    commands = [
        [pipeline, "--to", "openai", *files],
        ["--checkpoint", checkpoint("unet_class_cond"), *flags, "--output", tmp_path / "new" / "out"],
    ]
    for command in commands:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
                main(["convert", *map(str, command)])
            except SystemExit as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        with os.fdopen(read) as message:
            assert message.read().startswith("error: The disk is full: ")
        assert not {"unet.pt", "classifier.pt", "new"} & {path.name for path in tmp_path.iterdir()}
        assert not list(tmp_path.glob(".*"))
