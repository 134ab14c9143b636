"""What the tests share: the published code's numbers, and tiny models."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests already run in two processes

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from hf_guided import ADMClassifierConfig, ADMForImageClassification, ADMUNet2DModel
from hf_guided.conversion import convert_openai_classifier, convert_openai_unet

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; what the tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

REFERENCE = Path(__file__).parent / "reference"


@dataclass(frozen=True)
class Reference:
    """Numbers of the published code, with the config and the weights that gave them."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]


def draw_weights(recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a reference model, drawn as its metadata says."""
    random = np.random.default_rng(recipe["seed"])
    digest = hashlib.sha256()
    weights = {}
    for name in sorted(recipe["shapes"]):
        shape = recipe["shapes"][name]
        weight = random.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            weight = weight * np.float32(0.7 / np.sqrt(np.prod(shape[1:])))
        else:
            weight = weight * np.float32(0.1) + np.float32(name.endswith("weight"))
        digest.update(weight.astype("<f4").tobytes())
        weights[name] = torch.from_numpy(weight)
    assert digest.hexdigest() == recipe["sha256"]
    return weights


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """Loads a file of tests/reference by its name."""

    def load(name: str) -> Reference:
        with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights = draw_weights(json.loads(metadata["weights"])) if "weights" in metadata else {}
        return Reference(json.loads(metadata["config"]), weights, tensors)

    return load


@pytest.fixture(scope="session")
def reference_json() -> Callable[[str], Any]:
    """Loads a JSON file of tests/reference by its name."""
    return lambda name: json.loads((REFERENCE / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def sampler_unet(reference) -> ADMUNet2DModel:
    """The class-conditional UNet (3x16x16, 5 classes) of the reference trajectories, losses and likelihoods."""
    stored = reference("sampler_unet")
    return convert_openai_unet(stored.weights, stored.config)


@pytest.fixture(scope="session")
def sampler_classifier(reference) -> ADMForImageClassification:
    """The classifier of the reference trajectories."""
    stored = reference("sampler_classifier")
    return convert_openai_classifier(stored.weights, stored.config)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every weight a random value, those that start at zero included, and sets evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 0.7 * (parameter[0].numel() if parameter.ndim > 1 else 50) ** -0.5
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = noise + (parameter.ndim == 1 and name.endswith("weight"))
    return model.eval()


@pytest.fixture(scope="session")
def tiny_unet() -> Callable[..., ADMUNet2DModel]:
    """Makes a UNet of random weights; by default of 3x16x16 images and 5 classes, with a learned variance."""

    def make(**arguments: Any) -> ADMUNet2DModel:
        defaults = {
            "sample_size": 16,
            "model_channels": 32,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (8,),
            "attention_head_dim": None if "num_heads" in arguments else 16,
            "num_class_embeds": 5,
        }
        return randomize(ADMUNet2DModel(**{**defaults, **arguments}))

    return make


@pytest.fixture(scope="session")
def tiny_classifier() -> Callable[..., ADMForImageClassification]:
    """Makes a classifier of random weights; by default of 3x16x16 images in 3 classes, with an attention pool."""

    def make(**arguments: Any) -> ADMForImageClassification:
        defaults = {
            "sample_size": 16,
            "model_channels": 32,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [8],
            "attention_head_dim": None if "num_heads" in arguments else 16,
            "num_labels": 3,
        }
        return randomize(ADMForImageClassification(ADMClassifierConfig(**{**defaults, **arguments})))

    return make


@pytest.fixture(scope="session")
def randn() -> Callable[..., torch.Tensor]:
    """Draws standard normal numbers that depend on the shape and the seed alone."""
    return lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Largest difference relative to the largest absolute value of the second tensor, in which nothing may be NaN."""

    def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
        assert actual.shape == expected.shape
        actual, expected = actual.detach().double(), expected.detach().double()
        assert expected.isfinite().all()
        assert actual.isfinite().all()
        return ((actual - expected).abs().max() / expected.abs().max()).item()

    return relative


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB, which can be mounted again with another size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk takes the rights of root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # torch leaves its files open


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """60 RGB pictures of three classes, of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for label, name in enumerate(["apple", "banana", "cherry"]):
        (folder / name).mkdir()
        for i in range(20):
            shape = (int(random.integers(9, 20)), int(random.integers(9, 20)), 3)
            pixels = random.integers(0, 120, shape, dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder
