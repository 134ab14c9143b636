"""Why a small scale makes an unconditional model worse: where the samples are that did not arrive.

    python tests/benchmarks/digits_stranded.py --output_dir outputs

Takes what the main job left in `--output_dir` and prints, for each scale at which the classifier alone steers, how far
samples are from the nearest training image in the judge's features: those in which the judge sees the class that was
asked for, and the others.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from hf_guided import ADMForImageClassification, ClassifierGuidedPipeline
from hf_guided.data import DataArguments, load_labelled_images
from hf_guided.evaluation import classifier_features
from hf_guided.evaluation.sampling import sample_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"))
    parser.add_argument("--num_images", type=int, default=200)
    args = parser.parse_args()
    judge = ADMForImageClassification.from_pretrained(args.output_dir / "judge" / "model")
    pipe = ClassifierGuidedPipeline.from_pretrained(args.output_dir / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = load_labelled_images(DataArguments(), seed=0)[0]
    real = classifier_features(judge, torch.stack([images[i]["pixel_values"] for i in range(len(images))]))[0]

    labels = torch.arange(args.num_images) % 10
    print("| scale | arrived | distance of those | distance of the others | judge unsure (below 0.9) |")
    print("| --- | --- | --- | --- | --- |")
    for scale in (0.0, 1.0, 3.0):
        arguments = {"guidance_scale": scale, "condition_unet": False, "output_type": "latent"}
        samples = torch.cat(list(sample_batches(pipe, labels, 200, **arguments)))
        features, probabilities = classifier_features(judge, samples)
        nearest = np.linalg.norm(features[:, None] - real[None], axis=-1).min(axis=1)
        arrived = probabilities.argmax(axis=1) == labels.numpy()
        unsure = (probabilities.max(axis=1) < 0.9).mean()
        others = nearest[~arrived].mean() if not arrived.all() else float("nan")
        print(f"| {scale:g} | {arrived.mean():.2f} | {nearest[arrived].mean():.1f} | {others:.1f} | {unsure:.2f} |")


if __name__ == "__main__":
    main()
