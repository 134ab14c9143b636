"""Seconds and memory of the metrics at the size of published evaluations, against the plain way to compute them.

    python tests/benchmarks/metrics.py [--num_samples 10000] [--dim 2048]

Draws two sets of features as Inception's are (not negative, of few underlying factors), and computes each metric in a
process of its own. Prints Markdown: seconds, seconds of all processors, the peak of memory beyond the features, the
ratio of the plain way's seconds to ours, and the result. The plain ways are scipy's `sqrtm` for the Frechet distance,
and whole float64 matrices of distances for precision, recall, density and coverage. Other work on the machine slows
all of it, and spoils even the ratios where it comes and goes; the load is printed.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from full_size_conversion import apart

from hf_guided.evaluation import (
    frechet_distance,
    frechet_interval,
    inception_score,
    kernel_distance,
    manifold_metrics,
    nearest_distances,
)


def draw_features(folder: Path, num_samples: int, dim: int) -> None:
    """Writes `generated.npy`, of a little less spread, and `reference.npy`."""
    generator = np.random.default_rng(0)
    factors = 64
    weight = (generator.standard_normal((factors, dim)) * 0.3 / factors**0.5).astype(np.float32)
    for name, scale in (("generated", 0.95), ("reference", 1.0)):
        features = scale * generator.standard_normal((num_samples, factors), dtype=np.float32) @ weight
        features += 0.1 * generator.standard_normal((num_samples, dim), dtype=np.float32) + 0.35
        np.save(folder / f"{name}.npy", features.clip(min=0))


def frechet_by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """With the square root of the covariances' product, as the published evaluators have it."""
    from scipy.linalg import sqrtm

    a, b = a.astype(np.float64), b.astype(np.float64)
    difference, s1, s2 = a.mean(axis=0) - b.mean(axis=0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(difference @ difference + np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2).real))


def manifolds_of_whole_matrices(generated: np.ndarray, reference: np.ndarray) -> list[float]:
    """Precision, recall, density and coverage from three whole matrices of squared distances in float64."""
    generated, reference = generated.astype(np.float64), reference.astype(np.float64)

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.square(a).sum(axis=1)[:, None] - 2 * a @ b.T + np.square(b).sum(axis=1)

    within = np.sort(distances(reference, reference), axis=1)
    radius, density_radius = within[:, [3]], within[:, [5]]
    generated_radius = np.sort(distances(generated, generated), axis=1)[:, 3]
    between = distances(reference, generated)
    inside = between < density_radius
    return [
        float((between <= radius).any(axis=0).mean()),
        float((between <= generated_radius).any(axis=1).mean()),
        float(inside.sum() / (5 * len(generated))),
        float(inside.any(axis=1).mean()),
    ]


def score_of_features(generated: np.ndarray, reference: np.ndarray) -> float:
    """The Inception Score of 1008 classes that depend on the first features."""
    logits = 3 * generated[:, :1008].astype(np.float64)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return inception_score(exp / exp.sum(axis=1, keepdims=True))


def float16_manifolds(generated: np.ndarray, reference: np.ndarray) -> list[float]:
    return list(manifold_metrics(generated, reference, distance_dtype="float16"))


def median_nearest(generated: np.ndarray, reference: np.ndarray) -> float:
    return float(np.median(nearest_distances(generated, reference)[0]))


ROWS: dict[str, tuple[Callable, Callable | None]] = {
    "Frechet distance": (frechet_distance, frechet_by_sqrtm),
    "its confidence interval": (frechet_interval, None),
    "kernel distance": (kernel_distance, None),
    "precision, recall, density, coverage": (manifold_metrics, manifolds_of_whole_matrices),
    "the same in float16": (float16_manifolds, None),
    "nearest distances": (median_nearest, None),
    "Inception Score of 1008 classes": (score_of_features, None),
}


def measure(function: Callable, folder: Path) -> tuple[float, float, int, list[float]]:
    """Wall seconds, processor seconds, bytes beyond the features, and the result."""
    features = [np.load(folder / f"{name}.npy") for name in ("generated", "reference")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, processor_start = time.perf_counter(), time.process_time()
    result = function(*features)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, processor_seconds, peak * 1024, np.atleast_1d(result).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    args = parser.parse_args()
    print(f"{args.num_samples:,} x {args.dim:,} features against as many, {os.cpu_count()} processors\n")
    print("| | seconds | of all processors | peak memory | plain / ours | load | result |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        apart(draw_features, folder, args.num_samples, args.dim)
        for name, (ours, plain) in ROWS.items():
            our_seconds = None
            for label, function in ((name, ours), (f"{name}, plainly", plain)):
                if function is None:
                    continue
                load = os.getloadavg()[0]
                seconds, processor_seconds, peak, result = apart(measure, function, folder)
                ratio = "" if our_seconds is None else f"{seconds / our_seconds:.1f}"
                our_seconds = seconds
                print(
                    f"| {label} | {seconds:.1f} | {processor_seconds:.1f} | {peak / 1e9:.2f} GB | {ratio} | "
                    f"{load:.1f} | {', '.join(f'{value:.5g}' for value in result)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
