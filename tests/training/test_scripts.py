"""The scripts as users run them, on a folder of their own pictures."""

import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from hub_server import HubServer, User
from launching import TINY_MODEL, TINY_RUN, environment
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_guided import ClassifierGuidedPipeline
from hf_guided.data import DataArguments, load_labelled_images
from hf_guided.training import train, train_classifier, train_diffusion, train_upscaler
from hf_guided.training.arguments import parse_arguments, run_script
from hf_guided.training.train_classifier import ClassifierArguments, ClassifierTask
from hf_guided.training.train_diffusion import DiffusionArguments

ROOT = Path(__file__).parents[2]


def test_the_whole_walk_on_a_folder_of_pictures(photos, tmp_path, monkeypatch, caplog):
    flags = [
        *TINY_MODEL,
        *("--train_data_dir", str(photos), "--resolution", "8", "--train_batch_size", "4", "--max_train_steps", "2"),
        *("--num_images", "12", "--respacing", "3", "--guidance_scales", "0", "2", "--conditional_scales", "2"),
        *("--output_dir", "out", "--diffusion_preview_steps", "2"),
        *("--validation_steps", "1", "--label_dropout", "0.2"),
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command = [*launch, str(ROOT / "training" / "train.py"), *flags]
    first = forked.run(command, cwd=tmp_path, env=environment())
    assert first.returncode == 0, first.stderr[-3000:]
    for said in ("54 images", "3", "parameters", "GiB", "2 steps of 4 images", "writes", "held-out images", "scale 2"):
        assert said in first.stderr

    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())["rows"]
    assert [(row["guidance_scale"], row["condition_unet"]) for row in report] == [
        (None, None),
        (0.0, False),
        (2.0, False),
        (2.0, True),
    ]
    assert all(0 <= row[f"{name}/judge"] <= 1 for row in report for name in ("accuracy", "precision", "recall"))
    assert not any("fd_ratio/judge" in row for row in report)  # six held-out images are fewer than twelve samples
    for picture in ("scales.png", "pipeline/grid.png", "pipeline/trade_off.png", "diffusion/preview-000002.png"):
        Image.open(out / picture).verify()
    card = (out / "pipeline" / "README.md").read_text()
    assert "`apple`, `banana`, `cherry`" in card
    assert str(photos.parent) not in card
    assert list((out / "diffusion" / "logs").rglob("*tfevents*"))

    pipe = ClassifierGuidedPipeline.from_pretrained(out / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert list(pipe.id2label.values()) == ["apple", "banana", "cherry"]
    picture = pipe("banana", generator=torch.Generator().manual_seed(0)).images[0]
    assert (picture.mode, picture.size) == ("RGB", (8, 8))
    assert pipe.scheduler.timesteps.tolist() == [999, 500, 0]

    classify = pipeline("image-classification", model=str(out / "pipeline" / "classifier"))
    assert {answer["label"] for answer in classify(Image.open(photos / "apple" / "3.png"))} <= {
        "apple",
        "banana",
        "cherry",
    }

    # the same command again: nothing is trained again, and the result is the same
    before = (out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    caplog.set_level(logging.INFO)
    run_script(train.main)
    assert caplog.text.count("after 2 of 2 steps") == 3
    assert (out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert json.loads((out / "report.json").read_text())["rows"] == report


PUSHING = ["--push_to_hub", "--hub_model_id", "fruit", "--hub_license", "mit", "--checkpointing_steps", "1"]


def push(hub, script, *flags, cwd, token="hf_secret"):
    """Runs a script, whose folders the Hub then has."""
    return forked.run(
        [sys.executable, "-m", f"hf_guided.{script}", *flags],
        cwd=cwd,
        env={**hub.environment(cwd / "home", token), "ACCELERATE_USE_CPU": "true"},
    )


@pytest.fixture
def hub():
    with HubServer({"hf_secret": User("me"), "hf_other": User("you")}) as server:
        yield server


def test_pushes_at_checkpoints_and_at_the_end(photos, tmp_path, hub):
    flags = [*TINY_RUN, "--train_data_dir", str(photos), "--resolution", "8", "--output_dir", "out", *PUSHING]
    hub.delay("POST", "/api/models/.*/preupload/.*", 1.5)  # longer than a step, on a busy machine too
    result = push(hub, "training.train_diffusion", *flags, "--max_train_steps", "12", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Pushed to" in result.stderr
    assert "hf_secret" not in result.stderr + result.stdout
    last, *before, first = hub.repos["me/fruit"].history()
    assert last.message == "Upload with hf-guided"
    assert first.message == "initial commit"
    steps = [int(commit.message.removeprefix("Training, step ").removesuffix(" of 12")) for commit in before]
    assert 1 <= len(steps) < 11  # those that came while another was under way were left out
    assert steps == sorted(steps, reverse=True)
    for commit in (last, *before):  # each is whole, and says how far it is
        assert {
            "model_index.json",
            "unet/diffusion_pytorch_model.safetensors",
            "scheduler/scheduler_config.json",
            "README.md",
        } <= set(commit.files)
        assert not any("checkpoint" in name for name in commit.files)
        assert b"license: mit" in commit.files["README.md"]
        assert b'from_pretrained("me/fruit")' in commit.files["README.md"]
    weights = [commit.files["unet/diffusion_pytorch_model.safetensors"] for commit in (last, *before)]
    assert len(set(weights)) == len(weights)
    assert f"{steps[0]} of 12 steps of 4 images so far" in before[0].files["README.md"].decode()
    assert re.search(r"\| Steps \| 12 steps of 4 images, in \d+ seconds? \|", last.files["README.md"].decode())
    assert b"![Samples, one row per class](grid.png)" in last.files["README.md"]
    assert last.files["grid.png"].startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "diffusion" / "snapshot").exists()
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()


def test_another_family_is_pushed_too(photos, tmp_path, hub):
    flags = ["--train_data_dir", str(photos), "--resolution", "8", "--output_dir", "out", *PUSHING]
    flags += ["--train_batch_size", "4", "--max_train_steps", "2", "--num_levels", "1", "--num_blocks", "1"]
    result = push(hub, "training.train_baseline", "--family", "flow", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    files = hub.repos["me/fruit"].head().files
    assert {"model_index.json", "flow/diffusion_pytorch_model.safetensors", "grid.png"} <= set(files)
    assert b'FlowPipeline.from_pretrained("me/fruit")' in files["README.md"]
    assert b"Largest error of an image taken to latents and back" in files["README.md"]


def test_a_push_that_fails_does_not_stop_the_training(photos, tmp_path, hub):
    flags = [*TINY_RUN, "--train_data_dir", str(photos), "--resolution", "8", "--output_dir", "out", *PUSHING]
    hub.fail("POST", "/api/models/me/fruit/commit/main", 403, times=100)
    result = push(hub, "training.train_classifier", *flags, "--max_train_steps", "4", cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "The push of the newest snapshot failed: This token has no write access to me/fruit" in result.stderr
    error, hint, command = result.stderr.strip().splitlines()[-3:]
    assert error.startswith("error: This token has no write access to me/fruit")
    assert hint == "The training is done and saved. To push it:"
    assert len(hub.repos["me/fruit"].history()) == 1
    saved = (tmp_path / "out" / "classifier" / "model" / "model.safetensors").read_bytes()

    hub.heal()
    assert command.split()[:2] == ["hf-guided", "push"]
    finished = push(hub, "cli", *command.split()[1:], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert hub.repos["me/fruit"].head().files["model.safetensors"] == saved
    assert {"preprocessor_config.json", "inspection.json"} <= set(hub.repos["me/fruit"].head().files)


def test_who_may_not_push_hears_it_before_the_training(photos, tmp_path, hub):
    flags = [*TINY_RUN, "--train_data_dir", str(photos), "--resolution", "8", "--max_train_steps", "1"]
    flags += ["--push_to_hub", "--hub_model_id", "me/fruit"]
    result = push(hub, "training.train_diffusion", *flags, cwd=tmp_path, token="hf_other")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: This token has no write access to me/fruit")
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_mistakes_end_in_one_sentence(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for flags, message in [
        (["--train_data_dir", "nowhere"], "nowhere"),
        (["--train_data_dir", str(photos / "apple"), "--resolution", "8"], "apple"),
        (["--output_dir", str(tmp_path / "file" / "x")], "file"),
        (["--model_channels", "20"], "multiple of 32"),
    ]:
        monkeypatch.setattr(sys, "argv", ["train_diffusion.py", *TINY_RUN, *flags])
        with pytest.raises(SystemExit, match=r"\Aerror: ") as stopped:
            run_script(train_diffusion.main)
        assert message in str(stopped.value)
        assert "\n" not in str(stopped.value)


def test_a_classifier_learns_its_classes_at_every_noise_level(photos, tmp_path):
    argv = [*TINY_RUN, "--train_data_dir", str(photos), "--resolution", "8", "--output_dir", str(tmp_path)]
    argv += ["--max_train_steps", "60", "--learning_rate", "3e-3", "--ema_decay", "0.9", "--train_batch_size", "16"]
    data_args, stages = parse_arguments({"classifier": ClassifierArguments}, argv)
    folder = train_classifier.train_classifier(data_args, stages["classifier"])
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    assert classifier.config.id2label == {0: "apple", 1: "banana", 2: "cherry"}
    assert classifier.config.beta_schedule == stages["classifier"].beta_schedule
    classify = pipeline("image-classification", model=str(folder))
    random = np.random.default_rng(1)
    for label, name in enumerate(["apple", "banana", "cherry"]):
        pixels = random.integers(0, 120, (12, 12, 3), dtype=np.uint8)
        pixels[..., label] += 120
        assert classify(Image.fromarray(pixels))[0]["label"] == name


def test_crops_for_one_classifier_are_for_it_alone():
    images = load_labelled_images(DataArguments(dataset_name="digits"), seed=0)
    plain, cropped = (ClassifierTask(ClassifierArguments(augment=augment), images) for augment in (False, True))

    def differing(task, index):
        return not torch.equal(task.images[index, 0]["pixel_values"], images[0][index, 0]["pixel_values"])

    assert not any(differing(plain, index) for index in range(20))
    assert sum(differing(cropped, index) for index in range(20)) > 10
    assert cropped.held_out is images[1]
    assert cropped.images.digest == images[0].digest


def test_a_folder_with_odd_names(photos, tmp_path, caplog):
    root = tmp_path / os.fsdecode(b"photos\xe9\n[1]")
    for name in ("train", "__x", os.fsdecode(b"caf\xe9")):
        shutil.copytree(photos / "apple", root / name / "2023")
    (root / "train" / "x.heic").write_bytes(b"")
    argv = [*TINY_RUN, "--train_data_dir", str(root), "--resolution", "8", "--output_dir", str(tmp_path / "out")]
    argv += ["--lr_scheduler", "constant"]
    for steps in ("1", "2"):  # and resumes
        data_args, stages = parse_arguments(
            {"classifier": ClassifierArguments}, [*argv, "--max_train_steps", steps, "--report_to", "tensorboard"]
        )
        with caplog.at_level("INFO"):
            folder = train_classifier.train_classifier(data_args, stages["classifier"])
    assert "  classes: 3, with 18 to 18 images each: __x, caf\\xe9, train\n" in caplog.text
    assert "supported format (1; .heic 1): train/x.heic\n" in caplog.text
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label == {
        0: "__x",
        1: "caf\\xe9",
        2: "train",
    }
    assert "photos" in (folder / "README.md").read_text()


@pytest.mark.parametrize("script", [train, train_classifier, train_diffusion, train_upscaler])
def test_help_tells_how_to_launch(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit, match=r"\A0\Z"):
        run_script(script.main)
    said = capsys.readouterr().out
    assert "accelerate launch" in said
    assert "--train_data_dir" in said


def test_an_unconditional_model_of_pictures_without_labels(photos, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.png"))[:12]):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
    argv = [*TINY_RUN, "--train_data_dir", str(folder), "--resolution", "8", "--output_dir", str(tmp_path / "out")]
    argv += ["--no_class_conditional", "--max_train_steps", "2", "--preview_steps", "1", "--num_inference_steps", "2"]
    data_args, stages = parse_arguments({"diffusion": DiffusionArguments}, argv)
    finished = train_diffusion.train_diffusion(data_args, stages["diffusion"])
    Image.open(tmp_path / "out" / "diffusion" / "preview-000002.png").verify()
    pipe = ClassifierGuidedPipeline.from_pretrained(finished)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.num_classes is None
    assert pipe.config.sampling_defaults == {"num_inference_steps": 2}
    assert pipe.scheduler.config.solver_order == 2
    assert len(pipe(num_images_per_label=3).images) == 3


def test_training_that_waits_for_its_images_says_so_once(photos, tmp_path, caplog):
    large = tmp_path / "large"
    for name in ("apple", "banana"):
        (large / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (2500, 2500, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(large / name / f"{i}.jpg")
    flags = ["--resolution", "8", "--max_train_steps", "4", "--logging_steps", "2", "--held_out_fraction", "0"]
    for data, times in ((photos, 0), (large, 1)):
        folders = ["--train_data_dir", str(data), "--output_dir", str(tmp_path / f"{data.name}-out")]
        argv = [*TINY_RUN, *folders, *flags, "--dataloader_num_workers", "0"]
        data_args, stages = parse_arguments({"diffusion": DiffusionArguments}, argv)
        caplog.clear()
        train_diffusion.train_diffusion(data_args, stages["diffusion"])
        assert caplog.text.count("% of the time is spent loading images: raise --dataloader_num") == times


@pytest.mark.parametrize(("capability", "times"), [("AVX2", 1), ("AVX512", 0)])
def test_a_processor_without_bfloat16_says_so(photos, tmp_path, caplog, monkeypatch, capability, times):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    argv = [*TINY_RUN, "--train_data_dir", str(photos), "--resolution", "8", "--max_train_steps", "1"]
    argv += ["--mixed_precision", "bf16", "--output_dir", str(tmp_path / "out"), "--noisy", "false"]
    data_args, stages = parse_arguments({"classifier": ClassifierArguments}, argv)
    train_classifier.train_classifier(data_args, stages["classifier"])
    assert caplog.text.count("leave out --mixed_precision bf16") == times


def test_held_out_loss_is_the_same_every_time_and_falls(photos, tmp_path):
    """The moving average is lent for the measurement, and given back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def held_out(folder: Path, *flags: str) -> list[float]:
        argv = [*TINY_MODEL, "--train_batch_size", "16", "--train_data_dir", str(photos), "--resolution", "8"]
        argv += [
            "--output_dir",
            str(folder),
            "--max_train_steps",
            "40",
            "--learning_rate",
            "3e-3",
            "--ema_decay",
            "0.8",
        ]
        data_args, stages = parse_arguments({"classifier": ClassifierArguments}, [*argv, *flags])
        train_classifier.train_classifier(data_args, stages["classifier"])
        values = []
        for events in (folder / "classifier" / "logs").rglob("*tfevents*"):
            accumulator = EventAccumulator(str(events)).Reload()
            if "held_out/loss" in accumulator.Tags()["scalars"]:
                values += [event.value for event in accumulator.Scalars("held_out/loss")]
        return values

    every_ten = held_out(tmp_path / "ten", "--validation_steps", "10")
    assert len(every_ten) == 4
    assert every_ten[-1] < every_ten[0]
    assert held_out(tmp_path / "twenty", "--validation_steps", "20") == every_ten[1::2]
