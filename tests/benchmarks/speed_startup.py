"""Seconds from the start of a process until there is something: an import, the command line, a pipeline, an image.

    OMP_NUM_THREADS=1 python tests/benchmarks/speed_startup.py --guided_diffusion ../guided-diffusion

Every row is a fresh process of this interpreter, all of them in turn, round after round, the files in the system's
cache. `import torch` is the floor that nothing built on it can go below: "ratio" is to it, round by round. The pipeline
is made first, of the benchmark's UNet and classifier, and beside it diffusers' of a UNet of equal size. The published
code keeps no pipelines: its row only imports. Prints Markdown and writes "startup" to the JSON of the benchmarks.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
import speed
from diffusers import DDPMPipeline, DDPMScheduler

from hf_guided import ADMForImageClassification, ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline
from hf_guided.conversion.openai import make_classifier, make_unet

FLOOR = "`import torch`"
OURS = """
from hf_guided import ClassifierGuidedPipeline
pipe = ClassifierGuidedPipeline.from_pretrained({folder!r})
"""
THEIRS = """
from diffusers import DDPMPipeline
pipe = DDPMPipeline.from_pretrained({folder!r})
"""


def save_pipelines(folder: Path) -> dict[str, str]:
    """Saves our pipeline and diffusers', and returns where.

    The UNets are of equal size; ours has a classifier beside it, 3.3 million parameters to the UNet's 8.0.
    """
    unet = peers.randomise(ADMUNet2DModel.from_config(make_unet(peers.UNET).config))
    classifier = peers.randomise(ADMForImageClassification(make_classifier(peers.CLASSIFIER).config))
    pipelines = {
        "ours": ClassifierGuidedPipeline(unet, ADMScheduler(), classifier),
        "theirs": DDPMPipeline(
            peers.randomise(peers.diffusers_unet({**peers.UNET, "out_channels": 3, "num_classes": None})),
            DDPMScheduler(),
        ),
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
    return {name: str(folder / name) for name in pipelines}


def commands(folders: dict[str, str], steps: int, published: Path | None) -> dict[str, list[str]]:
    """What each process is told to run, by the name of the row."""
    ours, theirs = OURS.format(folder=folders["ours"]), THEIRS.format(folder=folders["theirs"])
    codes = {
        "Python alone": "pass",
        FLOOR: "import torch",
        "`import hf_guided`": "import hf_guided",
        "`from hf_guided import ClassifierGuidedPipeline`": "from hf_guided import ClassifierGuidedPipeline",
        "`import diffusers`": "import diffusers",
        "`from diffusers import DDPMPipeline`": "from diffusers import DDPMPipeline",
        "our pipeline loaded": ours,
        "diffusers' pipeline loaded": theirs,
        f"our first image, {steps} guided steps": f"{ours}pipe(0, num_inference_steps={steps}).images",
        f"diffusers' first image, {steps} steps": f"{theirs}pipe(num_inference_steps={steps}).images",
    }
    if published is not None:
        codes["`import guided_diffusion`, its unet and script_util"] = (
            f"import sys; sys.path.insert(0, {str(published)!r}); "
            "import guided_diffusion; from guided_diffusion import script_util, unet"
        )
    rows = {name: [sys.executable, "-c", code] for name, code in codes.items()}
    return rows | {"`hf-guided --help`": [str(Path(sys.executable).with_name("hf-guided")), "--help"]}


def measured(rows: dict[str, list[str]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each process, and its ratio to the floor."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # a network would be measured with it

    def run(command: list[str]) -> Any:
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")

    contenders = {name: lambda command=command: run(command) for name, command in rows.items()}
    return speed.summary(speed.seconds_in_turn(contenders, rounds, warmup=1), FLOOR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guided_diffusion", type=Path, metavar="PATH", help="folder of the published code")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="processes of each row (default: 5)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps of the first images (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.json"), metavar="JSON")
    args = parser.parse_args()

    published = args.guided_diffusion
    if published is not None:
        published = published.resolve()
        peers.guided_diffusion(published)  # says what is wrong with the folder, if something is
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(commands(save_pipelines(Path(folder)), args.steps, published), args.rounds)
    print(speed.markdown(rows, {"seconds": speed.milliseconds, "fastest": speed.milliseconds, "ratio": speed.ratio}))
    speed.save({"startup": rows}, args.output)


if __name__ == "__main__":
    main()
