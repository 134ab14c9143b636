"""What a budget buys: the main job at several times, widths and seeds, and whether the time is kept.

    python tests/benchmarks/budgets.py --data mnist --budgets 10m 30m 60m --seeds 0 1 2 --output budgets
    python tests/benchmarks/budgets.py --data photos --budgets 10m 20m --widths 32 64 --output budgets-photos

`photos` is a folder, such as that of colour_set.py. `--widths` are tried instead of the planned one, and `--flags` are
passed to each training: `--flags "--diffusion_prediction_type epsilon"`. Trainings that have ended are not repeated.
All models are measured in the features of one evaluation classifier, of the longest budget and the first seed. Samples
and held-out images are as many; brightness is the mean of the pixels in [-1, 1], with its deviation over images.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from hf_guided import ClassifierGuidedPipeline
from hf_guided.data import DataArguments, load_labelled_images, source_argument
from hf_guided.evaluation.evaluate import measure
from hf_guided.evaluation.features.extractors import ModelFeatures
from hf_guided.evaluation.features.feature_sets import collect_features
from hf_guided.evaluation.features.image_sets import ArrayImages, LoadedImages, SampledImages
from hf_guided.evaluation.memorisation import memorisation
from hf_guided.files import write_json
from hf_guided.training.timing import parse_duration

METRICS = ("accuracy", "fid", "precision", "recall")


def train(data: str, budget: str, width: int | None, seed: int, flags: str, folder: Path) -> None:
    """The main job, unless it has ended; `took.json` says how long it took."""
    if (folder / "took.json").is_file():
        return
    command = [sys.executable, "-m", "hf_guided", "train", data, "--budget", budget, "--seed", str(seed)]
    command += ["--output_dir", str(folder), "--report_to", "none", *shlex.split(flags)]
    command += [] if width is None else ["--diffusion_model_channels", str(width)]
    started = time.monotonic()
    subprocess.run(command, check=True)
    write_json({"seconds": time.monotonic() - started}, folder / "took.json")


def brightness(pixels: np.ndarray) -> str:
    means = (pixels.astype(np.float64) / 127.5 - 1).reshape(len(pixels), -1).mean(axis=1)
    return f"{means.mean():.2f} ± {means.std():.2f}"


def measured(folder: Path, train_features, held_features, extractor, num_images: int) -> dict:
    """The metrics of samples at the scale that the training saved."""
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(num_images) % len(pipeline.id2label)
    samples = SampledImages(pipeline, labels, seed=1)
    batches = list(samples.batches(samples.split(100)))
    pixels = torch.cat(batches).permute(0, 2, 3, 1).numpy()
    features = collect_features(ArrayImages(pixels, labels.numpy()), extractor, batch_size=250)
    found = measure(features, train_features, labels.numpy())
    report = json.loads((folder / "report.json").read_text())["rows"]
    saved = pipeline.config.sampling_defaults
    return {
        **{name: found[f"{name}/judge"] for name in METRICS},
        "copied": memorisation(features, train_features, held_features).copied_share,
        "brightness": brightness(pixels),
        "scale": saved["guidance_scale"] if "guidance_scale" in saved else saved["guidance"][0]["scale"],
        "evaluation classifier": report[0]["accuracy/judge"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--budgets", nargs="+", default=["10m", "30m", "60m"])
    parser.add_argument("--widths", nargs="+", type=int, default=[None])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--flags", default="")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--output", default="budgets")
    args = parser.parse_args()
    runs = {}
    for seed in args.seeds:
        for budget in args.budgets:
            for width in args.widths:
                name = f"{budget}-{'planned' if width is None else width}-{seed}"
                runs[name] = budget, Path(args.output) / name
                train(args.data, budget, width, seed, args.flags, runs[name][1])

    longest = max(runs, key=lambda name: parse_duration(runs[name][0]))
    judge = AutoModelForImageClassification.from_pretrained(runs[longest][1] / "judge" / "model")
    extractor = ModelFeatures(judge, "judge")
    plan = json.loads((runs[longest][1] / "plan.json").read_text())
    arguments = {**source_argument(args.data), "resolution": plan["recipe"]["data"]["resolution"]}
    images = load_labelled_images(DataArguments(**arguments), seed=0)
    held_out = LoadedImages(images[1].plain(args.num_images))
    train_features = collect_features(LoadedImages(images[0].plain(10_000)), extractor, batch_size=250)
    held_features = collect_features(held_out, extractor, batch_size=250)
    real = measure(held_features, train_features, held_out.labels)
    pixels = torch.stack([held_out[i] for i in range(len(held_out))]).permute(0, 2, 3, 1).numpy()
    rows = {"held-out images": {**{name: real[f"{name}/judge"] for name in METRICS}, "brightness": brightness(pixels)}}
    for name, (budget, folder) in runs.items():
        rows[name] = measured(folder, train_features, held_features, extractor, len(held_out))
        took = json.loads((folder / "took.json").read_text())["seconds"]
        rows[name]["time"] = took / parse_duration(budget)
        width = json.loads((folder / "plan.json").read_text())["recipe"]["diffusion"]["model_channels"]
        rows[name]["width"] = width
    write_json(rows, Path(args.output) / "budgets.json")
    columns = ["width", *METRICS, "copied", "brightness", "scale", "evaluation classifier", "time"]
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        print(f"| {name} | {' | '.join(f'{c:.3g}' if isinstance(c, float) else str(c) for c in cells)} |")


if __name__ == "__main__":
    main()
