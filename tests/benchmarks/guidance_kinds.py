"""What each kind of guidance buys on digits, and what it costs.

    python tests/benchmarks/guidance_kinds.py --output_dir outputs/seeds

Each kind at its best scale against none, with the models of three main jobs (trained first where they are missing) and
the pipeline's own solver and steps, 500 samples a seed. Scales are tuned for FID with other noise than the table's. Two
models are trained beside each main job's: a UNet of a quarter of the steps, for autoguidance, and a classifier of clean
images that is not the judge (it has no ReLU that a softplus could replace). The judge never guides. Prints Markdown;
writes `kinds.json`, whose settings are kept, and `kinds.png`, where each column is one noise and one class. Seconds are
those of an otherwise idle machine or they mean nothing.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from digits_models import Judge, Measurements, clean_classifier, main_job, spread, weak_unet

from hf_guided.generation.grids import labelled_grid, save_png
from hf_guided.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DenoisedClassifierGuidance,
    EntropyScaling,
    Guidance,
)

ALONE, CONDITIONAL = "the classifier alone guides", "the UNet is class-conditional"
Kinds = Callable[[float], Sequence[Guidance]]


# kind: (scales to tune over, what a scale makes)
ROWS: dict[str, dict[str, tuple[Sequence[float], Kinds]]] = {
    ALONE: {
        "none": ((0.0,), lambda scale: []),
        "classifier": ((1, 2, 3, 5, 10), lambda scale: [ClassifierGuidance(scale)]),
        "classifier, entropy scaled": (
            (0.5, 1, 2, 3),
            lambda scale: [ClassifierGuidance(scale, entropy_scaling=EntropyScaling(20.0))],
        ),
        "classifier, 0 to 700": ((3, 5, 10), lambda scale: [ClassifierGuidance(scale, interval=(0, 700))]),
        "classifier, 300 to 999": ((3, 5, 10), lambda scale: [ClassifierGuidance(scale, interval=(300, 999))]),
        "classifier, 550 to 999": ((3, 5, 10), lambda scale: [ClassifierGuidance(scale, interval=(550, 999))]),
        "classifier, 150 to 650": ((3, 5, 10, 20), lambda scale: [ClassifierGuidance(scale, interval=(150, 650))]),
        "classifier, every 2nd": ((3, 5, 10), lambda scale: [ClassifierGuidance(scale, every=2)]),
        "classifier, 2nd reused": ((2, 3, 5), lambda scale: [ClassifierGuidance(scale, every=2, reuse=True)]),
        "clean classifier": ((1, 3, 10, 30), lambda scale: [DenoisedClassifierGuidance(scale)]),
        "clean, through the UNet": (
            (1, 3, 10),
            lambda scale: [DenoisedClassifierGuidance(scale, through_unet=True, marginal_temperature=1.0, sine=0.0)],
        ),
        "classifier + clean classifier": (
            (1, 2, 3),
            lambda scale: [ClassifierGuidance(scale), DenoisedClassifierGuidance(scale)],
        ),
    },
    CONDITIONAL: {
        "none": ((0.0,), lambda scale: []),
        "classifier": ((0.1, 0.25, 0.5, 1, 2, 3), lambda scale: [ClassifierGuidance(scale)]),
        "classifier, entropy scaled": (
            (0.05, 0.1, 0.25, 0.5, 1),
            lambda scale: [ClassifierGuidance(scale, entropy_scaling=EntropyScaling(20.0))],
        ),
        "classifier, 550 to 999": ((0.5, 1, 2, 3), lambda scale: [ClassifierGuidance(scale, interval=(550, 999))]),
        "classifier, 150 to 650": ((0.25, 0.5, 1, 2), lambda scale: [ClassifierGuidance(scale, interval=(150, 650))]),
        "classifier, 2nd reused": (
            (0.1, 0.25, 0.5, 1),
            lambda scale: [ClassifierGuidance(scale, every=2, reuse=True)],
        ),
        "classifier, 3rd reused": (
            (0.1, 0.25, 0.5, 1),
            lambda scale: [ClassifierGuidance(scale, every=3, reuse=True)],
        ),
        "clean classifier": ((0.3, 1, 3, 10), lambda scale: [DenoisedClassifierGuidance(scale)]),
        "classifier-free": ((1.1, 1.25, 1.5, 2, 3), lambda scale: [ClassifierFreeGuidance(scale)]),
        "classifier-free, 0 to 700": (
            (1.25, 1.5, 2, 3),
            lambda scale: [ClassifierFreeGuidance(scale, interval=(0, 700))],
        ),
        "autoguidance": ((1.1, 1.25, 1.5, 2, 3), lambda scale: [AutoGuidance(scale)]),
        "classifier + autoguidance": (
            (0.5, 1, 2),
            lambda scale: [ClassifierGuidance(scale), AutoGuidance(1.25)],
        ),
        "classifier + classifier-free": (
            (0.25, 0.5, 1),
            lambda scale: [ClassifierGuidance(scale), ClassifierFreeGuidance(1.25)],
        ),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    measurements = Measurements(args.output_dir / "kinds.json")

    def measure(judge: Judge, section: str, name: str, scale: float, sampling_seed: int) -> dict[str, Any]:
        kinds = ROWS[section][name][1](scale)
        judged = partial(judge, sampling_seed, guidance=kinds, condition_unet=section == CONDITIONAL)
        return measurements.get(f"{section}|{name}|{scale}|{judge.seed}|{sampling_seed}", judged)

    judges = []
    for seed in args.seeds:
        folder = main_job(args.output_dir, seed)
        judge = Judge(folder, seed)
        judge.pipeline.register_modules(
            guide_unet=weak_unet(folder, seed), clean_classifier=clean_classifier(folder, seed)
        )
        judges.append(judge)

    pictures, names = [], []
    for section, rows in ROWS.items():
        print(f"\n{section[0].upper()}{section[1:]}:\n")
        print("| guidance | scale | accuracy | FID | precision | recall | UNet calls | classifier calls | seconds |")
        print("|" + " --- |" * 9)
        for name, (scales, _) in rows.items():
            fids = {
                scale: sum(measure(judge, section, name, scale, 1000)["fid"] for judge in judges) for scale in scales
            }
            best = min(fids, key=lambda scale: fids[scale])
            results = [measure(judge, section, name, best, judge.seed) for judge in judges]
            cells = ["" if name == "none" else f"{best:g}"]
            for metric, style in {"accuracy": ".3f", "fid": ".2f", "precision": ".3f", "recall": ".3f"}.items():
                cells.append(spread([row[metric] for row in results], style))
            unet_calls = results[0]["unet_calls"] + results[0].get("guide_unet_calls", 0)
            classifier_calls = results[0]["classifier_calls"] + results[0].get("clean_classifier_calls", 0)
            seconds = sorted(row["seconds"] for row in results)[len(results) // 2]
            cells += [str(unet_calls), str(classifier_calls), f"{seconds:.1f}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            pictures += judges[0].pictures(guidance=rows[name][1](best), condition_unet=section == CONDITIONAL)
            names.append(f"conditional: {name}" if section == CONDITIONAL else name)
    save_png(labelled_grid(pictures, names, cell_size=40), args.output_dir / "kinds.png")


if __name__ == "__main__":
    main()
