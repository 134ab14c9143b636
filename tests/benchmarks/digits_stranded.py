"""Why a small scale makes an unconditional model worse: where the samples are that did not arrive.

    python tests/benchmarks/digits_stranded.py --output_dir outputs

Takes what the main job left in `--output_dir` and prints, for each scale at which the classifier alone guides, how far
samples are from the nearest training image in the judge's features: those in which the judge sees the class that was
asked for, and the others.
"""

import argparse
from pathlib import Path

import torch

from hf_guided import ADMForImageClassification, ClassifierGuidedPipeline
from hf_guided.evaluation.features.extractors import ModelFeatures
from hf_guided.evaluation.features.image_sets import SampledImages, open_images
from hf_guided.evaluation.metrics.manifolds import nearest_distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"))
    parser.add_argument("--num_images", type=int, default=200)
    args = parser.parse_args()
    judge = ADMForImageClassification.from_pretrained(args.output_dir / "judge" / "model")
    extractor = ModelFeatures(judge, "judge")
    pipe = ClassifierGuidedPipeline.from_pretrained(args.output_dir / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    train = open_images("digits:train")
    real = extractor(next(iter(train.batches([range(len(train))])))).features

    labels = torch.arange(args.num_images) % 10
    print("| scale | arrived | distance of those | distance of the others | judge unsure (below 0.9) |")
    print("| --- | --- | --- | --- | --- |")
    for scale in (0.0, 1.0, 3.0):
        samples = SampledImages(pipe, labels, guidance_scale=scale, condition_unet=False)
        judged = extractor(torch.cat(list(samples.batches([range(len(samples))]))))
        nearest, _ = nearest_distances(judged.features, real)
        probabilities = judged.probabilities
        arrived = probabilities.argmax(axis=1) == labels.numpy()
        unsure = (probabilities.max(axis=1) < 0.9).mean()
        others = nearest[~arrived].mean() if not arrived.all() else float("nan")
        print(f"| {scale:g} | {arrived.mean():.2f} | {nearest[arrived].mean():.1f} | {others:.1f} | {unsure:.2f} |")


if __name__ == "__main__":
    main()
