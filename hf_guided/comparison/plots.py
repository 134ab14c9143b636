"""Plots of a comparison: sample grids side by side, metrics and training curves."""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from PIL import Image

from ..evaluation.plots import empty_figure, finish_axes, save_figure
from ..generation.grids import INK, PAPER, labelled_grid, save_png, shortened
from .results import FamilyRuns, families_of

_COLORS = {"vae": "#bc4c00", "gan": "#cf222e", "flow": "#8250df", "diffusion": "#0969da", "guided": "#1a7f37"}
_OTHER_COLORS = ("#bf3989", "#9a6700", "#1b7c83", "#57606a", "#6639ba")
_MARKERS = "osD^vPX<>"
_PANELS_PER_ROW = 3
_HELD_OUT = "held_out/"  # before the name of a loss


def save_grids(
    grids: Mapping[str, Sequence[Image.Image]],
    class_names: Sequence[str],
    path: str | os.PathLike,
    titles: Mapping[str, str],
) -> None:
    """Saves a PNG of the families' images side by side, each under its title, one row per class.

    `grids` has the images of each family, where real images may be one, class by class. A `ValueError` if a family has
    more or fewer than another.
    """
    counts = {family: len(images) for family, images in grids.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"Each family needs the same number of images; got {counts}.")
    longest = max(max(images[0].size) for images in grids.values())
    cell_size = longest * -(-56 // longest)  # the same for all, so that rows are aligned
    parts: list[Image.Image] = []
    for family, images in grids.items():
        names = [""] * len(class_names) if parts else class_names
        parts.append(labelled_grid(images, names, title=titles[family], cell_size=cell_size))
    picture = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), PAPER)
    lefts = itertools.accumulate((part.width for part in parts), initial=0)
    for left, part in zip(lefts, parts, strict=False):
        picture.paste(part, (left, 0))
    save_png(picture, path)


def save_curves(comparison: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Saves a PNG of precision against recall, the FID of each seed, and the training losses of a comparison."""
    families = families_of(comparison)
    others = [name for name in families if name not in _COLORS]
    colors = _COLORS | dict(zip(others, itertools.cycle(_OTHER_COLORS), strict=False))
    drawn = [
        (family, colors[name], marker)
        for (name, family), marker in zip(families.items(), itertools.cycle(_MARKERS), strict=False)
    ]
    trained = [(family, color) for family, color, _ in drawn if any(run["losses"] for run in family.runs)]
    real = {} if comparison["real"] is None else comparison["real"]["metrics"]

    rows = -(-len(trained) // _PANELS_PER_ROW)
    figure = empty_figure(13, 6.2 + 2.8 * rows)
    numbers, losses = figure.subfigures(2, 1, height_ratios=(6.2, 2.8 * rows)) if rows else (figure, None)
    plane, distance = numbers.subplots(1, 2, width_ratios=(1.5, 1))
    values = _draw_plane(plane, drawn, real)
    _draw_distances(distance, drawn, real)
    if plane.get_legend_handles_labels()[1]:
        numbers.legend(*plane.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    if losses is not None:
        panels = list(losses.subplots(rows, _PANELS_PER_ROW, squeeze=False).flat)
        for axes, (family, color) in zip(panels, trained, strict=False):
            _draw_losses(axes, family, color)
        for axes in panels[len(trained) :]:
            axes.set_axis_off()
    _annotate(figure, plane, values)
    save_figure(figure, path)


def _draw_plane(axes: Any, drawn: Sequence[tuple[FamilyRuns, str, str]], real: Mapping[str, float]) -> list:
    """Draws families as points with the range of their seeds, and curves over the values of a trade-off.

    Returns the labels of the curves: recall, precision, text, colour.
    """
    annotations = []
    for family, color, marker in drawn:
        if both := _recall_and_precision(run["metrics"] for run in family.runs):
            # Error bars are distances from the mean.
            (x, x_range), (y, y_range) = (
                (fmean(values), [[max(0.0, fmean(values) - min(values))], [max(0.0, max(values) - fmean(values))]])
                for values in zip(*both, strict=True)
            )
            axes.errorbar(
                [x], [y], xerr=x_range, yerr=y_range, fmt=marker, markersize=10, color=color, capsize=3,
                label=family.title, zorder=3,
            )  # fmt: skip
        curves = [run["curve"] for run in family.runs if run["curve"] is not None]
        metrics_of: dict[float, list[Mapping[str, float]]] = {}
        for point in itertools.chain.from_iterable(curve["points"] for curve in curves):
            metrics_of.setdefault(point["value"], []).append(point["metrics"])
        points = [
            (*map(fmean, zip(*both, strict=True)), f"{value:g}", color)
            for value, metrics in sorted(metrics_of.items())
            if (both := _recall_and_precision(metrics))
        ]
        if points:
            recalls, precisions, *_ = zip(*points, strict=True)
            label = f"{family.title}, by {curves[-1]['name']}"
            axes.plot(recalls, precisions, "-o", markersize=4, linewidth=1, color=color, alpha=0.7, label=label)
        annotations += points
    if {"precision", "recall"} <= real.keys():
        axes.plot(
            [real["recall"]], [real["precision"]], "*", markersize=17, color=INK, markerfacecolor="#ffd33d",
            label="held-out images", zorder=4,
        )  # fmt: skip
    axes.margins(0.08)
    finish_axes(axes, "Precision against recall: up and right is better", "recall (diversity)", "precision (fidelity)")
    return annotations


def _recall_and_precision(metrics: Iterable[Mapping[str, float]]) -> list[tuple[float, float]]:
    """Both, of those that have both."""
    both = ((of_run.get("recall"), of_run.get("precision")) for of_run in metrics)
    return [(recall, precision) for recall, precision in both if recall is not None and precision is not None]


def _draw_distances(axes: Any, drawn: Sequence[tuple[FamilyRuns, str, str]], real: Mapping[str, float]) -> None:
    """Draws the FID of each run, with a bar at the mean."""
    from matplotlib.ticker import LogLocator, NullLocator

    everything = []
    for i, (family, color, marker) in enumerate(drawn):
        fids = [fid for fid in family.values("fid").values() if fid > 0]  # a log axis has no 0
        everything += fids
        # Side by side, so that equal ones do not hide each other.
        places = [i + 0.12 * (j - (len(fids) - 1) / 2) for j in range(len(fids))]
        axes.plot(places, fids, marker, color=color, markersize=7, alpha=0.8)
        if fids:
            axes.hlines(fmean(fids), i - 0.3, i + 0.3, color=color, linewidth=1.5)
    if real.get("fid", 0) > 0:
        everything.append(real["fid"])
        axes.axhline(real["fid"], color=INK, linestyle="--", linewidth=1)
        axes.annotate(
            "held-out images", (0, real["fid"]), xycoords=("axes fraction", "data"), xytext=(4, -4),
            textcoords="offset points", va="top", fontsize="small", color=INK,
        )  # fmt: skip
    names = [shortened(family.title, 20) for family, *_ in drawn]
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(names) - 0.4)
    if everything:
        axes.set_yscale("log")
        axes.set_ylim(min(everything) / 1.6, max(everything) * 1.6)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    finish_axes(axes, "FID of each seed, lower is better")


def _draw_losses(axes: Any, family: FamilyRuns, color: str) -> None:
    """Draws the losses of one family, a line per seed. A colour per loss; held-out losses are dashed."""
    lines = [line for run in family.runs for line in run["losses"].items()]
    names = dict.fromkeys(name.removeprefix(_HELD_OUT) for name, _ in lines)
    palette = dict(zip(names, (color, INK, "#9a6700", "#bf3989", "#57606a"), strict=False))
    labels = {name: name.replace(_HELD_OUT, "held-out ").replace("_", " ") for name, _ in lines}
    for name, points in lines:
        seconds, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            seconds, values, "--" if name.startswith(_HELD_OUT) else "-", linewidth=1.2, alpha=0.75,
            color=palette.get(name.removeprefix(_HELD_OUT), "#8c959f"), label=labels.pop(name, None),
        )  # fmt: skip
    heights = [value for _, points in lines for _, value in points if math.isfinite(value)]
    if heights and min(heights) > 0 and max(heights) > 20 * min(heights):
        axes.set_yscale("log")
    low, high = axes.transScale.transform([(0, bound) for bound in axes.get_ylim()])[:, 1]
    top = high + 0.35 * (high - low)  # space for the legend, which would hide lines
    axes.set_ylim(top=axes.transScale.inverted().transform((0, top))[1])
    finish_axes(axes, family.title, "seconds of training", color=color, loc="upper right", ncols=2)


def _annotate(figure: Any, axes: Any, annotations: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels points with their values where a label covers no point and no other label; skips the others."""
    figure.draw_without_rendering()  # the layout moves axes, so that positions are known only now
    points = [axes.transData.transform(annotation[:2]) for annotation in annotations]
    markers = [axes.transData.transform(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    scale = figure.dpi / 72
    sized = [(point, 4 * scale) for point in points] + [(marker, 8 * scale) for marker in markers]
    taken = [(x - half, y - half, x + half, y + half) for (x, y), half in sized]
    sides = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
    for (x, y), (_, _, text, color) in zip(points, annotations, strict=True):
        width, height = 5.2 * scale * len(text), 9 * scale
        for gap, (right, up) in itertools.product((5 * scale, 11 * scale), sides):
            middle = (x + right * (width / 2 + gap), y + up * (height / 2 + gap))
            box = (middle[0] - width / 2, middle[1] - height / 2, middle[0] + width / 2, middle[1] + height / 2)
            if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in taken):
                taken.append(box)
                at = axes.transData.inverted().transform(middle)
                axes.annotate(text, at, ha="center", va="center", fontsize=8, color=color)
                break
