"""The upsampler: what it is conditioned on, what it leaves behind, and that it can be stopped."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from launching import TINY_RUN, run
from PIL import Image

from hf_guided import ClassifierGuidedUpscalePipeline
from hf_guided.data import load_labelled_images
from hf_guided.processes import StoppedError
from hf_guided.training import train_upscaler as script
from hf_guided.training.arguments import parse_arguments
from hf_guided.training.loop import seed_everything
from hf_guided.training.train_diffusion import DiffusionArguments, make_unet
from hf_guided.training.train_upscaler import UpscalerArguments, UpscalerTask, measure, small_size, train_upscaler

STAGE = {"upscaler": UpscalerArguments}
FLAGS = [*TINY_RUN, "--max_train_steps", "4", "--checkpointing_steps", "2", "--resolution", "8", "--respacing", "2"]


def parse(*flags: str):
    data_args, stages = parse_arguments(STAGE, [*FLAGS, *flags])
    return data_args, stages["upscaler"]


def make_task(photos: Path, *flags: str) -> UpscalerTask:
    data_args, args = parse("--train_data_dir", str(photos), *flags)
    images = load_labelled_images(data_args, seed=0)
    torch.manual_seed(0)
    return UpscalerTask(args, images)


def bits(output_dir: Path) -> dict[str, bytes]:
    """Everything that training computes: weights, optimizer, moving average, schedule, and the finished UNet."""
    folders = [output_dir / "upscaler" / "checkpoint-4", output_dir / "upscaler" / "pipeline" / "unet"]
    files = [path for folder in folders for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")]
    assert len(files) == 4
    return {path.name: path.read_bytes() for path in files}


def test_the_script_leaves_a_pipeline_a_picture_and_numbers(photos, tmp_path, monkeypatch):
    flags = [*FLAGS, "--train_data_dir", str(photos), "--preview_steps", "4"]
    result = run("train_upscaler", *flags, "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for said in ("== upscaler ==", "54 images", "8x8 pixels", "GiB a process", "share of detail", "bicubic"):
        assert said in result.stderr

    out = tmp_path / "out" / "upscaler"
    report = json.loads((out / "pipeline" / "report.json").read_text())
    assert set(report) == {"bicubic", "sample"}
    assert all(value >= 0 for row in report.values() for value in row.values())
    for name in ("pipeline/grid.png", "preview-000004.png"):
        picture = Image.open(out / name)
        assert picture.width > 5 * 56  # five columns of enlarged pictures
    pipe = ClassifierGuidedUpscalePipeline.from_pretrained(out / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert list(pipe.id2label.values()) == ["apple", "banana", "cherry"]
    assert (pipe.config.low_res_size, pipe.config.sampling_defaults) == (2, {"respacing": "2"})
    assert pipe.unet.config.low_res_channels == 3
    assert pipe(Image.new("RGB", (2, 2), "red"), "apple").images[0].size == (8, 8)

    # the same command again: nothing is trained again, and all is as before
    weights = out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes(), (out / "pipeline" / "grid.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_upscaler.py", *flags, "--output_dir", "out"])
    monkeypatch.setattr(UpscalerTask, "losses", lambda *args: pytest.fail("trained again"))
    script.main()
    assert (weights.read_bytes(), (out / "pipeline" / "grid.png").read_bytes()) == before
    assert json.loads((out / "pipeline" / "report.json").read_text()) == report


def test_stopped_and_gone_on_with_it_ends_with_the_same_bits(photos, tmp_path, monkeypatch):
    def train(folder: Path, *more: str) -> Path:
        flags = ("--train_data_dir", str(photos), "--low_res_noise", "0.5", "--random_flip", "--label_dropout", "0.5")
        return train_upscaler(*parse(*flags, "--output_dir", str(folder), *more))

    assert train(tmp_path / "whole") == tmp_path / "whole" / "upscaler" / "pipeline"

    losses, calls = UpscalerTask.losses, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return losses(*args)

    monkeypatch.setattr(UpscalerTask, "losses", interrupted)
    with pytest.raises(StoppedError, match="Stopped after 3 steps"):
        train(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "upscaler" / "pipeline").exists()
    train(tmp_path / "stopped", "--respacing", "3")  # how it samples may change
    assert len(calls) == 4
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")


def test_the_small_image_is_the_mean_of_its_pixels_and_clean_by_default(photos, randn):
    task = make_task(photos)
    batch = {"pixel_values": randn(4, 3, 8, 8).clamp(-1, 1), "labels": torch.tensor([0, 1, 2, 0])}
    low_res = task.conditions(batch)["low_res"]
    expected = batch["pixel_values"].reshape(4, 3, 2, 4, 2, 4).mean(dim=(3, 5))
    assert torch.allclose(low_res, expected, atol=1e-6)
    assert torch.equal(low_res, task.inputs(batch)["low_res"])

    def losses(task) -> torch.Tensor:
        seed_everything(0, 0, 0, 0)
        torch.nn.init.normal_(task.model.conv_out.weight)
        return task.losses(task.model.eval(), batch, torch.full((4,), 500))[0]

    plain = losses(task)
    assert torch.equal(losses(make_task(photos, "--low_res_noise", "0")), plain)
    noised = losses(make_task(photos, "--low_res_noise", "0.5"))
    assert not torch.isclose(noised, plain).any()
    assert torch.equal(losses(make_task(photos, "--low_res_noise", "0.5")), noised)


def test_augmentation_draws_a_strength_for_each_image(photos):
    task = make_task(photos, "--low_res_noise", "0.5")
    task.low_size = (8, 8)
    batch = {"pixel_values": torch.zeros(2000, 3, 8, 8), "labels": torch.zeros(2000, dtype=torch.long)}
    torch.manual_seed(0)
    strengths = task.conditions(batch)["low_res"].square().mean(dim=(1, 2, 3)).sqrt()
    # uniform from 0 to 0.5, of which the estimate from 192 numbers is off by 5 %
    for share in (0.1, 0.5, 0.9):
        assert strengths.quantile(share).item() == pytest.approx(0.5 * share, abs=0.02)
    assert strengths.max() < 0.6


def test_sizes_must_divide(photos, tmp_path):
    assert small_size(None, (64, 64)) == (16, 16)
    assert small_size(8, (32, 48)) == (8, 12)
    for low, resolution in [(3, (8, 8)), (8, (8, 8)), (16, (8, 8)), (0, (8, 8)), (None, (2, 2)), (4, (8, 9))]:
        with pytest.raises(ValueError, match=r"cannot be downsampled evenly to a height of .* --low_resolution that"):
            small_size(low, resolution)
    flags = ("--train_data_dir", str(photos), "--low_resolution", "3", "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"Images of 8 x 8 pixels .* height of 3;"):
        train_upscaler(*parse(*flags))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"--low_res_noise -0\.1 is not allowed; give a finite number of at least 0"):
        parse("--low_res_noise", "-0.1")
    with pytest.raises(ValueError, match="not understood"):
        parse("--respacing", "x")


def test_without_classes_and_not_square(photos, tmp_path):
    flags = ["--resolution", "8", "16", "--low_resolution", "4", "--no_class_conditional", "--max_train_steps", "1"]
    folder = train_upscaler(*parse("--train_data_dir", str(photos), *flags, "--output_dir", str(tmp_path)))
    pipe = ClassifierGuidedUpscalePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.num_classes, pipe.config.low_res_size) == (None, 4)
    assert pipe(Image.new("RGB", (8, 4))).images[0].size == (16, 8)


def test_a_stage_of_a_recipe_may_need_its_own_data(tmp_path):
    data, stages = parse_arguments(STAGE, [])
    assert (data.dataset_name, data.resolution, stages["upscaler"].low_resolution) == ("digits", [16], 8)
    assert parse_arguments(STAGE, ["--resolution", "32"])[0].resolution == [32]
    assert parse_arguments({"diffusion": DiffusionArguments}, [])[0].resolution is None
    data, stages = parse_arguments(STAGE, ["--dataset_name", "photographs"])
    assert (data.dataset_name, data.random_flip, stages["upscaler"].low_resolution) == ("photographs", True, 8)

    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"upscaler": {"data": {"resolution": [16]}}, "diffusion": {}}))
    with pytest.raises(ValueError, match="section 'upscaler' has data of its own; here all stages share theirs"):
        parse_arguments({"diffusion": DiffusionArguments, **STAGE}, ["--recipe", str(recipe)])
    recipe.write_text(yaml.safe_dump({"upscaler": {"data": {"resolutio": [16]}}}))
    with pytest.raises(ValueError, match="section 'data' has unknown keys: resolutio"):
        parse_arguments(STAGE, ["--recipe", str(recipe)])
    with pytest.raises(ValueError, match="no section upscaler, only classifier, diffusion, flow, gan,"):
        parse_arguments(STAGE, ["--recipe", "cifar10"])


@pytest.mark.parametrize(
    ("recipe", "side", "low_side", "millions"),
    [
        *[("digits", 16, 8, 2), ("photographs", 32, 8, 6), ("images", 64, 16, 101)],
        *[("imagenet256", 256, 64, 312), ("imagenet512", 512, 128, 309)],  # as published, table 13
    ],
)
def test_every_recipe_makes_its_upsampler(recipe, side, low_side, millions):
    data_args, stages = parse_arguments(STAGE, ["--recipe", recipe])
    assert data_args.resolution in (None, [side])
    assert small_size(stages["upscaler"].low_resolution, (side, side)) == (low_side, low_side)
    images = SimpleNamespace(resolution=(side, side), image_channels=3, num_classes=1000)
    with torch.device("meta"):
        unet = make_unet(stages["upscaler"], images, low_res_channels=3)
        unet(torch.empty(1, 3, side, side), 0, torch.zeros(1, dtype=torch.long), torch.empty(1, 3, low_side, low_side))
    assert round(unet.num_parameters() / 1e6) == millions


def test_measures_tell_blur_from_detail(randn):
    original = randn(2, 3, 8, 8)
    low_res = F.interpolate(original, (2, 2), mode="area")
    blocks = F.interpolate(low_res, (8, 8), mode="nearest")
    truth = measure(original, original, low_res)
    assert truth == {"error": 0, "error_after_downsampling": pytest.approx(0, abs=1e-12), "share_of_detail": 1}
    blur = measure(blocks, original, low_res)
    assert blur["share_of_detail"] == pytest.approx(0, abs=1e-12)
    assert blur["error_after_downsampling"] == pytest.approx(0, abs=1e-12)
    assert 0.5 < blur["error"] < 1.5
    assert measure(original + 0.5, original, low_res)["error_after_downsampling"] == pytest.approx(0.25, rel=1e-4)
