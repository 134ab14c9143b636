"""The digits lesson with several seeds: the table of README.md beside it.

    python tests/benchmarks/digits_seeds.py --output_dir outputs/seeds

Runs the main job once a seed (those that are finished are kept) and prints the mean of each number, in brackets the
lowest and the highest, as Markdown.
"""

import argparse
import json
from pathlib import Path

from digits_models import main_job, spread

COLUMNS = {"accuracy": ".3f", "fid": ".3g", "precision": ".3f", "recall": ".3f"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    folders = [main_job(args.output_dir, seed) for seed in args.seeds]
    reports = [json.loads((folder / "report.json").read_text())["rows"] for folder in folders]
    print("|  | accuracy | FID | precision | recall |\n| --- | --- | --- | --- | --- |")
    for rows in zip(*reports, strict=True):
        scale, conditional = rows[0]["guidance_scale"], rows[0]["condition_unet"]
        name = (
            "held-out images"
            if scale is None
            else f"scale {scale:g}{', class-conditional UNet' if conditional else ''}"
        )
        cells = [spread([row[f"{column}/judge"] for row in rows], style) for column, style in COLUMNS.items()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
