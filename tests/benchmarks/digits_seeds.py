"""The digits lesson with several seeds: what the README's table shows.

    python tests/benchmarks/digits_seeds.py --output_dir outputs/seeds

Runs the main job once a seed (those that are finished are kept) and prints the mean of each number, in brackets the
lowest and the highest, as Markdown.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

COLUMNS = {"accuracy": ".3f", "fid": ".3g", "precision": ".3f", "recall": ".3f"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for seed in args.seeds:
        folder = args.output_dir / f"seed-{seed}"
        if not (folder / "pipeline" / "README.md").is_file():
            started = time.monotonic()
            launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", "hf_guided.training.train"]
            subprocess.run([*launch, "--seed", str(seed), "--output_dir", str(folder)], check=True)
            print(f"seed {seed}: {time.monotonic() - started:.0f} s")
    reports = [
        json.loads((args.output_dir / f"seed-{seed}" / "report.json").read_text())["rows"] for seed in args.seeds
    ]
    print("|  | accuracy | FID | precision | recall |\n| --- | --- | --- | --- | --- |")
    for rows in zip(*reports, strict=True):
        scale, told = rows[0]["guidance_scale"], rows[0]["condition_unet"]
        name = "held-out images" if scale is None else f"scale {scale:g}{', UNet told the class' if told else ''}"
        cells = []
        for column, style in COLUMNS.items():
            values = sorted(row[column] for row in rows)
            mean = sum(values) / len(values)
            cells.append(f"{mean:{style}} ({values[0]:{style}}–{values[-1]:{style}})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
