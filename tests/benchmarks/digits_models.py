"""What the digits benchmarks share: models of the main job, trained where they are missing, and its judge's verdict."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification

from hf_guided import ADMUNet2DModel, ClassifierGuidedPipeline
from hf_guided.evaluation.evaluate import measure
from hf_guided.evaluation.features.extractors import ModelFeatures
from hf_guided.evaluation.features.feature_sets import collect_features
from hf_guided.evaluation.features.image_sets import ArrayImages, open_images
from hf_guided.files import write_json
from hf_guided.generation.sampling import to_8_bit


def launch(module: str, *flags: str) -> None:
    """Runs a training script."""
    started = time.monotonic()
    command = [sys.executable, "-m", "accelerate.commands.launch", "-m", f"hf_guided.training.{module}", *flags]
    subprocess.run(command, check=True)
    print(f"{module} {' '.join(flags)}: {time.monotonic() - started:.0f} s")


def main_job(output_dir: Path, seed: int) -> Path:
    """The folder of a finished main job."""
    folder = output_dir / f"seed-{seed}"
    if not (folder / "pipeline" / "README.md").is_file():
        launch("train", "--seed", str(seed), "--output_dir", str(folder))
    return folder


def weak_unet(folder: Path, seed: int) -> ADMUNet2DModel:
    """The UNet of a quarter of the training, for autoguidance."""
    finished = folder / "weak" / "diffusion" / "pipeline"
    if not finished.is_dir():
        flags = ("--recipe", "digits", "--max_train_steps", "250", "--seed", str(seed))
        launch("train_diffusion", *flags, "--output_dir", str(folder / "weak"))
    return ADMUNet2DModel.from_pretrained(finished, subfolder="unet")


def clean_classifier(folder: Path, seed: int) -> Any:
    """A classifier of clean images that is not the judge: the classifier's recipe and another seed."""
    finished = folder / "clean" / "classifier" / "model"
    if not finished.is_dir():
        flags = ("--recipe", "digits", "--no_noisy", "--seed", str(100 + seed))
        launch("train_classifier", *flags, "--output_dir", str(folder / "clean"))
    return AutoModelForImageClassification.from_pretrained(finished)


class Judge:
    """Samples with a pipeline of a main job and says what its independent network finds.

    Args:
        folder (`Path`): Of a finished main job.
        seed (`int`): The main job's.
        num_images (`int`, defaults to 500): Samples judged at each setting, all classes equally often.
    """

    def __init__(self, folder: Path, seed: int, num_images: int = 500):
        self.pipeline = ClassifierGuidedPipeline.from_pretrained(folder / "pipeline")
        self.pipeline.set_progress_bar_config(disable=True)
        network = AutoModelForImageClassification.from_pretrained(folder / "judge" / "model")
        self.features = ModelFeatures(network, "judge")
        self.seed = seed
        self.labels = torch.arange(num_images) % len(self.pipeline.id2label)
        self.reference = collect_features(open_images("digits:train"), self.features)

    def __call__(self, sampling_seed: int | None = None, **arguments: Any) -> dict[str, float]:
        """Accuracy, FID, precision and recall in the judge's features, and the seconds that the samples took."""
        generator = torch.Generator().manual_seed(self.seed if sampling_seed is None else sampling_seed)
        started = time.perf_counter()
        result = self.pipeline(self.labels, generator=generator, output_type="latent", return_cost=True, **arguments)
        seconds = time.perf_counter() - started
        samples = ArrayImages(to_8_bit(result.images).permute(0, 2, 3, 1).numpy())
        metrics = measure(collect_features(samples, self.features), self.reference, self.labels.numpy())
        verdict = {name: metrics[f"{name}/judge"] for name in ("accuracy", "fid", "precision", "recall")}
        return {**verdict, "seconds": seconds, **{f"{name}_calls": n for name, n in result.cost.calls.items()}}

    def pictures(self, **arguments: Any) -> list[Any]:
        """One sample of each class twice over, from the same noise for all arguments."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.pipeline(self.labels[:20], generator=generator, **arguments).images


class Measurements:
    """Rows by key in a JSON file: each is measured once, written at once, and kept."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The row of a key, measured if there is none."""
        if key not in self.rows:
            self.rows[key] = measure()
            print(key, self.rows[key], flush=True)
            write_json(self.rows, self.path)
        return self.rows[key]


def spread(values: Sequence[float], style: str) -> str:
    """The mean, in brackets the lowest and the highest."""
    return f"{sum(values) / len(values):{style}} ({min(values):{style}}–{max(values):{style}})"
