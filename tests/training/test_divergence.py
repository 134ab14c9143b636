"""A training that diverges ends in one sentence, with its checkpoints kept; rerun, in the same one."""

import importlib
import sys

import pytest
import torch
from launching import TINY_RUN

from hf_guided.training.arguments import run_script
from hf_guided.training.checkpoints import list_checkpoints
from hf_guided.training.divergence import DivergedError, check_loss, naming_divergence
from hf_guided.training.saving import finish

BASELINE = ["--channel_mult", "1", "--model_channels", "8", *TINY_RUN[TINY_RUN.index("--train_batch_size") :]]
RUNS = {
    "diffusion": ("train_diffusion", [*TINY_RUN, "--num_inference_steps", "2"]),
    "upscaler": ("train_upscaler", [*TINY_RUN, "--num_inference_steps", "2", "--low_resolution", "4"]),
    "classifier": ("train_classifier", TINY_RUN),
    "vae": ("train_baseline", ["--family", "vae", "--num_res_blocks", "1", *BASELINE]),
    "flow": (
        "train_baseline",
        ["--family", "flow", "--num_levels", "1", "--num_blocks", "2", "--hidden_channels", "8", *BASELINE[4:]],
    ),
}


def ending(name, argv, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    with pytest.raises(SystemExit, match=r"^error: The training has diverged: [^\n]* lower --learning_rate") as stopped:
        run_script(importlib.import_module(f"hf_guided.training.{name}").main)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize("steps", [3, 6])
@pytest.mark.parametrize("stage", RUNS)
def test_a_learning_rate_far_too_high(stage, steps, photos, tmp_path, monkeypatch):
    name, flags = RUNS[stage]
    argv = [*flags, "--train_data_dir", str(photos), "--resolution", "8", "--output_dir", str(tmp_path)]
    argv += ["--learning_rate", "1e4", "--max_train_steps", str(steps), "--logging_steps", "1"]
    argv += ["--checkpointing_steps", "1", "--lr_warmup_steps", "0"]
    first = ending(name, argv, monkeypatch)
    kept = [path.name for path in list_checkpoints(tmp_path / stage)]
    assert kept
    assert ending(name, argv, monkeypatch) == first
    assert [path.name for path in list_checkpoints(tmp_path / stage)] == kept
    assert not (tmp_path / stage / "pipeline").exists()
    assert not list((tmp_path / stage).glob(".*.partial"))


@pytest.mark.parametrize("rate", ["1e4", "1e10"])
def test_a_gan_ends_either_way(rate, photos, tmp_path, monkeypatch):
    """Its losses are bounded by the discriminator's normalisation, so that it may end with a useless model."""
    argv = ["--family", "gan", "--discriminator_channels", "8", *BASELINE, "--train_data_dir", str(photos)]
    argv += ["--resolution", "8", "--output_dir", str(tmp_path), "--max_train_steps", "3", "--translation", "0"]
    argv += ["--lr_warmup_steps", "0", "--learning_rate", rate, "--discriminator_learning_rate", rate]
    monkeypatch.setattr(sys, "argv", ["train_baseline.py", *argv])
    ends = ["ended"]
    try:
        run_script(importlib.import_module("hf_guided.training.train_baseline").main)
    except SystemExit as stopped:
        ends.append(str(stopped.code))
    assert ends[-1] == "ended" or ends[-1].startswith("error: The training has diverged: ")


def test_finite_weights_whose_images_are_not_finite(tiny_unet, tmp_path):
    """As checkpoints of an earlier version may hold."""
    from hf_guided import ADMScheduler, ClassifierGuidedPipeline

    unet = tiny_unet(in_channels=3, out_channels=6)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1e20)
    pipeline = ClassifierGuidedPipeline(unet, ADMScheduler())

    def save(folder: str) -> None:
        pipeline.save_pretrained(folder)
        pipeline([0], num_inference_steps=2)

    with pytest.raises(DivergedError, match="the model's images are not finite"):
        finish(save, tmp_path / "pipeline")
    assert not list(tmp_path.iterdir())


def test_what_counts_as_diverged():
    history = [{"step": 1, "loss": 2.0}]
    check_loss(1e6, 5, history)
    check_loss(2.0, 1, [])
    check_loss(5e8, 1, [])  # as the weight of a term may make it
    for loss, wrong in [(3e6, history), (float("nan"), history), (float("inf"), []), (-3e6, history)]:
        with pytest.raises(DivergedError, match="at step 5"):
            check_loss(loss, 5, wrong)
    with pytest.raises(RuntimeError, match="another"), naming_divergence():
        raise RuntimeError("another")
