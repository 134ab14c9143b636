"""A training that was stopped, killed or copied ends with the same bits as one that never was."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from launching import TINY_RUN, environment, run, script
from PIL import Image

from hf_guided.training.arguments import parse_arguments
from hf_guided.training.checkpoints import OTHERS_FILE, STATE_FILE, find_checkpoint, list_checkpoints
from hf_guided.training.train_diffusion import DiffusionArguments, train_diffusion

STEPS = 6
FLAGS = [
    *TINY_RUN,
    *("--max_train_steps", str(STEPS), "--checkpointing_steps", "2", "--checkpoints_total_limit", "10"),
    *("--resolution", "8", "--random_flip", "--random_crop", "--held_out_fraction", "0.1"),
]


def train(output_dir: Path, photos: Path, *flags: str) -> Path | None:
    return go(output_dir, "--train_data_dir", str(photos), *flags)


def go(output_dir: Path, *flags: str) -> Path | None:
    argv = [*FLAGS, "--output_dir", str(output_dir), *flags]
    data_args, stages = parse_arguments({"diffusion": DiffusionArguments}, argv)
    return train_diffusion(data_args, stages["diffusion"])


def bits(output_dir: Path, step: int = STEPS) -> dict[str, bytes]:
    """Everything that training computes: weights, optimizer, moving average, schedule, and the finished UNet."""
    folders = [output_dir / "diffusion" / f"checkpoint-{step}", output_dir / "diffusion" / "pipeline" / "unet"]
    kinds = (".safetensors", ".bin", ".pt")
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in kinds]
    assert len(files) == 4  # model, optimizer, the rest of the loop, and the finished UNet
    return {str(path.relative_to(output_dir)): path.read_bytes() for path in files}


def copy_checkpoint(source: Path, target: Path, step: int) -> None:
    name = Path("diffusion") / f"checkpoint-{step}"
    shutil.copytree(source / name, target / name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, photos) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(folder, photos) == folder / "diffusion" / "pipeline"
    return folder


def test_every_checkpoint_leads_to_the_same_bits(uninterrupted, photos, tmp_path):
    for step in (2, 4):
        folder = tmp_path / str(step)
        copy_checkpoint(uninterrupted, folder, step)
        train(folder, photos)
        assert list_checkpoints(folder / "diffusion")[0].name == f"checkpoint-{step}"
        assert bits(folder) == bits(uninterrupted)


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_accumulation_steps", "2", "--timestep_sampler", "loss_second_moment"],
        ["--dataloader_num_workers", "2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"],
        ["--mixed_precision", "bf16", "--gradient_checkpointing", "--adam_weight_decay", "0.1"],
    ],
)
def test_the_same_with_other_flags(photos, tmp_path, flags):
    train(tmp_path / "whole", photos, *flags)
    copy_checkpoint(tmp_path / "whole", tmp_path / "resumed", 4)
    train(tmp_path / "resumed", photos, *flags)
    assert bits(tmp_path / "resumed") == bits(tmp_path / "whole")


@pytest.mark.parametrize(
    "spelling", ["{name}/", "./{name}", "../{parent}/{name}", "~/{name}", "link", "copy", "dataset"]
)
def test_images_are_known_by_their_content(uninterrupted, photos, tmp_path, monkeypatch, spelling):
    """However their folder's path is spelled, and wherever they were copied or linked to."""
    monkeypatch.chdir(photos.parent)
    monkeypatch.setenv("HOME", str(photos.parent))
    copy_checkpoint(uninterrupted, tmp_path / "run", 4)
    given = Path(tmp_path / spelling)
    if spelling == "link":
        given.symlink_to(photos)
    elif spelling == "copy":
        shutil.copytree(photos, given, copy_function=shutil.copyfile)
    flags = [
        "--train_data_dir",
        str(given) if given.exists() else spelling.format(name=photos.name, parent=photos.parent.name),
    ]
    if spelling == "dataset":
        flags = ["--dataset_name", str(photos)]
    go(tmp_path / "run", *flags)
    assert bits(tmp_path / "run") == bits(uninterrupted)


@pytest.mark.parametrize("name", ["apple/0.bmp", "apple/9.bmp", "pear/3.bmp"])
def test_changed_images_are_refused(tmp_path, name):
    """Also a pixel of one that is held out, in a file of the same name and size."""
    colours = np.random.default_rng(0).integers(256, size=(2, 20, 8, 8, 3), dtype=np.uint8)
    for kind, images in zip(("apple", "pear"), colours, strict=True):
        (tmp_path / "t" / kind).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "t" / kind / f"{i}.bmp")
    flags = ["--train_data_dir", str(tmp_path / "t"), "--max_train_steps", "1"]
    go(tmp_path / "run", *flags)
    changed = tmp_path / "t" / name
    changed.write_bytes(changed.read_bytes()[:-1] + bytes([changed.read_bytes()[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"trained with other settings: the images have changed\. Use the same"):
        go(tmp_path / "run", *flags)


def test_checkpoints_of_older_versions_are_known_by_the_folders_name(uninterrupted, photos, tmp_path, monkeypatch):
    for name in ("same", "other"):
        copy_checkpoint(uninterrupted, tmp_path / name, 4)
        path = tmp_path / name / "diffusion" / "checkpoint-4" / STATE_FILE
        state = json.loads(path.read_text())
        del state["fingerprint"]["images"], state["run"], state["digests"]
        path.write_text(json.dumps(state))
    train(tmp_path / "same", photos)
    assert bits(tmp_path / "same") == bits(uninterrupted)
    with pytest.raises(ValueError, match="train_data_dir was"):
        train(tmp_path / "other", photos / ".." / photos.name)


def test_another_seed_gives_other_bits(uninterrupted, photos, tmp_path):
    train(tmp_path, photos, "--seed", "1")
    assert bits(tmp_path) != bits(uninterrupted)


def test_two_processes(uninterrupted, photos, tmp_path):
    def go(folder: Path) -> None:
        flags = [*FLAGS, "--train_data_dir", str(photos), "--output_dir", str(folder)]
        result = run("train_diffusion", *flags, processes=2)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "on 2 cpu process" in result.stderr

    go(tmp_path / "whole")
    copy_checkpoint(tmp_path / "whole", tmp_path / "resumed", 4)
    go(tmp_path / "resumed")
    assert bits(tmp_path / "resumed") == bits(tmp_path / "whole")
    assert bits(tmp_path / "whole") != bits(uninterrupted)

    # one process cannot go on where two were
    with pytest.raises(ValueError, match="number of processes was 2 and is now 1"):
        train(tmp_path / "whole", photos, "--max_train_steps", "8")


def start(folder: Path, photos: Path, *more: str) -> subprocess.Popen:
    flags = [*FLAGS, "--checkpointing_steps", "1", "--train_data_dir", str(photos), "--output_dir", str(folder), *more]
    return forked.Popen(
        script("train_diffusion", *flags),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_progress(process: subprocess.Popen, folder: Path) -> None:
    """Until a checkpoint appears that was not there before, or the process has ended."""
    known = set(list_checkpoints(folder / "diffusion"))
    while process.poll() is None and not set(list_checkpoints(folder / "diffusion")) - known:
        time.sleep(0.002)


def test_killed_at_random_moments(uninterrupted, photos, tmp_path):
    chance = random.Random(0)
    killed = tmp_path / "killed"
    for _ in range(3):
        process = start(killed, photos)
        wait_for_progress(process, killed)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.wait()
        for checkpoint in list_checkpoints(killed / "diffusion"):  # what is taken for whole is whole
            assert {"model.safetensors", "optimizer.bin", OTHERS_FILE, STATE_FILE} <= {
                path.name for path in checkpoint.iterdir()
            }
    train(killed, photos)
    assert bits(killed) == bits(uninterrupted)


@pytest.mark.parametrize(("signum", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_signals_save_and_exit_cleanly(photos, tmp_path, signum, workers):
    """Also if the whole process group gets the signal, as from a terminal or a cluster's scheduler."""
    flags = ("--dataloader_num_workers", str(workers), "--max_train_steps", "2000")
    process = start(tmp_path, photos, *flags)
    wait_for_progress(process, tmp_path)
    os.killpg(process.pid, signum)
    if signum == signal.SIGTERM:  # from the launcher and from the scheduler
        os.killpg(process.pid, signum)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signum, output[-3000:]  # so that `train && push` pushes nothing half-trained
    assert "Traceback" not in output
    assert "Rerun the same command to resume." in output
    step = int(list_checkpoints(tmp_path / "diffusion")[-1].name.rpartition("-")[2])
    copy_checkpoint(tmp_path, tmp_path / "resumed", step)
    train(tmp_path / "resumed", photos, "--max_train_steps", str(step + 2))
    train(tmp_path / "whole", photos, "--max_train_steps", str(step + 2))
    assert bits(tmp_path / "resumed", step + 2) == bits(tmp_path / "whole", step + 2)


def test_sigterm_to_the_launcher_reaches_the_training(photos, tmp_path):
    flags = [*FLAGS, "--checkpointing_steps", "1", "--max_train_steps", "2000", "--train_data_dir", str(photos)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", "hf_guided.training.train_diffusion"]
    process = forked.Popen(
        [*launch, *flags, "--output_dir", str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_progress(process, tmp_path)
    process.terminate()
    output = process.communicate(timeout=60)[0]  # ends when the training has closed its end of the pipe
    assert "Rerun the same command to resume." in output
    assert process.returncode != 0


def test_other_flags_are_named_and_refused_unless_they_cannot_matter(uninterrupted, photos, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted, folder)
    with pytest.raises(
        ValueError, match=r"learning_rate was 0.0001 and is now 0.1; train_batch_size was 4 and is now 8"
    ):
        train(folder, photos, "--train_batch_size", "8", "--learning_rate", "0.1")
    train(folder, photos, "--max_train_steps", "8", "--checkpointing_steps", "3", "--logging_steps", "1")
    checkpoints = folder / "diffusion"
    assert (checkpoints / "checkpoint-8" / STATE_FILE).is_file()
    with pytest.raises(ValueError, match="has 8 steps, more than --max_train_steps 7"):
        train(folder, photos, "--max_train_steps", "7")
    with pytest.raises(ValueError, match="holds newer checkpoints than checkpoint-4: checkpoint-6, checkpoint-8"):
        train(folder, photos, "--resume_from_checkpoint", str(checkpoints / "checkpoint-4"))
    elsewhere = ("--resume_from_checkpoint", str(checkpoints / "checkpoint-4"), "--checkpoints_total_limit", "1")
    train(tmp_path / "elsewhere", photos, *elsewhere)
    assert bits(tmp_path / "elsewhere") == bits(uninterrupted)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        train(folder, photos, "--resume_from_checkpoint", str(checkpoints / "checkpoint-5"))
    (photos / "apple" / "0.png").rename(tmp_path / "0.png")
    try:
        with pytest.raises(ValueError, match="number of images was 54 and is now 5"):
            train(folder, photos)
    finally:
        (tmp_path / "0.png").rename(photos / "apple" / "0.png")


def test_half_a_checkpoint_is_never_found(uninterrupted, tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    checkpoints = uninterrupted / "diffusion"
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copytree(checkpoints / "checkpoint-6", tmp_path / ".checkpoint-6.partial")
    shutil.copytree(checkpoints / "checkpoint-6", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / STATE_FILE).unlink()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-4"


def test_old_checkpoints_go_only_after_a_new_one_is_there(photos, tmp_path, monkeypatch):
    train(tmp_path, photos, "--checkpoints_total_limit", "2")
    assert [path.name for path in list_checkpoints(tmp_path / "diffusion")] == ["checkpoint-4", "checkpoint-6"]

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("accelerate.Accelerator.save_state", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, photos, "--checkpoints_total_limit", "2", "--max_train_steps", "8")
    assert [path.name for path in list_checkpoints(tmp_path / "diffusion")] == ["checkpoint-4", "checkpoint-6"]
