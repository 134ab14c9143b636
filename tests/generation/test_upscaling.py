"""Files of upsampled images: formats, several processes, and resuming."""

import contextlib
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import forked
import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided import ADMScheduler, ClassifierGuidedUpscalePipeline
from hf_guided.cli import main
from hf_guided.data.npz import read_samples
from hf_guided.generation.samples import read_record
from hf_guided.generation.sampling import to_8_bit
from hf_guided.generation.upscaling import read_small_images, upscale_to_file

NAMES = dict(enumerate("abcde"))
LABELS = [i % 5 for i in range(47)]


@pytest.fixture(scope="module")
def place(tiny_unet, tmp_path_factory) -> Path:
    """An upsampler, and small images as a file and as pictures."""
    folder = tmp_path_factory.mktemp("place")
    sizes = {"channel_mult": (1,), "attention_resolutions": (), "sample_size": 16}
    unet = tiny_unet(low_res_channels=3, num_class_embeds=5, **sizes)
    defaults = {"sampling_defaults": {"respacing": "4"}, "id2label": NAMES, "low_res_size": 8}
    ClassifierGuidedUpscalePipeline(unet, ADMScheduler(), **defaults).save_pretrained(folder / "upscaler")
    pixels = np.random.default_rng(0).integers(0, 256, (47, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "small.npz", pixels, np.array(LABELS))
    for i in range(5):
        Image.fromarray(pixels[i]).save(folder / f"{i}.png")
    return folder


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(place: Path, output: Path) -> list[str]:
    """A run of 24 batches."""
    flags = [str(place / "small.npz"), "--batch_size", "2", "--output", str(output)]
    arguments = ["upscale", str(place / "upscaler"), *flags]
    return [sys.executable, "-m", "hf_guided.cli", *arguments]


def start(argv: list[str]) -> subprocess.Popen:
    return forked.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_parts(output: Path, count: int, process: subprocess.Popen) -> None:
    while len(list(output.parent.glob(f"{output.name}.parts/*.raw"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@contextlib.contextmanager
def counted_calls():
    """The number of images of each batch that upscaling pipelines make."""
    made, original = [], ClassifierGuidedUpscalePipeline.__call__

    @functools.wraps(original)
    def call(self, image, *args, **kwargs):
        made.append(len(image))
        return original(self, image, *args, **kwargs)

    ClassifierGuidedUpscalePipeline.__call__ = call
    try:
        yield made
    finally:
        ClassifierGuidedUpscalePipeline.__call__ = original


@pytest.fixture(scope="module")
def at_once(place, tmp_path_factory) -> Path:
    """What one process makes in one sitting."""
    output = tmp_path_factory.mktemp("at-once") / "large.npz"
    main(command(place, output)[3:])
    return output


def test_one_process_makes_the_pixels_of_one_generator(place, at_once):
    """As before there were several processes: batch after batch from one generator."""
    pipe = ClassifierGuidedUpscalePipeline.from_pretrained(place / "upscaler")
    small, labels = read_samples(place / "small.npz")
    generator = torch.Generator().manual_seed(0)
    expected = []
    for start in range(0, 47, 2):
        part = slice(start, start + 2)
        options = {"generator": generator, "output_type": "latent", "return_dict": False}
        expected.append(to_8_bit(pipe(small[part], torch.from_numpy(labels[part]), **options)[0]))
    with np.load(at_once) as file:
        assert np.array_equal(file["arr_0"], torch.cat(expected).permute(0, 2, 3, 1).numpy())
        assert file["arr_1"].tolist() == LABELS
        assert file["arr_1"].dtype == np.int64


def test_the_same_command_makes_nothing_twice(place, at_once, capsys):
    before = at_once.read_bytes()
    with counted_calls() as made:
        main(command(place, at_once)[3:])
    assert made == []
    assert "is there already, made by the same command" in capsys.readouterr().out
    assert at_once.read_bytes() == before
    assert sorted(path.name for path in at_once.parent.iterdir()) == [at_once.name]  # and no picture beside it


def test_two_processes_make_the_same_bytes(place, at_once, tmp_path):
    done = forked.run(command(place, tmp_path / "large.npz"), processes=2, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved 47 images of 16x16") == 1
    assert "upscaling: 100%" in done.stderr
    assert (tmp_path / "large.npz").read_bytes() == at_once.read_bytes()
    assert not (tmp_path / "large.npz.parts").exists()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_started_again_the_file_is_the_same(end, place, at_once, tmp_path):
    output = tmp_path / "large.npz"
    process = start(command(place, output))
    wait_for_parts(output, 2, process)
    process.send_signal(end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -end)
    assert end == signal.SIGKILL or "Rerun the same command to resume." in errors.splitlines()[-1]
    kept = len(list(tmp_path.glob("large.npz.parts/*.raw")))
    assert not output.exists()
    with counted_calls() as made:
        main(command(place, output)[3:])
    assert len(made) == 24 - kept < 23
    assert output.read_bytes() == at_once.read_bytes()


def test_every_format_holds_the_same_images(place, at_once, tmp_path):
    expected = np.load(at_once)["arr_0"]
    for name in ("large.parquet", "large"):
        main(command(place, tmp_path / name)[3:])
    rows = datasets.Dataset.from_parquet(str(tmp_path / "large.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows["label"] == LABELS
    assert rows.features["label"].names == list("abcde")
    assert np.array_equal(np.stack([np.asarray(image) for image in rows["image"]]), expected)
    lines = [json.loads(line) for line in (tmp_path / "large" / "metadata.jsonl").read_text().splitlines()]
    assert [line["class_id"] for line in lines] == LABELS
    pictures = [np.asarray(Image.open(tmp_path / "large" / line["file_name"])) for line in lines]
    assert np.array_equal(np.stack(pictures), expected)


def test_a_picture_shows_small_and_large(place, tmp_path):
    paths = [str(place / f"{i}.png") for i in range(5)]
    main(["upscale", str(place / "upscaler"), *paths, "--labels", *"abcde", "--output", str(tmp_path / "a.png")])
    pipe = ClassifierGuidedUpscalePipeline.from_pretrained(place / "upscaler")
    images, none = read_small_images(paths)
    assert none is None
    assert upscale_to_file(pipe, images, list("abcde"), tmp_path / "large.npz")
    shown = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    for large in np.load(tmp_path / "large.npz")["arr_0"]:
        windows = np.lib.stride_tricks.sliding_window_view(shown, large.shape).reshape(-1, *large.shape)
        assert (windows == large).all(axis=(1, 2, 3)).any()
    # a picture of others may take its place, as that of samples may
    main(["upscale", str(place / "upscaler"), *paths[:2], "--labels", "a", "--output", str(tmp_path / "a.png")])
    assert read_record(tmp_path / "a.png")["num_images"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "seed was 0 and is now 1"),
        (["--batch_size", "3"], "batch_size was 2 and is now 3"),
        (["--labels", "a"], "the labels were different"),
        (["--num_inference_steps", "2"], "num_inference_steps was None and is now 2"),
    ],
)
def test_a_file_made_otherwise_is_kept(flags, message, place, at_once):
    before = hashlib.sha256(at_once.read_bytes()).digest()
    with pytest.raises(SystemExit, match=f"other settings: .*{message}"):
        main([*command(place, at_once)[3:], *flags])
    assert hashlib.sha256(at_once.read_bytes()).digest() == before


def test_other_images_and_other_commands_are_told_apart(place, at_once, tmp_path):
    small, labels = read_samples(place / "small.npz")
    small = small.copy()
    small[5, 0, 0, 0] ^= 1
    np.savez(tmp_path / "small.npz", small, labels)
    flags = ["--batch_size", "2", "--output", str(at_once)]
    with pytest.raises(SystemExit, match="other settings: the small images were different"):
        main(["upscale", str(place / "upscaler"), str(tmp_path / "small.npz"), *flags])
    with pytest.raises(SystemExit, match="was not made by this command"):
        main(["sample", "nowhere", "--num_images", "2", "--output", str(at_once)])


def test_a_wrong_flag_leaves_nothing(place, tmp_path):
    for name in ("large.npz", "large", "large.png"):
        with pytest.raises(SystemExit, match="error: "):
            main([*command(place, tmp_path / name)[3:], "--guidance_scale", "1"])
    assert list(tmp_path.iterdir()) == []
