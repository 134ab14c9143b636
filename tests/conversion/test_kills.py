"""Conversions that are killed at any of their file events: a rerun finishes with the same bytes, and nothing is left."""

import os
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


def check_every_kill(command, folder, step=1):
    """Kills at one file event after another, each in a fresh folder, until the command ends by itself."""
    main([word.format(out=folder / "whole") for word in command])
    expected = contents(folder / "whole")
    at = 1
    while True:
        work = folder / f"killed {at}"
        words = [word.format(out=work) for word in command]
        status = run_killed(words, work, at)
        main(words)
        assert contents(work) == expected, at
        main(words)  # what is finished is said to be so, and stays
        assert contents(work) == expected, at
        if status == 0:
            return at
        assert os.WTERMSIG(status) == signal.SIGKILL
        at += step


def test_a_conversion(checkpoint, reference, tmp_path):
    flags = needed_flags(reference("classifier_spatial").config)
    path = checkpoint("classifier_spatial")
    kills = check_every_kill(
        ["convert", "--checkpoint", str(path), "--flags", flags, "--dtype", "bf16", "--output", "{out}/new/out"],
        tmp_path,
    )
    assert kills > 5


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
    files = ["--output", "{out}/new/unet.pt", "--classifier", "{out}/new/classifier.pt"]
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
    both = ["--output", tmp_path / "unet.pt", "--classifier", tmp_path / "new" / "classifier.pt"]
    (tmp_path / "classifier").mkdir()
    changed = ClassifierGuidedPipeline.from_pretrained(pipeline, unet=other)
    changed.save_pretrained(tmp_path / "changed")
    assert "unet.pt exists already" in refused(tmp_path / "changed", "--to", "openai", *both)
    assert not (tmp_path / "new").exists()
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


def test_an_error_in_the_midst_leaves_nothing(pipeline, refused, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    files = ["--output", tmp_path / "new" / "deep" / "unet.pt", "--classifier", tmp_path / "new" / "classifier.pt"]
    assert "No space left" in refused(pipeline, "--to", "openai", *files)
    assert not (tmp_path / "new").exists()
