"""Ctrl-C at any moment: while a command imports, loads or works, it ends with status 130 and one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_guided import (
    ADMClassifierConfig,
    ADMForImageClassification,
    ADMScheduler,
    ADMUNet2DModel,
    ClassifierGuidedPipeline,
    ClassifierGuidedUpscalePipeline,
)

SIZES = {"sample_size": 8, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "num_heads": 2}
SIZES |= {"attention_resolutions": []}
NAMES = {0: "apple", 1: "banana", 2: "cherry"}
COMMANDS = {
    "sample": "hf_guided sample m --num_images 5000 --output new.npz",
    "upscale": "hf_guided.cli upscale u small.npz --output new.npz",
    "evaluate": "hf_guided.cli evaluate m photos --features m=c --num_images 5000 --output new",
    "sweep": "hf_guided.cli sweep m photos --features m=c --num_images 5000 --scales 0,1 --output new",
    "inspect": "hf_guided.cli inspect-classifier c photos --output new.png",
    "convert": "hf_guided.cli convert m --to openai --output new.pt",
    "train": "hf_guided.training.train --output_dir new",
    "diffusion": "hf_guided.training.train_diffusion --output_dir new",
    "gan": "hf_guided.training.train_baseline --family gan --output_dir new",
}
MOMENTS = [0.0, 0.7, 2.5]  # seconds after torch begins to be imported
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="when a library is loaded is read in /proc"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    unet = {"in_channels": 3, "out_channels": 6, **SIZES}
    classifier = ADMForImageClassification(ADMClassifierConfig(**SIZES, id2label=NAMES, pool="adaptive"))
    classifier.save_pretrained(folder / "c")
    conditional = ADMUNet2DModel(**unet, num_class_embeds=3, null_class_label=True)
    ClassifierGuidedPipeline(conditional, ADMScheduler(), classifier).save_pretrained(folder / "m")
    upsampler = ADMUNet2DModel(**unet, low_res_channels=3)
    ClassifierGuidedUpscalePipeline(upsampler, ADMScheduler(), low_res_size=4).save_pretrained(folder / "u")
    pixels = np.random.default_rng(0).integers(0, 256, (36, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "small.npz", pixels[:, :4, :4])
    for label, name in NAMES.items():
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(pixels[12 * label + i]).save(folder / "photos" / name / f"{i}.png")
    return folder


def start(line: str, place: Path) -> subprocess.Popen:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *line.split()], env=environment, cwd=place, stderr=subprocess.PIPE, text=True
    )


def wait_for(library: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c(name, place):
    processes = [start(COMMANDS[name], place) for _ in MOMENTS]
    try:
        for process in processes:
            wait_for("torch", process)
        began = time.monotonic()
        for moment, process in zip(MOMENTS, processes, strict=True):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for moment, process in zip(MOMENTS, processes, strict=True):
            _, errors = process.communicate(timeout=60)
            if process.returncode == 0:  # it was done before
                continue
            assert process.returncode == 130, (moment, errors)
            assert "Traceback" not in errors
            assert "Exception ignored" not in errors
            assert "Stopped" in errors.splitlines()[-1]
    finally:
        for process in processes:
            process.kill()
