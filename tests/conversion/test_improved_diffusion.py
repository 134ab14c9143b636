"""improved-diffusion's models: its defaults differ, 4,000 rescaled timesteps among them."""

import pytest
import torch

from hf_guided import ClassifierGuidedPipeline


def test_samples_like_improved_diffusion(reference, convert, tmp_path):
    """Weights, flags as its README gives them, and samples of that code."""
    stored = reference("improved_diffusion")
    torch.save(stored.weights, tmp_path / "ema.pt")
    convert("--checkpoint", tmp_path / "ema.pt", "--flags", stored.config["flags"], "--output", tmp_path / "model")
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "model")
    assert pipe.scheduler.config.rescale_timesteps
    samples, timesteps = [], []
    pipe(
        respacing=stored.config["respacing"],
        latents=stored.tensors["initial_noise"],
        variance_noise=stored.tensors["step_noise"],
        callback_on_step_end=lambda pipe, i, t, tensors: (
            samples.append(tensors["latents"]) or timesteps.append(int(t)) or {}
        ),
    )
    assert timesteps == stored.tensors["timesteps"].tolist()
    for step, expected in zip((0, 2, 5), stored.tensors["samples"], strict=True):
        assert (samples[step] - expected).abs().max() <= 1e-4 * expected.abs().max()

    told_otherwise = f"{stored.config['flags']} --rescale_timesteps False"
    convert("--checkpoint", tmp_path / "ema.pt", "--flags", told_otherwise, "--output", tmp_path / "other")
    other = ClassifierGuidedPipeline.from_pretrained(tmp_path / "other")
    result = other(
        respacing=stored.config["respacing"],
        latents=stored.tensors["initial_noise"],
        variance_noise=stored.tensors["step_noise"],
        output_type="latent",
    ).images
    assert (result - stored.tensors["samples"][-1]).abs().max() > 1e-2


@pytest.mark.parametrize("forgotten", ["diffusion_steps", "noise_schedule", "image_size"])
def test_half_of_its_flags_are_not_enough(reference, refused, tmp_path, forgotten):
    stored = reference("improved_diffusion")
    torch.save(stored.weights, tmp_path / "ema.pt")
    words = stored.config["flags"].split()
    at = words.index(f"--{forgotten}")
    message = refused(
        "--checkpoint",
        tmp_path / "ema.pt",
        "--flags",
        " ".join(words[:at] + words[at + 2 :]),
        "--output",
        tmp_path / "x",
    )
    assert f"--{forgotten} is missing" in message
    assert not (tmp_path / "x").exists()
