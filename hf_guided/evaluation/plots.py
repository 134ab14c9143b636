"""Plots: metrics against the guidance scale, likelihood by timestep, classifier metrics by noise level."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..files import replacing
from ..generation.grids import INK, PAPER, shortened
from ..generation.samples import RECORD_KEY
from .classifier_findings import ClassifierInspection
from .metrics.table import METRICS

_COLORS = {"fid": "#1a7f37", "precision": "#0969da", "recall": "#bc4c00", "accuracy": "#8250df"}
_MAX_CONFUSION_CLASSES = 20  # shown as a matrix


def trade_off_curve(rows: Sequence[Mapping[str, Any]], features: str, path: str | os.PathLike) -> None:
    """Saves a PNG of precision, recall and FID against the guidance scale (figure 4 of arXiv 2105.05233).

    Args:
        rows (`Sequence[Mapping]`): Rows of a report, each with `guidance_scale`, `condition_unet` (whether the UNet
            was class-conditional), `precision`, `recall` and `fid`, followed by `/` and `features`.
        features (`str`): The features to draw.
        path (`str` or `os.PathLike`): The PNG file.
    """
    rows = sorted(rows, key=lambda row: row["guidance_scale"])
    figure = empty_figure(9, 3.8)
    quality, distance = figure.subplots(1, 2)
    for conditional, line, marker, suffix in (
        (False, "-", "o", "unconditional UNet"),
        (True, "--", "D", "class-conditional UNet"),
    ):
        series = [row for row in rows if row["condition_unet"] == conditional]
        scales = [row["guidance_scale"] for row in series]
        for axes, metric in ((quality, "precision"), (quality, "recall"), (distance, "fid")):
            if series:
                axes.plot(
                    scales, [row[f"{metric}/{features}"] for row in series], line, marker=marker, color=_COLORS[metric],
                    markerfacecolor="white" if conditional else None, label=f"{METRICS[metric].title}, {suffix}",
                )  # fmt: skip
    for axes, title in ((quality, "Precision and recall"), (distance, "FID, lower is better")):
        _scale_axis(axes, sorted({row["guidance_scale"] for row in rows}), 1)  # scales run 0, 1, 3, 10
        finish_axes(axes, f"{title} ({features})", "guidance scale", loc="best")
    quality.set_ylim(0, 1.03)
    distance.set_ylim(bottom=0)
    save_figure(figure, path)


def likelihood_curve(timesteps: Sequence[int], vb: Sequence[float], path: str | os.PathLike) -> None:
    """Saves a PNG of the variational bound's terms, in bits per dimension, by timestep (arXiv 2102.09672, figure 2)."""
    figure = empty_figure(9, 3.8)
    terms, total = figure.subplots(1, 2)
    steps, bits = zip(*sorted(zip(timesteps, vb, strict=True)), strict=True)
    running = np.cumsum(bits)
    terms.plot(steps, bits, color="#0969da", marker="o" if len(steps) < 60 else None, markersize=3)
    terms.set_yscale("log")
    total.plot(steps, running, color="#1a7f37")
    total.set_ylim(bottom=0)
    finish_axes(terms, "Bits per dimension at each timestep", "timestep")
    finish_axes(total, f"Cumulative sum: {running[-1]:.3f}", "timestep")
    save_figure(figure, path)


def sweep_curve(
    rows: Sequence[Mapping[str, Any]], features: str, path: str | os.PathLike, chosen: Mapping[str, Any] | None = None
) -> None:
    """Saves a PNG of fidelity and diversity against the guidance scale, and against each other.

    Lines are means over seeds; bands reach from the lowest to the highest. `rows` are those of [`sweep`], every setting
    with every seed; `chosen` is the one to mark.
    """
    steps = list(dict.fromkeys(row["num_inference_steps"] for row in rows))
    scales = sorted({row["guidance_scale"] for row in rows})

    def by_scale(metric: str, count: int | None) -> np.ndarray:  # (scales, seeds)
        of_count = [row for row in rows if row["num_inference_steps"] == count]
        name = f"{metric}/{features}"
        return np.array([[row[name] for row in of_count if row["guidance_scale"] == scale] for scale in scales])

    figure = empty_figure(12.5, 3.9)
    distance, quality, plane = figure.subplots(1, 3)
    panels = [(distance, "fid"), (quality, "precision"), (quality, "recall")]
    if all(f"accuracy/{features}" in row for row in rows):
        panels.append((quality, "accuracy"))
    for i, count in enumerate(steps):
        line = ("-", "--", ":", "-.")[i % 4]
        suffix = "" if count is None else f", {count} steps"
        for axes, metric in panels:
            values, color, label = by_scale(metric, count), _COLORS[metric], f"{METRICS[metric].title}{suffix}"
            axes.plot(scales, values.mean(axis=1), line, marker="o", markersize=4, color=color, label=label)
            axes.fill_between(scales, values.min(axis=1), values.max(axis=1), color=color, alpha=0.12, linewidth=0)
        precision, recall = (by_scale(metric, count).mean(axis=1) for metric in ("precision", "recall"))
        plane.plot(recall, precision, line, marker="o", markersize=4, color=INK, label=suffix.removeprefix(", "))
        for scale, x, y in zip(scales, recall, precision, strict=True):
            plane.annotate(f"{scale:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize="x-small")
    if chosen is not None:
        for axes in (distance, quality):
            axes.axvline(chosen["guidance_scale"], color=INK, linewidth=0.8, linestyle=":")
        at, count = scales.index(chosen["guidance_scale"]), chosen["num_inference_steps"]
        x, y = (by_scale(metric, count)[at].mean() for metric in ("recall", "precision"))
        plane.plot([x], [y], "o", markersize=11, markerfacecolor="none", color="#cf222e", label="chosen")

    smallest = min((scale for scale in scales if scale > 0), default=1.0)
    for axes, title in ((distance, "FID, lower is better"), (quality, "Fidelity and diversity")):
        _scale_axis(axes, scales, smallest)
        axes.set_xlim(scales[0] - 0.1 * smallest, 1.2 * scales[-1])
        finish_axes(axes, f"{title} ({features})", "guidance scale", loc="best")
    distance.set_yscale("log")
    distance.yaxis.set_major_formatter("{x:g}")
    distance.yaxis.set_minor_formatter("{x:g}")
    quality.set_ylim(0, 1.03)
    finish_axes(plane, "Precision against recall, by scale", "recall (diversity)", "precision (fidelity)", loc="best")
    save_figure(figure, path)


def classifier_curves(
    inspection: ClassifierInspection, path: str | os.PathLike, record: Mapping[str, Any] | None = None
) -> None:
    """Saves a PNG of a noisy-image classifier's metrics by noise level, and its confusion matrix at the lowest.

    `record` are the settings that produced it, for [`read_record`].
    """
    rows = inspection.rows
    figure = empty_figure(12, 8.6)
    (accuracy, calibration), (guidance, confusion) = figure.subplots(2, 2)
    curves: list[tuple[Any, str, str, str, list[float | None]]] = [
        (accuracy, "held-out accuracy", "#0969da", "-", [row.accuracy for row in rows]),
        (accuracy, "training accuracy", "#bc4c00", "--", [row.train_accuracy for row in rows]),
        (calibration, "mean confidence", "#8250df", "-", [row.confidence for row in rows]),
        (calibration, "accuracy", "#0969da", "-", [row.accuracy for row in rows]),
        (calibration, "calibration error", "#cf222e", "--", [row.calibration_error for row in rows]),
        (guidance, "root mean square over images", "#1a7f37", "-", [row.epsilon_shift for row in rows]),
        (accuracy, "fraction of the label entropy", INK, ":",
         [row.information / inspection.label_entropy for row in rows]),
    ]  # fmt: skip
    for axes, name, color, line, values in curves:
        if None not in values:  # the training accuracy may be unknown
            timesteps = [row.timestep for row in rows]
            axes.plot(timesteps, values, line, marker="o", markersize=4, color=color, label=name)
    accuracy.axhline(inspection.chance, color=INK, linewidth=0.8, label=f"chance, {inspection.chance:.2f}")
    for axes, title in (
        (accuracy, "Accuracy and information about the class"),
        (calibration, "Confidence and calibration"),
        (guidance, "Norm of guidance of scale 1, relative to epsilon"),
    ):
        if inspection.interval is not None:
            low, high = inspection.interval
            axes.axvspan(low, high, color="#1a7f37", alpha=0.1, linewidth=0, label=f"suggested, {low} to {high}")
        place = "upper left" if axes is guidance else "upper right"
        finish_axes(axes, title, "timestep", loc=place, frameon=True, edgecolor="none")
        axes.set_ylim(0, None if axes is guidance else 1.03)
    guidance.yaxis.set_major_formatter("{x:.1%}")
    _draw_confusion(confusion, inspection)
    save_figure(figure, path, record)


def _draw_confusion(axes: Any, inspection: ClassifierInspection) -> None:
    """Draws the confusion matrix; for many classes, the most frequent errors as text."""
    counts, names = inspection.confusion, inspection.class_names
    of_class = counts.sum(axis=1)
    axes.set_title(f"Confusion at timestep {inspection.rows[0].timestep}", loc="left", color=INK)
    if len(names) > _MAX_CONFUSION_CLASSES:
        mistakes = sorted(((i, j) for i, j in np.argwhere(counts).tolist() if i != j), key=lambda pair: -counts[pair])
        worst = [
            f"{shortened(names[i])} classified as {shortened(names[j])}: {counts[i, j]} of {of_class[i]} images"
            for i, j in mistakes[:14]
        ]
        axes.text(0, 0.98, "\n".join(worst) or "no errors", va="top", linespacing=1.6, color=INK, fontsize="small")
        axes.set_axis_off()
        return
    shares = counts / of_class.clip(min=1)[:, None]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts).tolist():
        color = PAPER if shares[i, j] > 0.5 else INK
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=color, fontsize="small")
    short = [shortened(name, length=14) for name in names]
    rotated = {"rotation": 45, "ha": "right"} if max(map(len, short)) > 3 else {}
    axes.set_xticks(range(len(names)), short, fontsize="small", **rotated)
    axes.set_yticks(range(len(names)), short, fontsize="small")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def empty_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches, without pyplot and its global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The curves are drawn with matplotlib: pip install 'hf-guided[train]'.") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def finish_axes(axes: Any, title: str, xlabel: str = "", ylabel: str = "", color: str = INK, **legend: Any) -> None:
    """Titles, a light grid, and a legend with these arguments if there are any."""
    axes.set_title(title, loc="left", color=color)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(**{"frameon": False, "fontsize": "small", **legend})


def _scale_axis(axes: Any, scales: Sequence[float], linear_up_to: float) -> None:
    axes.set_xscale("symlog", linthresh=linear_up_to)
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.minorticks_off()


def save_figure(figure: Any, path: str | os.PathLike, record: Mapping[str, Any] | None = None) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata=None if record is None else {RECORD_KEY: json.dumps(record)})
