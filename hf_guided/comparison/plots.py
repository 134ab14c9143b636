"""Plots of a comparison: sample grids side by side, metrics and training curves."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..evaluation.plots import empty_figure, save_figure
from ..generation.grids import INK, PAPER, labelled_grid, save_png, shortened

_COLORS = {"vae": "#bc4c00", "gan": "#cf222e", "flow": "#8250df", "diffusion": "#0969da", "guided": "#1a7f37"}
_OTHER_COLORS = ("#bf3989", "#9a6700", "#1b7c83", "#57606a", "#6639ba")
_MARKERS = "osD^vPX<>"
_PANELS_PER_ROW = 3
_HELD_OUT = "held_out/"  # before the name of a loss


def families_of(comparison: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each family, sorted by seed; families in their order of appearance."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for run in sorted(comparison["runs"], key=lambda run: run["seed"]):
        families.setdefault(run["family"], []).append(run)
    return {run["family"]: families[run["family"]] for run in comparison["runs"]}


def values_of(runs: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """A number of each run that has it, by seed; values that are not finite count as missing."""
    values = {run["seed"]: run["metrics"].get(key, run.get(key)) for run in runs}
    return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}


def save_grids(
    grids: Mapping[str, Sequence[Image.Image]],
    class_names: Sequence[str],
    path: str | os.PathLike,
    titles: Mapping[str, str],
) -> None:
    """Saves a PNG of the families' images side by side, one row per class.

    Args:
        grids (`Mapping[str, Sequence[PIL.Image.Image]]`): The images of each family, where real images may be one,
            class by class, with the same number per class and family.
        class_names (`Sequence[str]`): The class of each row.
        path (`str` or `os.PathLike`): The PNG file.
        titles (`Mapping[str, str]`): The heading above each family's images.

    Raises:
        ValueError: If a family has more or fewer images than another.
    """
    counts = {family: len(images) for family, images in grids.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"Each family needs the same number of images; got {counts}.")
    longest = max(max(images[0].size) for images in grids.values())
    cell_size = longest * -(-56 // longest)  # the same for all, so that rows are aligned
    parts = [
        labelled_grid(
            images, class_names if i == 0 else [""] * len(class_names), title=titles[family], cell_size=cell_size
        )
        for i, (family, images) in enumerate(grids.items())
    ]
    picture = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), PAPER)
    left = 0
    for part in parts:
        picture.paste(part, (left, 0))
        left += part.width
    save_png(picture, path)


def save_curves(comparison: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Saves a PNG of precision against recall, the FID of each seed, and the training losses.

    Args:
        comparison (`Mapping`): The results: `runs`, one per family and seed, and `real`, the metrics of held-out
            images (or `None`).
        path (`str` or `os.PathLike`): The PNG file.
    """
    families = families_of(comparison)
    trained = {family: runs for family, runs in families.items() if any(run["losses"] for run in runs)}
    others = [family for family in families if family not in _COLORS]
    colors = _COLORS | {family: _OTHER_COLORS[i % len(_OTHER_COLORS)] for i, family in enumerate(others)}
    real = {} if comparison["real"] is None else comparison["real"]["metrics"]

    rows = -(-len(trained) // _PANELS_PER_ROW)
    figure = empty_figure(13, 6.2 + 2.8 * rows)
    numbers, losses = figure.subfigures(2, 1, height_ratios=(6.2, 2.8 * rows)) if rows else (figure, None)
    plane, distance = numbers.subplots(1, 2, width_ratios=(1.5, 1))
    values = _draw_plane(plane, families, colors, real)
    _draw_distances(distance, families, colors, real)
    if plane.get_legend_handles_labels()[1]:
        numbers.legend(*plane.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    if losses is not None:
        panels = list(losses.subplots(rows, _PANELS_PER_ROW, squeeze=False).flat)
        for axes, (family, runs) in zip(panels, trained.items(), strict=False):
            _draw_losses(axes, runs, colors[family])
        for axes in panels[len(trained) :]:
            axes.set_axis_off()
    _annotate(figure, plane, values)
    save_figure(figure, path)


def _draw_plane(axes: Any, families: Mapping[str, Any], colors: Mapping[str, str], real: Mapping[str, float]) -> list:
    """Draws families as points with the range of their seeds, and curves over the values of a trade-off.

    Returns:
        `list[tuple[float, float, str, str]]`: Labels of the curves: recall, precision, text, colour.
    """
    annotations = []
    for i, (family, runs) in enumerate(families.items()):
        marker = _MARKERS[i % len(_MARKERS)]
        both = [
            (recall, precision)
            for recall, precision in ((run["metrics"].get("recall"), run["metrics"].get("precision")) for run in runs)
            if recall is not None and precision is not None
        ]
        if both:
            (x, x_range), (y, y_range) = (_mean_and_range(values) for values in zip(*both, strict=True))
            axes.errorbar(
                [x], [y], xerr=x_range, yerr=y_range, fmt=marker, markersize=10, color=colors[family], capsize=3,
                label=runs[0]["title"], zorder=3,
            )  # fmt: skip
        trade_off, points = _trade_off(runs)
        if points:
            recalls, precisions = ([point[j] for point in points] for j in (1, 2))
            label = f"{runs[0]['title']}, by {trade_off}"
            axes.plot(
                recalls, precisions, "-o", markersize=4, linewidth=1, color=colors[family], alpha=0.7, label=label
            )
            annotations += [(recall, precision, f"{value:g}", colors[family]) for value, recall, precision in points]
    if {"precision", "recall"} <= real.keys():
        axes.plot(
            [real["recall"]], [real["precision"]], "*", markersize=17, color=INK, markerfacecolor="#ffd33d",
            label="held-out images", zorder=4,
        )  # fmt: skip
    axes.set_title("Precision against recall: up and right is better", loc="left", color=INK)
    axes.set_xlabel("recall (diversity)")
    axes.set_ylabel("precision (fidelity)")
    axes.margins(0.08)
    _plain(axes)
    return annotations


def _trade_off(runs: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[float, float, float]]]:
    """The name of the trade-off, and its values with their mean recall and precision over the runs."""
    name = ""
    found: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        if run["curve"] is not None:
            name = run["curve"]["name"]
            for point in run["curve"]["points"]:
                metrics = point["metrics"]
                if "recall" in metrics and "precision" in metrics:
                    found.setdefault(point["value"], []).append((metrics["recall"], metrics["precision"]))
    means = {
        value: [sum(column) / len(column) for column in zip(*pairs, strict=True)] for value, pairs in found.items()
    }
    return name, [(value, recall, precision) for value, (recall, precision) in sorted(means.items())]


def _draw_distances(
    axes: Any, families: Mapping[str, Any], colors: Mapping[str, str], real: Mapping[str, float]
) -> None:
    """Draws the FID of each run, with a bar at the mean."""
    from matplotlib.ticker import LogLocator, NullLocator

    everything = [real["fid"]] if real.get("fid", 0) > 0 else []
    for i, (family, runs) in enumerate(families.items()):
        fids = [fid for fid in values_of(runs, "fid").values() if fid > 0]  # a log axis has no 0
        everything += fids
        # Side by side, so that equal ones do not hide each other.
        places = [i + 0.12 * (j - (len(fids) - 1) / 2) for j in range(len(fids))]
        axes.plot(places, fids, _MARKERS[i % len(_MARKERS)], color=colors[family], markersize=7, alpha=0.8)
        if fids:
            axes.hlines(sum(fids) / len(fids), i - 0.3, i + 0.3, color=colors[family], linewidth=1.5)
    if real.get("fid", 0) > 0:
        axes.axhline(real["fid"], color=INK, linestyle="--", linewidth=1)
        axes.annotate(
            "held-out images", (0, real["fid"]), xycoords=("axes fraction", "data"), xytext=(4, -4),
            textcoords="offset points", va="top", fontsize="small", color=INK,
        )  # fmt: skip
    names = [shortened(runs[0]["title"], 20) for runs in families.values()]
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_title("FID of each seed, lower is better", loc="left", color=INK)
    if everything:
        axes.set_yscale("log")
        axes.set_ylim(min(everything) / 1.6, max(everything) * 1.6)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    _plain(axes)


def _draw_losses(axes: Any, runs: Sequence[Mapping[str, Any]], color: str) -> None:
    """Draws the losses of one family, a line per seed. A colour per loss; held-out losses are dashed."""
    names = list(dict.fromkeys(name.removeprefix(_HELD_OUT) for run in runs for name in run["losses"]))
    palette = dict(zip(names, (color, INK, "#9a6700", "#bf3989", "#57606a"), strict=False))
    labelled, heights = set(), []
    for run in runs:
        for name, points in run["losses"].items():
            seconds, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(
                seconds, values, linestyle="--" if name.startswith(_HELD_OUT) else "-", linewidth=1.2, alpha=0.75,
                color=palette.get(name.removeprefix(_HELD_OUT), "#8c959f"),
                label=None if name in labelled else name.replace(_HELD_OUT, "held-out ").replace("_", " "),
            )  # fmt: skip
            labelled.add(name)
            heights += [value for value in values if math.isfinite(value)]
    if heights and min(heights) > 0 and max(heights) > 20 * min(heights):
        axes.set_yscale("log")
    axes.set_title(runs[0]["title"], loc="left", color=color)
    axes.set_xlabel("seconds of training")
    _plain(axes)
    low, high = axes.transScale.transform([(0, bound) for bound in axes.get_ylim()])[:, 1]
    top = high + 0.35 * (high - low)  # space for the legend, which would hide lines
    axes.set_ylim(top=axes.transScale.inverted().transform((0, top))[1])
    axes.legend(frameon=False, fontsize="small", loc="upper right", ncols=2)


def _annotate(figure: Any, axes: Any, annotations: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels points with their values where a label covers no point and no other label; skips the others."""
    figure.draw_without_rendering()  # the layout moves axes, so that positions are known only now
    points = [axes.transData.transform(annotation[:2]) for annotation in annotations]
    markers = [axes.transData.transform(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    scale = figure.dpi / 72
    sized = [(point, 4 * scale) for point in points] + [(marker, 8 * scale) for marker in markers]
    taken = [(x - half, y - half, x + half, y + half) for (x, y), half in sized]
    for (x, y), (_, _, text, color) in zip(points, annotations, strict=True):
        width, height = 5.2 * scale * len(text), 9 * scale
        sides = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
        for gap, (right, up) in itertools.product((5 * scale, 11 * scale), sides):
            middle = (x + right * (width / 2 + gap), y + up * (height / 2 + gap))
            box = (middle[0] - width / 2, middle[1] - height / 2, middle[0] + width / 2, middle[1] + height / 2)
            if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in taken):
                taken.append(box)
                axes.annotate(
                    text, axes.transData.inverted().transform(middle), ha="center", va="center", fontsize=8, color=color
                )
                break


def _mean_and_range(values: Sequence[float]) -> tuple[float, list[list[float]]]:
    """The mean and its distances to the lowest and the highest, in the form of error bars."""
    mean = sum(values) / len(values)
    return mean, [[max(0.0, mean - min(values))], [max(0.0, max(values) - mean)]]


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
