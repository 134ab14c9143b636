"""Which image has which label and noise, and files of samples that several processes and sittings make."""

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided import ADMScheduler, ClassifierGuidedPipeline
from hf_guided.cli import main
from hf_guided.data.npz import read_samples
from hf_guided.generation.runs import check_destination
from hf_guided.generation.samples import NO_CLASS, read_record
from hf_guided.generation.sampling import (
    generator_at,
    sample_batches,
    sample_labels,
    sample_to_file,
    to_8_bit,
)

NAMES = dict(enumerate("abcde"))
# The same image in batches of other sizes, in [-1, 1]; 9.2e-6 was the most that was measured, on a CPU.
BOUND = 5e-5  # between batch sizes, whose convolutions round otherwise; 3.3e-5 is the most seen on any processor


@pytest.fixture(scope="module")
def pipe(sampler_unet, sampler_classifier):
    """The guided pipeline of the reference trajectories, 3x16x16."""
    pipe = ClassifierGuidedPipeline(
        sampler_unet, ADMScheduler(), sampler_classifier, id2label=NAMES, sampling_defaults={"respacing": "5"}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_unet, tiny_classifier):
    """A smaller one, saved: 1x8x8."""
    small = {"sample_size": 8, "in_channels": 1, "channel_mult": (1,), "attention_resolutions": ()}
    pipe = ClassifierGuidedPipeline(
        tiny_unet(**small, out_channels=2),
        ADMScheduler(),
        tiny_classifier(**small, num_labels=5),
        id2label=NAMES,
        sampling_defaults={"respacing": "5"},
    )
    path = tmp_path_factory.mktemp("sampling") / "pipeline"
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def saved(folder):
    pipe = ClassifierGuidedPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Observed:
    """A pipeline that keeps what it was asked for, what its UNet saw first, and what it made."""

    def __init__(self, pipe):
        self.pipe, self.seeds, self.labels, self.noise, self.samples = pipe, [], [], [], []

    def __call__(self, class_labels, *, generator, **arguments):
        copy = torch.Generator().set_state(generator.get_state())
        self.seeds += torch.randint(2**63 - 1, (len(class_labels),), generator=copy).tolist()
        self.labels += class_labels.tolist()
        seen = []
        hook = self.pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        try:
            result = self.pipe(class_labels, generator=generator, **arguments)
        finally:
            hook.remove()
        self.noise += seen[0]
        self.samples += result[0]
        return result


def stop_after(batches, stop, monkeypatch):
    """Lets pipelines make some batches, and does something else before the next."""
    made = 0

    original = ClassifierGuidedPipeline.__call__

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        nonlocal made
        made += 1
        if made > batches:
            stop()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ClassifierGuidedPipeline, "__call__", call)


def interrupt():
    raise KeyboardInterrupt


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else path.iterdir()
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_one_batch_is_the_pipelines_own(pipe, tiny_unet):
    labels = torch.tensor([3, 0, 4, 1])
    expected = pipe(labels, generator=torch.Generator().manual_seed(7), output_type="latent").images
    [(index, images)] = sample_batches(pipe, labels, 4, 7)
    assert index == 0
    assert torch.equal(images, to_8_bit(expected))
    generators = pipe.prepare_generators(torch.Generator().manual_seed(7), 100)
    later = pipe.prepare_generators(generator_at(7, 60), 40)
    assert [one.initial_seed() for one in later] == [one.initial_seed() for one in generators[60:]]

    unconditional = ClassifierGuidedPipeline(tiny_unet(num_class_embeds=None), ADMScheduler())
    unconditional.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    expected = unconditional(num_images_per_label=3, respacing="2", generator=generator, output_type="latent").images
    [(_, images)] = sample_batches(unconditional, torch.tensor(NO_CLASS).expand(3), 4, 7, respacing="2")
    assert torch.equal(images, to_8_bit(expected))


def test_8_bits_cut_off_as_published():
    values = torch.tensor([-1.5, -1, -1 + 1.99 / 127.5, 0, 0.999, 1, 1.5])
    assert to_8_bit(values).tolist() == [0, 0, 1, 127, 254, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_8_bit((every + 0.5) / 127.5 - 1), every)


def test_labels_depend_on_the_index_alone():
    uniform = sample_labels("uniform", 10_000, 10, seed=3)
    for num_images in (1, 7, 16, 999):
        assert torch.equal(sample_labels("uniform", num_images, 10, seed=3), uniform[:num_images])
    counts = uniform.bincount(minlength=10)
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9  # chi squared of 9 degrees of freedom, p = 0.001
    assert not torch.equal(sample_labels("uniform", 10_000, 10, seed=4), uniform)
    assert sample_labels("all", 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sample_labels([4, 1], 5, 9).tolist() == [4, 1, 4, 1, 4]


@pytest.mark.parametrize("solver_order", [1, 2])
def test_batches_of_3_and_of_7(pipe, solver_order):
    scheduler = ADMScheduler.from_config(pipe.scheduler.config, solver_order=solver_order)
    pipe = ClassifierGuidedPipeline(pipe.unet, scheduler, pipe.classifier)
    pipe.set_progress_bar_config(disable=True)
    labels = sample_labels("uniform", 16, 5, seed=1)
    observed, images = {}, {}
    for batch_size in (3, 7):
        observed[batch_size] = Observed(pipe)
        arguments = {"num_inference_steps": 6, "guidance_scale": 3.0}
        batches = list(sample_batches(observed[batch_size], labels, batch_size, 1, **arguments))
        assert [index for index, _ in batches] == list(range(len(batches)))
        images[batch_size] = torch.cat([batch for _, batch in batches])
    three, seven = observed[3], observed[7]
    assert three.seeds == seven.seeds
    assert three.seeds == [one.initial_seed() for one in pipe.prepare_generators(torch.Generator().manual_seed(1), 16)]
    assert three.labels == seven.labels == labels.tolist()
    assert torch.equal(torch.stack(three.noise), torch.stack(seven.noise))
    assert len({noise.numpy().tobytes() for noise in three.noise}) == 16
    assert (torch.stack(three.samples) - torch.stack(seven.samples)).abs().max() < BOUND
    assert (images[3].int() - images[7].int()).abs().max() <= 1


def test_a_batch_does_not_depend_on_the_others(pipe):
    labels = sample_labels("all", 8, 5)
    batches = dict(sample_batches(pipe, labels, 3, 1))
    assert [len(batch) for batch in batches.values()] == [3, 3, 2]
    for index, images in sample_batches(pipe, labels, 3, 1, batches=[2, 0]):
        assert torch.equal(images, batches.pop(index))
    assert list(batches) == [1]


@pytest.mark.parametrize("name", ["samples.npz", "samples.parquet", "samples", "samples/", "samples.png"])
def test_every_kind_of_file_holds_the_samples(saved, tmp_path, name):
    labels = sample_labels("uniform", 11, 5)
    images = torch.cat([batch for _, batch in sample_batches(saved, labels, 4)]).numpy()
    assert sample_to_file(saved, labels, f"{tmp_path}/{name}", batch_size=4)
    path = tmp_path / name
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "samples.png"}
    if path.suffix == ".npz":
        stored, ids = read_samples(path)
        assert np.array_equal(stored, images.transpose(0, 2, 3, 1))
        assert np.array_equal(ids, labels)
    elif path.suffix == ".parquet":
        from datasets import load_dataset

        dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        assert dataset["label"][:] == labels.tolist()
        assert dataset.features["label"].names == list("abcde")
        assert np.array_equal([np.asarray(image) for image in dataset["image"]], images[:, 0])
    elif path.suffix == "":
        assert np.array_equal([np.asarray(Image.open(path / f"{i:06d}.png")) for i in range(11)], images[:, 0])
        lines = (path / "metadata.jsonl").read_text().splitlines()
        assert [json.loads(line)["label"] for line in lines] == [NAMES[label] for label in labels.tolist()]

    # The picture has a row for each class, of which each image is somewhere.
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("L"))
    rows = len(set(labels.tolist()))
    assert picture.shape[0] == rows * 56 + (rows - 1) * 3 + 2 * 16
    for label in set(labels.tolist()):
        row = sorted(set(labels.tolist())).index(label)
        if name == "samples.png":
            row = list(dict.fromkeys(labels.tolist())).index(label)
        of_class = images[labels == label, 0].repeat(7, axis=-1).repeat(7, axis=-2)
        top = 16 + row * 59
        strip = picture[top : top + 56]
        right = [x for x in range(strip.shape[1] - 55) if np.array_equal(strip[:, x : x + 56], of_class[0])]
        assert len(right) == 1
        for i, image in enumerate(of_class):
            assert np.array_equal(strip[:, right[0] + 59 * i :][:, :56], image)


@pytest.mark.parametrize("name", ["samples.parquet", "samples"])
def test_a_batch_is_encoded_while_the_next_is_sampled(saved, tmp_path, monkeypatch, name):
    encoding, sampling, met = threading.Event(), threading.Event(), []

    def save(*args, original=Image.Image.save, **kwargs):
        encoding.set()
        met.append(sampling.wait(timeout=20))
        original(*args, **kwargs)

    def meet():
        sampling.set()
        met.append(encoding.wait(timeout=20))

    monkeypatch.setattr(Image.Image, "save", save)
    stop_after(1, meet, monkeypatch)
    sample_to_file(saved, sample_labels("all", 10, 5), tmp_path / name, batch_size=5)
    assert len(met) == 12  # ten images, the second batch and the picture of all
    assert all(met)


def test_what_is_there_is_not_made_again(saved, tmp_path):
    labels = sample_labels("all", 5, 5)
    for name in ("samples.npz", "samples.parquet", "samples"):
        path = tmp_path / name
        assert sample_to_file(saved, labels, path)
        assert read_record(path)["num_images"] == 5
        made = path.stat().st_mtime_ns
        assert not sample_to_file(saved, labels, path)
        assert path.stat().st_mtime_ns == made
        with pytest.raises(ValueError, match=r"other settings: seed was 0 and is now 1\. Give another --output"):
            sample_to_file(saved, labels, path, seed=1)
        with pytest.raises(ValueError, match="other settings: the labels were different"):
            sample_to_file(saved, labels.flip(0), path)
    before = contents(tmp_path / "samples.png")
    assert sample_to_file(saved, labels, tmp_path / "samples.png", seed=1)  # grids are made again
    assert contents(tmp_path / "samples.png") != before
    assert not sample_to_file(saved, labels, tmp_path / "samples.png", seed=1)


@pytest.mark.parametrize("spelling", ["./pipeline", "pipeline/", "link", "moved"])
def test_a_pipelines_folder_is_known_by_its_content(folder, tmp_path, monkeypatch, spelling):
    shutil.copytree(folder, tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    main(["sample", "pipeline", "--output", "samples.npz", "--num_images", "4"])
    made = Path("samples.npz").stat().st_mtime_ns
    if spelling == "moved":
        os.rename("pipeline", "moved")
    elif spelling == "link":
        os.symlink("pipeline", "link")
    main(["sample", spelling, "--output", "samples.npz", "--num_images", "4"])
    assert Path("samples.npz").stat().st_mtime_ns == made
    os.utime(Path(spelling, "model_index.json"))
    with pytest.raises(SystemExit, match="the model's files were different"):
        main(["sample", spelling, "--output", "samples.npz", "--num_images", "4"])


def test_parts_of_another_plan_are_told(saved, folder, tmp_path, monkeypatch):
    path, parts = tmp_path / "samples.npz", tmp_path / "samples.npz.parts"
    labels = sample_labels("all", 12, 5)
    with monkeypatch.context() as patch:
        stop_after(2, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            sample_to_file(saved, labels, path, batch_size=3)
    kept = contents(parts)
    assert sorted(kept) == ["000000.raw", "000001.raw", "plan.json"]
    for arguments, difference in [
        ({"batch_size": 4}, "batch_size was 3 and is now 4"),
        ({"batch_size": 3, "seed": 1}, "seed was 0 and is now 1"),
        ({"batch_size": 3, "guidance_scale": 2.0}, "guidance_scale was None and is now 2.0"),
    ]:
        with pytest.raises(ValueError, match=f"parts holds images with other settings: {difference}. Give the same"):
            sample_to_file(saved, labels, path, **arguments)
    config = folder / "unet" / "config.json"
    times = config.stat()
    os.utime(config, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"the model's files were different\. .* or remove the folder"):
        sample_to_file(saved, labels, path, batch_size=3)
    os.utime(config, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert contents(parts) == kept

    (parts / "000001.raw").write_bytes(kept["000001.raw"][:-1])  # cut off by a crash of the machine
    (parts / ".000002.raw.123.tmp").write_bytes(b"half")
    (parts / ".whole.123.tmp").mkdir()
    with monkeypatch.context() as patch:
        stop_after(0, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            sample_to_file(saved, labels, path, batch_size=3)
    assert sorted(contents(parts)) == ["000000.raw", "plan.json"]
    assert sample_to_file(saved, labels, path, batch_size=3)
    assert sample_to_file(saved, labels, tmp_path / "at-once.npz", batch_size=3)
    assert path.read_bytes() == (tmp_path / "at-once.npz").read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize("content", ["[]", "{}", "null", "", '{"seed": ', "\xff"])
def test_a_damaged_plan_is_refused(content, saved, tmp_path):
    parts = tmp_path / "samples.npz.parts"
    parts.mkdir()
    (parts / "plan.json").write_bytes(content.encode("latin1"))
    (parts / "000000.raw").write_text("kept")
    with pytest.raises(ValueError, match=r"plan\.json is damaged: .*; remove the folder .*\.parts to"):
        sample_to_file(saved, torch.zeros(2).long(), tmp_path / "samples.npz")
    assert (parts / "000000.raw").read_text() == "kept"


def test_a_mistake_leaves_nothing_behind(saved, tmp_path):
    with pytest.raises(ValueError, match="Give only one of"):
        sample_to_file(saved, 3 * torch.ones(2).long(), tmp_path / "x.npz", num_inference_steps=3, respacing="3")
    assert not list(tmp_path.iterdir())


def test_bad_names_are_refused_before_the_work(saved, tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "cat.png")
    for name, message in [
        ("samples.jpg", "must end in .npz, .parquet or .png, or in /"),
        ("nowhere/samples.npz", "make it first"),
        ("text.npz/samples/", "cannot be made"),
        ("text.npz/samples.npz", "make it first"),
        ("text.npz", "exists and was not made by this command"),
        ("folder", "exists and was not made by this command"),
        ("cat.png", "exists and was not made by this command"),
        ("cat.npz", "cat.png exists and was not made by this command"),  # the picture beside it
    ]:
        with pytest.raises(ValueError, match=message):
            check_destination(tmp_path / name)
    for name in ("empty", "new.npz", "v1.5/", "deep/new/"):
        check_destination(f"{tmp_path}/{name}")
    with pytest.raises(ValueError, match="/proc is a whole disk"):
        check_destination("/proc")
    with pytest.raises(ValueError, match=r"2000 images are too many for one grid"):
        sample_to_file(saved, torch.zeros(2000).long(), tmp_path / "many.png")
    (tmp_path / "mine.npz.parts").mkdir()
    (tmp_path / "mine.npz.parts" / "letter.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"mine\.npz\.parts was not made by this command"):
        sample_to_file(saved, torch.zeros(2).long(), tmp_path / "mine.npz")
    with pytest.raises(ValueError, match=r"need up to 1.*e\+05 GB on the disk .* GB are free; make room"):
        sample_to_file(saved, torch.tensor(NO_CLASS).expand(10**12), tmp_path / "huge.npz", batch_size=10**10)
    assert {path.name for path in tmp_path.iterdir()} == {"text.npz", "folder", "empty", "cat.png", "mine.npz.parts"}


@pytest.mark.parametrize("name", ["samples.npz", "samples.parquet", "samples"])
def test_a_file_that_may_grow_no_further_loses_nothing(saved, tmp_path, name):
    labels = sample_labels("all", 120, 5)
    arguments = {"batch_size": 60, "respacing": "2"}
    assert sample_to_file(saved, labels, tmp_path / f"whole-{name}", **arguments)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60 * 64 + 400, limits[1]))  # enough for a part, but not for the whole
    try:
        with pytest.raises(RuntimeError, match=r"disk is full: 120 of 120 images are kept in .*\.parts\. Make room"):
            sample_to_file(saved, labels, tmp_path / name, **arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / name).exists()
    assert sorted(contents(tmp_path / f"{name}.parts")) == ["000000.raw", "000001.raw", "plan.json"]
    assert sample_to_file(saved, labels, tmp_path / name, **arguments)
    assert contents(tmp_path / name) == contents(tmp_path / f"whole-{name}")


def test_a_full_disk_loses_nothing(saved, tmp_path, small_disk, monkeypatch):
    labels = sample_labels("all", 200, 5)
    arguments = {"batch_size": 64, "respacing": "2"}
    filler = small_disk / "filler"

    def fill():
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1000))

    with monkeypatch.context() as patch:
        stop_after(1, fill, patch)
        with pytest.raises(RuntimeError, match="disk is full: 64 of 200 images are kept"):
            sample_to_file(saved, labels, small_disk / "samples.npz", **arguments)
    assert sorted(contents(small_disk / "samples.npz.parts")) == ["000000.raw", "plan.json"]
    fill()  # also the space of the unfinished file
    with pytest.raises(ValueError, match=r"need up to .* and 0 GB are free; make room"):
        sample_to_file(saved, labels, small_disk / "samples.npz", **arguments)
    filler.unlink()
    assert sample_to_file(saved, labels, small_disk / "samples.npz", **arguments)
    assert sample_to_file(saved, labels, tmp_path / "samples.npz", **arguments)
    assert contents(small_disk / "samples.npz") == contents(tmp_path / "samples.npz")


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(folder: Path, output: Path, processes: int = 1) -> list[str]:
    """A run of 24 batches."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = ["--num_images", "47", "--batch_size", "2", "--respacing", "4", "--output", str(output)]
    return [sys.executable, *(launch if processes > 1 else []), "-m", "hf_guided.cli", "sample", str(folder), *flags]


def start(argv: list[str]) -> subprocess.Popen:
    return forked.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_parts(output: Path, count: int, process: subprocess.Popen) -> None:
    """Returns once so many batches are finished."""
    while len(list(output.parent.glob(f"{output.name}.parts/*.raw"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def at_once(folder, tmp_path_factory):
    """What one process makes in one sitting."""
    directory = tmp_path_factory.mktemp("at-once")
    for name in ("samples.npz", "samples"):
        main(command(folder, directory / name)[3:])
    return directory


def keep_samples(argv: list[str]) -> list[torch.Tensor]:
    """Runs a command and returns its batches before they are rounded to 8 bits."""
    kept, original = [], ClassifierGuidedPipeline.__call__

    @functools.wraps(original)
    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        kept.append(result[0])
        return result

    ClassifierGuidedPipeline.__call__ = call
    try:
        main(argv)
    finally:
        ClassifierGuidedPipeline.__call__ = original
    return kept


def test_two_processes_make_the_same_bits(folder, at_once, tmp_path):
    output = tmp_path / "two" / "samples.npz"
    output.parent.mkdir()
    argv = [sys.executable, __file__, *command(folder, output)[3:]]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = forked.run(argv, processes=2, env=ENVIRONMENT | path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved 47 samples") == 1
    assert "sampling: 100%" in done.stderr
    batches = keep_samples(command(folder, tmp_path / "samples.npz")[3:])
    for rank in range(2):
        kept = torch.load(output.parent / f"{rank}.pt", weights_only=True)
        assert len(kept) == 12
        assert all(torch.equal(*pair) for pair in zip(kept, batches[rank::2], strict=True))
    for name in ("samples.npz", "samples.png"):
        assert contents(output.parent / name) == contents(at_once / name)


def test_killed_and_started_again_the_file_is_the_same(folder, at_once, tmp_path, monkeypatch):
    # A folder by two processes, one of which is killed; the other neither waits for it nor loses what it made.
    output = tmp_path / "samples"
    process = start(command(folder, output, processes=2))
    wait_for_parts(output, 4, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(workers.split()[1]), signal.SIGKILL)
    out, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Saved" not in out
    assert "Rerun the same command to resume." in errors
    parts = contents(tmp_path / "samples.parts")
    assert 4 < len(parts) < 25
    main(command(folder, output)[3:])
    assert contents(output) == contents(at_once / "samples")

    # A .npz by one process; what it made is not made again.
    output = tmp_path / "samples.npz"
    process = start(command(folder, output))
    wait_for_parts(output, 2, process)
    process.kill()
    process.communicate()
    kept = len(list(tmp_path.glob("samples.npz.parts/*.raw")))
    stop_after(24 - kept, interrupt, monkeypatch)
    main(command(folder, output)[3:])
    assert contents(output) == contents(at_once / "samples.npz")


if __name__ == "__main__":  # each process of a launch keeps what it made beside the output
    torch.save(keep_samples(sys.argv[1:]), Path(sys.argv[-1]).with_name(f"{os.environ['RANK']}.pt"))
