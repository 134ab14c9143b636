"""Steps against FID: how few UNet calls reach the quality of 250 guided DDPM steps.

    python tests/benchmarks/guidance_solvers.py --output_dir outputs/seeds

Samples 500 guided digits (scale 3, the classifier alone guides) with each solver and number of steps, with the models
of three main jobs (trained first where they are missing), and judges them by the network that never guides. Prints
Markdown, and writes `solvers.json` and the curve `solvers.png`. Settings that are in the JSON already are kept.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from digits_models import Judge, Measurements, main_job, spread

from hf_guided import ADMScheduler

STEPS = (5, 6, 8, 10, 15, 20, 25, 50, 250)


def ours(**options: Any) -> Callable[[ADMScheduler], Any]:
    """An `ADMScheduler` of the same diffusion."""
    return lambda scheduler: ADMScheduler.from_config(scheduler.config, **options)


def theirs(name: str, **options: Any) -> Callable[[ADMScheduler], Any]:
    """A scheduler of diffusers of the same diffusion."""
    return lambda scheduler: getattr(diffusers, name).from_config(scheduler.config, **options)


PUBLISHED_DDIM = "DDIM, as published"
SOLVERS = {
    "DDPM, as published": ours(solver_order=1),
    PUBLISHED_DDIM: ours(algorithm_type="ddim", solver_order=1),
    "SDE-DPM-Solver++(2M)": ours(solver_order=2),
    "DPM-Solver++(2M)": ours(algorithm_type="ddim", solver_order=2),
    "DDIM of diffusers": theirs("DDIMScheduler", timestep_spacing="trailing"),
    "UniPC": theirs("UniPCMultistepScheduler"),
    "DEIS": theirs("DEISMultistepScheduler"),
    "Euler": theirs("EulerDiscreteScheduler"),
    "Euler ancestral": theirs("EulerAncestralDiscreteScheduler"),
}
AS_FAR_AS_50 = {"DDIM of diffusers", "UniPC", "DEIS", "Euler"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    measurements = Measurements(args.output_dir / "solvers.json")
    curves: dict[str, dict[int, list[dict[str, float]]]] = {name: {} for name in SOLVERS}
    for seed in args.seeds:
        judge = Judge(main_job(args.output_dir, seed), seed)
        process = judge.pipeline.scheduler
        for name, make in SOLVERS.items():
            judge.pipeline.scheduler = make(process)
            for steps in STEPS:
                if steps > 50 and name in AS_FAR_AS_50:
                    continue
                # As OpenAI's scripts space DDIM. From timestep 999, where "25" begins, it explodes on this schedule: it
                # clips the clean image before the gradient moves it, and there is next to no signal.
                spaced = {"respacing": f"ddim{steps}"} if name == PUBLISHED_DDIM else {"num_inference_steps": steps}
                measure = partial(judge, **spaced, guidance_scale=3.0, condition_unet=False)
                row = measurements.get(f"{name}|{steps}|{seed}", measure)
                curves[name].setdefault(steps, []).append(row)

    for metric, style in {"fid": ".2f", "recall": ".2f"}.items():
        print(f"\n| {metric} | {' | '.join(map(str, STEPS))} |\n|{' --- |' * (len(STEPS) + 1)}")
        for name, curve in curves.items():
            cells = [spread([row[metric] for row in curve[steps]], style) if steps in curve else "" for steps in STEPS]
            print(f"| {name} | {' | '.join(cells)} |")
    draw(curves, args.output_dir / "solvers.png")


def draw(curves: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> None:
    """FID against UNet calls: the mean of the seeds, and their spread where two solvers are compared."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    reference = [row["fid"] for row in curves["DDPM, as published"][250]]
    axes.axhspan(min(reference), max(reference), color="#0969da", alpha=0.12, label="DDPM, 250 steps: the three seeds")
    colors = ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#57606a", "#9a6700", "#0a7ea4", "#bf3989"]
    for color, (name, curve) in zip(colors, curves.items(), strict=True):
        steps = sorted(curve)
        means = [sum(row["fid"] for row in curve[n]) / len(curve[n]) for n in steps]
        bold = name.startswith("SDE")
        axes.plot(steps, means, marker="o", color=color, label=name, linewidth=2.6 if bold else 1.2, markersize=4)
        if bold:
            low, high = ([edge(row["fid"] for row in curve[n]) for n in steps] for edge in (min, max))
            axes.fill_between(steps, low, high, color=color, alpha=0.15)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.minorticks_off()
    axes.set_xlabel("UNet calls")
    axes.set_title("FID of guided digits (lower is better)", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    temporary = Path(f"{path}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
